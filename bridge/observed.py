"""Modules that record what flows through them: observers as modules, and a linear layer with two."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functional_sq as fsq
from bridge.buffers import Buffers, write
from bridge.torchao import adopt

__all__ = ["AffineQuantizedMinMaxObserver", "ObservedLinear", "ObserverModule", "insert_observers_"]


class ObserverModule(Buffers):
    """A `functional_sq` state as buffers; forward records its input and returns it.

    Args:
        spec: what is recorded and how it is read.
        shape: shape of the tensors to come; only the sizes that the granularity keeps matter. Left
            out, a per-tensor observer needs none and any other takes that of the first tensor.
        device: device of the buffers.

    Attributes:
        spec: as given.
        mask: bool tensor of the leading axes of the tensors to come, True where they count, or None.
            It also fits tensors in which these axes are one (tokens of all sequences in a row);
            others are recorded whole.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObserverModule
        >>> observer = ObserverModule(fsq.QuantSpec(torch.int8, fsq.PerTensor()))
        >>> _ = observer(torch.tensor([-1.0, 1.27]))
        >>> observer.calculate_qparams()
        QParams(scale=tensor([0.0100]), zero_point=tensor([0], dtype=torch.int32))
    """

    def __init__(
        self,
        spec: fsq.QuantSpec,
        shape: tuple[int, ...] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.mask: Tensor | None = None
        if shape is None and isinstance(spec.granularity, fsq.PerTensor):
            shape = (1,)
        if shape is not None:
            self.reset(shape, device)

    def reset(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        """Forget everything; take tensors of `shape` from now on."""
        # Buffers made in inference mode could never be written outside of it.
        with torch.inference_mode(False):
            for name, value in fsq.init(self.spec, tuple(shape), device=device).items():
                self.register_buffer(name, value)

    @property
    def state(self) -> fsq.State:
        """What was recorded: the buffers as a `functional_sq` state."""
        return {name: value for name, value in self._buffers.items() if value is not None}

    def forward(self, x: Tensor) -> Tensor:
        if not self._buffers:
            self.reset(tuple(x.shape), x.device)
        mask = self.mask
        if mask is not None and mask.shape != x.shape[: mask.ndim]:
            mask = mask.reshape(-1) if x.shape[:1] == (mask.numel(),) else None
        write(self, fsq.observe(self.spec, self.state, x, mask=mask))
        return x

    def fault(self, min_count: int = 1) -> str | None:
        """Say what makes the record unfit to choose a range from, or None."""
        if not self._buffers:
            return "nothing was seen; calibrate with data that reaches it"
        return self.spec.observer.fault(self.state, min_count)

    def calculate_qparams(self) -> fsq.QParams:
        """Return scale and zero point.

        Raises:
            CalibrationError: nothing was seen, or NaN or Inf was.
        """
        if fault := self.fault():
            raise fsq.CalibrationError(fault)
        return fsq.calc_qparams(self.spec, self.state)

    def extra_repr(self) -> str:
        return repr(self.spec)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = list(self._buffers) or list(self.spec.observer.init((1,), torch.float32, None))
        found = [name for name in names if prefix + name in state_dict]
        if not found:
            return  # A checkpoint of the float model: the calibration stays as it is.
        if not self._buffers:
            for name in found:
                self.register_buffer(name, torch.empty_like(state_dict[prefix + name]))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class AffineQuantizedMinMaxObserver(ObserverModule):
    """torchao's min/max observer: the same arguments, the same qparams.

    Differs where torchao's loses something: statistics are buffers (in `state_dict`, moved by `to`),
    they are float32 for a bfloat16 model too, and tensors of another rank or batch size than the
    first are taken.

    Args:
        mapping_type: `MappingType`, functional_sq's or torchao's.
        target_dtype: quantized dtype, such as `torch.uint8` or `torch.float8_e4m3fn`.
        granularity: which elements share one scale, functional_sq's or torchao's.
        quant_min: smallest code; default: the dtype's.
        quant_max: largest code; default: the dtype's.
        eps: lower limit of a scale; default: float32's eps.
        scale_dtype: default float32.
        zero_point_dtype: default int32.

    Source: `torchao.quantization.observer.AffineQuantizedMinMaxObserver`.

    Example:
        >>> import torch
        >>> from bridge import AffineQuantizedMinMaxObserver, MappingType, PerTensor
        >>> observer = AffineQuantizedMinMaxObserver(MappingType.ASYMMETRIC, torch.uint8, granularity=PerTensor())
        >>> _ = observer(torch.tensor([-1.0, 1.55]))
        >>> observer.calculate_qparams().scale
        tensor([0.0100])
    """

    def __init__(
        self,
        mapping_type: fsq.MappingType,
        target_dtype: torch.dtype,
        granularity: fsq.Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
    ) -> None:
        given = {"eps": eps, "scale_dtype": scale_dtype, "zero_point_dtype": zero_point_dtype}
        super().__init__(
            fsq.QuantSpec(
                target_dtype,
                adopt(granularity),
                mapping=adopt(mapping_type),
                quant_min=quant_min,
                quant_max=quant_max,
                **{name: value for name, value in given.items() if value is not None},
            )
        )


class Observed(nn.Module):
    config = None

    def to_float(self):
        (module,) = self._origin
        module.weight, module.bias = self.weight, self.bias
        return module


class ObservedLinear(Observed, nn.Linear):
    """A float linear layer that records its input; its weight is observed when it is converted.

    Args:
        in_features: K.
        out_features: N.
        act_obs: records the input. One scale for each token is refused: a static scale must fit any
            batch.
        weight_obs: names how the weight will be quantized.
        bias: whether there is a bias.
        device: as `torch.nn.Linear`.
        dtype: as `torch.nn.Linear`.

    Raises:
        TypeError: an observer is not an ObserverModule.
        ValueError: a granularity does not apply.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedLinear, ObserverModule
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> layer = ObservedLinear.from_float(torch.nn.Linear(4, 2), ObserverModule(spec), ObserverModule(spec))
        >>> _ = layer(torch.ones(3, 4)); layer.act_obs.state["max"]
        tensor([1.])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act_obs: ObserverModule,
        weight_obs: ObserverModule,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        _check_observers(act_obs, weight_obs)
        check_static(act_obs.spec, in_features)
        weight_obs.spec.granularity.stat_shape((out_features, in_features))
        if not act_obs.state:
            act_obs.reset((in_features,), device)
        self.act_obs = act_obs
        self.weight_obs = weight_obs

    @classmethod
    def from_float(cls, float_linear: nn.Linear, act_obs: ObserverModule, weight_obs: ObserverModule) -> ObservedLinear:
        """Return an observed layer that shares the parameters of `float_linear`.

        Raises:
            TypeError: an observer is not an ObserverModule.
            ValueError: a granularity does not apply, or the layer has hooks or a parametrization,
                which would be lost.
        """
        _check_observers(act_obs, weight_obs)
        _check_plain(float_linear)
        weight = float_linear.weight
        if act_obs.state:
            act_obs.to(weight.device)
        else:
            act_obs.reset((float_linear.in_features,), weight.device)
        observed = cls(
            float_linear.in_features,
            float_linear.out_features,
            act_obs,
            weight_obs,
            False,
            # The parameters below replace these, so these take no memory.
            device="meta",
            dtype=weight.dtype,
        )
        observed.weight = weight
        observed.bias = float_linear.bias
        observed.observe_weight()
        observed._origin = (float_linear,)
        return observed.train(float_linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act_obs(x), self.weight, self.bias)

    def observe_weight(self) -> None:
        """Record the weight as it is now, and nothing that it was before."""
        self.weight_obs.reset(tuple(self.weight.shape), self.weight.device)
        self.weight_obs(self.weight)


