"""Quantization written a second time, in numpy and ml_dtypes, from the formulas alone.

Nothing here imports torch or the package. Each arithmetic operation runs in the order and in the
dtype of the contract (DESIGN.md, "Numerics"), so results are compared in bits; block reductions
are loops over slices, not reshapes. A half (bfloat16, float16) operation is one in float32 whose
result is rounded, and float64 reaches a half or a float8 through float32: so IEEE hardware and
torch do it.

Arrays stand for tensors; a range, a scale and a zero point have the rank of what they belong to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[np.generic]

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Format:
    """The facts of a quantized dtype: its smallest and largest code and how a code is stored."""

    bits: int
    qmin: float
    qmax: float
    storage: np.dtype

    @property
    def is_float(self) -> bool:
        return self.storage.kind not in "iu"


def _format(bits: int, qmin: float, qmax: float, storage: DTypeLike) -> Format:
    return Format(bits, qmin, qmax, np.dtype(storage))


# Literals, not formulas: the package computes them.
FORMATS = {
    "uint1": _format(1, 0, 1, np.uint8),
    "uint2": _format(2, 0, 3, np.uint8),
    "uint3": _format(3, 0, 7, np.uint8),
    "uint4": _format(4, 0, 15, np.uint8),
    "uint5": _format(5, 0, 31, np.uint8),
    "uint6": _format(6, 0, 63, np.uint8),
    "uint7": _format(7, 0, 127, np.uint8),
    "uint8": _format(8, 0, 255, np.uint8),
    "int1": _format(1, -1, 0, np.int8),
    "int2": _format(2, -2, 1, np.int8),
    "int3": _format(3, -4, 3, np.int8),
    "int4": _format(4, -8, 7, np.int8),
    "int5": _format(5, -16, 15, np.int8),
    "int6": _format(6, -32, 31, np.int8),
    "int7": _format(7, -64, 63, np.int8),
    "int8": _format(8, -128, 127, np.int8),
    "int16": _format(16, -32768, 32767, np.int16),
    "float8_e4m3fn": _format(8, -448.0, 448.0, ml_dtypes.float8_e4m3fn),
    "float8_e5m2": _format(8, -57344.0, 57344.0, ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": _format(8, -240.0, 240.0, ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": _format(8, -57344.0, 57344.0, ml_dtypes.float8_e5m2fnuz),
}


# Arithmetic.


def cast(x: ArrayLike, dtype: DTypeLike) -> Array:
    """Round to a float `dtype`; float64 reaches anything narrower through float32."""
    x = np.asarray(x)
    with np.errstate(all="ignore"):
        return (x.astype(F32) if x.dtype == F64 and dtype != F64 else x).astype(dtype)


def promote(a: np.dtype, b: np.dtype) -> np.dtype:
    """Return the dtype in which values of two float dtypes are combined."""
    if a == b:
        return a
    return F64 if F64 in (a, b) else F32


def arithmetic(op: Callable[..., Array], dtype: np.dtype, *values: ArrayLike) -> Array:
    """Apply one operation and round once: in float32 for halves, else in `dtype` itself."""
    wide = F64 if dtype == F64 else F32
    with np.errstate(all="ignore"):
        return cast(op(*(np.asarray(v).astype(wide) for v in values)), dtype)


# Blocks: every slice of the tensor that shares one statistic.


def block_size(granularity: str, arg: object, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes of a block, as `torchao.quantization.observer.get_block_size` defines them."""
    rank = len(shape)
    if granularity == "PerTensor":
        return shape
    if granularity == "PerAxis":
        return tuple(1 if i == arg % rank else shape[i] for i in range(rank))
    if granularity == "PerRow":
        return tuple(shape[i] if i == arg % rank else 1 for i in range(rank))
    if granularity == "PerToken":
        return (1,) * (rank - 1) + shape[-1:]
    if granularity == "PerGroup":
        return (1,) * (rank - 1) + (arg,)
    if granularity == "PerBlock":
        return tuple(arg)
    raise AssertionError(granularity)


