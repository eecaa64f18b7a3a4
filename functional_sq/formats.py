"""Number formats: which codes a dtype has, and how a real value becomes a code and back.

A format is one entry of `FORMATS`.

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

from functional_sq.compat import is_exporting
from functional_sq.tracing import computed_once, is_batched, is_traced

if TYPE_CHECKING:
    from functional_sq.qparams import QParams

__all__ = [
    "FORMATS",
    "REAL_DTYPES",
    "Float8",
    "Format",
    "Integer",
    "as_float32",
    "check_real",
    "check_real_dtype",
    "format_of",
    "name_of",
]

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
        return _cast(self.steps(x, qp).clamp_min_(low).clamp_max_(high), self.storage)


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
        # torch.round rounds halves to even.
        steps = torch.mul(x, computed_once(qp.scale.reciprocal())).round_()
        return steps.add_(qp.zero_point) if _fits_into(steps, qp.zero_point) else steps + qp.zero_point

    def decode(self, q: Tensor, qp: QParams, dtype: torch.dtype) -> Tensor:
        # torchao.dequantize_affine subtracts in the output dtype, which is exact for 8 bits in any of them, and
        # multiplies in the promoted dtype. Of 16 bits, float16 makes Inf of 65535 and bfloat16 rounds from 257 on.
        exact = torch.promote_types(dtype, torch.float32) if self.bits > 8 else dtype
        steps = _cast(q, exact) - qp.zero_point.to(exact)
        return (steps.mul_(qp.scale) if _fits_into(steps, qp.scale) else steps * qp.scale).to(dtype)


_DETOURS: Final = {
    (torch.float32, torch.uint8): torch.int16,
    (torch.float64, torch.uint8): torch.int16,
    (torch.uint8, torch.float16): torch.float32,
    (torch.int8, torch.float16): torch.float32,
}
"""Casts that torch makes on a CPU one number after another, and what is on a way that takes a quarter of the time."""


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x.to(dtype)` of codes, or of floats that are codes."""
    by = _DETOURS.get((x.dtype, dtype)) if x.device.type == "cpu" and not is_traced(x) else None
    return x.to(dtype) if by is None else x.to(by).to(dtype)


def _fits_into(steps: Tensor, stat: Tensor) -> bool:
    """Whether an eager sum or product of fresh `steps` and `stat` may overwrite `steps`: it has the same dtype, and
    `stat` has no batch or gradient of `torch.func`, which `steps` may lack."""
    if torch.compiler.is_compiling():
        return False
    kept = torch.promote_types(steps.dtype, stat.dtype) is steps.dtype
    return kept and not torch._C._functorch.is_functorch_wrapped_tensor(stat)


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
        return (as_float32(q) * qp.scale).to(dtype)


def as_float32(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """Return float8 codes as float32: the values of `codes.to(torch.float32)`.

    On a CPU torch casts one code after another: 1.4 ns each on two cores, 0.15 ns where Inductor compiles it. By the
    bits of a `torch.float8_e4m3fn` it takes 0.25 ns eager and 0.05 to 0.1 compiled. No step makes a subnormal float32,
    so nothing is lost where those are flushed to zero.

    Args:
        codes: of any shape.
        out: float32 to write to, of that shape; eager alone.

    Example:
        >>> import torch
        >>> from functional_sq.formats import as_float32
        >>> as_float32(torch.tensor([0.4375, -448.0]).to(torch.float8_e4m3fn)).tolist()
        [0.4375, -448.0]
    """
    by_bits = codes.dtype is torch.float8_e4m3fn and codes.device.type == "cpu" and not is_exporting()
    if by_bits and is_traced(codes):
        return _float32_by_bits(codes.view(torch.int8))
    if not by_bits or codes.numel() < _FEW or is_batched(codes):
        return codes.to(torch.float32) if out is None else out.copy_(codes)
    y = torch.empty_like(codes, dtype=torch.float32) if out is None else out
    pieces = [(y, codes)]
    if y.is_contiguous() and codes.is_contiguous():  # What the steps leave stays in the cache.
        pieces = [*zip(*(torch.split(each.view(-1), _PIECE) for each in (y, codes)), strict=True)]
    for to, piece in pieces:
        to.copy_(_float16_by_bits(piece.view(torch.int8))).mul_(256)
    return y


_FEW = 2**13
"""Fewer codes than this torch casts in less time than it takes to call the steps by bits."""

_PIECE = 2**19
"""How many codes an eager pass takes at a time."""


def _float32_by_bits(code: Tensor) -> Tensor:
    """Return float32 of a sign, 4 bits of exponent with a bias of 7, and 3 of mantissa, without a branch.

    In integers of 32 bits, as Inductor has vectors of those for all of it.
    """
    wide = code.to(torch.int32)
    size = wide & 0x7F
    bits = (size << 20) + (127 - 7 << 23)
    bits = torch.where(size == 0x7F, bits | 0x7F800000, bits)  # NaN
    y = torch.where(size < 8, size.to(torch.float32) * 2.0**-9, bits.view(torch.float32))
    return (y.view(torch.int32) | (wide & -(2**31))).view(torch.float32)


def _float16_by_bits(code: Tensor) -> Tensor:
    """Return 1/256 of the same in float16, whose exponent has a bias of 15: the bits moved, but for a NaN."""
    wide = code.to(torch.int16)
    bits = (wide << 7).bitwise_and_(~(1 << 14))
    bits |= wide.bitwise_and_(0x7F).add_(1).bitwise_and_(0x80).bitwise_left_shift_(7)  # NaN: an exponent of ones
    return bits.view(torch.float16)


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


def name_of(kind: torch.dtype | torch.layout) -> str:
    """Return the name of a dtype or layout as one says it, without `torch.`; `getattr(torch, name)` gives it back.

    Example:
        >>> import torch
        >>> from functional_sq.formats import name_of
        >>> name_of(torch.float8_e4m3fn)
        'float8_e4m3fn'
    """
    return str(kind).removeprefix("torch.")


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
        names = ", ".join(map(name_of, FORMATS))
        raise TypeError(f"{dtype!r} is not a quantized dtype; use one of {names}") from None


def check_real_dtype(dtype: object, given: str) -> None:
    """Raise TypeError unless `dtype` is one of real values; `given` says before it what it was given for."""
    if dtype not in REAL_DTYPES:
        raise TypeError(f"{given}{dtype}; use one of {', '.join(map(str, REAL_DTYPES))}")


def check_real(x: Tensor, verb: str) -> None:
    """Raise TypeError unless `x` is a tensor of real values; `verb` names the caller."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{verb} got a {type(x).__name__}; give a tensor")
    if x.dtype not in REAL_DTYPES:
        names = ", ".join(map(name_of, REAL_DTYPES))
        raise TypeError(f"{verb} got a tensor of {x.dtype}; convert it to one of {names}")
    # A backward that is traced may not ask for a layout.
    if not torch.compiler.is_compiling() and (x.layout is not torch.strided or x.is_nested):
        kind = "nested" if x.is_nested else name_of(x.layout)
        raise TypeError(f"{verb} got a {kind} tensor; give a dense one")
