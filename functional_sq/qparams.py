"""Quantization parameters, and how a range of real values becomes them: each formula once."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from functional_sq.formats import check_real

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["MappingType", "QParams", "check_qparams", "fixed_zero_point", "from_range"]


class MappingType(enum.Enum):
    """How a range `[lo, hi]` is laid over the codes `[qmin, qmax]`.

    The names and formulas are those of `torchao.quantization.MappingType`:

    * `SYMMETRIC`: `scale = max(-lo, hi) / ((qmax - qmin) / 2)`; 0 sits in the middle of the codes.
    * `SYMMETRIC_NO_CLIPPING_ERR`: `scale = max(lo / qmin, hi / qmax)`; uses the extra negative code
      of two's complement, so a range that ends at its negative side is not widened. Needs
      `qmin < 0 < qmax`.
    * `ASYMMETRIC`: the range, made to contain 0, is spread over all codes:
      `scale = (hi - lo) / (qmax - qmin)`, `zero_point = clamp(qmin - round(lo / scale), qmin, qmax)`.
      Integers only.

    Example:
        >>> import torch, functional_sq as fsq
        >>> for mapping in fsq.MappingType:
        ...     spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=mapping)
        ...     scale, zero_point = fsq.from_range(spec, torch.tensor([-128.0]), torch.tensor([63.5]))
        ...     print(mapping, round(scale.item(), 4), zero_point.item())
        MappingType.SYMMETRIC 1.0039 0
        MappingType.SYMMETRIC_NO_CLIPPING_ERR 1.0 0
        MappingType.ASYMMETRIC 0.751 42
    """

    SYMMETRIC = enum.auto()
    SYMMETRIC_NO_CLIPPING_ERR = enum.auto()
    ASYMMETRIC = enum.auto()

    def __repr__(self) -> str:
        return f"MappingType.{self.name}"


class QParams(NamedTuple):
    """What maps real values to codes: `q = round(x / scale) + zero_point`, limited to the codes.

    Unpacks as torchao's pair, `scale, zero_point = qp`, and is a pytree.

    Attributes:
        scale: positive; input units per step. Shape: the statistics' shape, of the tensor's rank.
        zero_point: the code of 0.0; the same shape. 0 everywhere for float8.

    Example: see `calc_qparams` and `quantize`.
    """

    scale: Tensor
    zero_point: Tensor


def check_qparams(qp: object) -> QParams:
    """Return a pair of tensors as QParams; TypeError if `qp` is none, ValueError unless they have one shape."""
    scale, zero_point = qp if isinstance(qp, tuple) and len(qp) == 2 else (None, None)
    if not (isinstance(scale, Tensor) and isinstance(zero_point, Tensor)):
        raise TypeError(f"qp is {qp!r}; give QParams(scale, zero_point), two tensors")
    if zero_point.shape != scale.shape:
        raise ValueError(
            f"the zero point has shape {tuple(zero_point.shape)} and the scale {tuple(scale.shape)}; they must be equal"
        )
    return QParams(scale, zero_point)


def fixed_zero_point(spec: QuantSpec) -> int | None:
    """Return the zero point that a symmetric mapping gives every block; None for ASYMMETRIC."""
    qmin, qmax = spec.bounds
    return None if spec.mapping is MappingType.ASYMMETRIC else int((qmax + qmin + 1) / 2)


def from_range(spec: QuantSpec, lo: Tensor, hi: Tensor) -> QParams:
    """Turn the range of each block into its scale and zero point.

    Arithmetic runs in the dtype of the range and is cast to `spec.scale_dtype` at the end, as in
    `torchao.quantization.choose_qparams_affine_with_min_max`. The bits are torchao's wherever its scale
    is finite, except that a 16-bit range does not round the middle of int16 codes. Where `hi - lo`
    overflows, each end is divided before the subtraction; a scale that is too large even so is the
    largest number of the range's dtype or of `scale_dtype`, whichever is less.

    Args:
        spec: the quantization; its `mapping`, bounds, `eps`, `scale_dtype` and `zero_point_dtype`
            are used.
        lo: smallest real value of each block, input units.
        hi: largest real value of each block; shape and dtype of `lo`.

    Raises:
        TypeError, ValueError: `lo` and `hi` are not real tensors of one shape and dtype.

    Returns:
        QParams of the shape of `lo`. `scale` is at least `spec.eps`; a range that is empty
        (`lo > hi`: nothing was seen) gives `eps` too.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
        >>> fsq.from_range(spec, torch.tensor([-1.0]), torch.tensor([1.55]))
        QParams(scale=tensor([0.0100]), zero_point=tensor([100], dtype=torch.int32))
    """
    from functional_sq.spec import check_spec  # which imports this file

    check_spec(spec)
    for name, end in (("lo", lo), ("hi", hi)):
        check_real(end, f"from_range ({name})")
    if lo.shape != hi.shape or lo.dtype != hi.dtype:
        raise ValueError(
            f"lo is {lo.dtype} of shape {tuple(lo.shape)} and hi {hi.dtype} of shape {tuple(hi.shape)}; "
            f"a range has two ends alike"
        )
    qmin, qmax = spec.bounds
    # A scale is positive and finite in the dtype of the range, and after the cast below.
    held, cast = torch.finfo(lo.dtype), torch.finfo(spec.scale_dtype)
    least = max(spec.eps, held.tiny * held.eps)
    largest = min(held.max, cast.max)
    zero = torch.zeros_like(lo)
    lo, hi = torch.minimum(lo, zero), torch.maximum(hi, zero)
    fixed = fixed_zero_point(spec)
    if fixed is None:
        width = hi - lo
        n = float(qmax - qmin)
        scale = torch.where(width.isinf(), _over(hi, n) - _over(lo, n), _over(width, n)).clamp(least, largest)
        zero_point = (qmin - torch.round(lo / scale)).clamp(qmin, qmax)
    else:
        if spec.mapping is MappingType.SYMMETRIC:
            scale = _over(torch.maximum(-lo, hi), float(qmax - qmin) / 2)
        else:
            scale = torch.maximum(_over(lo, float(qmin)), _over(hi, float(qmax)))
        scale = scale.clamp(least, largest)
        # Not in the dtype of the range, as torchao: a 16-bit float rounds the middle of 16-bit codes.
        zero_point = torch.full_like(scale, fixed, dtype=torch.int64)
    # Clamped once more as integers: a 16-bit bound rounds outwards in a 16-bit float range.
    zero_point = zero_point.to(torch.int64).clamp(int(qmin), int(qmax))
    return QParams(scale.to(spec.scale_dtype).clamp(max=cast.max), zero_point.to(spec.zero_point_dtype))


def _over(x: Tensor, n: float) -> Tensor:
    """Return `x / n`, rounded once on every device: CUDA multiplies by the reciprocal of a divisor that is a number."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) / torch.full((), n, dtype=wide, device=x.device)).to(x.dtype)
