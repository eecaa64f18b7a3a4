"""Quantized layers: codes in buffers, and a forward that multiplies them."""

from __future__ import annotations

import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import is_, itemgetter
from typing import Any, ClassVar, TypeAlias, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

import functional_sq as fsq
from bridge import inductor
from bridge.aqt import AffineQuantizedTensor
from bridge.buffers import Buffers
from bridge.linear_activation_quantized import (
    LinearActivationQuantizedTensor,
    static_activation,
    to_linear_activation_quantized,
)
from bridge.observed import (
    Observed,
    ObservedConv1d,
    ObservedConv2d,
    ObservedConv3d,
    ObservedConvTranspose1d,
    ObservedConvTranspose2d,
    ObservedConvTranspose3d,
    ObservedLinear,
    check_static,
    settings_of,
    weight_of,
)
from bridge.observer import qparams_of, weight_qparams
from functional_sq import backends, brgemm, chains, onednn_conv
from functional_sq.compat import is_exporting
from functional_sq.conv import direct_convolution, is_tapped
from functional_sq.conv_transpose import direct_transposed, is_polyphase
from functional_sq.folded import check_zero_point
from functional_sq.formats import Float8, check_real, name_of
from functional_sq.granularity import check_stats
from functional_sq.linear import direct_product, quantized_linear
from functional_sq.qparams import check_qparams, fixed_zero_point
from functional_sq.spec import check_spec

__all__ = [
    "QUANTIZED",
    "SWITCHES",
    "Quantized",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedLinear",
]

SWITCHES = ("reference", "hand_on", "fast_accum")
"""What a constructor takes beside what the float layer's takes; attributes that may be changed at any time."""


_SHARED: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()
"""The tensors of `_shared`, for as long as a layer has them."""


_Direct: TypeAlias = Callable[[Tensor], Tensor | None]

_DIRECT: WeakKeyDictionary[Quantized, tuple[tuple[object, ...], _Direct | None]] = WeakKeyDictionary()
"""For each layer, what `Quantized._direct` found, behind what it depends on."""

_OPERANDS = itemgetter("product_scale", "act_scale", "act_zero_point", "weight_codes", "weight_zero_point")
"""The buffers that are read where codes of real values are made and multiplied at once."""


@torch.inference_mode(False)
def _shared(qp: fsq.QParams) -> fsq.QParams:
    """Return tensors of the same values, and the same ones whenever both values and the device are."""
    if qp.scale.numel() != 1 or qp.scale.is_meta or type(qp.scale) is not Tensor:
        return fsq.QParams(*(value.clone() for value in qp))
    both = qp.scale.item(), qp.scale.dtype, qp.zero_point.item(), qp.zero_point.dtype, qp.scale.device
    return fsq.QParams(*(_SHARED.setdefault((*both, name), value.clone()) for name, value in qp._asdict().items()))


_NAMES = {
    prefix: [f"{prefix}_{name}" for name in fields]
    for prefix, fields in {
        "act": fsq.QParams._fields,
        "shared": fsq.QParams._fields,
        "weight": fsq.FoldedWeight._fields,
        "product": fsq.Epilogue._fields,
    }.items()
}
"""The buffers of each tuple that a layer has, by what their names begin with."""


