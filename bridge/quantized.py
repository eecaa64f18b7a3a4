"""The quantized linear layer: codes in buffers, and a forward that multiplies them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import functional_sq as fsq
from bridge.buffers import Buffers
from bridge.observed import ObservedLinear, check_static

if TYPE_CHECKING:
    from bridge.aqt import AffineQuantizedTensor

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
        dtype: dtype of the bias; the output has the input's.

    Raises:
        ValueError: the two specs cannot be multiplied as codes, or the input has a scale for each
            token.

    Attributes:
        act_scale, act_zero_point: `(1,)`, the input's quantization.
        weight_codes, weight_scale, weight_zero_point, weight_sum: a `functional_sq.FoldedWeight`.
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
        self.act = act
        self.weight_spec = weight
        self.reference = reference
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

    @classmethod
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
        quantized = cls(k, n, act, weight, bias=False, reference=reference, device="meta")
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

    @property
    def folded(self) -> fsq.FoldedWeight:
        """The weight in the form that is multiplied."""
        return fsq.FoldedWeight(self.weight_codes, self.weight_scale, self.weight_zero_point, self.weight_sum)

    @property
    def qweight(self) -> AffineQuantizedTensor:
        """The quantized weight as a tensor: codes, scale, zero point, `.dequantize()`."""
        from bridge.aqt import AffineQuantizedTensor

        codes, qp = fsq.unfold(self.weight_spec, self.folded)
        return AffineQuantizedTensor.from_codes(self.weight_spec, codes, qp, dtype=self._float_dtype())

    def _float_dtype(self) -> torch.dtype:
        return torch.float32 if self.bias is None else self.bias.dtype

    def forward(self, x: Tensor) -> Tensor:
        qp = fsq.QParams(self.act_scale, self.act_zero_point)
        q = fsq.quantize(self.act, x, qp)
        if self.reference:
            w = fsq.dequantize(self.weight_spec, *fsq.unfold(self.weight_spec, self.folded), dtype=x.dtype)
            return fsq.linear_reference(self.act, q, qp, w, None if self.bias is None else self.bias.to(x.dtype))
        return fsq.linear(self.act, q, qp, self.folded, self.bias, dtype=x.dtype)

    def extra_repr(self) -> str:
        path = "dequantized product" if self.reference else f"{_short(self.weight_codes.dtype)} product"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"activation={_summary(self.act)}, weight={_summary(self.weight_spec)}, {path}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summary(spec: fsq.QuantSpec) -> str:
    return f"{_short(spec.dtype)} {spec.mapping.name.lower()} {spec.granularity}"
