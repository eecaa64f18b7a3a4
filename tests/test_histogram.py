"""Bins, counts and percentiles against numpy; the references below use neither torch nor the package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch._dynamo.testing import CompileCounter

import functional_sq as fsq
from functional_sq.observers.histogram import _CHUNK, Histogram
from functional_sq.observers.percentile import Percentile

Array = NDArray[np.generic]
Bins = tuple[int, int, int]
"""Least exponent, end exponent, mantissa bits."""

DEFAULT: Bins = (-24, 24, 4)
BINS: list[Bins] = [DEFAULT, (-2, 3, 0), (-126, 128, 7), (0, 1, 10)]
SPECIAL = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf])


# References.


def bin_of(x: Array, bins: Bins) -> Array:
    """Return the bin of each value by arithmetic on it, not on its bits; that after the last for a NaN."""
    least, end, bits = bins
    half = (end - least) * 2**bits
    with np.errstate(invalid="ignore"):
        magnitude = np.abs(x.astype(np.float64))
        mantissa, exponent = np.frexp(magnitude)  # magnitude = mantissa * 2**exponent, 0.5 <= mantissa < 1
        place = (exponent - 1 - least) * 2.0**bits + np.floor((2 * mantissa - 1) * 2**bits) + 1
    place = np.where(magnitude < 2.0**least, 0, np.where(magnitude >= 2.0**end, half, place))
    return np.where(np.isnan(x), 2 * half + 1, half + np.where(x < 0, -place, place)).astype(np.int64)


def edges_of(bins: Bins) -> Array:
    least, end, bits = bins
    positive = [2.0**e * (1 + i / 2**bits) for e in range(least, end) for i in range(2**bits)] + [2.0**end]
    return np.array([-v for v in reversed(positive)] + positive)


def counts_of(x: Array, bins: Bins) -> Array:
    """Count with numpy.histogram; each sign apart, for its bins are closed on the left and these towards zero."""
    edges = edges_of(bins)
    least, end, half = 2.0 ** bins[0], 2.0 ** bins[1], len(edges) // 2 - 1
    with np.errstate(invalid="ignore"):
        x = x.astype(np.float64).reshape(-1)
    x = np.clip(x[~np.isnan(x)], np.nextafter(-end, 0), np.nextafter(end, 0))
    positive = np.histogram(x[x >= least], edges[half + 1 :])[0]
    negative = np.histogram(-x[x <= -least], edges[half + 1 :])[0]
    return np.concatenate([negative[::-1], [(np.abs(x) < least).sum()], positive])


def width_at(x: float) -> float:
    """Return the width of the default bin of `x`, in which the default exponents hold it."""
    edges = edges_of(DEFAULT)
    i = min(int(bin_of(np.array([x]), DEFAULT)[0]), len(edges) - 2)
    return float(edges[i + 1] - edges[i])


def test_the_reference_counts_each_bin_alike() -> None:
    x = np.array([-4.0, -2.0, -1.9, -1.0, -0.5, 0.0, 0.9, 1.0, 2.0, 3.9, np.nan])
    assert counts_of(x, (0, 2, 0)).tolist() == [2, 2, 3, 1, 2]
    assert bin_of(x, (0, 2, 0)).tolist() == [0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 5]


# Helpers.


def observer_of(bins: Bins) -> Histogram:
    return Histogram(bins[:2], bins[2])


def recorded(observer: fsq.Observer, x: torch.Tensor, **keywords: torch.Tensor) -> fsq.State:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=observer)
    return fsq.observe(spec, fsq.init(spec, x.shape, dtype=x.dtype), x, **keywords)


def same(a: fsq.State, b: fsq.State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Bins.


@pytest.mark.parametrize("bins", BINS, ids=str)
def test_edges(bins: Bins) -> None:
    observer, edges = observer_of(bins), observer_of(bins).edges()
    assert edges.dtype == torch.float64
    assert np.array_equal(edges.numpy(), edges_of(bins))
    assert len(edges) == observer.bins + 1 == 2 * observer.half + 2
    assert (edges.diff() > 0).all()


@pytest.mark.parametrize("bins", BINS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bin_of_every_16_bit_value(bins: Bins, dtype: torch.dtype) -> None:
    codes = np.arange(2**16, dtype=np.uint16)
    x = torch.from_numpy(codes.view(np.int16)).view(dtype)
    with np.errstate(invalid="ignore"):
        values = codes.view(ml_dtypes.bfloat16 if dtype is torch.bfloat16 else np.float16).astype(np.float64)
    expected = bin_of(values, bins)
    for wider in (dtype, torch.float32, torch.float64):
        assert np.array_equal(observer_of(bins).index(x.to(wider)).numpy(), expected), wider
    assert np.array_equal(recorded(observer_of(bins), x)["histogram"].numpy().reshape(-1), counts_of(values, bins))


@pytest.mark.parametrize("bins", BINS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_begin_at_their_edges(bins: Bins, dtype: type[np.floating]) -> None:
    with np.errstate(over="ignore"):
        edges = edges_of(bins).astype(dtype)
    beside = [np.nextafter(edges, dtype(-np.inf)), edges, np.nextafter(edges, dtype(np.inf))]
    x = np.concatenate([*beside, SPECIAL.astype(dtype)])
    observer = observer_of(bins)
    index = observer.index(torch.from_numpy(x))
    assert np.array_equal(index.numpy(), bin_of(x, bins))
    finite = torch.from_numpy(x[~np.isnan(x)]).sort().values
    assert (observer.index(finite).diff() >= 0).all(), "the axis is ordered by value"


def test_a_float64_beside_an_edge_is_not_rounded_over_it() -> None:
    x = torch.tensor([1.0 - 2**-53, 1.0, -1.0 + 2**-53, -1.0], dtype=torch.float64)
    at_one = Histogram().half + 24 * 16 + 1
    assert (Histogram().index(x) - Histogram().half).tolist() == [
        at_one - 769,
        at_one - 768,
        769 - at_one,
        768 - at_one,
    ]


def test_bins_are_narrow() -> None:
    edges = Histogram().edges()
    positive = edges[Histogram().half + 1 :]
    assert (positive.diff() <= positive[:-1] / 16).all()


# Counts.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_counts_are_those_of_numpy(dtype: torch.dtype) -> None:
    x = (torch.randn(64, 33) * torch.exp2(torch.randint(-30, 12, (64, 33)))).to(dtype)
    x[0, :7] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 2.0**15, -1.0])
    state = recorded(Histogram(), x)
    assert state["histogram"].shape == (1, 1, Histogram().bins)
    assert np.array_equal(state["histogram"].numpy().reshape(-1), counts_of(x.double().numpy(), DEFAULT))
    assert state["count"].item() == state["histogram"].sum().item() + 1 == x.numel()


GRANULARITIES = [fsq.PerTensor(), fsq.PerAxis(0), fsq.PerAxis(1), fsq.PerAxis(-1), fsq.PerToken(), fsq.PerGroup(3)]


@pytest.mark.parametrize("granularity", [*GRANULARITIES, fsq.PerBlock((1, 5, 2)), fsq.PerBlock((1, 1, 1))], ids=repr)
def test_each_block_counts_its_own(granularity: fsq.Granularity) -> None:
    x = torch.randn(6, 5, 4).transpose(0, 2)
    keep = torch.rand(4, 5) > 0.4
    keep[1] = False
    spec = fsq.QuantSpec(torch.int8, granularity, observer=Histogram())
    state = fsq.observe(spec, fsq.init(spec, x.shape), x, mask=keep)
    assert torch.equal(state["histogram"].sum(-1), state["count"])
    values = np.where(keep.numpy()[..., None], x.numpy(), np.nan)
    sizes = [n // s for n, s in zip(x.shape, state["count"].shape, strict=True)]
    for where in np.ndindex(*state["count"].shape):
        block = values[tuple(slice(i * n, (i + 1) * n) for i, n in zip(where, sizes, strict=True))]
        assert np.array_equal(state["histogram"][where].numpy(), counts_of(block, DEFAULT)), where


@pytest.mark.parametrize("granularity", [fsq.PerTensor(), fsq.PerAxis(0)], ids=repr)
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_the_imaginary_part_of_a_conjugate_is_counted(granularity: fsq.Granularity, dtype: type) -> None:
    """torch keeps such a tensor as the memory of the other sign: of the spectra of sounds, for one."""
    z = (np.random.randn(3, 40) + 1j * np.random.randn(3, 40)).astype(dtype)
    x = torch.from_numpy(z).conj().imag
    assert x.is_neg()
    spec = fsq.QuantSpec(torch.int8, granularity, observer=Histogram())
    counts = fsq.observe(spec, fsq.init(spec, x.shape), x)["histogram"]
    for row, block in zip(counts.flatten(0, 1), np.conj(z).imag.reshape(len(counts), -1), strict=True):
        assert np.array_equal(row.numpy(), counts_of(block, DEFAULT))


def test_what_is_too_large_is_counted_at_the_ends() -> None:
    state = recorded(Histogram(), torch.tensor([2.0**24, 3e38, torch.inf, -(2.0**24)]))
    assert state["histogram"][0, [0, -1]].tolist() == [1, 3]
    assert (state["min"].item(), state["max"].item()) == (-(2.0**24), torch.inf)


def test_a_nan_is_in_no_bin_and_stays_visible() -> None:
    signalling = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    state = recorded(Histogram(), torch.cat([signalling, torch.tensor([torch.nan, 1.0])]))
    assert state["histogram"].sum() == 1
    assert state["min"].isnan()
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Histogram())
    with pytest.raises(fsq.CalibrationError, match="NaN was seen"):
        fsq.check(spec, state)


def test_merging_is_concatenation_in_bits() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(-1), observer=Histogram())
    parts = [torch.randn(n, 8) * 10.0**n for n in (1, 7, 3)]
    empty = fsq.init(spec, (1, 8))
    a, b, c = (fsq.observe(spec, empty, x) for x in parts)
    whole = fsq.observe(spec, empty, torch.cat(parts))
    assert same(fsq.merge(spec, fsq.merge(spec, c, a), b), whole)


@pytest.mark.parametrize("granularity", [fsq.PerTensor(), fsq.PerAxis(-1)], ids=repr)
def test_vmap_over_experts_is_the_loop(granularity: fsq.Granularity) -> None:
    spec = fsq.QuantSpec(torch.int8, granularity, observer=Percentile(99.0))
    x, keep = torch.randn(16, 40, 4), torch.rand(16, 40) > 0.5
    keep[3] = False  # an expert to which no token was sent
    one = partial(fsq.observe, spec, fsq.init(spec, x.shape[1:]))
    states = [one(e, mask=k) for e, k in zip(x, keep, strict=True)]
    stacked = torch.vmap(lambda e, k: one(e, mask=k))(x, keep)
    assert same(stacked, {name: torch.stack([s[name] for s in states]) for name in stacked})
    assert stacked["count"][3].eq(0).all()
    assert stacked["histogram"][3].eq(0).all()
    other_axis = torch.vmap(lambda e, k: one(e, mask=k), in_dims=(2, 0))(x.permute(1, 2, 0), keep)
    assert same(other_axis, stacked)


@pytest.mark.parametrize("observer", [Histogram(), Percentile(99.0)], ids=repr)
def test_one_full_graph_for_all_batches(observer: fsq.Observer) -> None:
    counter = CompileCounter()
    spec = fsq.QuantSpec(torch.uint8, fsq.PerAxis(0), mapping=fsq.MappingType.ASYMMETRIC, observer=observer)

    def step(state: fsq.State, x: torch.Tensor) -> tuple[fsq.State, fsq.QParams]:
        state = fsq.observe(spec, state, x)
        return state, fsq.calc_qparams(spec, state)

    compiled: Callable[[fsq.State, torch.Tensor], tuple[fsq.State, fsq.QParams]]
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    state = expected = fsq.init(spec, (3, 20))
    for _ in range(4):
        x = torch.randn(3, 20)
        state, qp = compiled(state, x)
        expected, expected_qp = step(expected, x)
        assert same(state, expected)
        assert torch.equal(qp.scale, expected_qp.scale)
    assert counter.frame_count == 1


def test_generated_code_counts_the_same() -> None:
    x = torch.randn(64, 48)
    x[0, :6] = torch.from_numpy(SPECIAL)
    keep = torch.rand(64) > 0.2
    for observe in (partial(recorded, Histogram()), partial(recorded, Histogram(), mask=keep)):
        compiled = torch.compile(observe, fullgraph=True)(x)
        assert torch.equal(compiled["histogram"], observe(x)["histogram"])


def test_the_operators_are_registered_right() -> None:
    samples = (torch.tensor([0, 3, 3, 5, 4], dtype=torch.int32), 5)
    torch.library.opcheck(torch.ops.functional_sq.bincount.default, samples)
    x = torch.tensor([[0.5, -1.0, float("nan")], [1.0, 7.0, -0.0]])
    for keep in (None, x > 0):
        torch.library.opcheck(torch.ops.functional_sq.count_bins.default, (x, keep, -1, 2, 1))


@pytest.mark.parametrize("bins", BINS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_tensor_of_many_chunks_is_counted_whole(bins: Bins, dtype: type[np.floating]) -> None:
    """Three chunks, the last one short; Inf and a NaN whose first digits are those of Inf in each."""
    n = 2 * _CHUNK + 12345
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(n) * np.exp2(rng.integers(-40, 40, n))).astype(dtype)
    x[:: _CHUNK // 3] = np.inf
    x[1 :: _CHUNK // 3] = -np.inf
    whole = np.int32 if dtype is np.float32 else np.int64
    x.view(whole)[2 :: _CHUNK // 3] = np.array([np.inf], dtype).view(whole)[0] + 1
    assert np.isnan(x).sum() == 7
    keep = rng.random(n) < 0.7
    state = recorded(observer_of(bins), torch.from_numpy(x))
    assert np.array_equal(state["histogram"].numpy().reshape(-1), counts_of(x, bins))
    masked = recorded(observer_of(bins), torch.from_numpy(x), mask=torch.from_numpy(keep))
    assert np.array_equal(masked["histogram"].numpy().reshape(-1), counts_of(x[keep], bins))


def test_memory_is_what_the_docstring_says() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0), observer=Histogram())
    state = fsq.init(spec, (4096, 2), device="meta")
    size = sum(value.nbytes for value in state.values())
    assert size == 4096 * ((Histogram().bins + 1) * 8 + 8)
    assert 50e6 < size < 51e6


# Percentiles.


@st.composite
def samples(draw: st.DrawFn) -> Array:
    n, seed = draw(st.integers(1, 400)), draw(st.integers(0, 2**31))
    generator = np.random.default_rng(seed)
    x = generator.standard_t(draw(st.sampled_from([1, 3, 30])), n) * 2.0 ** draw(st.integers(-8, 8))
    kind = draw(st.sampled_from(["both signs", "positive", "zeros", "ties"]))
    x = {"positive": np.abs(x), "zeros": np.where(x < 0, 0, x), "ties": np.round(x)}.get(kind, x)
    return np.clip(x, -(2.0**23), 2.0**23).astype(np.float32)


@settings(max_examples=300)
@given(samples(), st.sampled_from([50.5, 75.0, 90.0, 99.0, 99.9, 100.0]), st.booleans())
def test_a_percentile_is_within_a_bin_of_numpys(x: Array, p: float, asymmetric: bool) -> None:
    mapping = fsq.MappingType.ASYMMETRIC if asymmetric else fsq.MappingType.SYMMETRIC
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=mapping, observer=Percentile(p))
    state = fsq.observe(spec, fsq.init(spec, x.shape), torch.from_numpy(x))
    lo, hi = (end.item() for end in spec.observer.range(spec, state))
    wide = x.astype(np.float64)
    values = wide if asymmetric else np.abs(wide)
    for found, q in ((hi, p), (lo if asymmetric else -lo, 100 - p if asymmetric else p)):
        # The two values that numpy interpolates between are each known to a bin.
        beside = [np.percentile(values, q, method=m) for m in ("lower", "higher")]
        width = max(width_at(v) for v in beside) + 2.0**-23 * abs(found)
        assert abs(found - np.percentile(values, q)) <= width, (q, found, np.percentile(values, q))
    if asymmetric:
        assert x.min() <= lo <= hi <= x.max()
        if p == 100:
            assert (lo, hi) == (x.min(), x.max())
    else:
        assert lo == -hi
        assert hi <= np.abs(x).max()
        assert p < 100 or hi == np.abs(x).max()


@pytest.mark.parametrize("p", [50.5, 75.0, 99.0])
def test_percentiles_between_the_smallest_and_the_largest_are_those_of_numpy(p: float) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0), mapping=fsq.MappingType.ASYMMETRIC, observer=Percentile(p))
    x = np.array([[-1.03, 2.9], [0.53, 0.54], [-7.7, -7.3], [1e-9, 1.0], [3.3, 3.3]], np.float32)
    lo, hi = spec.observer.range(spec, fsq.observe(spec, fsq.init(spec, x.shape), torch.from_numpy(x)))
    expected = np.percentile(x.astype(np.float64), [100 - p, p], axis=1)
    np.testing.assert_allclose(np.stack([lo[:, 0], hi[:, 0]]), expected, rtol=2.0**-23, atol=0)  # rounded to float32
    infinite = fsq.observe(spec, fsq.init(spec, (1, 2)), torch.tensor([[-torch.inf, torch.inf]]))
    assert not any(end.isnan() for end in spec.observer.range(spec, infinite))


@pytest.mark.parametrize("mapping", [fsq.MappingType.ASYMMETRIC, fsq.MappingType.SYMMETRIC], ids=str)
def test_a_block_that_saw_nothing_has_the_identity(mapping: fsq.MappingType) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0), mapping=mapping, observer=Percentile())
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    state = fsq.observe(spec, fsq.init(spec, (2, 3), dtype=x.dtype), x, mask=torch.tensor([True, False]))
    lo, hi = spec.observer.range(spec, state)
    assert (lo[1].item(), hi[1].item()) == (torch.inf, -torch.inf)
    assert (lo.dtype, hi.dtype, hi[0].item()) == (torch.bfloat16, torch.bfloat16, 1.0)


@pytest.mark.parametrize("mapping", [fsq.MappingType.ASYMMETRIC, fsq.MappingType.SYMMETRIC], ids=str)
def test_nan_and_inf_stay_visible(mapping: fsq.MappingType) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=mapping, observer=Percentile(100.0))
    for value in (torch.nan, torch.inf):
        state = fsq.observe(spec, fsq.init(spec, (3,)), torch.tensor([1.0, value, 2.0]))
        assert not spec.observer.range(spec, state)[1].isfinite()
    only_nan = fsq.observe(spec, fsq.init(spec, (1,)), torch.tensor([torch.nan]))
    assert spec.observer.range(spec, only_nan)[0].isnan()


def test_a_state_of_one_rule_is_read_by_the_others() -> None:
    record = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Histogram())
    read = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Percentile(90.0))
    x = torch.randn(1000)
    a, b = (fsq.observe(s, fsq.init(s, x.shape), x) for s in (record, read))
    assert same(a, b)
    assert fsq.calc_qparams(read, a).scale < fsq.calc_qparams(record, a).scale


# Errors.

INVALID: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Histogram([-24, 24]), TypeError, r"exponents=\[-24, 24\] is not a tuple of two ints; use one such as"),  # type: ignore[arg-type]
    (lambda: Histogram((1, 2, 3)), TypeError, r"exponents=\(1, 2, 3\) is not a tuple of two ints"),  # type: ignore[arg-type]
    (lambda: Histogram((0, 1.0)), TypeError, r"exponents=\(0, 1.0\) is not a tuple of two ints"),  # type: ignore[arg-type]
    (lambda: Histogram((True, 2)), TypeError, r"exponents=\(True, 2\) is not a tuple of two ints"),
    (lambda: Histogram((3, 3)), ValueError, r"exponents=\(3, 3\) is not least < end within -126 to 128; use two"),
    (lambda: Histogram((-127, 0)), ValueError, r"exponents=\(-127, 0\) is not least < end within -126 to 128"),
    (lambda: Histogram((0, 129)), ValueError, r"exponents=\(0, 129\) is not least < end within -126 to 128"),
    (lambda: Histogram(mantissa_bits=1.0), TypeError, r"mantissa_bits=1.0 is not an int; use one from 0 to 10"),  # type: ignore[arg-type]
    (lambda: Histogram(mantissa_bits=-1), ValueError, r"mantissa_bits=-1 is not within 0 to 10; .*use 4"),
    (lambda: Histogram(mantissa_bits=11), ValueError, r"mantissa_bits=11 is not within 0 to 10"),
    (lambda: Percentile("99"), TypeError, r"p='99' is not a number; a percentile is one such as 99.99"),  # type: ignore[arg-type]
    (lambda: Percentile(True), TypeError, r"p=True is not a number"),
    (lambda: Percentile(50), ValueError, r"p=50 is not more than 50 and at most 100; use one such as 99.99"),
    (lambda: Percentile(0.999), ValueError, r"p=0.999 is not more than 50"),
    (lambda: Percentile(100.1), ValueError, r"p=100.1 is not more than 50 and at most 100"),
    (lambda: Percentile(float("nan")), ValueError, r"p=nan is not more than 50"),
    (lambda: Percentile(99.0, exponents=(3, 3)), ValueError, r"exponents=\(3, 3\) is not least < end"),
]


@pytest.mark.parametrize(("call", "error", "message"), INVALID, ids=[row[2] for row in INVALID])
def test_invalid_arguments(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        call()


@pytest.mark.parametrize("wrap", [lambda observer: observer, fsq.SkipNonfinite], ids=["plain", "wrapped"])
def test_a_state_of_other_bins_is_refused(wrap: Callable[[fsq.Observer], fsq.Observer]) -> None:
    x = torch.ones(3)
    spec, other = (
        fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=wrap(observer))
        for observer in (Percentile(), Histogram((-8, 8)))
    )
    state = fsq.observe(other, fsq.init(other, x.shape), x)
    for use in (fsq.check, fsq.calc_qparams, partial(fsq.observe, x=x), partial(fsq.merge, other=state)):
        with pytest.raises(ValueError, match=r"histogram has shape \(1, 513\), .* has 1537 bins .*; use the exponents"):
            use(spec, state)