class Quantized(Buffers):
    """A layer with static ranges that multiplies codes: integers, or float8.

    Made by `from_observed` or `from_float`; the constructor of a derived class makes an empty one to
    load a `state_dict` into. For inference: no gradient flows through it.

    Attributes:
        act_scale, act_zero_point: `(1,)`, the input's quantization.
        weight_codes, weight_scale, weight_zero_point, weight_sum: a `functional_sq.FoldedWeight`.
        product_scale, product_offset: a `functional_sq.Epilogue`, computed from these and not saved.
            After writing to a buffer by hand, load the `state_dict` anew; to `torch.func.functional_call`
            give all buffers of another layer, not its `state_dict`.
        shared_scale, shared_zero_point: copies of `act_scale` and `act_zero_point`, the very same tensors in all
            layers with these values: by them a compiler sees which layers quantize alike. Not saved either.
        reference: dequantize and multiply floats instead. May be changed at any time where the codes
            can be multiplied.
        weight: the weight as the float layer has it, dequantized where it is used; `qweight` has its codes.
        hand_on: compiled, whether the layer may take part in a chain: make the codes of the next layer
            in place of floats, or take those of the layer before. May be changed at any time.
        fast_accum: on CUDA, add float8 products with fewer bits than float32 has. May be changed at any time.
        observed: the observed type that it is made from.
        settings: the names of what the float layer's constructor takes, other than bias, device and
            dtype; attributes here too.
    """

    act_scale: Tensor
    act_zero_point: Tensor
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_sum: Tensor | None
    product_scale: Tensor
    product_offset: Tensor | None
    shared_scale: Tensor
    shared_zero_point: Tensor
    observed: ClassVar[type[Observed]]
    settings: ClassVar[tuple[str, ...]]
    _reference: ClassVar[Callable[..., Tensor]]
    """Multiplies the floats that codes stand for."""
    _geometry: Mapping[str, Any] = {}
    """What both take by name."""
    _geometry_json = ""
    """What `chains.layer` takes as the geometry: what a product of codes takes of it."""

    @torch.inference_mode(False)  # What is made in it could not be loaded into outside of it.
    def __init__(
        self,
        shape: tuple[int, ...],
        settings: Mapping[str, Any],
        act: fsq.QuantSpec,
        weight: fsq.QuantSpec,
        *,
        bias: bool,
        reference: bool,
        hand_on: bool,
        fast_accum: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_static(act, shape)
        if not reference:
            fsq.check_product(act, weight, shape)
        for name, value in settings.items():
            setattr(self, name, value)
        self.act_spec = act
        self.weight_spec = weight
        self.reference = reference
        self.hand_on = hand_on
        self.fast_accum = fast_accum
        self._described = chains.describe(act)
        self.dtype = dtype or torch.get_default_dtype()
        empty = torch.zeros(shape, dtype=weight.format.storage, device=device)
        self._set(
            fsq.calc_qparams(act, fsq.init(act, shape[1:2], device=device)),
            fsq.fold(weight, empty, fsq.calc_qparams(weight, fsq.init(weight, shape, device=device))),
        )
        for name, value in self.act_qparams._asdict().items():  # an empty layer has no input in common with others
            self.register_buffer(f"shared_{name}", value.clone(), persistent=False)
        self.bias = (
            nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    def _set(self, act: fsq.QParams, weight: fsq.FoldedWeight) -> None:
        for prefix, values in (("act", act), ("weight", weight)):
            for name, value in values._asdict().items():
                # Contiguous and of its own: a state_dict must not save what a view was taken of.
                self.register_buffer(f"{prefix}_{name}", None if value is None else value.detach().clone())
        self._fold()

    @torch.inference_mode(False)
    def _fold(self) -> None:
        """Compute from the buffers what the product is scaled and shifted by; it is not saved."""
        multiplied = self.weight_codes.dtype is not torch.int16 and self._one_a_row() and self.act_scale.numel() == 1
        values = fsq.epilogue(self.act_spec, self.act_qparams, self.multiplied) if multiplied else None
        for name in fsq.Epilogue._fields:
            value = getattr(values, name, None)
            self.register_buffer(f"product_{name}", None if value is None else value.contiguous(), persistent=False)
        self._share()

    def _one_a_row(self) -> bool:
        """Whether the weight has one scale for each output, as what multiplies codes wants it."""
        return all(size == 1 for size in self.weight_scale.shape[1:])

    def _share(self) -> None:
        for name, value in _shared(self.act_qparams)._asdict().items():
            self.register_buffer(f"shared_{name}", value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        super()._apply(fn, recurse)
        _DIRECT.pop(self, None)  # it would keep the memory of tensors that were replaced
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        self._share()
        return self

    def arguments(self) -> dict[str, object]:
        """Return what makes an empty twin, beside the two specs, device and dtype: plain values for JSON.

        `type(layer)(act=layer.act_spec, weight=layer.weight_spec, **layer.arguments())` loads the
        layer's `state_dict`.

        Example:
            >>> import torch, functional_sq as fsq
            >>> from bridge import QuantizedLinear
            >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
            >>> print(*QuantizedLinear(8, 4, spec, spec).arguments().items())
            ('in_features', 8) ('out_features', 4) ('bias', True) ('reference', False) ('hand_on', True) \
('fast_accum', False)
        """
        return {
            **settings_of(self, self.settings),
            "bias": self.bias is not None,
            **settings_of(self, SWITCHES),
        }

    @classmethod
    @torch.inference_mode(False)  # Buffers made in inference mode could not be loaded into outside of it.
    def from_float(
        cls,
        module: nn.Module,
        act: fsq.QuantSpec,
        act_qparams: fsq.QParams,
        weight: fsq.QuantSpec,
        **switches: Any,
    ) -> Quantized:
        """Quantize the weight of the float layer `module`; its range is taken from the weight as it is now.

        Args:
            module: the layer; it is left as it is.
            act, weight: the two quantizations.
            act_qparams: scale and zero point of the input.
            switches: `reference`, `hand_on` and `fast_accum`, as the constructor.

        Raises:
            CalibrationError: the weight has NaN or Inf.
            TypeError: `module` is no such layer, or `act_qparams` are no two tensors.
            ValueError: as the constructor, or `act_qparams` have not the shape that `act` gives.
        """
        if not isinstance(module, cls.observed.float_type):
            name = cls.observed.float_type.__name__
            raise TypeError(f"{cls.__name__}.from_float got a {type(module).__name__}; give a torch.nn.{name}")
        w = weight_of(module).detach()
        act_qparams = _fitted(act, act_qparams, tuple(w.shape))
        quantized = cls(
            **settings_of(module, cls.settings),
            act=act,
            weight=weight,
            bias=False,
            **switches,
            device="meta",
            dtype=w.dtype,
        )
        # Not fsq.check: a weight that is all zero is exact under any scale.
        if not bool(w.isfinite().all()):
            raise fsq.CalibrationError("the weight has NaN or Inf; mend it, or leave the layer in float")
        qparams = weight_qparams(weight, w)
        quantized._set(act_qparams, fsq.fold(weight, fsq.quantize(weight, w, qparams), qparams))
        bias: Any = module.bias
        if bias is not None:
            quantized.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return quantized.train(module.training)

    @classmethod
    def from_observed(cls, observed: Observed, target_dtype: torch.dtype | None = None, **switches: Any) -> Quantized:
        """Convert a calibrated layer.

        Args:
            observed: the layer; it is left as it is.
            target_dtype: the dtype that both observers were made for; None: not compared.
            switches: as `from_float`.

        Raises:
            CalibrationError: the layer saw nothing, or NaN or Inf.
            ValueError: the observers were made for another dtype than `target_dtype`.
        """
        if not isinstance(observed, cls.observed):
            raise TypeError(f"from_observed got a {type(observed).__name__}; give a bridge.{cls.observed.__name__}")
        for name, observer in (("activations", observed.act_obs), ("weight", observed.weight_obs)):
            if target_dtype not in (None, observer.spec.dtype):
                raise ValueError(
                    f"target_dtype={target_dtype}, but the {name} were observed for {observer.spec.dtype}; "
                    f"use the dtype that the observers were made with"
                )
        qparams = qparams_of(observed.act_obs)
        specs = observed.act_obs.spec, qparams, observed.weight_obs.spec
        return cls.from_float(observed, *specs, **switches)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        faults = self._misfits(state_dict, prefix)
        if faults:
            args[-1].extend(faults)  # error_msgs
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._fold()

    def _misfits(self, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
        """Say which codes and zero points of a state are none of this layer's formats."""
        found, fixed = [], fixed_zero_point(self.act_spec)
        for name, spec in (("weight_codes", self.weight_spec), ("act_zero_point", self.act_spec)):
            value, own = state_dict.get(prefix + name), getattr(self, name)
            if not isinstance(value, Tensor) or value.is_meta or value.numel() == 0:
                continue
            held = spec.format.storage if name == "weight_codes" else value.dtype
            if value.dtype is not own.dtype:
                found.append(f"{prefix}{name} is {value.dtype}, and a layer of {spec.dtype} has {own.dtype}")
            elif name == "act_zero_point" and fixed is not None and bool((value != fixed).any()):
                found.append(f"{prefix}{name} is {value.flatten().tolist()}, and that of {spec} {fixed}")
            elif not value.is_floating_point() and spec.bounds != (torch.iinfo(held).min, torch.iinfo(held).max):
                codes = fsq.unfold(spec, self.folded._replace(codes=value))[0] if name == "weight_codes" else value
                (low, high), (least, most) = spec.bounds, (int(codes.min()), int(codes.max()))
                if not low <= least <= most <= high:
                    found.append(f"{prefix}{name} has codes from {least} to {most}, and {spec.dtype} {low} to {high}")
        return [f"{fault}; load the state of a layer that was quantized alike" for fault in found]

    def _values(self, prefix: str) -> list[Any]:
        """Return the buffers that `_set` and `_fold` registered; as attributes each of them would take 1 us."""
        buffers: Mapping[str, Any] = self._buffers
        return [buffers[name] for name in _NAMES[prefix]]

    @property
    def act_qparams(self) -> fsq.QParams:
        """The input's scale and zero point."""
        return fsq.QParams(*self._values("act"))

    @property
    def folded(self) -> fsq.FoldedWeight:
        """The weight in the form that is multiplied."""
        return fsq.FoldedWeight(*self._values("weight"))

    @property
    def multiplied(self) -> fsq.FoldedWeight:
        """The weight in the form that a product of codes takes."""
        return self.folded

    @property
    def weight(self) -> Tensor:
        """The weight as the float layer has it, for code that looks at its shape, dtype or device; not to be written.

        In eager mode a tensor that dequantizes where it is used, so that a look costs little.
        """
        return self._dequantized(self.dtype) if torch.compiler.is_compiling() else self.qweight

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        return fsq.dequantize(self.weight_spec, *fsq.unfold(self.weight_spec, self.folded), dtype=dtype)

    @property
    def qweight(self) -> AffineQuantizedTensor:
        """The quantized weight as a tensor, its output channels first: codes, scale, zero point, `.dequantize()`."""
        spec = self.weight_spec
        codes, (scale, zero_point) = fsq.unfold(spec, self.folded)
        return AffineQuantizedTensor(
            codes,
            scale,
            None if codes.is_floating_point() else zero_point,
            spec.dtype,
            quant_min=spec.quant_min,
            quant_max=spec.quant_max,
            dtype=self.dtype,
            use_fast_accum=self.fast_accum and codes.is_floating_point(),
        )

    def forward(self, input: Tensor) -> Tensor:  # the float layer's name for it: it may be given by name
        multiply = self._direct() if not self.reference and brgemm.reads(input) else None
        y = None if multiply is None else multiply(input)
        return self._run(input, {}) if y is None else y

    def _direct(self) -> _Direct | None:
        """Return what `_found` finds; asked again where an operand, or what else it depends on, is another."""
        parameters, operands = self._parameters, _OPERANDS(self._buffers)  # an attribute would take 1 us
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (that asks for both)
        scale = operands[0]
        learned = bias is not None and bias.requires_grad, scale is not None and scale.requires_grad
        asked = *backends.PRODUCTS, *backends.CONVOLUTIONS
        depends_on = (*asked, *learned, self.act_spec, bias, *operands)
        before, found = _DIRECT.get(self, ((), None))
        same = len(before) == len(depends_on) and all(map(is_, before, depends_on))
        # What torch.jit traces notes how this is found, and expects the same of each call.
        if not same or torch.jit.is_tracing():  # type: ignore[attr-defined]
            found = None if scale is None else self._found(fsq.Epilogue(*self._values("product")))
            _DIRECT[self] = depends_on, found
        return found

    def _found(self, known: fsq.Epilogue) -> _Direct | None:
        """Return what computes the result of real values in eager mode by one operator, if anything does."""
        return None

    def _run(self, x: Tensor, changed: Mapping[str, Any]) -> Tensor:
        """Return the result; `changed` is what this call alone has in place of the layer's geometry."""
        check_real(x, type(self).__name__)
        bias: Tensor | None = self.bias
        known = fsq.Epilogue(*self._values("product"))
        if known.scale is None and not self.reference:
            raise ValueError(
                f"reference=False, and codes of {self.act_spec.dtype} and {self.weight_spec.dtype} with these scales "
                f"have no product; set reference=True"
            )
        captured = torch.compiler.is_compiling() and not is_exporting()
        if captured and self.hand_on and not self.reference and x.dtype is not torch.float64 and not changed:
            weight = self.multiplied
            return chains.layer(
                self._described,
                self._padded(x),
                fsq.QParams(*self._values("shared")),
                weight.codes,
                weight.zero_point,
                bias,
                known,
                geometry=self._geometry_json,
                dtype=x.dtype,
                fast_accum=self.fast_accum,
                known_by=inductor.install(weight.codes.device.type),
            )
        qp = self.act_qparams
        x, geometry = self._padded(x), {**self._geometry, **changed}
        if self.reference:
            w = self._dequantized(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
            return self._reference(self.act_spec, fsq.quantize(self.act_spec, x, qp), qp, w, bias, **geometry)
        exact = x.dtype is torch.float64  # Its model wants the scales' product in float64.
        how = {"epilogue": None if exact else known, "fast_accum": self.fast_accum}
        return self._multiply(x, qp, bias, **geometry, **how)

    @abstractmethod
    def _multiply(self, x: Tensor, qp: fsq.QParams, bias: Tensor | None, **how: Any) -> Tensor:
        """Multiply the codes of the input with the weight's."""

    def _padded(self, x: Tensor) -> Tensor:
        """Return the input with what a product of codes cannot add."""
        return x

    @abstractmethod
    def _backend(self) -> str:
        """Say what else than torch multiplies, and from what size on."""

    @property
    def path(self) -> str:
        """How the layer multiplies, in words; what its device or weight does not allow is not in it."""
        if self.reference:
            return "dequantized product"
        return f"{name_of(self.weight_codes.dtype)} product{self._backend()}"

    def extra_repr(self) -> str:
        if torch.compiler.is_compiling():  # torch.vmap takes the repr of what it maps, which is no constant of a graph
            return ""
        shown = {name: value for name, value in self.arguments().items() if name not in SWITCHES}
        return (
            f"{', '.join(f'{name}={value!r}' for name, value in shown.items())}, "
            f"activation={_summary(self.act_spec)}, weight={_summary(self.weight_spec)}, {self.path}"
        )


def _taken_by(asked: Iterable[tuple[str, range]], what: str) -> str:
    """Say which backend takes how many rows or windows; the first that takes a number does, in the order given."""
    shown, free = "", [range(1, sys.maxsize)]
    for name, offered in ((name, offered) for name, offered in asked if offered):
        both = (range(max(a.start, offered.start), min(a.stop, offered.stop)) for a in free)
        for taken in filter(None, both):
            last = f"{what} on" if taken.stop == sys.maxsize else f"to {taken.stop - 1} {what}"
            shown += f", by {name} from {taken.start} {last}"
        rest = ((range(a.start, min(a.stop, offered.start)), range(max(a.start, offered.stop), a.stop)) for a in free)
        free = [part for parts in rest for part in parts if part]
    return shown


class QuantizedLinear(Quantized):
    """A linear layer with static ranges that multiplies codes: integers, or float8.

    Made by `from_observed` or `from_float`; the constructor makes an empty one to load a
    `state_dict` into. For inference: no gradient flows through it.

    Args:
        in_features: K.
        out_features: N.
        act: quantization of the input; one scale for the tensor.
        weight: quantization of the weight; one scale for the tensor or for each row.
        bias: whether there is a bias.
        reference: dequantize and multiply floats instead, with the bits of torchao's
            AffineQuantizedTensor. Takes any format and granularity. May be changed at any time
            where the codes can be multiplied.
        hand_on: compiled, whether the layer may take part in a chain of layers that hand codes on.
        fast_accum: on CUDA, add float8 products with fewer bits than float32 has: faster on Hopper, less exact.
        device: device of the buffers.
        dtype: dtype of the bias and of what `qweight` stands for; the output has the input's.

    Raises:
        ValueError: the two specs cannot be multiplied as codes, or the input has a scale for each
            token.

    Its attributes are those of `Quantized`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import QuantizedLinear
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
        >>> layer = QuantizedLinear.from_float(torch.nn.Linear(8, 4), spec, qp, spec)
        >>> layer(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 4])
    """

    in_features: int
    out_features: int
    observed = ObservedLinear
    settings = ("in_features", "out_features")
    _reference = staticmethod(fsq.linear_reference)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act: fsq.QuantSpec,
        weight: fsq.QuantSpec,
        *,
        bias: bool = True,
        reference: bool = False,
        hand_on: bool = True,
        fast_accum: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            (out_features, in_features),
            {"in_features": in_features, "out_features": out_features},
            act,
            weight,
            bias=bias,
            reference=reference,
            hand_on=hand_on,
            fast_accum=fast_accum,
            device=device,
            dtype=dtype,
        )

    def as_linear(self) -> nn.Linear:
        """Return a `torch.nn.Linear` that computes the same: its weight is a tensor subclass.

        The form of torchao's tutorial that keeps the module. The weight's codes are folded at each
        call, so the module form is the faster one.

        Raises:
            ValueError: the layer has `reference=True`.
        """
        if self.reference:
            raise ValueError(
                "as_linear of a layer with reference=True: the tensor subclass multiplies codes; keep the layer, "
                "or set layer.reference = False before"
            )
        activation = {"scale": self.act_scale, "target_dtype": self.act_spec.dtype}
        if not isinstance(self.act_spec.format, Float8):
            activation |= {
                "zero_point": self.act_zero_point,
                "quant_min": self.act_spec.quant_min,
                "quant_max": self.act_spec.quant_max,
            }
        weight = to_linear_activation_quantized(self.qweight, static_activation, activation)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = self.bias  # type: ignore[assignment]  # None is what torch sets for none
        # What print(model) shows; torch.nn.Linear does not look at its weight. No method: one pickles as its name.
        linear.extra_repr = partial(_repr_of_weight, linear)  # type: ignore[method-assign]
        return linear.train(self.training)

    def _found(self, known: fsq.Epilogue) -> _Direct | None:
        return direct_product(self.act_spec, self.act_qparams, self.folded, self.bias, known)

    def _multiply(self, x: Tensor, qp: fsq.QParams, bias: Tensor | None, **how: Any) -> Tensor:
        return quantized_linear(self.act_spec, x, qp, self.folded, bias, **how)

    def _backend(self) -> str:
        if brgemm.float8_for(self.weight_codes) is not None:
            return f", by {brgemm.NAME}"
        weight = self.weight_codes, self.weight_zero_point
        return _taken_by(
            ((each.NAME, each.rows(*weight)) for each in backends.PRODUCTS if each.supports(*weight)), "rows"
        )


_GEOMETRY = ("stride", "padding", "output_padding", "dilation", "groups")
"""What `conv` or `conv_transpose` takes of the settings."""


class _QuantizedConv(Quantized):
    """What the convolutions share; `kernel_size` and the like are tuples, as in `torch.nn.Conv2d`."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    settings: ClassVar[tuple[str, ...]] = ObservedConv2d.settings
    _product: ClassVar[Callable[..., Tensor]] = staticmethod(fsq.conv)
    """Multiplies codes."""
    _direct_product: ClassVar[Callable[..., _Direct | None]] = staticmethod(direct_convolution)
    """Returns what makes and multiplies them by one operator."""
    _reference: ClassVar[Callable[..., Tensor]] = staticmethod(fsq.conv_reference)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        act: fsq.QuantSpec,
        weight: fsq.QuantSpec,
        bias: bool = True,
        reference: bool = False,
        hand_on: bool = True,
        fast_accum: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        # The float layer checks its settings, and says what it makes of them.
        made = self.observed.float_type(in_channels, out_channels, kernel_size, **settings, bias=False, device="meta")
        super().__init__(
            tuple(weight_of(made).shape),
            settings_of(made, self.settings),
            act,
            weight,
            bias=bias,
            reference=reference,
            hand_on=hand_on,
            fast_accum=fast_accum,
            device=device,
            dtype=dtype,
        )
        self._around = [] if self.padding_mode == "zeros" else cast(list[int], made._reversed_padding_repeated_twice)
        self._geometry = settings_of(self, [name for name in self.settings if name in _GEOMETRY])
        if self._around:
            self._geometry["padding"] = 0
        self._geometry_json = json.dumps({**self._geometry, **self._phases})

    @property
    def _phases(self) -> Mapping[str, Any]:
        """What `_product` takes beside the geometry."""
        return {}

    def _found(self, known: fsq.Epilogue) -> _Direct | None:
        operands = self.act_spec, self.act_qparams, self.multiplied, self.bias, known
        convolve = self._direct_product(*operands, **self._geometry, **self._phases)
        if convolve is None or not self._around:
            return convolve
        around, mode = self._around, self.padding_mode
        return lambda x: convolve(F.pad(x, around, mode=mode))

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self._around, mode=self.padding_mode) if self._around else x

    def _multiply(self, x: Tensor, qp: fsq.QParams, bias: Tensor | None, **how: Any) -> Tensor:
        q = brgemm.quantize(self.act_spec, x, qp)
        return self._product(self.act_spec, q, qp, self.multiplied, bias, dtype=x.dtype, **self._phases, **how)

    def _backend(self) -> str:
        if brgemm.float8_for(self.weight_codes, self.groups) is not None:
            return f", by {brgemm.NAME}"
        # A transposed one is a convolution, by windows at each step.
        steps = [1 for _ in self.stride] if "output_padding" in self._geometry else self.stride
        codes, _, zero_point, _ = self.multiplied
        weight = codes, zero_point
        tapped = is_tapped(self.act_spec, codes, self.groups)
        looped = [onednn_conv] if tapped and zero_point is not None else []
        asked = [each for each in backends.CONVOLUTIONS if each.supports(*weight) and each not in looped]
        taken = [(each.NAME, each.windows(*weight, steps, self.dilation, self.groups)) for each in asked]
        by = _taken_by(taken, "windows")
        takes_many = any(offered.stop == sys.maxsize for _, offered in taken)
        return by if not tapped or takes_many else f"{by}, compiled to one loop"


class QuantizedConv1d(_QuantizedConv):
    """As QuantizedConv2d, over one dimension.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import QuantizedConv1d
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
        >>> layer = QuantizedConv1d.from_float(torch.nn.Conv1d(8, 4, 3), spec, qp, spec)
        >>> layer(torch.zeros(2, 8, 9)).shape
        torch.Size([2, 4, 7])
    """

    observed = ObservedConv1d


class QuantizedConv2d(_QuantizedConv):
    """A convolution over two dimensions with static ranges that multiplies codes.

    Fastest on a `channels_last` input, and on CUDA with its codes so too, as a float layer:
    `layer.to(memory_format=torch.channels_last)`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, bias: as
            `torch.nn.Conv2d`.
        act: quantization of the input; one scale for the tensor.
        weight: quantization of the weight; one scale for the tensor or for each output channel.
        reference: dequantize and convolve floats instead; takes any format, and any granularity of the
            weight.
        hand_on: compiled, whether the layer may take part in a chain of layers that hand codes on.
        fast_accum: on CUDA, add float8 products with fewer bits than float32 has: faster on Hopper, less exact.
        device: device of the buffers.
        dtype: dtype of the bias; the output has the input's.

    Raises:
        ValueError: the two specs cannot be multiplied as codes, or the input has several scales.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import QuantizedConv2d
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
        >>> layer = QuantizedConv2d.from_float(torch.nn.Conv2d(8, 4, 3, padding=1), spec, qp, spec)
        >>> layer(torch.zeros(2, 8, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    observed = ObservedConv2d


class QuantizedConv3d(_QuantizedConv):
    """As QuantizedConv2d, over three dimensions.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import QuantizedConv3d
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
        >>> layer = QuantizedConv3d.from_float(torch.nn.Conv3d(8, 4, 3, padding=1), spec, qp, spec)
        >>> layer(torch.zeros(2, 8, 5, 5, 5)).shape
        torch.Size([2, 4, 5, 5, 5])
    """

    observed = ObservedConv3d


class _QuantizedConvTranspose(_QuantizedConv):
    """What the transposed ones share: codes of the weight lie as those of a convolution, `fsq.transpose_weight`.

    Attributes:
        phase_codes, phase_scale, phase_zero_point, phase_sum: `fsq.polyphase` of them where there is a stride and
            neither groups nor dilation, as far as it is not None. Not saved, as `product_scale`.
    """

    settings = ObservedConvTranspose2d.settings
    _product = staticmethod(fsq.conv_transpose)
    _direct_product = staticmethod(direct_transposed)
    _reference = staticmethod(fsq.conv_transpose_reference)

    @property
    def _phases(self) -> Mapping[str, Any]:
        cut = is_polyphase(self.stride, self.dilation, self.groups)
        return {"kernel_size": self.kernel_size} if cut else {}

    @torch.inference_mode(False)
    def _fold(self) -> None:
        if self._phases and self._one_a_row():
            for name, value in fsq.polyphase(self.folded, self.stride)._asdict().items():
                if value is not None:  # torch.export counts a buffer that is None among its inputs
                    self.register_buffer(f"phase_{name}", value, persistent=False)
        super()._fold()

    @property
    def multiplied(self) -> fsq.FoldedWeight:
        """The weight in the form that a product of codes takes: `fsq.polyphase` of it, or `folded`."""
        phases: list[Any] = [self._buffers.get(f"phase_{name}") for name in fsq.FoldedWeight._fields]
        return self.folded if phases[0] is None else fsq.FoldedWeight(*phases)

    @property
    def weight(self) -> Tensor:
        """As `Quantized.weight`, always dequantized."""
        return fsq.transpose_weight(self._dequantized(self.dtype), self.groups)

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Return the result; with `output_size`, as torch's layer takes it, the layer takes part in no chain."""
        if output_size is None:
            return super().forward(input)
        lengths = self.stride, self.padding, self.kernel_size, len(self.stride), self.dilation
        added = _ConvTransposeNd._output_padding(self, input, output_size, *lengths)  # type: ignore[arg-type]
        return self._run(input, {"output_padding": added})


class QuantizedConvTranspose1d(_QuantizedConvTranspose):
    """As QuantizedConv1d, transposed.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import QuantizedConvTranspose1d
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
        >>> layer = QuantizedConvTranspose1d.from_float(torch.nn.ConvTranspose1d(8, 4, 2, 2), spec, qp, spec)
        >>> layer(torch.zeros(2, 8, 5)).shape, layer(torch.zeros(2, 8, 5), output_size=[11]).shape
        (torch.Size([2, 4, 10]), torch.Size([2, 4, 11]))
    """

    observed = ObservedConvTranspose1d


class QuantizedConvTranspose2d(_QuantizedConvTranspose):
    """As QuantizedConv2d, transposed.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import QuantizedConvTranspose2d
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
        >>> layer = QuantizedConvTranspose2d.from_float(torch.nn.ConvTranspose2d(8, 4, 2, 2), spec, qp, spec)
        >>> layer(torch.zeros(2, 8, 5, 5)).shape, layer.qweight.shape
        (torch.Size([2, 4, 10, 10]), torch.Size([4, 8, 2, 2]))
    """

    observed = ObservedConvTranspose2d


class QuantizedConvTranspose3d(_QuantizedConvTranspose):
    """As QuantizedConv3d, transposed.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import QuantizedConvTranspose3d
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
        >>> layer = QuantizedConvTranspose3d.from_float(torch.nn.ConvTranspose3d(8, 4, 2, 2), spec, qp, spec)
        >>> layer(torch.zeros(2, 8, 3, 3, 3)).shape
        torch.Size([2, 4, 6, 6, 6])
    """

    observed = ObservedConvTranspose3d


QUANTIZED: dict[type[Observed], type[Quantized]] = {
    quantized.observed: quantized
    for quantized in (
        QuantizedLinear,
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedConv3d,
        QuantizedConvTranspose1d,
        QuantizedConvTranspose2d,
        QuantizedConvTranspose3d,
    )
}
"""Which quantized type an observed one becomes."""


def _fitted(act: fsq.QuantSpec, qp: fsq.QParams, shape: tuple[int, ...]) -> fsq.QParams:
    """Return the qparams of an input with the shape and dtypes that a layer holds them in."""
    check_spec(act)
    scale, zero_point = check_qparams(qp)
    fits = check_stats(act.granularity, "the input's scale", scale.shape, shape[1:2])
    check_zero_point(act, zero_point)
    return fsq.QParams(scale.reshape(fits).to(act.scale_dtype), zero_point.reshape(fits).to(act.zero_point_dtype))


def _repr_of_weight(linear: nn.Linear) -> str:
    weight = linear.weight
    kind = type(weight.data).__name__
    if isinstance(weight, LinearActivationQuantizedTensor):
        inner = weight.original_weight_tensor
        assert isinstance(inner, AffineQuantizedTensor)
        activation = name_of(weight.quant_kwargs["target_dtype"])
        kind = f"{kind}(activation={activation}, weight={name_of(inner.target_dtype)} {inner.spec.granularity})"
    return f"{nn.Linear.extra_repr(linear)}, weight={kind}"


def _summary(spec: fsq.QuantSpec) -> str:
    return f"{name_of(spec.dtype)} {spec.mapping.name.lower()} {spec.granularity}"
