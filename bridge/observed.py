"""Modules that record what flows through them: observers as modules, and float layers with two."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import functional_sq as fsq
from bridge.aqt import AffineQuantizedTensor
from bridge.buffers import Buffers, write
from bridge.linear_activation_quantized import LinearActivationQuantizedTensor

__all__ = [
    "Observed",
    "ObservedConv1d",
    "ObservedConv2d",
    "ObservedConv3d",
    "ObservedConvTranspose1d",
    "ObservedConvTranspose2d",
    "ObservedConvTranspose3d",
    "ObservedLinear",
    "ObserverModule",
    "insert_observers_",
    "is_quantizable",
    "observed_type",
    "weight_of",
]


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
        masked: whether it fitted any tensor since `calibrate` set it.

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
        self.masked = False
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ObserverModule:
        unwritten = any(value.is_meta for value in self.state.values())
        super()._apply(fn, recurse)
        if unwritten:  # to_empty gives memory that holds anything
            self.forget()
        return self

    def nothing(self, device: torch.device | None = None) -> fsq.State:
        """Return the state of an observer like this one that has seen nothing."""
        count = self.state["count"]
        return self.spec.observer.init(tuple(count.shape), torch.float32, device or count.device)

    def forget(self, device: torch.device | None = None) -> None:
        """Forget everything, and take memory on `device`; default: where the record is."""
        with torch.inference_mode(False):  # as `reset`
            for name, value in self.nothing(device).items():
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        if not self._buffers:
            self.reset(tuple(x.shape), x.device)
        elif self.state["count"].is_meta and not x.is_meta:  # parameters were assigned to a model without memory
            self.forget(x.device)
        mask = None if self.mask is None else fit_mask(self.mask, x.shape[:-1])
        if mask is not None:
            self.masked = True
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


def fit_mask(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Return the mask as it fits the first of these axes, flattened or not; None where it is of other positions.

    Of what a layer takes or gives, `shape` leaves out the features, whose number may be that of tokens.
    """
    if mask is None or mask.shape == tuple(shape[: mask.ndim]):
        return mask
    return mask.reshape(-1) if tuple(shape[:1]) == (mask.numel(),) else None


def qparams_of(observer: ObserverModule) -> fsq.QParams:
    """Return what an observer calculates, with zeros for a zero point that is None."""
    scale, zero_point = observer.calculate_qparams()
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=observer.spec.zero_point_dtype)
    return fsq.QParams(scale, zero_point)


def weight_qparams(spec: fsq.QuantSpec, weight: Tensor) -> fsq.QParams:
    """Return scale and zero point of a weight as it is now; `weight` is that of `weight_of`."""
    return fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, weight.shape, device=weight.device), weight))


