"""The quantized linear layer: codes in buffers, and a forward that multiplies them."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

import functional_sq as fsq
from bridge.aqt import (
    AffineQuantizedTensor,
    LinearActivationQuantizedTensor,
    static_activation,
    to_linear_activation_quantized,
)
from bridge.buffers import Buffers
from bridge.observed import ObservedLinear, check_static
from functional_sq.formats import Float8

__all__ = ["QuantizedLinear"]


class QuantizedLinear(Buffers):
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
        device: device of the buffers.
        dtype: dtype of the bias and of what `qweight` stands for; the output has the input's.

    Raises:
        ValueError: the two specs cannot be multiplied as codes, or the input has a scale for each
            token.

    Attributes:
        act_scale, act_zero_point: `(1,)`, the input's quantization.
        weight_codes, weight_scale, weight_zero_point, weight_sum: a `functional_sq.FoldedWeight`.
        product_scale, product_offset: a `functional_sq.Epilogue`, computed from these and not saved.
            After writing to a buffer by hand, load the `state_dict` anew.
        qweight: the weight as AffineQuantizedTensor, with the codes of its spec.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge import QuantizedLinear
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.01]), torch.tensor([0], dtype=torch.int32))
        >>> layer = QuantizedLinear.from_float(torch.nn.Linear(8, 4), spec, qp, spec)
        >>> layer(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 4])
    """

    act_scale: Tensor
    act_zero_point: Tensor
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_sum: Tensor | None
    product_scale: Tensor
    product_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act: fsq.QuantSpec,
        weight: fsq.QuantSpec,
        *,
        bias: bool = True,
        reference: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_static(act, in_features)
        if not reference:
            fsq.check_product(act, weight, (out_features, in_features))
        self.in_features = in_features
        self.out_features = out_features
        self.act_spec = act
        self.weight_spec = weight
        self.reference = reference
        self.dtype = dtype or torch.get_default_dtype()
        empty = torch.zeros(out_features, in_features, dtype=weight.format.storage, device=device)
        self._set(
            fsq.calc_qparams(act, fsq.init(act, (in_features,), device=device)),
            fsq.fold(weight, empty, fsq.calc_qparams(weight, fsq.init(weight, empty.shape, device=device))),
        )
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False) if bias else None
        )

    def _set(self, act: fsq.QParams, weight: fsq.FoldedWeight) -> None:
        for prefix, values in (("act", act), ("weight", weight)):
            for name, value in values._asdict().items():
                # Contiguous and of its own: a state_dict must not save what a view was taken of.
                self.register_buffer(f"{prefix}_{name}", None if value is None else value.detach().clone())
        self._fold()

    def _fold(self) -> None:
        """Compute from the buffers what the product is scaled and shifted by; it is not saved."""
        multiplied = self.weight_codes.dtype is not torch.int16 and self.weight_scale.shape[1] == 1
        values = fsq.epilogue(self.act_spec, self.act_qparams, self.folded) if multiplied else fsq.Epilogue(None, None)
        for name, value in values._asdict().items():
            self.register_buffer(f"product_{name}", None if value is None else value.contiguous(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    @classmethod
    @torch.inference_mode(False)  # Buffers made in inference mode could not be loaded into outside of it.
    def from_float(
        cls,
        linear: nn.Linear,
        act: fsq.QuantSpec,
        act_qparams: fsq.QParams,
        weight: fsq.QuantSpec,
        *,
        reference: bool = False,
    ) -> QuantizedLinear:
        """Quantize the weight of `linear`; its range is taken from the weight as it is now.

        Raises:
            CalibrationError: the weight has NaN or Inf.
            ValueError: as the constructor.
        """
        w = linear.weight.detach()
        n, k = w.shape
        quantized = cls(k, n, act, weight, bias=False, reference=reference, device="meta", dtype=w.dtype)
        state = fsq.observe(weight, fsq.init(weight, w.shape, device=w.device), w)
        try:
            fsq.check(weight, state)
        except fsq.CalibrationError as error:
            raise fsq.CalibrationError(f"the weight: {error}") from error
        qparams = fsq.calc_qparams(weight, state)
        quantized._set(act_qparams, fsq.fold(weight, fsq.quantize(weight, w, qparams), qparams))
        if linear.bias is not None:
            quantized.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return quantized.train(linear.training)

    @classmethod
    def from_observed(
        cls, observed: ObservedLinear, target_dtype: torch.dtype | None = None, *, reference: bool = False
    ) -> QuantizedLinear:
        """Convert a calibrated layer.

        Args:
            observed: the layer; it is left as it is.
            target_dtype: the dtype that both observers were made for; None: not compared.
            reference: as the constructor.

        Raises:
            CalibrationError: the layer saw nothing, or NaN or Inf.
            ValueError: the observers were made for another dtype than `target_dtype`.
        """
        if not isinstance(observed, ObservedLinear):
            raise TypeError(f"from_observed got a {type(observed).__name__}; give a bridge.ObservedLinear")
        for name, observer in (("activations", observed.act_obs), ("weight", observed.weight_obs)):
            if target_dtype not in (None, observer.spec.dtype):
                raise ValueError(
                    f"target_dtype={target_dtype}, but the {name} were observed for {observer.spec.dtype}; "
                    f"use the dtype that the observers were made with"
                )
        qparams = observed.act_obs.calculate_qparams()
        return cls.from_float(observed, observed.act_obs.spec, qparams, observed.weight_obs.spec, reference=reference)

    @torch.inference_mode(False)
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._fold()

    def arguments(self) -> dict[str, object]:
        """Return what else made this layer: the constructor's arguments but the specs, device and dtype.

        `type(layer)(act=layer.act_spec, weight=layer.weight_spec, **layer.arguments())` is an empty twin
        that takes the layer's `state_dict`. The values have JSON.
        """
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "reference": self.reference,
        }

    @property
    def act_qparams(self) -> fsq.QParams:
        """The input's scale and zero point."""
        return fsq.QParams(self.act_scale, self.act_zero_point)

    @property
    def folded(self) -> fsq.FoldedWeight:
        """The weight in the form that is multiplied."""
        return fsq.FoldedWeight(self.weight_codes, self.weight_scale, self.weight_zero_point, self.weight_sum)

    @property
    def qweight(self) -> AffineQuantizedTensor:
        """The quantized weight as a tensor: codes, scale, zero point, `.dequantize()`."""
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
        )

    def as_linear(self) -> nn.Linear:
        """Return a `torch.nn.Linear` that computes the same: its weight is a tensor subclass.

        The form of torchao's tutorial that keeps the module. The weight's codes are folded at each
        call, so the module form is the faster one.
        """
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
        linear.bias = self.bias
        # What print(model) shows; torch.nn.Linear does not look at its weight.
        linear.extra_repr = MethodType(_repr_of_weight, linear)
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        qp = self.act_qparams
        q = fsq.quantize(self.act_spec, x, qp)
        if self.reference:
            w = fsq.dequantize(self.weight_spec, *fsq.unfold(self.weight_spec, self.folded), dtype=x.dtype)
            return fsq.linear_reference(self.act_spec, q, qp, w, None if self.bias is None else self.bias.to(x.dtype))
        # A float64 model wants the scales' product in float64.
        known = None if x.dtype is torch.float64 else fsq.Epilogue(self.product_scale, self.product_offset)
        return fsq.linear(self.act_spec, q, qp, self.folded, self.bias, dtype=x.dtype, epilogue=known)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        path = "dequantized product" if self.reference else f"{_short(self.weight_codes.dtype)} product"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"activation={_summary(self.act_spec)}, weight={_summary(self.weight_spec)}, {path}"
        )


def _repr_of_weight(linear: nn.Linear) -> str:
    weight = linear.weight
    kind = type(weight.data).__name__
    if isinstance(weight, LinearActivationQuantizedTensor):
        inner = weight.original_weight_tensor
        assert isinstance(inner, AffineQuantizedTensor)
        activation = _short(weight.quant_kwargs["target_dtype"])
        kind = f"{kind}(activation={activation}, weight={_short(inner.target_dtype)} {inner.spec.granularity})"
    return f"{nn.Linear.extra_repr(linear)}, weight={kind}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summary(spec: fsq.QuantSpec) -> str:
    return f"{_short(spec.dtype)} {spec.mapping.name.lower()} {spec.granularity}"
