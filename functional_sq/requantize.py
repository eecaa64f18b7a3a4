"""What follows an exact product: scale, bias and residual, then an activation and the next layer's codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq.granularity import PerTensor
from functional_sq.qparams import QParams, check_qparams
from functional_sq.quantize import quantize
from functional_sq.spec import QuantSpec
from functional_sq.tracing import is_batched, is_traced

__all__ = [
    "ACTIVATIONS",
    "Float8Codes",
    "Requantization",
    "apply_epilogue",
    "check_requantization",
    "fills_a_byte",
    "has_one_scale",
    "requantize",
    "requantize_by",
    "requantizes",
]

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "none": lambda x: x,
        "relu": F.relu,
        "relu6": F.relu6,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "silu": F.silu,
        "hardswish": F.hardswish,
        "tanh": torch.tanh,
    }
)
"""What a layer can apply before it makes codes of its result."""


class Requantization(NamedTuple):
    """What turns the result of one layer into the codes that the next one multiplies.

    Attributes:
        spec: the next layer's quantization of its input.
        qp: scale and zero point of it, one for the tensor.
        activation: what is applied before, a key of `ACTIVATIONS`.

    Example: see `requantize`.
    """

    spec: QuantSpec
    qp: QParams
    activation: str = "none"


def requantize(x: Tensor, then: Requantization) -> Tensor:
    """Return `quantize(then.spec, activation(x), then.qp)`.

    Args:
        x: real values, the result of a layer.
        then: the activation, and the next layer's quantization.

    Returns:
        codes in the storage dtype of `then.spec`, shape of `x`.

    Raises:
        TypeError: `then` is no Requantization, or `x` holds no real values.
        ValueError: the activation is none of `ACTIVATIONS`, or `then.qp` does not fit `x`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> qp = fsq.QParams(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32))
        >>> then = fsq.Requantization(fsq.QuantSpec(torch.int8, fsq.PerTensor()), qp, "relu")
        >>> fsq.requantize(torch.tensor([-1.0, 1.0]), then)
        tensor([0, 2], dtype=torch.int8)
    """
    then = check_requantization(then)
    return quantize(then.spec, ACTIVATIONS[then.activation](x), then.qp)


def requantize_by(make: Callable[[str, Tensor, Tensor], Tensor], then: Requantization, dtype: torch.dtype) -> Tensor:
    """Return codes of 8 bits that `make(activation, scale, zero_point)` makes in `dtype`, as their spec has them."""
    storage, zero_point = then.spec.format.storage, then.qp.zero_point.to(torch.int32)
    if storage is dtype:
        return make(then.activation, then.qp.scale, zero_point)
    up = 128 if dtype is torch.uint8 else -128
    return (make(then.activation, then.qp.scale, zero_point + up) ^ up).view(storage)


def apply_epilogue(
    product: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, residual: Tensor | None = None
) -> Tensor:
    """Scale an exact product, add the bias and a residual, round once to `dtype`; in float32, or wider where it is.

    The product may be written to: in eager mode memory for another matrix takes as long as the arithmetic.
    """
    wide = torch.promote_types(dtype, torch.float32)
    y = product.to(wide)
    # In a graph it may be a view, and writing to a view makes the compiler compute it again.
    apart = is_traced(y) or is_batched(scale, bias, residual)
    y = y * scale.to(wide) if apart else y.mul_(scale.to(wide))
    for term in (bias, residual):
        if term is not None:
            y = y + term.to(wide) if apart else y.add_(term.to(wide))
    return y.to(dtype)


def fills_a_byte(spec: QuantSpec, scale: Tensor) -> bool:
    """Whether codes are integers of all 8 bits and have one float32 scale, as those that a backend can make do."""
    return has_one_scale(spec, scale) and spec.bounds in ((-128, 127), (0, 255))


def has_one_scale(spec: QuantSpec, scale: Tensor) -> bool:
    """Whether codes have one float32 scale, which a kernel reads as such."""
    return isinstance(spec.granularity, PerTensor) and scale.numel() == 1 and scale.dtype is torch.float32


def requantizes(spec: QuantSpec, scale: Tensor, activation: str) -> bool:
    """Whether a kernel with all `ACTIVATIONS` applies one and makes codes of its result: of all 8 bits, one scale.

    Args:
        spec: the codes' quantization.
        scale: its scale.
        activation: a key of `functional_sq.ACTIVATIONS`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.requantize import requantizes
        >>> requantizes(fsq.QuantSpec(torch.int8, fsq.PerTensor()), torch.ones(1), "relu")
        True
    """
    return fills_a_byte(spec, scale) and activation in ACTIVATIONS


class Float8Codes:
    """What kernels of float8 say of the codes that they make, as a backend does of integers."""

    CODES: torch.dtype = torch.float8_e4m3fn

    def requantizes(self, spec: QuantSpec, scale: Tensor, activation: str) -> bool:
        """Whether an activation is applied and codes are made of the result: of e4m3, one scale."""
        return spec.dtype is self.CODES and has_one_scale(spec, scale) and activation in ACTIVATIONS


def check_requantization(then: object) -> Requantization:
    """Raise TypeError unless `then` is a Requantization, ValueError unless its activation is one of `ACTIVATIONS`."""
    if not isinstance(then, Requantization):
        raise TypeError(f"then is {then!r}; give a Requantization(spec, qp, activation)")
    if not isinstance(then.activation, str) or then.activation not in ACTIVATIONS:
        raise ValueError(f"activation={then.activation!r}; use one of {', '.join(map(repr, ACTIVATIONS))}")
    return then._replace(qp=check_qparams(then.qp))