class Observed(nn.Module):
    """A float layer that records its input; its weight is observed when it is converted.

    Base of a class that also derives from the float layer's type, and comes before it: the layer's
    own forward then runs on what was recorded, and parameters keep their names.

    Attributes:
        act_obs: records the input. Scales whose shape depends on the batch are refused: a static scale
            must fit any.
        weight_obs: names how the weight will be quantized.
        config: the StaticQuantConfig that it was prepared with, or None.
        float_type: the type of the float layer.
        settings: the names of what its constructor takes, other than bias, device and dtype.
    """

    act_obs: ObserverModule
    weight_obs: ObserverModule
    weight: Tensor
    config: Any
    float_type: ClassVar[type[nn.Module]]
    settings: ClassVar[tuple[str, ...]]

    def attach(self, act_obs: ObserverModule, weight_obs: ObserverModule) -> None:
        """Take two observers; called once, by the constructor of a derived class.

        Raises:
            TypeError: an observer is not an ObserverModule.
            ValueError: both are one object, or a granularity does not apply.
        """
        _check_observers(act_obs, weight_obs)
        shape = tuple(weight_of(self).shape)
        check_static(act_obs.spec, shape)
        weight_obs.spec.granularity.stat_shape(shape)
        if not act_obs.state:
            act_obs.reset(shape[1:2], self.weight.device)
        self.act_obs = act_obs
        self.weight_obs = weight_obs
        self.config = None
        # In a tuple, so that it is no submodule: its parameters are this layer's already.
        self._float: tuple[nn.Module, ...] = ()

    @classmethod
    def from_float(cls, module: nn.Module, act_obs: ObserverModule, weight_obs: ObserverModule) -> Observed:
        """Return an observed layer that shares the parameters of `module`.

        Raises:
            TypeError: an observer is not an ObserverModule, or `module` is not of `float_type`.
            ValueError: both observers are one object, a granularity does not apply, the weight is quantized already,
                or the layer has hooks or a parametrization, which would be lost.
        """
        _check_observers(act_obs, weight_obs)
        if not isinstance(module, cls.float_type):
            raise TypeError(
                f"{cls.__name__}.from_float got a {type(module).__name__}; give a torch.nn.{cls.float_type.__name__}"
            )
        check_plain(module)
        weight, shape = cast(Tensor, module.weight), tuple(weight_of(module).shape)
        check_static(act_obs.spec, shape)
        if act_obs.state:
            act_obs.to(weight.device)
        else:
            act_obs.reset(shape[1:2], weight.device)
        observed = cls(
            **settings_of(module, cls.settings),
            act_obs=act_obs,
            weight_obs=weight_obs,
            bias=False,
            # The parameters below replace these, so these take no memory.
            device="meta",
            dtype=weight.dtype,
        )
        observed.weight, observed.bias = weight, cast(Tensor, module.bias)  # it may be None
        observed._float = (module,)
        observed.observe_weight()
        return observed.train(module.training)

    def to_float(self) -> nn.Module:
        """Return the float layer with this layer's parameters: the very module that `from_float` took.

        A layer that was constructed gives a new one.

        Example:
            >>> import torch, functional_sq as fsq
            >>> from bridge import ObservedLinear, ObserverModule
            >>> spec, linear = fsq.QuantSpec(torch.int8, fsq.PerTensor()), torch.nn.Linear(4, 2)
            >>> layer = ObservedLinear.from_float(linear, ObserverModule(spec), ObserverModule(spec))
            >>> layer.to_float() is linear
            True
        """
        check_plain(self)
        if self._float:
            module = self._float[0]
        else:
            module = self.float_type(**settings_of(self, self.settings), bias=False, device="meta")
        module.weight, module.bias = self.weight, self.bias
        return module.train(self.training)

    # `input` is the float layer's name for it, which it may be given by; the rest is what that one takes beside it.
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.act_obs(input if self.act_obs.mask is None else self.positions(input))
        return super().forward(input, *args, **kwargs)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        # A model that was prepared without memory gets its parameters here; what its observers saw comes after.
        if not self.weight.is_meta and any(value.is_meta for value in self.act_obs.state.values()):
            self.act_obs.forget(self.weight.device)
            self.observe_weight()

    def positions(self, x: Tensor) -> Tensor:
        """Return an input or output of the layer with the axes that a mask is for in front."""
        return x

    @property
    def rows(self) -> int:
        """How many vectors along the input's features were seen: tokens, pixels."""
        return int(self.act_obs.state["count"].sum()) // int(getattr(self, self.settings[0]))

    def observe_weight(self) -> None:
        """Record the weight as it is now, and nothing that it was before."""
        weight = weight_of(self)
        self.weight_obs.reset(tuple(weight.shape), weight.device)
        self.weight_obs(weight)


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

    float_type = nn.Linear
    settings = ("in_features", "out_features")

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
        self.attach(act_obs, weight_obs)


CONV_SETTINGS: tuple[str, ...] = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
"""What the constructor of a convolution takes, other than bias, device and dtype."""


class _ObservedConv(Observed):
    """What the convolutions share."""

    settings = CONV_SETTINGS

    def __init__(self, *settings: Any, act_obs: ObserverModule, weight_obs: ObserverModule, **kwargs: Any) -> None:
        super().__init__(*settings, **kwargs)
        self.attach(act_obs, weight_obs)

    def positions(self, x: Tensor) -> Tensor:
        # A mask (batch, tokens) fits the leading axes once the channels are last.
        return x.movedim(1 - self.weight.ndim, -1)