def _check_observers(act_obs: object, weight_obs: object) -> None:
    for name, observer in (("act_obs", act_obs), ("weight_obs", weight_obs)):
        if not isinstance(observer, ObserverModule):
            raise TypeError(
                f"{name} is a {type(observer).__name__}; give an ObserverModule, "
                f"such as bridge.AffineQuantizedMinMaxObserver"
            )


def _check_plain(linear: nn.Linear) -> None:
    """Raise ValueError if a layer that takes the place of `linear` would do less than it."""
    if nn.utils.parametrize.is_parametrized(linear):
        raise ValueError(
            "the weight is computed by a parametrization, which would be lost; "
            "call torch.nn.utils.parametrize.remove_parametrizations first, or leave the layer out by filter_fn"
        )
    if "forward" in vars(linear):
        raise ValueError("the layer has a forward of its own, which would be lost; leave the layer out by filter_fn")
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if any(hooks):
        raise ValueError("the layer has hooks, which would be lost; remove them first, or leave it out by filter_fn")


def check_static(spec: fsq.QuantSpec, in_features: int) -> None:
    """Raise ValueError if the shape of a static activation scale would depend on the batch."""
    granularity = spec.granularity
    wide, narrow = (granularity.stat_shape((rows, in_features)) for rows in (5, 3))
    if wide != narrow:
        raise ValueError(
            f"{granularity} gives each token a scale of its own, and a static scale must fit any batch; "
            f"use PerTensor() for activations"
        )