def blocks(shape: tuple[int, ...], size: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yield the index of each statistic and the slice of the tensor that it stands for."""
    counts = [n // b for n, b in zip(shape, size, strict=True)]
    for index in itertools.product(*map(range, counts)):
        yield index, tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, size, strict=True))


def min_max(x: Array, size: tuple[int, ...], dtype: np.dtype) -> tuple[Array, Array]:
    """Return the smallest and largest value of each block, in `dtype`; -0.0 counts as 0.0."""
    lo = np.empty([n // b for n, b in zip(x.shape, size, strict=True)], dtype)
    hi = np.empty_like(lo)
    for index, where in blocks(x.shape, size):
        values = x[where].astype(F64)
        # The 0 is added last: a small negative value may have rounded to -0.0.
        lo[index], hi[index] = (arithmetic(np.add, dtype, cast(v, dtype), 0.0) for v in (values.min(), values.max()))
    return lo, hi


def spread(stat: Array, shape: tuple[int, ...]) -> Array:
    """Repeat each statistic over its block."""
    for axis, n in enumerate(shape):
        stat = np.repeat(stat, n // stat.shape[axis], axis=axis)
    return stat


# The three formulas.


def qparams(
    lo: Array,
    hi: Array,
    *,
    mapping: str,
    qmin: float,
    qmax: float,
    eps: float = 2.0**-23,
    scale_dtype: np.dtype = F32,
    zero_point_dtype: DTypeLike = np.int32,
) -> tuple[Array, Array]:
    """Turn a range into scale and zero point, in the arithmetic of the range's dtype."""
    d = lo.dtype
    zero = np.zeros_like(lo)
    lo, hi = np.minimum(lo, zero), np.maximum(hi, zero)
    n = float(qmax - qmin)
    if mapping == "ASYMMETRIC":
        width = arithmetic(np.subtract, d, hi, lo)
        whole = arithmetic(np.divide, d, width, n)
        parts = arithmetic(np.subtract, d, arithmetic(np.divide, d, hi, n), arithmetic(np.divide, d, lo, n))
        scale = np.where(np.isinf(width), parts, whole)
    elif mapping == "SYMMETRIC":
        scale = arithmetic(np.divide, d, np.maximum(-lo, hi), n / 2)
    else:
        scale = np.maximum(arithmetic(np.divide, d, lo, qmin), arithmetic(np.divide, d, hi, qmax))
    # Positive and finite, in the dtype of the range and after the cast.
    least = max(eps, float(ml_dtypes.finfo(d).smallest_subnormal))
    largest = min(float(ml_dtypes.finfo(d).max), float(ml_dtypes.finfo(scale_dtype).max))
    scale = np.clip(scale, cast(least, d), cast(largest, d))
    if mapping == "ASYMMETRIC":
        below = arithmetic(np.rint, d, arithmetic(np.divide, d, lo, scale))
        # A number on the left of a tensor becomes one of its dtype first; on the right it does not.
        zero_point = np.clip(arithmetic(np.subtract, d, cast(qmin, d), below), cast(qmin, d), cast(qmax, d))
    else:
        zero_point = np.full(scale.shape, int((qmax + qmin + 1) / 2))
    # The bounds were rounded to the range's dtype above: 16-bit ones may be off in a half.
    zero_point = np.clip(zero_point.astype(F64), qmin, qmax).astype(zero_point_dtype)
    return np.minimum(cast(scale, scale_dtype), ml_dtypes.finfo(scale_dtype).max), zero_point


def quantize(x: Array, scale: Array, zero_point: Array, format: Format, *, qmin: float, qmax: float) -> Array:
    """Map real values to codes; one scale for each element after `spread`."""
    scale, zero_point = spread(scale, x.shape), spread(zero_point, x.shape)
    if format.is_float:
        d = promote(F32, scale.dtype)
        steps = arithmetic(np.divide, d, cast(x, F32), scale)
        return cast(np.clip(steps, np.array(qmin, d), np.array(qmax, d)), format.storage)
    d = promote(x.dtype, scale.dtype)
    steps = arithmetic(np.multiply, d, x, arithmetic(np.divide, scale.dtype, np.ones_like(scale), scale))
    steps = arithmetic(np.add, d, arithmetic(np.rint, d, steps), zero_point)
    return np.clip(steps.astype(F64), qmin, qmax).astype(format.storage)


def dequantize(q: Array, scale: Array, zero_point: Array, dtype: np.dtype = F32) -> Array:
    """Map codes to real values of `dtype`."""
    scale, zero_point = spread(scale, q.shape), spread(zero_point, q.shape)
    if q.dtype.kind not in "iu":
        return cast(arithmetic(np.multiply, promote(F32, scale.dtype), q.astype(F32), scale), dtype)
    exact = promote(dtype, F32) if q.dtype == np.int16 else dtype  # a half does not hold 16-bit codes
    steps = arithmetic(np.subtract, exact, cast(q.astype(F32), exact), cast(zero_point.astype(F64), exact))
    return cast(arithmetic(np.multiply, promote(exact, scale.dtype), steps, scale), dtype)


# float64, for bounds.


def edge(mapping: str, qmin: int, qmax: int) -> float:
    """Return how many steps, in exact arithmetic, the end of a range lies from its code; at least a half.

    In steps, a SYMMETRIC range ends at `n/2` both ways, and the zero point `int((qmax + qmin + 1) / 2)`
    moves it: `int` truncates towards 0, so codes that lie mostly below 0 lose a step at the top. An
    ASYMMETRIC zero point is rounded, which costs half a step. NO_CLIPPING ends at codes.
    """
    z, n = int((qmax + qmin + 1) / 2), qmax - qmin
    if mapping == "SYMMETRIC":
        return max(0.5, n / 2 + z - qmax, qmin + n / 2 - z)
    return 0.5


def error(x: Array, decoded: Array, scale: Array) -> NDArray[np.float64]:
    """Return `|x - decoded|` in steps, in float64."""
    return np.abs(x.astype(F64) - decoded.astype(F64)) / spread(scale.astype(F64), x.shape)


# Convolution.


def convolve(
    x: Array,
    w: Array,
    *,
    stride: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Array:
    """Return the sum of products over each window, in the dtype of `x`; padding is 0.

    `x` is (B, C, *space), `w` (N, C / groups, *kernel), the result (B, N, *size): one output position
    at a time, its window cut out by slices.
    """
    (n, per_group, *kernel), outputs = w.shape, w.shape[0] // groups
    terms = per_group * int(np.prod(kernel))
    x = np.pad(x, ((0, 0), (0, 0), *padding))
    extents = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sizes = [(a - e) // s + 1 for a, e, s in zip(x.shape[2:], extents, stride, strict=True)]
    y = np.zeros((len(x), n, *sizes), x.dtype)
    for index in itertools.product(*map(range, sizes)):
        axes = zip(index, stride, extents, dilation, strict=True)
        window = x[(..., *(slice(i * s, i * s + e, d) for i, s, e, d in axes))]
        for g in range(groups):
            rows = slice(g * outputs, (g + 1) * outputs)
            group = window[:, g * per_group : (g + 1) * per_group].reshape(len(x), terms)
            y[(slice(None), rows, *index)] = group @ w[rows].reshape(outputs, terms).T
    return y


def convolve_transposed(
    x: Array,
    w: Array,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Array:
    """Scatter each element of `x`, times the kernel, into the result, in the dtype of `x`; what is padding is cut off.

    `x` is (B, C, *space), `w` (C, N / groups, *kernel), as torch holds it, the result (B, N, *size).
    """
    (channels, per_group, *kernel), inputs = w.shape, w.shape[0] // groups
    axes = zip(x.shape[2:], kernel, stride, dilation, output_padding, strict=True)
    whole = [(a - 1) * s + d * (k - 1) + 1 + more for a, k, s, d, more in axes]
    y = np.zeros((len(x), per_group * groups, *whole), x.dtype)
    for c, index in itertools.product(range(channels), itertools.product(*map(range, x.shape[2:]))):
        for tap in itertools.product(*map(range, kernel)):
            where = tuple(i * s + t * d for i, s, t, d in zip(index, stride, tap, dilation, strict=True))
            rows = slice(c // inputs * per_group, (c // inputs + 1) * per_group)
            y[(slice(None), rows, *where)] += np.outer(x[(slice(None), c, *index)], w[(c, slice(None), *tap)])
    return y[(..., *(slice(p, n - p) for p, n in zip(padding, whole, strict=True)))]