class ObservedConv1d(_ObservedConv, nn.Conv1d):
    """As ObservedConv2d, over one dimension.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConv1d, ObserverModule
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> layer = ObservedConv1d.from_float(torch.nn.Conv1d(4, 2, 3), ObserverModule(spec), ObserverModule(spec))
        >>> _ = layer(torch.ones(1, 4, 9)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.Conv1d


class ObservedConv2d(_ObservedConv, nn.Conv2d):
    """A float convolution over two dimensions that records its input.

    Args:
        settings: what `torch.nn.Conv2d` takes.
        act_obs: records the input; one scale for the tensor.
        weight_obs: names how the weight will be quantized.
        kwargs: what `torch.nn.Conv2d` takes by name.

    Raises:
        TypeError: an observer is not an ObserverModule.
        ValueError: a granularity does not apply.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConv2d, ObserverModule
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> layer = ObservedConv2d.from_float(torch.nn.Conv2d(4, 2, 3), ObserverModule(spec), ObserverModule(spec))
        >>> _ = layer(torch.ones(1, 4, 9, 9)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.Conv2d


class ObservedConv3d(_ObservedConv, nn.Conv3d):
    """As ObservedConv2d, over three dimensions.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConv3d, ObserverModule
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> layer = ObservedConv3d.from_float(torch.nn.Conv3d(4, 2, 3), ObserverModule(spec), ObserverModule(spec))
        >>> _ = layer(torch.ones(1, 4, 5, 5, 5)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.Conv3d


class _ObservedConvTranspose(_ObservedConv):
    """What the transposed ones share: the weight is torch's, and is observed in the layout of `weight_of`."""

    settings = (*CONV_SETTINGS, "output_padding")


class ObservedConvTranspose1d(_ObservedConvTranspose, nn.ConvTranspose1d):
    """As ObservedConv1d, of a `torch.nn.ConvTranspose1d`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConvTranspose1d, ObserverModule
        >>> observers = (ObserverModule(fsq.QuantSpec(torch.int8, fsq.PerTensor())) for _ in range(2))
        >>> layer = ObservedConvTranspose1d.from_float(torch.nn.ConvTranspose1d(4, 2, 3), *observers)
        >>> _ = layer(torch.ones(1, 4, 9)); layer.act_obs.state["max"]
        tensor([1.])
    """

    float_type = nn.ConvTranspose1d


class ObservedConvTranspose2d(_ObservedConvTranspose, nn.ConvTranspose2d):
    """As ObservedConv2d, of a `torch.nn.ConvTranspose2d`; PerAxis(0) of its weight is a scale for each output channel.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConvTranspose2d, ObserverModule
        >>> observers = (ObserverModule(fsq.QuantSpec(torch.int8, each)) for each in (fsq.PerTensor(), fsq.PerAxis(0)))
        >>> layer = ObservedConvTranspose2d.from_float(torch.nn.ConvTranspose2d(4, 2, 3), *observers)
        >>> layer.weight.shape, layer.weight_obs.state["max"].shape
        (torch.Size([4, 2, 3, 3]), torch.Size([2, 1, 1, 1]))
    """

    float_type = nn.ConvTranspose2d


class ObservedConvTranspose3d(_ObservedConvTranspose, nn.ConvTranspose3d):
    """As ObservedConv3d, of a `torch.nn.ConvTranspose3d`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import ObservedConvTranspose3d, ObserverModule
        >>> observers = (ObserverModule(fsq.QuantSpec(torch.int8, fsq.PerTensor())) for _ in range(2))
        >>> layer = ObservedConvTranspose3d.from_float(torch.nn.ConvTranspose3d(4, 2, 3), *observers)
        >>> layer(torch.ones(1, 4, 5, 5, 5)).shape
        torch.Size([1, 2, 7, 7, 7])
    """

    float_type = nn.ConvTranspose3d


OBSERVED: dict[type[nn.Module], type[Observed]] = {
    observed.float_type: observed
    for observed in (
        ObservedLinear,
        ObservedConv1d,
        ObservedConv2d,
        ObservedConv3d,
        ObservedConvTranspose1d,
        ObservedConvTranspose2d,
        ObservedConvTranspose3d,
    )
}
"""Which observed type takes the place of a float one."""

LAYERS = ", ".join(f"torch.nn.{kind.__name__}" for kind in OBSERVED)
"""The float types, for messages."""


def observed_type(module: nn.Module) -> type[Observed] | None:
    """Return the observed type that computes what `module` computes; None where there is none.

    A subclass counts while it computes what its torch type does: with a forward, or parameters, of its
    own it is something else. A layer whose weight is quantized already is left as it is.

    Example:
        >>> import torch
        >>> from bridge.observed import observed_type
        >>> observed_type(torch.nn.Conv2d(3, 8, 3)).__name__, observed_type(torch.nn.ReLU())
        ('ObservedConv2d', None)
    """
    # MultiheadAttention's output projection is a Linear that is never called: its parameters are used.
    # A lazy layer has no weight yet.
    if isinstance(module, (nn.modules.linear.NonDynamicallyQuantizableLinear, nn.modules.lazy.LazyModuleMixin)):
        return None
    for kind, observed in OBSERVED.items():
        if _runs_as(module, kind):
            return None if _own_parts(module) or _holds_tensors(module._parameters.get("weight")) else observed
    return None


def is_quantizable(module: nn.Module) -> bool:
    """Say whether `make_quantizable_` replaces `module`: it computes what a type that it knows computes, and no more.

    Example:
        >>> import torch
        >>> from bridge.observed import is_quantizable
        >>> is_quantizable(torch.nn.MultiheadAttention(8, 2)), is_quantizable(torch.nn.LSTM(8, 8))
        (True, False)
    """
    # A model that has a Conv1D has loaded transformers.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    for kind, parts in ((nn.MultiheadAttention, _ATTENTION_PARTS), (conv1d, _PARTS)):
        if kind is not None and _runs_as(module, kind):
            return not _own_parts(module, parts)
    return False


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is of a type, or of a subclass of it that has its forward."""
    own = [name for name in ("forward", "__call__", "_conv_forward", "_output_padding") if hasattr(kind, name)]
    return isinstance(module, kind) and all(getattr(type(module), name) is getattr(kind, name) for name in own)


_PARTS = ("weight", "bias")
_ATTENTION_PARTS = (
    *("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("in_proj_bias", "bias_k", "bias_v", "out_proj"),
)


def _own_parts(module: nn.Module, known: Sequence[str] = _PARTS) -> list[str]:
    """Return the parameters, buffers and modules that a subclass has beside its type's; a parent may use them."""
    if type(module) in OBSERVED or nn.utils.parametrize.is_parametrized(module):
        return []
    return [
        name for part in (module._parameters, module._buffers, module._modules) for name in part if name not in known
    ]


def _holds_tensors(weight: Tensor | None) -> bool:
    """Whether a weight has other tensors inside, as quantized ones do; a DTensor is float, and has its own refusal."""
    return is_traceable_wrapper_subclass(weight) and not hasattr(weight, "placements")


def float_reason(module: nn.Module) -> str | None:
    """Say why `module`, a kind of layer that one may expect to be quantized, is not; None: it is, or is no such."""
    kind = type(module).__name__
    remedy = "call bridge.make_quantizable_(model) first" if is_quantizable(module) else None
    if isinstance(module, nn.MultiheadAttention):
        return (
            f"{kind} multiplies its projections itself, calling no layer; "
            f"to have them quantized, {remedy or 'use an attention that calls torch.nn.Linear'}"
        )
    if isinstance(module, Observed):
        return None
    if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        own = [name for name, value in module.named_parameters(recurse=False) if _is_matrix(name, value)]
        if not own or isinstance(module, _LOOKS_UP_OR_SCALES):
            return None
        return (
            f"{kind} has {own[0]} of its own and calls no layer with it; "
            f"to have it quantized, {remedy or 'let a torch.nn.Linear multiply it'}"
        )
    if observed_type(module) is not None or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    weight = module._parameters.get("weight")
    if isinstance(weight, (AffineQuantizedTensor, LinearActivationQuantizedTensor)):
        return None
    if _holds_tensors(weight):
        return f"its weight is a {type(weight).__name__} already"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{kind} has no weight yet; run the float model once before"
    if isinstance(module, tuple(OBSERVED)):
        if own := _own_parts(module):
            return f"{kind} has {own[0]} of its own, which a quantized layer would not have"
        return f"{kind} has a forward of its own, which a quantized layer would not run"
    return f"no quantized layer does what {kind} does"


_LOOKS_UP_OR_SCALES = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.utils.parametrize.ParametrizationList,
)
"""What has parameters of two axes and multiplies no matrix."""


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is probably multiplied as a matrix, or is one of several matrices.

    One whose first size is 1 is probably added: positions of a grid, for each image of a batch.
    """
    if isinstance(parameter, nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
        return False
    long = sum(size > 1 for size in parameter.shape)
    return (long > 2 and parameter.shape[0] > 1) or (long > 1 and name.startswith("weight"))


def weight_of(layer: Any) -> Tensor:
    """Return the weight of a float or observed layer as it is quantized: its output channels first.

    Example:
        >>> import torch
        >>> from bridge.observed import weight_of
        >>> weight_of(torch.nn.ConvTranspose1d(6, 8, 3, groups=2)).shape
        torch.Size([8, 3, 3])
    """
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return fsq.transpose_weight(layer.weight, layer.groups) if transposed else layer.weight


def settings_of(made: object, names: Sequence[str]) -> dict[str, Any]:
    """Return what the constructor of a module or a config took, by name."""
    return {name: getattr(made, name) for name in names}


def _check_observers(act_obs: object, weight_obs: object) -> None:
    for name, observer in (("act_obs", act_obs), ("weight_obs", weight_obs)):
        if not isinstance(observer, ObserverModule):
            raise TypeError(
                f"{name} is a {type(observer).__name__}; give an ObserverModule, "
                f"such as bridge.AffineQuantizedMinMaxObserver"
            )
    if act_obs is weight_obs:
        raise ValueError(
            "act_obs and weight_obs are one object, which would mix both ranges; give a copy.deepcopy of it for one"
        )


def check_plain(module: nn.Module) -> None:
    """Raise ValueError if a layer that takes the place of `module` would do less than it.

    Asked before observers are put in, and again before they are taken out.
    """
    if nn.utils.parametrize.is_parametrized(module):
        raise ValueError(
            "the weight is computed by a parametrization, which would be lost; "
            "call torch.nn.utils.parametrize.remove_parametrizations first, or leave the layer out by a rule"
        )
    own = MethodType(type(module).forward, module)
    # Where accelerate took its hooks away, it has left the class's own.
    if vars(module).get("forward", own) != own:
        raise ValueError(
            "the layer has a forward of its own, which would be lost; take it away first, or leave the layer out by a "
            "rule"
        )
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        raise ValueError("the layer has hooks, which would be lost; remove them first, or leave it out by a rule")
    for weight in [module.weight] if hasattr(module, "weight") else module.parameters(recurse=False):
        if hasattr(weight, "placements"):  # a DTensor
            raise ValueError("the weight is sharded; quantize the model before it is sharded, or leave the layer out")
        if _holds_tensors(weight):
            raise ValueError(
                f"the weight is a {type(weight).__name__} already; give the float layer, or leave this one as it is"
            )


def check_static(spec: fsq.QuantSpec, shape: Sequence[int]) -> None:
    """Raise ValueError unless a static scale of the input fits every batch and image size.

    Args:
        spec: the activations' quantization.
        shape: shape of the weight as it is quantized, of a linear layer or a convolution.
    """
    granularity = spec.granularity
    if len(shape) > 2:
        if not isinstance(granularity, fsq.PerTensor):
            raise ValueError(
                f"{granularity} gives the input of a convolution several scales, and a static scale must fit any "
                f"batch and image; use PerTensor() for activations"
            )
        return
    wide, narrow = (granularity.stat_shape((rows, shape[1])) for rows in (5, 3))
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
        filter_fn: `(module, name) -> bool`, asked of each `torch.nn.Linear`; default: all of them.

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
        lambda module, name: is_linear(module, name) and (filter_fn is None or filter_fn(module, name)),
        lambda layer, name: ObservedLinear.from_float(layer, deepcopy(act_obs), deepcopy(weight_obs)),
        "a torch.nn.Linear",
    )


def is_linear(module: nn.Module, name: str) -> bool:
    """Say whether `module` computes what `torch.nn.Linear` computes and nothing else."""
    return observed_type(module) is ObservedLinear


def public_name(name: str) -> str:
    """Return a module's name in the model that the user compiled.

    Example:
        >>> public_name("_orig_mod.encoder.0")
        'encoder.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Return the public names of a model's modules; one that has several is under its first."""
    return {module: public_name(name) for name, module in model.named_modules()}


def swap_(
    model: nn.Module,
    wanted: Callable[[nn.Module, str], bool],
    make: Callable[[Any, str], nn.Module],
    what: str,
    remedy: str = "look at the filter",
) -> None:
    """Replace every module that `wanted(module, name)` by `make(module, name)`, or none of them.

    All are made before the first is put in place. A module used in two places is made once. Where none is wanted, the
    error says that none is `what`, and the `remedy`.
    """
    if wanted(model, ""):
        raise ValueError(f"the model is itself {what} and cannot be replaced in place; wrap it: nn.Sequential(model)")
    modules = model.named_modules(remove_duplicate=False)
    found = {name: module for name, module in modules if wanted(module, public_name(name))}
    if not found:
        raise ValueError(f"no module of {type(model).__name__} is {what} to replace, and nothing was changed; {remedy}")
    made: dict[int, nn.Module] = {}
    errors: dict[str, ValueError | TypeError] = {}
    for name, module in found.items():
        if id(module) not in made:
            try:
                made[id(module)] = make(module, public_name(name))
            except (ValueError, TypeError) as error:
                errors[public_name(name)] = error
    if errors:
        first = next(iter(errors.values()))
        told = [f"{name}: {error}" for name, error in errors.items()]
        if told[1:]:
            told = [f"{len(told)} layers cannot be replaced, and nothing was changed:", *told]
        raise type(first)("\n  ".join(told)) from first
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    choose_paths(model)


_FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""What torch's encoder looks at before it hands the parameters of its layers, in eval mode, to one fused
operator; the layers themselves are then not called."""


def choose_paths(model: nn.Module) -> None:
    """Switch torch's fused path off in encoders that hold layers of this package, and on again where none is left."""
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
