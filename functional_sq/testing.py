"""The laws that every observer and every spec obeys, as code that anyone can run on their own.

    from functional_sq.testing import check_convolution_backend, check_observer, check_product_backend
    check_observer(MyObserver())        # None, or one AssertionError with the smallest example of each failure
    check_product_backend(my_kernels)           # the same for a backend of functional_sq.backends
    check_convolution_backend(my_kernels)

A law is a function of a spec and of tensors that raises AssertionError, with the expression and the
values, where it does not hold. `LAWS` pairs each with the strategy of its arguments. Laws compare
bits: a NaN equals a NaN, 0.0 differs from -0.0. What has to be left out is said, with the
reason, in the docstring of the law.

Needs hypothesis: `pip install hypothesis`.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, Verbosity, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import functional_sq as fsq
from functional_sq.backends import Convolution, Product
from functional_sq.formats import REAL_DTYPES, Format
from functional_sq.int_mm import INT32_TERMS
from functional_sq.observer import Observer, State
from functional_sq.operands import Operands
from functional_sq.qparams import QParams
from functional_sq.requantize import ACTIVATIONS, apply_epilogue

__all__ = [
    "LAWS",
    "Law",
    "a_constant_is_represented",
    "assert_same_bits",
    "cases",
    "check_convolution_backend",
    "check_law",
    "check_observer",
    "check_product_backend",
    "codes_in_range_idempotent_monotone",
    "compiled_equals_eager",
    "convolution_is_exact",
    "each_block_is_represented",
    "granularities",
    "granularities_agree",
    "large_is_its_pieces",
    "masked_values_do_not_count",
    "merge_is_a_commutative_monoid",
    "observe_is_a_homomorphism",
    "observe_is_pure",
    "product_is_exact",
    "qparams_ignore_splits",
    "round_trips",
    "scale_equivariance",
    "shapes",
    "specs",
    "tensors",
    "unfit_states_are_faulty",
    "vmap_equals_loop",
    "zero_is_exact",
]


# Strategies: what to draw.


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
    blocks = st.tuples(*(st.sampled_from(_divisors(n)) for n in shape)).map(fsq.PerBlock)
    if not shape:
        return st.one_of(st.just(fsq.PerTensor()), blocks)
    axes = st.integers(-len(shape), len(shape) - 1)
    groups = st.sampled_from(_divisors(shape[-1])).map(fsq.PerGroup)
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


# Composites are made once, at the top level: making one reads its source, which is slower than drawing.


@st.composite
def _specs(draw: st.DrawFn, shape: Sequence[int], observer: Observer) -> fsq.QuantSpec:
    dtype = draw(st.sampled_from(list(fsq.FORMATS)))
    keywords: dict[str, Any] = dict(draw(st.sampled_from(_bounds(fsq.FORMATS[dtype]))))
    keywords["mapping"] = draw(st.sampled_from(_mappings(dtype, keywords)))
    return fsq.QuantSpec(
        dtype,
        draw(granularities(shape)),
        observer=observer,
        # float32's own; the smallest that is allowed; one that clamps ordinary data.
        eps=draw(st.sampled_from([torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny, 0.25])),
        scale_dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        zero_point_dtype=draw(st.sampled_from([torch.int32, torch.float32])),
        **keywords,
    )


@st.composite
def _tensors(
    draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, nonfinite: bool, exponents: tuple[int, int] | None
) -> Tensor:
    n = math.prod(shape)
    kinds = _elements(dtype, 2.0 ** draw(st.integers(-8, 8)))
    constant = draw(st.booleans()) and draw(st.booleans())
    size = 1 if constant else min(n, _ONE_BY_ONE)
    cut = draw(st.sampled_from([size, size // 2, size // 4]))
    values: list[float] = []
    for part in (cut, size - cut):
        element, sign = kinds[draw(_KINDS)], draw(_SIGNS)
        values += [draw(element) * draw(sign) for _ in range(part)]
    if constant:
        values *= n
    elif n > size:
        values = _filled(values, n, runs=draw(st.booleans()), seed=draw(st.integers(0, 2**16)))
    if nonfinite and draw(st.booleans()):
        where, what = draw(st.integers(0, n - 1)), draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        values[where] = what
    if exponents is not None:
        values = [_limited(v, *exponents) for v in values]
    body = torch.tensor(values, dtype=torch.float64).to(dtype)
    if draw(st.booleans()):
        # The same values in another order of memory: strides that decrease from the right.
        return body.reshape(tuple(reversed(shape))).permute(tuple(reversed(range(len(shape)))))
    return body.reshape(tuple(shape))


@st.composite
def _cases(draw: st.DrawFn, observer: Observer, nonfinite: bool, dtypes: Sequence[torch.dtype]) -> dict[str, Any]:
    shape = draw(shapes())
    dtype = draw(st.sampled_from(dtypes))
    batch = tensors(shape, dtype, nonfinite=nonfinite)
    return {
        "spec": draw(specs(shape, observer=observer)),
        "batches": (draw(batch), draw(batch), draw(batch)),
        "dtype": draw(st.sampled_from([torch.float32, dtype])),
    }


_SIGNS: Final = st.sampled_from([st.sampled_from([1.0, -1.0]), st.just(1.0), st.just(-1.0)])
# Ordinary values more often: only they have all bits of their mantissa, which shows sums that round.
_KINDS: Final = st.sampled_from(["ordinary"] * 3 + ["ties", "zeros", "subnormal", "huge"])
_ONE_BY_ONE: Final = 8


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _bounds(format: Format) -> list[dict[str, int]]:
    """Return the bounds to draw of a format: its own, and for integers narrower ones."""
    low, high = format.bounds
    if not (isinstance(low, int) and isinstance(high, int)):
        return [{}]
    narrower = [
        {"quant_min": low + 1},
        {"quant_max": high - 1},
        {"quant_min": low // 2, "quant_max": high // 2},
        {"quant_min": high - 1},
    ]
    return [{}] + [b for b in narrower if b.get("quant_min", low) < b.get("quant_max", high)]


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


# Assertions: how a failure reads.


def assert_same_bits(left: str, right: str, a: object, b: object) -> None:
    """Raise AssertionError unless two values have the same structure, dtypes, shapes and bits.

    A NaN equals any NaN; 0.0 differs from -0.0.

    Args:
        left: the expression that gave `a`.
        right: the expression that gave `b`.
        a: a tensor, or a dict or tuple of such; anything else is compared by `==`.
        b: what it is compared with.

    Example:
        >>> assert_same_bits("min(x)", "min(y)", torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
        Traceback (most recent call last):
        ...
        AssertionError: min(x) is not min(y), in 1 of 2 elements, first at (0,): 0.0 and -0.0
          min(x) = tensor([0.0, 1.0])
          min(y) = tensor([-0.0, 1.0])
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        _assert_same_tensor(left, right, a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        _require(a.keys() == b.keys(), f"{left} has the keys of {right}", **{left: sorted(a), right: sorted(b)})
        for key in a:
            assert_same_bits(f"{left}[{key!r}]", f"{right}[{key!r}]", a[key], b[key])
    elif isinstance(a, tuple) and type(a) is type(b) and len(a) == len(b):
        names = getattr(a, "_fields", None)
        for i, pair in enumerate(zip(a, b, strict=True)):
            field = f".{names[i]}" if names else f"[{i}]"
            assert_same_bits(left + field, right + field, *pair)
    else:
        _require(type(a) is type(b) and a == b, f"{left} == {right}", **{left: a, right: b})


def _assert_same_tensor(left: str, right: str, a: Tensor, b: Tensor) -> None:
    for what in ("dtype", "shape", "device"):
        ours, theirs = getattr(a, what), getattr(b, what)
        _require(
            ours == theirs,
            f"{left} has the {what} of {right}",
            **{f"{left}.{what}": _plain(ours), f"{right}.{what}": _plain(theirs)},
        )
    differ = _bits(a) != _bits(b)
    if a.is_floating_point():
        differ &= ~(a.isnan() & b.isnan())
    if not bool(differ.any()):
        return
    where = tuple(differ.nonzero()[0].tolist())
    first = f"first at {where}: {a[where].item()!r} and {b[where].item()!r}"
    raise AssertionError(
        f"{left} is not {right}, in {int(differ.sum())} of {differ.numel()} elements, {first}\n"
        f"  {left} = {_plain(a)}\n  {right} = {_plain(b)}"
    )


def _bits(x: Tensor) -> Tensor:
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(same_size[x.element_size()])


def _plain(value: object) -> str:
    """Return a value as text: tensors with all their digits, so that the text makes the same bits."""
    if isinstance(value, Tensor):
        dtype = "" if value.dtype in (torch.float32, torch.int64) else f", dtype={value.dtype}"
        return f"tensor({value.tolist()}{dtype})"
    if isinstance(value, torch.Size):
        return str(tuple(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_plain(v)}" for k, v in value.items()) + "}"
    if type(value) is tuple:
        return "(" + ", ".join(map(_plain, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def _require(holds: bool, expression: str, **values: object) -> None:
    """Raise AssertionError with the expression and the values in it, unless it holds."""
    if not holds:
        lines = [f"not so: {expression}"]
        lines += [f"  {name} = {value if isinstance(value, str) else _plain(value)}" for name, value in values.items()]
        raise AssertionError("\n".join(lines))


# Laws.


def merge_is_a_commutative_monoid(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that merging states is associative and commutative, with `init` as its identity.

    Neither part changes, and the observer's `table`, by which ranks merge, gives the same bits. An observer that
    depends on order says so: `merge` raises a TypeError that has the word "order".

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape; a state is recorded from each.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> merge_is_a_commutative_monoid(spec, (torch.ones(2), torch.zeros(2), torch.rand(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    a, b, c = (fsq.observe(spec, empty, x) for x in batches)
    if _depends_on_order(spec, empty):
        return
    merge, before = functools.partial(fsq.merge, spec), copy.deepcopy((empty, a, b, c))
    assert_same_bits("merge(init, a)", "a", merge(empty, a), a)
    assert_same_bits("merge(a, init)", "a", merge(a, empty), a)
    assert_same_bits("merge(init, init)", "init", merge(empty, empty), empty)
    assert_same_bits("merge(a, b)", "merge(b, a)", merge(a, b), merge(b, a))
    assert_same_bits("merge(merge(a, b), c)", "merge(a, merge(b, c))", merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same_bits("(init, a, b, c) after merges", "(init, a, b, c) before", (empty, a, b, c), before)
    merged = merge(a, b)
    known: dict[str, Callable[..., Tensor]] = {"min": torch.minimum, "max": torch.maximum, "sum": torch.add}
    for key, reduction in spec.observer.table.items():
        if reduction.name in known:
            by_name = known[reduction.name](a[key], b[key])
            assert_same_bits(f"merge(a, b)[{key!r}]", f"{reduction.name} of both, by its table", merged[key], by_name)


def observe_is_a_homomorphism(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that recording two batches, their concatenation, or each apart and merging is one.

    Batches are joined and cut along each axis that is reduced whole, where longer data has the same
    statistics: every axis for PerTensor, the last for PerToken, none for PerGroup. An observer that
    depends on order is left out: there the three are meant to differ.

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape; the first makes the state that the others add to.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> observe_is_a_homomorphism(spec, (torch.ones(2), torch.zeros(2), torch.rand(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    if _depends_on_order(spec, empty):
        return
    observe, merge = functools.partial(fsq.observe, spec), functools.partial(fsq.merge, spec)
    s, (a, b) = observe(empty, batches[0]), batches[1:]
    both = observe(observe(s, a), b)
    joined = "observe(observe(s, a), b)"
    assert_same_bits(joined, "observe(observe(s, b), a)", both, observe(observe(s, b), a))
    assert_same_bits(joined, "merge(observe(s, a), observe(init, b))", both, merge(observe(s, a), observe(empty, b)))
    for axis in _whole_axes(spec, a.shape):
        for first, second, text in ((a, b, "a, b"), (b, a, "b, a")):
            cat = torch.cat([first, second], axis)
            assert_same_bits(joined, f"observe(s, cat([{text}], {axis}))", both, observe(s, cat))
        once, n = observe(s, a), a.shape[axis]
        for at in (0, n // 2, n):
            parts = torch.split(a, [at, n - at], axis)
            text = f"observe(observe(s, p), q) with p, q = a.split([{at}, {n - at}], {axis})"
            assert_same_bits("observe(s, a)", text, once, observe(observe(s, parts[0]), parts[1]))


def qparams_ignore_splits(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that scales, zero points and codes do not depend on how data was ordered or sharded.

    An observer that depends on order is left out.

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qparams_ignore_splits(spec, (torch.ones(2), torch.zeros(2), torch.rand(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    if _depends_on_order(spec, empty):
        return
    a, b, c = (fsq.observe(spec, empty, x) for x in batches)
    expected = fsq.calc_qparams(spec, _seen(spec, empty, *batches))
    codes = fsq.quantize(spec, batches[0], expected)
    others = {
        "the batches in reverse": _seen(spec, empty, *reversed(batches)),
        "merge(a, merge(b, c))": fsq.merge(spec, a, fsq.merge(spec, b, c)),
        "merge(merge(c, a), b)": fsq.merge(spec, fsq.merge(spec, c, a), b),
    }
    for axis in _whole_axes(spec, batches[0].shape):
        others[f"cat(batches, {axis})"] = fsq.observe(spec, empty, torch.cat(list(batches), axis))
    for text, state in others.items():
        qp = fsq.calc_qparams(spec, state)
        assert_same_bits("calc_qparams(the batches in turn)", f"calc_qparams({text})", expected, qp)
        assert_same_bits("codes(the batches in turn)", f"codes({text})", codes, fsq.quantize(spec, batches[0], qp))


def masked_values_do_not_count(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, mask: Tensor, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that what `mask` leaves out is not seen, whatever it is, and that the rest is, once.

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape; the first two make a state, the third is masked.
        mask: bool, of the shape of the batches' leading axes.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> masked_values_do_not_count(spec, (torch.ones(2),) * 3, mask=torch.tensor([True, False]))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    s = _seen(spec, empty, *batches[:2])
    x = batches[2]
    observe = functools.partial(fsq.observe, spec, s)
    every, none = torch.ones_like(mask), torch.zeros_like(mask)
    assert_same_bits("observe(s, x, mask=every)", "observe(s, x)", observe(x, mask=every), observe(x))
    assert_same_bits("observe(s, x, mask=none)", "s", observe(x, mask=none), s)
    assert_same_bits("observe(init, x, mask=none)", "init", fsq.observe(spec, empty, x, mask=none), empty)
    left_out = ~mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    seen = observe(x, mask=mask)
    if not _depends_on_order(spec, s):
        rest = fsq.observe(spec, seen, x, mask=~mask)
        assert_same_bits("observe(observe(s, x, mask=mask), x, mask=~mask)", "observe(s, x)", rest, observe(x))
    for garbage in (0.0, torch.finfo(x.dtype).max, math.nan):
        y = x.masked_fill(left_out, garbage)
        text = f"observe(s, x with {garbage} where not mask, mask=mask)"
        assert_same_bits("observe(s, x, mask=mask)", text, seen, observe(y, mask=mask))


def observe_is_pure(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that `observe` keeps the form of the state, changes nothing and gives the same twice.

    Keys, shapes, dtypes and device stay; neither state nor data change, also not in `merge` and
    `calc_qparams`; a batch without elements adds nothing; new tensors are contiguous and share
    memory neither with the data nor with each other. `init` makes tensors of its own in each call, on
    the device and in the dtype that it is given, or a wider one; `count` is int64. `calc_qparams`
    reads by name: other keys, and their order, do not matter.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape.
        dtype: dtype of the states.

    Example:
        >>> observe_is_pure(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.ones(2), torch.zeros(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    _assert_made(spec, batches[0].shape, dtype, empty)
    state = empty
    for x in batches:
        old_state, old_x, old_tensors = copy.deepcopy(state), x.clone(), dict(state)
        new = fsq.observe(spec, state, x)
        assert_same_bits("s after observe(s, x)", "s before", state, old_state)
        assert_same_bits("x after observe(s, x)", "x before", x, old_x)
        replaced = [name for name in state if state[name] is not old_tensors[name]]
        _require(new is not state and not replaced, "observe(s, x) is a new dict and leaves s as it was", s=replaced)
        _assert_form(new, empty, x)
        assert_same_bits("observe(s, x)", "observe(s, x) again", new, fsq.observe(spec, state, x))
        nothing = x.new_empty((0, *x.shape[1:]))
        if x.ndim and 0 in _whole_axes(spec, x.shape):
            assert_same_bits("observe(s, x[:0])", "s", fsq.observe(spec, state, nothing), state)
        state = new
    before = copy.deepcopy((empty, state))
    qp = fsq.calc_qparams(spec, state)
    assert_same_bits("calc_qparams(s)", "calc_qparams(s) again", qp, fsq.calc_qparams(spec, state))
    more = {"of another observer": state["count"]} | dict(reversed(state.items()))
    assert_same_bits("calc_qparams(s)", "that of s in another order, with more in it", qp, fsq.calc_qparams(spec, more))
    if not _depends_on_order(spec, empty):
        _assert_form(fsq.merge(spec, state, state), empty, batches[0])
    assert_same_bits("(init, s) after calc_qparams and merge", "(init, s) before", (empty, state), before)


def vmap_equals_loop(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that `torch.vmap(partial(observe, spec))` gives what a loop gives, with masks and without.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, stacked to the batch that vmap runs over.
        dtype: dtype of the states.

    Example:
        >>> vmap_equals_loop(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.ones(2), torch.zeros(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    states = [_seen(spec, empty, *batches[:i]) for i in range(len(batches))]
    looped = [fsq.observe(spec, s, x) for s, x in zip(states, batches, strict=True)]
    mapped = torch.vmap(functools.partial(fsq.observe, spec))(_stack(states), torch.stack(list(batches)))
    assert_same_bits("vmap(observe)(states, xs)", "stack of observe(s, x)", mapped, _stack(looped))
    masks = torch.stack([x > 0 for x in batches])

    def masked(s: State, x: Tensor, mask: Tensor) -> State:
        return fsq.observe(spec, s, x, mask=mask)

    looped = [masked(*each) for each in zip(states, batches, masks, strict=True)]
    mapped = torch.vmap(masked)(_stack(states), torch.stack(list(batches)), masks)
    assert_same_bits("vmap(observe)(states, xs, masks)", "stack of observe(s, x, mask)", mapped, _stack(looped))


def compiled_equals_eager(
    spec: fsq.QuantSpec,
    batches: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "inductor",
) -> None:
    """Assert that compiled `observe` is one graph, compiled once for equal specs, with eager's bits.

    Forgets what torch has compiled in this process, before and after, to count from nothing.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, observed in turn.
        dtype: dtype of the states.
        backend: what compiles the graph whose bits are compared. "inductor" needs a C++ compiler,
            "aot_eager" does not.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> compiled_equals_eager(spec, (torch.ones(2), torch.zeros(2)), backend="aot_eager")
    """
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    torch.compiler.reset()
    try:
        for equal_spec in (spec, copy.deepcopy(spec)):
            counted = torch.compile(functools.partial(fsq.observe, equal_spec), fullgraph=True, backend=count)
            state = empty
            for x in batches:
                state = counted(state, x)
            _require(
                len(graphs) == 1,
                f"{len(batches)} batches, and then an equal spec, compile once",
                compilations=len(graphs),
            )
        compiled = torch.compile(functools.partial(fsq.observe, spec), fullgraph=True, backend=backend)
        state = empty
        for x in batches:
            eager = fsq.observe(spec, state, x)
            assert_same_bits(f"compile(observe, {backend!r})(s, x)", "observe(s, x)", compiled(state, x), eager)
            state = eager
    finally:
        torch.compiler.reset()


def round_trips(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that spec and state survive pickle, deepcopy, JSON, a file, and the spec its repr.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, observed in turn.
        dtype: dtype of the state.

    Example:
        >>> round_trips(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.ones(2), torch.zeros(2)))
    """
    from functional_sq.serialize import load, own_classes, save, spec_from_json, spec_to_json

    state = _seen(spec, fsq.init(spec, batches[0].shape, dtype=dtype), *batches)
    own = own_classes(spec)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calibration.safetensors")
        save(path, {"layer.0": (spec, state)})
        loaded = load(path, classes=own)
    _require(list(loaded) == ["layer.0"], "load(save({'layer.0': ...})) has that one layer", loaded=list(loaded))
    copies = {
        "pickle.loads(pickle.dumps((spec, s)))": pickle.loads(pickle.dumps((spec, state))),
        "copy.deepcopy((spec, s))": copy.deepcopy((spec, state)),
        "load(save((spec, s)))": loaded["layer.0"],
    }
    for text, pair in copies.items():
        assert_same_bits(f"{text}[1]", "s", pair[1], state)
    names = {name: getattr(fsq, name) for name in fsq.__all__}
    equals = {text: pair[0] for text, pair in copies.items()} | {
        "spec_from_json(spec_to_json(spec))": spec_from_json(spec_to_json(spec), classes=own),
        "eval(repr(spec))": eval(repr(spec), {"torch": torch, **{cls.__name__: cls for cls in own}, **names}),
    }
    for text, other in equals.items():
        _require(other == spec and hash(other) == hash(spec), f"{text} == spec, with its hash", other=other, spec=spec)


def zero_is_exact(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that `dequantize(quantize(0)) == 0`, whatever was observed.

    As values, not as bits: a float8 keeps the sign of -0.0.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, finite; zeros of their shape and dtype are quantized.
        dtype: dtype of the state.

    Example:
        >>> zero_is_exact(fsq.QuantSpec(torch.uint8, fsq.PerTensor()), (torch.ones(2), torch.zeros(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    for count in range(len(batches) + 1):
        qp = fsq.calc_qparams(spec, _seen(spec, empty, *batches[:count]))
        for zero in (0.0, -0.0):
            q = fsq.quantize(spec, torch.full_like(batches[0], zero), qp)
            for out in {torch.float32, batches[0].dtype}:
                y = fsq.dequantize(spec, q, qp, dtype=out)
                text = f"dequantize(quantize({zero}), dtype={out}) == 0"
                _require(bool((y == 0).all()), text, **qp._asdict(), codes=q, dequantized=y)


def codes_in_range_idempotent_monotone(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that codes stay in bounds, come back as themselves, and are ordered as the values are.

    Every code in use of an 8-bit format is dequantized and quantized again, with the qparams of
    every block; of a 16-bit format, the ends and each 251st. They are dequantized to float32: a
    bfloat16 has 8 bits, not enough to tell neighbouring codes apart after the multiplication. A
    code whose value is above the largest float32 (where the range ends near it) has no way back.
    Bounds and order are checked for the batches with 0, infinities and the largest floats.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, finite; all but the last are observed, all are quantized.
        dtype: dtype of the state.

    Example:
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor())
        >>> codes_in_range_idempotent_monotone(spec, (torch.ones(2), torch.zeros(2)))
    """
    x = batches[-1]
    qp = fsq.calc_qparams(spec, _seen(spec, fsq.init(spec, x.shape, dtype=dtype), *batches[:-1]))
    codes = fsq.quantize(spec, x, qp)
    _assert_come_back(spec, "quantize(x)", codes, qp)

    # Each block as a row, so that each meets every value; the same arithmetic, one call.
    rows = dataclasses.replace(spec, granularity=fsq.PerAxis(0))
    row_qp = QParams(qp.scale.reshape(-1, 1), qp.zero_point.reshape(-1, 1))
    blocks = row_qp.scale.numel()
    _assert_come_back(rows, "every code", _codes_in_use(spec).expand(blocks, -1), row_qp)
    top = torch.finfo(x.dtype).max
    ends = torch.tensor([-math.inf, -top, -0.0, 0.0, top, math.inf], dtype=x.dtype)
    values = torch.cat([ends, *(b.reshape(-1) for b in batches)]).sort().values
    q = fsq.quantize(rows, values.expand(blocks, -1), row_qp).to(torch.float32)
    low, high = spec.bounds
    outside = ~((q >= low) & (q <= high))
    _require(not bool(outside.any()), f"codes lie in [{low}, {high}]", **row_qp._asdict(), values=values, codes=q)
    falls = q.diff() < 0
    _require(not bool(falls.any()), "larger values have no smaller codes", **row_qp._asdict(), values=values, codes=q)


def scale_equivariance(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, exponent: int) -> None:
    """Assert that data times `2**k` gives scales times `2**k`, the same zero points and codes.

    It holds while nothing overflows, becomes subnormal or is raised to `eps`. So the state is
    float32 and `eps` is set to the smallest that is allowed, and magnitudes that are not 0 are to
    lie in `[2**-12, 2**12]`, `k` in -11 ... 11. A range of width 0 still gives `eps`, with any `k`.
    An observer that records no values (`Fixed`) has the same state for both, and then must give the
    same qparams.

    Args:
        spec: the quantization, with the observer under test; its `eps` is not used.
        batches: tensors of one shape, observed in turn; the first is quantized.
        exponent: the `k`.

    Example:
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor())
        >>> scale_equivariance(spec, (torch.ones(2), torch.zeros(2)), exponent=-3)
    """
    spec = dataclasses.replace(spec, eps=torch.finfo(torch.float32).tiny)
    factor = 2.0**exponent
    empty = fsq.init(spec, batches[0].shape)
    state, large = _seen(spec, empty, *batches), _seen(spec, empty, *(x * factor for x in batches))
    qp, large_qp = fsq.calc_qparams(spec, state), fsq.calc_qparams(spec, large)
    if all(torch.equal(_bits(state[name]), _bits(large[name])) for name in state):
        assert_same_bits("calc_qparams(s)", "calc_qparams(the same s)", qp, large_qp)
        return
    raised = qp.scale <= spec.eps
    expected = QParams(torch.where(raised, qp.scale, qp.scale * factor), qp.zero_point)
    names = (f"calc_qparams(observed x * 2**{exponent})", f"calc_qparams(observed x) * 2**{exponent}")
    assert_same_bits(*names, large_qp, expected)
    scaled = QParams(qp.scale * factor, qp.zero_point)
    codes = fsq.quantize(spec, batches[0], qp)
    large_codes = fsq.quantize(spec, batches[0] * factor, scaled)
    assert_same_bits(f"quantize(x * 2**{exponent}, scale * 2**{exponent})", "quantize(x, scale)", large_codes, codes)


def granularities_agree(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that granularities which name the same blocks give the same bits.

    PerToken, PerRow(-1), PerGroup(C) and PerBlock((1, C)); PerGroup(g) and PerBlock((1, g)); PerAxis
    and PerBlock; PerTensor, PerBlock of the whole shape, and PerAxis on an axis of size 1. And a
    per-tensor state is the same for data of any shape.

    Args:
        spec: the quantization, with the observer under test; its granularity is not used.
        batches: tensors of one shape, observed in turn; the first is quantized.
        dtype: dtype of the states.

    Example:
        >>> granularities_agree(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.ones(2, 3), torch.zeros(2, 3)))
    """

    def results(granularity: fsq.Granularity, xs: Sequence[Tensor]) -> dict[str, object]:
        same = dataclasses.replace(spec, granularity=granularity)
        state = _seen(same, fsq.init(same, xs[0].shape, dtype=dtype), *xs)
        qp = fsq.calc_qparams(same, state)
        return {"state": state, "qparams": qp, "codes": fsq.quantize(same, xs[0], qp)}

    # An axis of size 1 in front, for PerAxis(0) and for scalars.
    xs = [x.unsqueeze(0) for x in batches]
    shape = xs[0].shape
    ones, last = (1,) * (len(shape) - 1), shape[-1]
    equal: list[tuple[fsq.Granularity, fsq.Granularity]] = [
        (fsq.PerAxis(0), fsq.PerTensor()),
        (fsq.PerBlock(tuple(shape)), fsq.PerTensor()),
        (fsq.PerGroup(last), fsq.PerToken()),
        (fsq.PerRow(-1), fsq.PerToken()),
    ]
    equal += [(fsq.PerBlock((*ones, g)), fsq.PerGroup(g)) for g in _divisors(last)]
    equal += [
        (fsq.PerBlock(tuple(1 if i == axis else n for i, n in enumerate(shape))), fsq.PerAxis(axis))
        for axis in range(1, len(shape))
    ]
    for one, other in equal:
        assert_same_bits(repr(one), repr(other), results(one, xs), results(other, xs))
    per_tensor = dataclasses.replace(spec, granularity=fsq.PerTensor())
    empty = fsq.init(per_tensor, shape, dtype=dtype)
    flat = [x.reshape(-1) for x in xs]
    assert_same_bits(
        "a PerTensor state",
        "that of the flattened data",
        _seen(per_tensor, empty, *xs),
        _seen(per_tensor, empty, *flat),
    )


def large_is_its_pieces(spec: fsq.QuantSpec, *, rows: int, dtype: torch.dtype = torch.float32) -> None:
    """Assert that a tensor of any size counts its elements, and is recorded as its pieces are.

    An observer that depends on order has the first part alone to obey.

    Args:
        spec: the quantization, with the observer under test; its granularity reduces the first axis whole.
        rows: of a tensor of normal values `(rows, 3)`, which is cut into 16 pieces.
        dtype: dtype of the states.

    Example:
        >>> large_is_its_pieces(fsq.QuantSpec(torch.int8, fsq.PerTensor()), rows=2000)
    """
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
    empty = fsq.init(spec, x.shape, dtype=dtype)
    state = fsq.observe(spec, empty, x)
    counted = int(state["count"].sum())
    _require(counted == x.numel(), "the counts of a state sum to the elements", counted=counted, elements=x.numel())
    if _depends_on_order(spec, empty):
        return
    pieces = [fsq.observe(spec, empty, piece) for piece in x.tensor_split(16)]
    merged = functools.reduce(functools.partial(fsq.merge, spec), pieces)
    assert_same_bits("observe(init, x)", "the merge of its 16 pieces", state, merged)


def unfit_states_are_faulty(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that `fault` tells of a state that saw too little, and of one that saw a NaN or an Inf in any block.

    An observer whose range does not depend on data need not. One that leaves such values out or replaces them need
    not either, but then its state says so: it is another than that of the data without them, and than that of the
    data with a 0, a 1 or the largest value of either sign in their place.

    Args:
        spec: the quantization, with the observer under test.
        batches: three tensors of one shape, finite.
        dtype: dtype of the states.

    Example:
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> unfit_states_are_faulty(spec, (torch.ones(2), torch.zeros(2), torch.rand(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    if spec.observer.fault(empty, 1) is None:
        fixed = fsq.calc_qparams(spec, empty)
        for x in batches:
            qp = fsq.calc_qparams(spec, _seen(spec, empty, x))
            assert_same_bits("calc_qparams(observe(init, x))", "calc_qparams(init), which is not faulty", qp, fixed)
        return
    seen = fsq.observe(spec, empty, batches[0])
    few = int(seen["count"].max()) + 1
    _require(spec.observer.fault(seen, few) is not None, f"less than {few} values in a block are a fault", s=seen)
    top = torch.finfo(batches[0].dtype).max
    for place, value in ((0, math.nan), (-1, math.nan), (0, math.inf), (-1, -math.inf)):
        there = torch.zeros(batches[0].shape, dtype=torch.bool)
        there.view(-1)[place] = True
        x = batches[0].masked_fill(there, value)
        seen = fsq.observe(spec, empty, x)
        if spec.observer.fault(seen, 1) is not None:
            continue
        hidden = {"it masked": fsq.observe(spec, empty, x, mask=~there)}
        for finite in (0.0, 1.0, top, -top):
            hidden[f"{finite} in its place"] = fsq.observe(spec, empty, x.masked_fill(there, finite))
        for text, other in hidden.items():
            told = any(not torch.equal(_bits(seen[name]), _bits(other[name])) for name in seen)
            _require(told, f"{value} is a fault, or the state is another than with {text}", x=x, s=seen)


def a_constant_is_represented(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that where one value was seen, of either sign, it has a code that stands for it within an eighth.

    An observer whose range does not depend on data need not.

    Args:
        spec: the quantization, of 8 bits, with the observer under test.
        batches: tensors of one element that is not 0, within `[2**-12, 2**12]`.
        dtype: dtype of the states.

    Example:
        >>> a_constant_is_represented(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.tensor([-3.0]),))
    """
    for one in batches:
        x = one.expand(4, 3).contiguous()
        empty = fsq.init(spec, x.shape, dtype=dtype)
        if spec.observer.fault(empty, 1) is None:
            return
        qp = fsq.calc_qparams(spec, _seen(spec, empty, x, x))
        y = fsq.dequantize(spec, fsq.quantize(spec, x, qp), qp)
        near = (y - x).abs() <= x.abs() / 8
        _require(bool(near.all()), "dequantize(quantize(x)) is near to x", **qp._asdict(), x=x, dequantized=y)


def each_block_is_represented(spec: fsq.QuantSpec, *, columns: int, dtype: torch.dtype = torch.float32) -> None:
    """Assert that rows of very different sizes have ranges of their own that are fit to be used.

    The rows are normal values times `2**-9`, 1, `2**5` and `2**10`. The state has no fault. Of each row,

    * the range has a width: `lo < hi`;
    * the squared error is below the signal, the sum of the values' own squares. 0 is a code, so a value with its
      nearest code, or limited by the range, errs by no more than itself, and the sums are equal only where all
      become 0. So a range passes however much it clips, and fails if it is not finite, or too wide for any value;
    * scale and zero point are those of the row alone, per tensor.

    An observer whose range does not depend on data need not.

    Args:
        spec: the quantization, of 8 bits and one scale for each row, with the observer under test.
        columns: values in each of the four rows.
        dtype: dtype of the states.

    Example:
        >>> each_block_is_represented(fsq.QuantSpec(torch.int8, fsq.PerAxis(0)), columns=50)
    """
    sizes = torch.tensor([[2.0**-9], [1.0], [2.0**5], [2.0**10]])
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(columns)) * sizes
    empty = fsq.init(spec, x.shape, dtype=dtype)
    if spec.observer.fault(empty, 1) is None:
        return
    state = fsq.observe(spec, empty, x)
    fault = spec.observer.fault(state, 1)
    _require(fault is None, "a state that saw normal values has no fault", fault=str(fault))
    lo, hi = spec.observer.range(spec, state)
    _require(bool((lo < hi).all()), "lo < hi of each row", lo=lo, hi=hi)
    qp = fsq.calc_qparams(spec, state)
    y = fsq.dequantize(spec, fsq.quantize(spec, x, qp), qp)
    signal, error = (v.double().square().sum(-1) for v in (x, y - x))
    _require(bool((error < signal).all()), "error < signal of each row", **qp._asdict(), error=error, signal=signal)
    alone = dataclasses.replace(spec, granularity=fsq.PerTensor())
    for i, row in enumerate(torch.split(x, 1)):
        own = fsq.calc_qparams(alone, fsq.observe(alone, fsq.init(alone, row.shape, dtype=dtype), row))
        assert_same_bits(f"qparams of row {i}", "those of the row alone", QParams(*(v[i : i + 1] for v in qp)), own)


def product_is_exact(
    backend: Product,
    *,
    rows: int,
    k: int,
    n: int,
    zero_point: int,
    fill: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = None,
    residual: bool = False,
    strided: bool = False,
    asymmetric: bool = False,
    activation: str | None = None,
    step: float = 0.25,
    device: torch.device | str = "cpu",
) -> None:
    """Assert that a backend sums exactly, and then rounds as `linear` does.

    `sum_k (q - zero_point) (w - weight_zero_point)` is converted to float32 once, scaled, the bias and the residual
    are added, each rounded to float32, and the result is rounded to `dtype`. Codes that the backend makes are the
    nearest, or within a 32nd of the border of two. Weight, scale, bias and zero point are what they are at the call,
    also if they were written to after another. Nothing of that is written to by the backend, nor a result that it gave
    before. It supports int8 codes alone, and is asked without their values, as where a graph is traced.

    Args:
        backend: what is under test.
        rows, k, n: sizes; `(rows, k)` codes of `backend.CODES` meet `(n, k)` of int8.
        zero_point: that of the activations, as codes of uint8.
        fill: "all": codes are drawn among all, "ends": among the two at the ends, "far": near those that make the
            largest sums.
        seed: of what is drawn.
        dtype: of the result.
        bias: its dtype, if there is one.
        residual: whether there is one, in `dtype`; `(1, rows, n)`.
        strided: whether scale and bias are every second element of a tensor, and the residual is transposed.
        asymmetric: whether the weight has zero points, for a backend that supports them.
        activation: a key of `ACTIVATIONS`; codes are compared too, if the backend makes them after it.
        step: their scale; a 32nd of it is one too.
        device: where the backend multiplies. What is right is computed on the CPU.

    Example:
        >>> from functional_sq import onednn
        >>> if onednn.AVAILABLE:
        ...     product_is_exact(onednn, rows=3, k=2000, n=5, zero_point=255, fill="far", seed=0, bias=torch.float32)
    """
    draw = torch.Generator().manual_seed(seed)
    q, w = (t.to(device) for t in _drawn_codes(draw, (rows, k), (n, k), fill, zero_point, seed))
    z = torch.tensor([zero_point], dtype=torch.int32, device=device)
    of_weight = torch.randint(-128, 128, (n,), generator=draw).to(device, torch.int32) if asymmetric else None

    def real() -> Tensor:
        """Return the weight less its zero points."""
        return w.cpu().double() - (0 if of_weight is None else of_weight.cpu()[:, None])

    def sums() -> Tensor:
        return ((q.cpu().double() - z.cpu()) @ real().t()).long()  # exact below 2**53

    total = sums()
    scale, b = _drawn_epilogue(draw, n, bias, strided, device, _largest(activation, total))
    _assert_asked(backend, w, of_weight, backend.rows, range)
    results = []
    for written_to in ("nothing", "codes", "the rest"):
        _write(written_to, w, z, scale, b)
        total = sums()
        offset = ((z.cpu().long() - 128) * real().sum(1).long()).to(_offset_dtype(k)).to(device)
        operands = Operands(*_given(backend, q, z), w, of_weight, scale, offset, b)
        results.append(_assert_rounded(backend, backend.product, operands, total, dtype, activation, step))
        if residual:
            added = torch.randn(n, rows, generator=draw).t() if strided else torch.randn(rows, n, generator=draw)
            added = added.to(device, dtype)[None]
            before, of_scale, of_bias = _on_cpu(added, scale, b)
            right = apply_epilogue(total[None], of_scale, of_bias, dtype, before)
            assert_same_bits("plus(residual, ...)", "exact", backend.plus(added, operands).cpu(), right)
            assert_same_bits("residual after the call", "residual", added.cpu(), before)
    _assert_kept(results)


def convolution_is_exact(
    backend: Convolution,
    *,
    images: int,
    size: Sequence[int],
    channels: int,
    outputs: int,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    zero_point: int,
    fill: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = None,
    strided: bool = False,
    last: bool = True,
    activation: str | None = None,
    step: float = 0.25,
    device: torch.device | str = "cpu",
) -> None:
    """Assert that a backend sums windows exactly, and then rounds as `conv` does: as `product_is_exact`.

    Args:
        backend: what is under test.
        images, size: how many images, and their height and width.
        channels, outputs, groups: of each group, and how many groups: `(images, groups * channels, *size)` codes of
            `backend.CODES` meet `(groups * outputs, channels, *kernel)` of int8.
        kernel: along height and width, or along the width alone.
        stride, dilation: along height and width.
        padding: above, below, left and right; what is there has the code `zero_point`.
        zero_point, fill, seed, dtype, bias, strided, activation, step, device: as `product_is_exact`.
        last: whether the channels of the images lie last in memory, as those that `conv` gives.

    Example:
        >>> from functional_sq import onednn, onednn_conv
        >>> geometry = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 0, 1, 0), "dilation": (1, 1)}
        >>> layer = {"channels": 8, "outputs": 4, "groups": 2, **geometry}
        >>> if onednn.AVAILABLE:
        ...     convolution_is_exact(onednn_conv, images=2, size=(7, 6), **layer, zero_point=3, fill="all", seed=0)
    """
    draw = torch.Generator().manual_seed(seed)
    n = groups * outputs
    shapes = (images, groups * channels, *size), (n, channels, *kernel)
    q, w = (t.to(device) for t in _drawn_codes(draw, *shapes, fill, zero_point, seed))
    z = torch.tensor([zero_point], dtype=torch.int32, device=device)
    if last:
        q = q.contiguous(memory_format=torch.channels_last)
    above, below, left, right = padding

    def sums() -> Tensor:
        # Sums of float64 are exact below 2**53, in any order.
        wide = F.pad(q.cpu().double() - z.cpu(), (left, right, above, below))
        rows = w.cpu().double().reshape(*w.shape[:2], *(1 for _ in range(4 - w.ndim)), *kernel)
        return F.conv2d(wide, rows, None, tuple(stride), 0, tuple(dilation), groups).long().movedim(1, -1)

    total = sums()
    scale, b = _drawn_epilogue(draw, n, bias, strided, device, _largest(activation, total))

    def windows(codes: Tensor, zero_point: Tensor | None) -> int:
        along = len(kernel)
        return backend.least_windows(codes, stride[-along:], dilation[-along:], groups)

    def convolved(operands: Operands, *then: Any, **to: Any) -> Tensor:
        return backend.convolve(operands, stride, padding, dilation, groups, *then, **to).movedim(1, -1)

    _assert_asked(backend, w, None, windows, int)
    results = []
    for written_to in ("nothing", "codes", "the rest"):
        _write(written_to, w, z, scale, b)
        offset = (z.long() - 128) * w.flatten(1).sum(1, dtype=torch.int64)
        operands = Operands(*_given(backend, q, z), w, None, scale, offset.to(_offset_dtype(w[0].numel())), b)
        results.append(_assert_rounded(backend, convolved, operands, sums(), dtype, activation, step))
    _assert_kept(results)


def _write(what: str, codes: Tensor, zero_point: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Write to what a backend was given before, as `load_state_dict` does."""
    if what == "codes":
        codes.bitwise_not_()
    elif what == "the rest":
        zero_point.neg_().add_(255)
        scale.mul_(0.75)
        if bias is not None:
            bias.neg_()


def _offset_dtype(k: int) -> torch.dtype:
    """Return the dtype of what `epilogue` subtracts from sums of so many products."""
    return torch.int32 if k <= INT32_TERMS else torch.int64


def _assert_asked(
    backend: Product | Convolution, codes: Tensor, zero_point: Tensor | None, ask: Callable[..., Any], kind: type
) -> None:
    """Assert that a backend says what it takes: int8 alone, and by shapes, dtypes and devices alone."""
    floats = codes.to(torch.float8_e4m3fn)
    _require(not backend.supports(floats, None), "codes of float8 are not supported", shape=floats.shape)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = mode.from_tensor(codes), None if zero_point is None else mode.from_tensor(zero_point)
        try:
            traced = (backend.supports(*given), ask(*given))
        except Exception as error:
            raise AssertionError("not so: it is asked without values, as where a graph is traced") from error
    answers = (backend.supports(codes, zero_point), ask(codes, zero_point))
    _require(isinstance(answers[1], kind), f"the least work is told by a {kind.__name__}", answer=str(answers[1]))
    _require(answers == traced, "the answers are those without values", answers=answers, without=traced)


def _assert_kept(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Assert that no call wrote to the result of one before."""
    for i, (y, right) in enumerate(results):
        assert_same_bits(f"result of call {i} after the others", "exact", y.cpu(), right)


def _given(backend: Product | Convolution, q: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of uint8, and their zero point, as those that a backend takes."""
    return (q, z) if backend.CODES is torch.uint8 else ((q ^ 128).view(torch.int8), z - 128)


def _drawn_codes(
    draw: torch.Generator, of_q: tuple[int, ...], of_w: tuple[int, ...], fill: str, zero_point: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return codes of activations and of a weight."""

    def codes(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype, *, upper: bool) -> Tensor:
        if fill == "ends":
            return torch.where(torch.rand(shape, generator=draw) < 0.5, low, high).to(dtype)
        if fill == "far":
            low, high = (high - 63, high) if upper else (low, low + 63)
        return torch.randint(low, high + 1, shape, generator=draw).to(dtype)

    q = codes(0, 255, of_q, torch.uint8, upper=zero_point < 128)
    return q, codes(-128, 127, of_w, torch.int8, upper=seed % 2 > 0)


def _drawn_epilogue(
    draw: torch.Generator, n: int, bias: torch.dtype | None, strided: bool, device: torch.device | str, largest: float
) -> tuple[Tensor, Tensor | None]:
    """Return scales, with which the largest sum is 1/4 to 16, and a bias of some dtype, or none."""
    step = 2 if strided else 1
    scale = (torch.exp2(torch.rand(n * step, generator=draw) * 6 - 2) / largest).to(device)[::step]
    return scale, None if bias is None else torch.randn(n * step, generator=draw).to(device, bias)[::step]


def _largest(activation: str | None, sums: Tensor) -> float:
    """Return what sums are scaled by: with an activation the largest of them, so that they lie where it bends."""
    return 1024.0 if activation is None or sums.numel() == 0 else max(1.0, float(sums.abs().max()))


def _on_cpu(*tensors: Tensor | None) -> list[Any]:
    """Return copies that nothing writes to."""
    return [None if t is None else t.detach().cpu().clone() for t in tensors]


def _assert_rounded(
    backend: Product | Convolution,
    call: Callable[..., Tensor],
    operands: Operands,
    total: Tensor,
    dtype: torch.dtype,
    activation: str | None,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Assert that `call(operands, ...)` is the epilogue of exact sums `(..., N)`, and nearest codes of an activation.

    Return the result in `dtype` as it came, and what is right.
    """
    device, before = operands.scale.device, _on_cpu(*operands)
    scale, bias = _on_cpu(operands.scale, operands.bias)

    def called(*then: Any, **to: Any) -> Tensor:
        y = call(operands, *then, **to)
        for name, after, old in zip(operands._fields, _on_cpu(*operands), before, strict=True):
            assert_same_bits(f"operands.{name} after the call", f"operands.{name}", after, old)
        return y

    y, right = called(dtype=dtype), apply_epilogue(total, scale, bias, dtype)
    assert_same_bits("result", "exact", y.cpu(), right)
    if activation is None:
        return y, right
    to_scale = torch.tensor([step])
    spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
    for other, scales in (
        (fsq.QuantSpec(torch.int8, fsq.PerTensor(), quant_min=-127), to_scale),
        (dataclasses.replace(spec, quant_max=15), to_scale),
        (spec, torch.ones(2)),
    ):
        asked = backend.requantizes(other, scales, activation)
        _require(not asked, "codes are made of one scale and all 8 bits alone", spec=other, scale=scales)
    if not backend.requantizes(spec, to_scale, activation):
        return y, right
    exact = ACTIVATIONS[activation](apply_epilogue(total, scale, bias, torch.float32).double())
    shift = 0 if backend.CODES is torch.uint8 else 128
    for each, zero in ((to_scale, 100), (to_scale / 32, 200)):
        to_zero_point = torch.tensor([zero - shift], dtype=torch.int32, device=device)
        codes = called(activation, each.to(device), to_zero_point).cpu()
        _require(codes.dtype is backend.CODES, "codes have the backend's dtype", dtype=str(codes.dtype))
        steps = (exact / each + zero).clamp(0, 255)
        _require(codes.shape == steps.shape, "the result has its shape", shape=codes.shape, right=steps.shape)
        # A sum of terms of up to 20, each rounded to float32, is off by less than 2**-7 of the smallest step, and
        # polynomials in place of activations by as much.
        off = (codes.double() + shift - steps).abs()
        near = bool((off <= 0.5 + 2**-5).all())
        _require(near, "codes are the nearest, or at the border of two", codes=codes, steps=steps - shift)
    return y, right


def _seen(spec: fsq.QuantSpec, state: State, *batches: Tensor) -> State:
    for x in batches:
        state = fsq.observe(spec, state, x)
    return state


def _stack(states: Sequence[State]) -> State:
    return {name: torch.stack([s[name] for s in states]) for name in states[0]}


def _depends_on_order(spec: fsq.QuantSpec, empty: State) -> bool:
    """Return whether merge says that the observer depends on order; another TypeError is a failure."""
    try:
        fsq.merge(spec, empty, empty)
    except TypeError as error:
        _require("order" in str(error), 'the TypeError of merge gives its reason, with the word "order"', error=error)
        return True
    return False


def _whole_axes(spec: fsq.QuantSpec, shape: Sequence[int]) -> list[int]:
    """Return the axes along which more data has the same statistics: reduced, and as a whole."""
    stat_shape = spec.granularity.stat_shape(shape)
    whole = []
    for axis, n in enumerate(shape):
        # A PerBlock or PerGroup whose block is the axis reduces it too, but not when it is longer.
        longer = [*shape[:axis], 2 * n, *shape[axis + 1 :]]
        try:
            same = spec.granularity.stat_shape(longer) == stat_shape
        except ValueError:
            same = False
        if same:
            whole.append(axis)
    return whole


def _assert_made(spec: fsq.QuantSpec, shape: torch.Size, dtype: torch.dtype, state: State) -> None:
    """Assert that `init` makes tensors of its own, as it is asked to."""
    again, elsewhere = (fsq.init(spec, shape, dtype=dtype, device=device) for device in (None, "meta"))
    for name, value in state.items():
        right = torch.int64 if name == "count" else torch.promote_types(value.dtype, dtype)
        if name == "count" or value.is_floating_point():
            _require(value.dtype is right, f"{name!r} of init(..., dtype={dtype}) is {right}", found=str(value.dtype))
        apart = value.untyped_storage().data_ptr() != again[name].untyped_storage().data_ptr()
        _require(apart or value.numel() == 0, f"{name!r} of two calls of init shares no memory")
        _require(elsewhere[name].is_meta, f"{name!r} of init(..., device) is there", found=str(elsewhere[name].device))


def _assert_form(new: State, old: State, x: Tensor) -> None:
    _require(new.keys() == old.keys(), "a new state has the keys of the old", new=sorted(new), old=sorted(old))
    memory = {x.untyped_storage().data_ptr(): "x"}
    for name, value in new.items():
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(value, what), getattr(old[name], what)
            _require(
                ours == theirs,
                f"{name!r} of a new state has the {what} of the old",
                new=_plain(ours),
                old=_plain(theirs),
            )
        _require(value.is_contiguous(), f"{name!r} of a new state is contiguous", strides=value.stride())
        where = value.untyped_storage().data_ptr()
        _require(where not in memory, f"{name!r} of a new state shares no memory with {memory.get(where)}")
        memory[where] = repr(name)


def _assert_come_back(spec: fsq.QuantSpec, text: str, q: Tensor, qp: QParams) -> None:
    y = fsq.dequantize(spec, q, qp)
    again = torch.where(y.isinf(), q, fsq.quantize(spec, y, qp))
    assert_same_bits(f"quantize(dequantize({text}))", text, again, q)


def _codes_in_use(spec: fsq.QuantSpec) -> Tensor:
    storage, (low, high) = spec.format.storage, spec.bounds
    if storage.itemsize == 1:
        codes = torch.arange(256).to(torch.uint8).view(storage)
    else:
        codes = torch.tensor([*range(int(low), int(high) + 1, 251), int(high)], dtype=storage)
    values = codes.to(torch.float32)
    return codes[(values >= low) & (values <= high)]  # a comparison with NaN is false


# The suite: each law with its cases.


@dataclass(frozen=True)
class Law:
    """A law and how to draw its arguments.

    Attributes:
        holds: the function that raises AssertionError where the law does not hold.
        cases: from what is under test, an observer or a backend, to the strategy of the keyword arguments of `holds`.
        max_examples: limit on the number of cases, for a law that is slow to check.
    """

    holds: Callable[..., None]
    cases: Callable[[Any], SearchStrategy[dict[str, Any]]]
    max_examples: int | None = None


@st.composite
def _with_mask(draw: st.DrawFn, observer: Observer) -> dict[str, Any]:
    case = draw(cases(observer, nonfinite=True))
    shape = case["batches"][0].shape
    leading = tuple(shape[: draw(st.integers(0, len(shape)))])
    n = math.prod(leading)
    keep = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return case | {"mask": torch.tensor(keep, dtype=torch.bool).reshape(leading)}


@st.composite
def _with_exponent(draw: st.DrawFn, observer: Observer) -> dict[str, Any]:
    shape = draw(shapes())
    # Values and their multiples lie within 2**-24 ... 2**24, where the bins of a histogram end. Not
    # float16: that is outside it.
    batch = tensors(shape, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])), exponents=(-12, 12))
    return {
        "spec": draw(specs(shape, observer=observer)),
        "batches": (draw(batch), draw(batch), draw(batch)),
        "exponent": draw(st.integers(-11, 11)),
    }


def _large_cases(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    """Return a few fixed cases: less and more than what a cache, or a piece of an observer, holds."""
    granularities = fsq.PerTensor(), fsq.PerAxis(-1)
    specs = [fsq.QuantSpec(torch.int8, granularity, observer=observer) for granularity in granularities]
    return st.sampled_from([{"spec": spec, "rows": rows} for rows in (2_000, 40_000, 130_000) for spec in specs])


@st.composite
def _constants(draw: st.DrawFn, observer: Observer) -> dict[str, Any]:
    kinds = [(torch.int8, fsq.MappingType.SYMMETRIC), (torch.uint8, fsq.MappingType.ASYMMETRIC)]
    kinds.append((torch.float8_e4m3fn, fsq.MappingType.SYMMETRIC))
    dtype, mapping = draw(st.sampled_from(kinds))
    value = draw(st.floats(2.0**-12, 2.0**12, width=32)) * draw(st.sampled_from([1.0, -1.0]))
    granularity = draw(st.sampled_from([fsq.PerTensor(), fsq.PerAxis(-1)]))
    return {
        "spec": fsq.QuantSpec(dtype, granularity, mapping=mapping, observer=observer),
        "batches": (torch.tensor([value]),),
    }


def _rows(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    """Return a few fixed cases, one for each kind of format and mapping."""
    kinds = [
        (torch.int8, fsq.MappingType.SYMMETRIC),
        (torch.uint8, fsq.MappingType.ASYMMETRIC),
        (torch.float8_e4m3fn, fsq.MappingType.SYMMETRIC),
    ]
    specs = [fsq.QuantSpec(dtype, fsq.PerAxis(0), mapping=mapping, observer=observer) for dtype, mapping in kinds]
    return st.sampled_from([{"spec": spec, "columns": 200} for spec in specs])


def _compiled_cases(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    """Return a few fixed cases: a compilation takes too long for drawn ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 6, generator=generator)
    x[0, 0, 0] = -0.0
    return st.sampled_from(
        [
            {
                "spec": fsq.QuantSpec(
                    torch.uint8, fsq.PerAxis(-1), mapping=fsq.MappingType.ASYMMETRIC, observer=observer
                ),
                "batches": tuple(x),
                "backend": "inductor",
            },
            {
                "spec": fsq.QuantSpec(torch.int8, fsq.PerGroup(3), observer=observer),
                "batches": tuple(x.to(torch.bfloat16)),
                "backend": "aot_eager",
            },
            {
                "spec": fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor(), observer=observer),
                "batches": tuple(x.transpose(1, 2)),
                "dtype": torch.float64,
                "backend": "aot_eager",
            },
        ]
    )


def _finite(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    return cases(observer)


def _any(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    return cases(observer, nonfinite=True)


LAWS: Final[Mapping[str, Law]] = MappingProxyType(
    {
        law.holds.__name__: law
        for law in (
            Law(merge_is_a_commutative_monoid, _any),
            Law(observe_is_a_homomorphism, _any),
            Law(masked_values_do_not_count, _with_mask),
            Law(observe_is_pure, _any),
            Law(vmap_equals_loop, _any),
            Law(compiled_equals_eager, _compiled_cases, max_examples=3),
            Law(round_trips, _any),
            Law(zero_is_exact, _finite),
            Law(codes_in_range_idempotent_monotone, _finite),
            Law(scale_equivariance, _with_exponent),
            Law(granularities_agree, _finite),
            Law(qparams_ignore_splits, _finite),
            Law(large_is_its_pieces, _large_cases, max_examples=6),
            Law(unfit_states_are_faulty, _finite),
            Law(a_constant_is_represented, _constants),
            Law(each_block_is_represented, _rows, max_examples=3),
        )
    }
)
"""Every law by its name, with the cases it is checked on; read-only."""


def check_law(law: Law, subject: Any, *, max_examples: int = 100) -> None:
    """Check one law, such as those of `LAWS`, on an observer.

    Args:
        law: the law, with its cases.
        subject: the observer, or what else the law is of.
        max_examples: number of cases to draw.

    Raises:
        AssertionError: the law does not hold; the message has the smallest case that was found, as
            a call, and what was wrong.

    Example:
        >>> check_law(LAWS["zero_is_exact"], fsq.MinMax(), max_examples=5)
    """
    failures: list[tuple[dict[str, Any], Exception]] = []

    @settings(
        max_examples=min(max_examples, law.max_examples or max_examples),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(law.cases(subject))
    def run(case: dict[str, Any]) -> None:
        try:
            law.holds(**case)
        except Exception as error:
            failures.append((case, error))
            raise

    try:
        run()
    except Exception as error:
        # Whatever a law raises is a failure of the observer, and one that comes and goes (Flaky) is
        # too. What the strategies raise is none and goes on as it is.
        if not failures or not (isinstance(error, Flaky) or error is failures[-1][1]):
            raise
        smallest = failures[-1][0]  # hypothesis runs it last
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        arguments = "".join(f"    {name}={_plain(value)},\n" for name, value in smallest.items())
        raise AssertionError(f"{law.holds.__name__}(\n{arguments})\n{kind}{error}") from error


_WIDE: Final = 120_000
"""So many products, all near the largest, have a sum that int32 does not hold."""


@st.composite
def _products(draw: st.DrawFn, backend: Product, device: str) -> dict[str, Any]:
    whole = st.integers(1, 8).map(lambda i: 16 * i)  # all that some backends take
    k = draw(st.one_of(st.integers(1, 70), whole, st.sampled_from([384, 513, 1025, 2048, 4999, 9001, 9008, _WIDE])))
    n = draw(st.one_of(st.integers(1, 40), st.sampled_from([100, 300])))
    rows = draw(st.one_of(st.integers(0, 40), st.sampled_from([65, 130, 257])))
    if k == _WIDE:
        n, rows = min(n, 3), min(rows, 3)
    if not backend.supports(torch.empty(n, k, dtype=torch.int8, device=device), None):
        reject()
    zero_points = torch.empty(n, 1, dtype=torch.int32, device=device)
    asymmetric = backend.supports(torch.empty(n, k, dtype=torch.int8, device=device), zero_points)
    return {
        "backend": backend,
        "asymmetric": asymmetric and draw(st.booleans()),
        "rows": rows,
        "k": k,
        "n": n,
        **_roundings(draw, device, k),
        "residual": draw(st.booleans()),
    }


@st.composite
def _convolutions(draw: st.DrawFn, backend: Convolution, device: str) -> dict[str, Any]:
    channels = draw(st.one_of(st.integers(1, 8), st.sampled_from([1, 32, 65, 96, 128, 900, 5000])))
    outputs = draw(st.one_of(st.integers(1, 12), st.integers(33, 80)))
    groups = draw(st.one_of(st.integers(1, 6), st.sampled_from([9, 17]))) if channels * outputs < 100 else 1
    kernel = draw(st.one_of(st.tuples(st.integers(1, 4)), st.tuples(st.integers(1, 4), st.integers(1, 4))))
    codes = torch.empty((groups * outputs, channels, *kernel), dtype=torch.int8, device=device)
    if not backend.supports(codes, None):
        reject()
    size, stride, dilation = [], [], []
    padding: list[int] = []
    for k in (1, *kernel)[-2:]:
        gap, sides = draw(st.integers(1, 3)), draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
        extent = gap * (k - 1) + 1
        more = draw(st.one_of(st.integers(0, 6), st.sampled_from([33]))) if channels < 100 else draw(st.integers(0, 6))
        size.append(max(1, extent - sum(sides)) + more)
        stride.append(draw(st.integers(1, 4)))
        padding += sides
        dilation.append(gap)
    return {
        "backend": backend,
        "images": draw(st.sampled_from([1, 2, 3, 0])),
        "size": tuple(size),
        "channels": channels,
        "outputs": outputs,
        "groups": groups,
        "kernel": kernel,
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "last": draw(st.booleans()),
        **_roundings(draw, device, channels * math.prod(kernel)),
    }


def _roundings(draw: st.DrawFn, device: str, k: int) -> dict[str, Any]:
    """Return what the laws of backends have in common, for sums of `k` products."""
    # Above 2**24 sums in float32 are wrong in their last bits, which a float32 alone shows.
    largest = k == _WIDE or (k > 2**24 // (192 * 64) and draw(st.booleans()))
    ends = st.sampled_from([0, 255])
    return {
        "device": device,
        "zero_point": draw(ends if largest else st.one_of(st.integers(0, 255), ends)),
        "fill": "far" if largest else draw(st.sampled_from(["far", "ends", "all"])),
        "seed": draw(st.integers(0, 2**16)),
        "dtype": torch.float32 if largest else draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "bias": draw(st.sampled_from([None, torch.float32, torch.bfloat16])),
        "strided": draw(st.booleans()),
        "step": draw(st.sampled_from([0.25, 0.01])),
        "activation": draw(st.one_of(st.none(), st.sampled_from(sorted(ACTIVATIONS)))),
    }


def check_product_backend(backend: Product, *, device: torch.device | str = "cpu", max_examples: int = 300) -> None:
    """Check that a backend multiplies exactly and rounds as `linear` does.

    Args:
        backend: what may join `functional_sq.backends.PRODUCTS`.
        device: where it multiplies.
        max_examples: number of cases to draw, among the weights that it supports.

    Raises:
        AssertionError: it does not; the message has the smallest case that was found, as a call, and what
            was wrong.
        TypeError: it lacks a part of the protocol, or its `key` is no function that returns a tuple.

    Example:
        >>> from functional_sq import onednn
        >>> if onednn.AVAILABLE:
        ...     check_product_backend(onednn, max_examples=5)
    """
    _check_backend(backend, Product, Law(product_is_exact, lambda b: _products(b, str(device))), max_examples)


def check_convolution_backend(
    backend: Convolution, *, device: torch.device | str = "cpu", max_examples: int = 300
) -> None:
    """Check that a backend convolves exactly and rounds as `conv` does: any geometry, groups, and images of any size.

    Args:
        backend: what may join `functional_sq.backends.CONVOLUTIONS`.
        device: where it convolves.
        max_examples: number of cases to draw, among the weights that it supports.

    Raises:
        AssertionError, TypeError: as `check_product_backend`.

    Example:
        >>> from functional_sq import onednn, onednn_conv
        >>> if onednn.AVAILABLE:
        ...     check_convolution_backend(onednn_conv, max_examples=5)
    """
    law = Law(convolution_is_exact, lambda b: _convolutions(b, str(device)))
    _check_backend(backend, Convolution, law, max_examples)


def _check_backend(backend: Product | Convolution, protocol: type, law: Law, max_examples: int) -> None:
    parts = {name for c in protocol.__mro__ for name in (*vars(c), *vars(c).get("__annotations__", ()))}
    missing = sorted(name for name in parts if not name.startswith("_") and not hasattr(backend, name))
    if missing:
        raise TypeError(
            f"{backend!r} has no {', '.join(missing)}; "
            f"give an object with all that functional_sq.backends.{protocol.__name__} has"
        )
    if not callable(backend.key) or not isinstance(backend.key(), tuple):
        raise TypeError(f"{backend!r}.key is no function that returns a tuple; give what its answers depend on, or ()")
    try:
        check_law(law, backend, max_examples=max_examples)
    except Unsatisfiable as error:
        raise AssertionError(f"{backend!r} supports none of the weights that were drawn: nothing is known") from error


def check_observer(observer: Observer, *, max_examples: int = 100) -> None:
    """Check every law on an observer.

    Cases are drawn from a fixed seed: two runs check the same. Nothing is printed, no example is stored, and no
    test runner is needed. hypothesis itself keeps constants of the sources that it read in `.hypothesis` of the
    working directory, or in the folder that the environment variable HYPOTHESIS_STORAGE_DIRECTORY names.

    Args:
        observer: the observer under test. Its class is importable, as pickle asks.
        max_examples: number of cases for each law.

    Raises:
        AssertionError: at least one law does not hold. The message names each, with the smallest
            case that was found, as a call, and what was wrong.

    Example:
        >>> check_observer(fsq.MinMax(), max_examples=5)
    """
    failures = {}
    for name, law in LAWS.items():
        try:
            check_law(law, observer, max_examples=max_examples)
        except AssertionError as error:
            failures[name] = str(error)
    if failures:
        text = "\n\n".join(failures.values())
        raise AssertionError(f"{observer!r} fails {len(failures)} of {len(LAWS)} laws: {', '.join(failures)}\n\n{text}")
