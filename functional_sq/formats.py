"""Number formats: which codes a dtype has, and how a real value becomes a code and back.

A format is one entry of `FORMATS`. Everything else in the package asks the format; nothing else
in the package tests for "is this float8".

| format           | codes                      | storage        | x -> code                         |
|------------------|----------------------------|----------------|-----------------------------------|
| uint1 ... uint8  | 0 ... 2**b - 1             | uint8          | clamp(round(x * (1/s)) + z)       |
| int1 ... int8    | -2**(b-1) ... 2**(b-1) - 1 | int8           | the same                          |
| int16            | -32768 ... 32767           | int16          | the same                          |
| four float8      | every finite value         | the dtype      | clamp(x.float() / s), then a cast |

A code of fewer than eight bits occupies one byte.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from functional_sq.blocks import is_batched

if TYPE_CHECKING:
    from functional_sq.qparams import QParams

__all__ = ["FORMATS", "REAL_DTYPES", "Float8", "Format", "Integer", "check_real", "format_of"]

REAL_DTYPES: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of real values: what can be observed and quantized."""


class Format(abc.ABC):
    """The codes of one quantized dtype and the two maps between codes and real values."""

    dtype: torch.dtype
    """The quantized dtype, as the user names it: `torch.int4`."""

    @property
    @abc.abstractmethod
    def storage(self) -> torch.dtype:
        """The dtype of the tensor that holds the codes."""

    @property
    @abc.abstractmethod
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest code."""

    @abc.abstractmethod
    def steps(self, x: Tensor, qp: QParams) -> Tensor:
        """Express `x` in steps of the format, not yet limited to its codes; a fresh tensor."""

    @abc.abstractmethod
    def decode(self, q: Tensor, qp: QParams, dtype: torch.dtype) -> Tensor:
        """Map codes to real values of `dtype`."""

    def encode(self, x: Tensor, qp: QParams, bounds: tuple[float, float]) -> Tensor:
        """Map real values to codes; what lies outside `bounds` saturates."""
        # In place on the fresh tensor of steps(): an eager quantize is bound by memory traffic.
        # The clamp comes before the cast for float8 too: casts of values that overflow differ
        # between torch (NaN) and ml_dtypes (inf or NaN by format).
        # clamp_ has no batching rule, and a second tensor of floats takes 4 times as long as these two passes.
        low, high = bounds
        return self.steps(x, qp).clamp_min_(low).clamp_max_(high).to(self.storage)


@dataclass(frozen=True)
class Integer(Format):
    """Two's-complement or unsigned integers of `bits` bits."""

    dtype: torch.dtype
    bits: int
    signed: bool

    @property
    def storage(self) -> torch.dtype:
        if self.bits > 8:
            return torch.int16
        return torch.int8 if self.signed else torch.uint8

    @property
    def bounds(self) -> tuple[int, int]:
        if self.signed:
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    def steps(self, x: Tensor, qp: QParams) -> Tensor:
        # Multiplied by the reciprocal, as torchao.quantize_affine does: not the bits of x / scale.
        # torch.round rounds halves to even. Added out of place: under vmap the zero point alone may have a batch.
        return torch.mul(x, qp.scale.reciprocal()).round_() + qp.zero_point

    def decode(self, q: Tensor, qp: QParams, dtype: torch.dtype) -> Tensor:
        # torchao.dequantize_affine subtracts in the output dtype (exact for 8 bits in any of them)
        # and multiplies in the promoted dtype.
        steps = q.to(dtype) - qp.zero_point.to(dtype)
        in_place = qp.scale.dtype is dtype and not is_batched(qp.scale)
        return (steps.mul_(qp.scale) if in_place else steps * qp.scale).to(dtype)


@dataclass(frozen=True)
class Float8(Format):
    """An 8-bit float (OCP OFP8 or its FNUZ variant); its zero point is always 0."""

    dtype: torch.dtype

    @property
    def storage(self) -> torch.dtype:
        return self.dtype

    @property
    def bounds(self) -> tuple[float, float]:
        largest = torch.finfo(self.dtype).max
        return -largest, largest

    def steps(self, x: Tensor, qp: QParams) -> Tensor:
        # Divided, as torchao._quantize_affine_float8 does.
        return torch.div(x.to(torch.float32), qp.scale)

    def decode(self, q: Tensor, qp: QParams, dtype: torch.dtype) -> Tensor:
        return (q.to(torch.float32) * qp.scale).to(dtype)


def _formats() -> dict[torch.dtype, Format]:
    table: dict[torch.dtype, Format] = {}
    for bits in range(1, 9):
        for signed, prefix in ((True, "int"), (False, "uint")):
            dtype = getattr(torch, f"{prefix}{bits}")
            table[dtype] = Integer(dtype, bits, signed)
    table[torch.int16] = Integer(torch.int16, 16, True)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        dtype = getattr(torch, name)
        table[dtype] = Float8(dtype)
    return table


FORMATS: Final = MappingProxyType(_formats())
"""Every quantized dtype with its format; read-only."""


def format_of(dtype: torch.dtype) -> Format:
    """Return the format of a quantized dtype.

    Args:
        dtype: `torch.int1` ... `torch.int8`, `torch.uint1` ... `torch.uint8`, `torch.int16`,
            or one of the four 8-bit floats.

    Raises:
        TypeError: `dtype` is not a dtype, or not one that codes can have.

    Example:
        >>> import torch
        >>> from functional_sq.formats import format_of
        >>> format_of(torch.int4).bounds, format_of(torch.int4).storage
        ((-8, 7), torch.int8)
        >>> format_of(torch.float8_e4m3fn).bounds
        (-448.0, 448.0)
    """
    try:
        return FORMATS[dtype]
    except (KeyError, TypeError):
        names = ", ".join(str(d).removeprefix("torch.") for d in FORMATS)
        raise TypeError(f"{dtype!r} is not a quantized dtype; use one of {names}") from None


def check_real(x: Tensor, verb: str) -> None:
    """Raise TypeError unless `x` is a tensor of real values; `verb` names the caller."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{verb} got a {type(x).__name__}; give a tensor")
    if x.dtype not in REAL_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in REAL_DTYPES)
        raise TypeError(f"{verb} got a tensor of {x.dtype}; convert it to one of {names}")