def insert_observers_(
    model: nn.Module,
    act_obs: ObserverModule,
    weight_obs: ObserverModule,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Swap every linear layer of `model` for an ObservedLinear with copies of the two observers.

    Args:
        model: changed in place; may be compiled already.
        act_obs: copied for the input of each layer.
        weight_obs: copied for the weight of each layer.
        filter_fn: `(module, name) -> bool`; default: every `torch.nn.Linear`.

    Raises:
        ValueError: no layer matches. Nothing was changed.

    Example:
        >>> import torch
        >>> from bridge import AffineQuantizedMinMaxObserver, MappingType, PerTensor, insert_observers_
        >>> observer = AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8, granularity=PerTensor())
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> insert_observers_(model, observer, observer); type(model[0]).__name__
        'ObservedLinear'
    """
    swap_(
        model,
        filter_fn or is_linear,
        lambda layer, name: ObservedLinear.from_float(layer, deepcopy(act_obs), deepcopy(weight_obs)),
        "a torch.nn.Linear",
    )


def is_linear(module: nn.Module, name: str) -> bool:
    """Say whether `module` computes what `torch.nn.Linear` computes and nothing else."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        # MultiheadAttention's output projection is a Linear that is never called: its parameters are used.
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    )


def float_reason(module: nn.Module) -> str | None:
    """Say why `module`, a kind of layer that one may expect to be quantized, is not; None: it is, or is no such."""
    if isinstance(module, nn.MultiheadAttention):
        return (
            "torch.nn.MultiheadAttention multiplies its projections itself, calling no layer; "
            "to have them quantized, use an attention that calls torch.nn.Linear"
        )
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or isinstance(module, Observed):
        return None
    if observed_type(module) is not None or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    kind = type(module).__name__
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{kind} has no weight yet; run the float model once before"
    if isinstance(module, tuple(OBSERVED)):
        return f"{kind} has a forward of its own, which a quantized layer would not run"
    return f"no quantized layer does what {kind} does"


OBSERVED = {nn.Linear: ObservedLinear}


def observed_type(module):
    return ObservedLinear if is_linear(module, "") and not isinstance(module, Observed) else None


def swap_(
    model: nn.Module,
    wanted: Callable[[nn.Module, str], bool],
    make: Callable[[Any, str], nn.Module],
    what: str,
) -> None:
    """Replace every module that `wanted(module, name)` by `make(module, name)`, or none of them.

    All are made before the first is put in place. A module used in two places is made once.
    """
    check_root(model, wanted, what)
    found = {name: module for name, module in model.named_modules(remove_duplicate=False) if wanted(module, name)}
    if not found:
        raise ValueError(f"no module of {type(model).__name__} is {what} that the filter takes; nothing was changed")
    made: dict[int, nn.Module] = {}
    errors: dict[str, ValueError | TypeError] = {}
    for name, module in found.items():
        if id(module) not in made:
            try:
                made[id(module)] = make(module, name)
            except (ValueError, TypeError) as error:
                errors[name] = error
    if errors:
        first = next(iter(errors.values()))
        told = [f"{name}: {error}" for name, error in errors.items()]
        if told[1:]:
            told = [f"{len(told)} layers cannot be replaced, and nothing was changed:", *told]
        raise type(first)("\n  ".join(told)) from first
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    _choose_paths(model)


_FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""What torch's encoder looks at before it hands the parameters of its layers, in eval mode, to one fused
operator; the layers themselves are then not called."""


def _choose_paths(model: nn.Module) -> None:
    """Make encoders call the layers that this package put into them, and only those."""
    for module in model.modules():
        flag = next((flag for kind, flag in _FAST_PATHS.items() if isinstance(module, kind)), None)
        if flag is None:
            continue
        ours, kept = any(isinstance(m, Buffers) for m in module.modules()), f"_float_{flag}"
        if ours and not hasattr(module, kept):
            setattr(module, kept, getattr(module, flag))
            setattr(module, flag, False)
        elif not ours and hasattr(module, kept):
            setattr(module, flag, getattr(module, kept))
            delattr(module, kept)


def check_root(model: nn.Module, wanted: Callable[[nn.Module, str], bool], what: str) -> None:
    """Raise ValueError if `model` itself would have to be replaced."""
    if wanted(model, ""):
        raise ValueError(f"the model is itself {what} and cannot be replaced in place; wrap it: nn.Sequential(model)")
