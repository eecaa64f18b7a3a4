"""What is drawn: shapes, granularities, specs, tensors, and the arguments of most laws."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import functional_sq as fsq
from functional_sq.formats import REAL_DTYPES
from functional_sq.observer import Observer

__all__ = ["cases", "divisors", "granularities", "shapes", "specs", "tensors"]


def shapes(*, min_rank: int = 0, max_rank: int = 3, max_side: int = 6) -> SearchStrategy[tuple[int, ...]]:
    """Draw the shape of a tensor that has elements.

    Args:
        min_rank: least number of axes; 0 draws scalars too.
        max_rank: largest number of axes.
        max_side: largest size of an axis.

    Example:
        >>> from hypothesis import find
        >>> find(shapes(min_rank=2), lambda shape: shape[-1] > 3)
        (1, 4)
    """
    return st.lists(st.integers(1, max_side), min_size=min_rank, max_size=max_rank).map(tuple)


def granularities(shape: Sequence[int]) -> SearchStrategy[fsq.Granularity]:
    """Draw a granularity that applies to `shape`; each class, with every axis and divisor.

    Args:
        shape: shape of the tensor to quantize.

    Example:
        >>> from hypothesis import find
        >>> find(granularities((4, 6)), lambda g: g.stat_shape((4, 6)) == (4, 2))
        PerGroup(group_size=3)
    """
    return _granularities(tuple(shape))


@functools.cache
def _granularities(shape: tuple[int, ...]) -> SearchStrategy[fsq.Granularity]:
    blocks = st.tuples(*(st.sampled_from(divisors(n)) for n in shape)).map(fsq.PerBlock)
    if not shape:
        return st.one_of(st.just(fsq.PerTensor()), blocks)
    axes = st.integers(-len(shape), len(shape) - 1)
    groups = st.sampled_from(divisors(shape[-1])).map(fsq.PerGroup)
    return st.one_of(
        st.just(fsq.PerTensor()), st.just(fsq.PerToken()), axes.map(fsq.PerAxis), axes.map(fsq.PerRow), groups, blocks
    )


def specs(shape: Sequence[int], *, observer: Observer = fsq.MinMax()) -> SearchStrategy[fsq.QuantSpec]:  # noqa: B008
    """Draw a spec that applies to `shape`: any format, legal mapping, bounds, eps and dtypes.

    Scales are float32 or float64. In a 16-bit scale the laws of law 5 are false, and no
    implementation could make them true: the reciprocal of a bfloat16 scale is off by up to
    `2**-9`, and times a code of 255 that is half a step, so a code need not come back as itself.

    Args:
        shape: shape of the tensor to quantize.
        observer: the observer of every drawn spec.

    Example:
        >>> from hypothesis import find
        >>> find(specs((4, 6)), lambda spec: spec.bounds == (-127, 127))
        QuantSpec(torch.int8, PerTensor(), quant_min=-127)
    """

    return _specs(shape, observer)


def tensors(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    nonfinite: bool = False,
    exponents: tuple[int, int] | None = None,
) -> SearchStrategy[Tensor]:
    """Draw a tensor of real values that lie where quantization goes wrong.

    Ties at half a step of an 8-bit scale, 0.0 and -0.0, one sign only, subnormals, one value
    everywhere, the largest finite values, and ordinary values; many tensors join two such kinds,
    and half are not contiguous. Up to 8 elements are drawn one by one. A larger tensor is filled
    from 8 such elements and fractions of them, by a drawn seed: that is fast, and an example
    still shrinks to a small one.

    Args:
        shape: shape of the tensor.
        dtype: float32, float64, bfloat16 or float16. A float64 is not larger than the largest
            float32, so that a float32 state can hold it.
        nonfinite: whether NaN, inf and -inf are drawn too.
        exponents: `(e, f)` brings the magnitude of what is not 0 into `[2**e, 2**f]`.

    Example:
        >>> from hypothesis import find
        >>> find(tensors((2,)), lambda x: bool((x.abs() == torch.finfo(x.dtype).max).all()))
        tensor([3.4028e+38, 3.4028e+38])
    """
    return _tensors(shape, dtype, nonfinite, exponents)


def cases(
    observer: Observer, *, nonfinite: bool = False, dtypes: Sequence[torch.dtype] = REAL_DTYPES
) -> SearchStrategy[dict[str, Any]]:
    """Draw the arguments of most laws: `spec`, three `batches` of one shape, the `dtype` of states.

    Args:
        observer: the observer under test.
        nonfinite: whether batches hold NaN and Inf.
        dtypes: dtypes of batches. A state has the batches' own dtype or float32.

    Example:
        >>> from hypothesis import find
        >>> case = find(cases(fsq.MinMax()), lambda case: case["spec"].dtype == torch.uint4)
        >>> case["spec"], case["batches"], case["dtype"]
        (QuantSpec(torch.uint4, PerTensor()), (tensor(0.), tensor(0.), tensor(0.)), torch.float32)
    """

    return _cases(observer, nonfinite, dtypes)


# Composites are made once, at the top level: making one reads its source, which is slower than drawing. So is
# making any other strategy, and asking it for the first time what it is.


@st.composite
def _specs(draw: st.DrawFn, shape: Sequence[int], observer: Observer) -> fsq.QuantSpec:
    dtype = draw(_DTYPES)
    bounds, mappings = draw(_bounds(dtype))
    mapping = draw(mappings)
    return fsq.QuantSpec(
        dtype,
        draw(granularities(shape)),
        mapping=mapping,
        observer=observer,
        eps=draw(_EPS),
        scale_dtype=draw(_SCALES),
        zero_point_dtype=draw(_ZERO_POINTS),
        **bounds,
    )


@st.composite
def _tensors(
    draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, nonfinite: bool, exponents: tuple[int, int] | None
) -> Tensor:
    n = math.prod(shape)
    kinds = _elements(dtype, 2.0 ** draw(_EXPONENTS))
    constant = draw(_BOOLEANS) and draw(_BOOLEANS)
    size = 1 if constant else min(n, _ONE_BY_ONE)
    cut = size // draw(_CUTS)
    values: list[float] = []
    for part in (cut, size - cut):
        element, sign = kinds[draw(_KINDS)], draw(_SIGNS)
        values += [draw(element) * draw(sign) for _ in range(part)]
    if constant:
        values *= n
    elif n > size:
        values = _filled(values, n, runs=draw(_BOOLEANS), seed=draw(st.integers(0, 2**16)))
    if nonfinite and draw(_BOOLEANS):
        where, what = draw(st.integers(0, n - 1)), draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        values[where] = what
    if exponents is not None:
        values = [_limited(v, *exponents) for v in values]
    body = torch.tensor(values, dtype=torch.float64).to(dtype)
    if draw(_BOOLEANS):
        # The same values in another order of memory: strides that decrease from the right.
        return body.reshape(tuple(reversed(shape))).permute(tuple(reversed(range(len(shape)))))
    return body.reshape(tuple(shape))


@st.composite
def _cases(draw: st.DrawFn, observer: Observer, nonfinite: bool, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    shape = draw(_SHAPES)
    dtype = draw(st.sampled_from(dtypes))
    batch = tensors(shape, dtype, nonfinite=nonfinite)
    return {
        "spec": draw(specs(shape, observer=observer)),
        "batches": (draw(batch), draw(batch), draw(batch)),
        "dtype": draw(st.sampled_from([torch.float32, dtype])),
    }


_BOOLEANS: Final = st.booleans()
_EXPONENTS: Final = st.integers(-8, 8)
_CUTS: Final = st.sampled_from([1, 2, 4])
_SHAPES: Final = shapes()
_DTYPES: Final = st.sampled_from(list(fsq.FORMATS))
# float32's own; the smallest that is allowed; one that clamps ordinary data.
_EPS: Final = st.sampled_from([torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny, 0.25])
_SCALES: Final = st.sampled_from([torch.float32, torch.float64])
_ZERO_POINTS: Final = st.sampled_from([torch.int32, torch.float32])
_EITHER: Final = st.sampled_from([1.0, -1.0])
_SIGNS: Final = st.sampled_from([_EITHER, st.just(1.0), st.just(-1.0)])
# Ordinary values more often: only they have all bits of their mantissa, which shows sums that round.
_KINDS: Final = st.sampled_from(["ordinary"] * 3 + ["ties", "zeros", "subnormal", "huge"])
_ONE_BY_ONE: Final = 8


def divisors(n: int) -> list[int]:
    """Return the divisors of `n`, which are the block sizes along an axis of that size."""
    return [d for d in range(1, n + 1) if n % d == 0]


@functools.cache
def _bounds(dtype: torch.dtype) -> SearchStrategy[tuple[dict[str, int], SearchStrategy[fsq.MappingType]]]:
    """Draw bounds of a format, its own and for integers narrower ones, with the mappings that they allow."""
    low, high = fsq.FORMATS[dtype].bounds
    drawn: list[dict[str, int]] = [{}]
    if isinstance(low, int) and isinstance(high, int):
        narrower = [
            {"quant_min": low + 1},
            {"quant_max": high - 1},
            {"quant_min": low // 2, "quant_max": high // 2},
            {"quant_min": high - 1},
        ]
        drawn += [b for b in narrower if b.get("quant_min", low) < b.get("quant_max", high)]
    return st.sampled_from([(bounds, st.sampled_from(_mappings(dtype, bounds))) for bounds in drawn])


def _mappings(dtype: torch.dtype, bounds: Mapping[str, Any]) -> list[fsq.MappingType]:
    """Return the mappings that QuantSpec takes; it alone has the rule."""
    legal = []
    for mapping in fsq.MappingType:
        try:
            fsq.QuantSpec(dtype, fsq.PerTensor(), mapping=mapping, **bounds)
        except ValueError:
            continue
        legal.append(mapping)
    return legal


@functools.cache
def _elements(dtype: torch.dtype, step: float) -> dict[str, SearchStrategy[float]]:
    """Return the elements of each kind of tensor, without sign."""
    info = torch.finfo(dtype)
    top = min(info.max, torch.finfo(torch.float32).max)
    smallest = info.smallest_normal * info.eps
    # 127, 127.5 and 255 as the largest value make the step of an 8-bit scale a power of two, and
    # the other values then lie halfway between two codes.
    ties = [v * step for v in (0.5, 1.0, 1.5, 2.5, 3.5, 62.5, 126.5, 127.0, 127.5, 255.0)]
    return {
        "ordinary": st.integers(0, 2**24 - 1).map(lambda v: v * 2.0**-22 * step),  # an int shrinks faster than a float
        "ties": st.sampled_from(ties),
        "zeros": st.sampled_from([0.0, -0.0]),
        "subnormal": st.sampled_from([smallest, 3 * smallest, info.smallest_normal - smallest, info.smallest_normal]),
        "huge": st.sampled_from([top, top * (1 - info.eps), top / 2]),
    }


def _filled(values: Sequence[float], n: int, *, runs: bool, seed: int) -> list[float]:
    """Return `n` values or fractions of them, in runs (so that blocks differ) or mixed."""
    choose = random.Random(seed)
    bases = [values[i * len(values) // n] if runs else choose.choice(values) for i in range(n)]
    return [v * choose.choice((1.0, 1.0, choose.uniform(0, 1))) for v in bases]


def _limited(value: float, least: int, end: int) -> float:
    mantissa, exponent = math.frexp(value)
    return math.ldexp(mantissa, min(max(exponent, least + 1), end))
