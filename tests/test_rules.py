"""Mse and Entropy against searches in numpy that see the raw data and import no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch

import functional_sq as fsq
from functional_sq.observers.entropy import Entropy
from functional_sq.observers.histogram import Histogram
from functional_sq.observers.mse import Mse
from functional_sq.observers.percentile import Percentile

Array = np.ndarray
SAMPLES = 10_000


def _outliers(g: np.random.Generator, n: int) -> Array:
    x = g.normal(size=n)
    x[: n // 2000] *= 30
    return x


def _gelu(g: np.random.Generator, n: int) -> Array:
    x = 1.5 * g.normal(size=n)
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


DATA: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "gaussian": lambda g, n: g.normal(size=n),
    "laplace": lambda g, n: g.laplace(size=n),
    "student": lambda g, n: g.standard_t(3, size=n),
    "relu": lambda g, n: np.maximum(g.normal(size=n), 0),
    "gelu": _gelu,
    "uniform": lambda g, n: g.uniform(-1, 1, size=n),
    "outliers": _outliers,
}
SYMMETRIC, NO_CLIPPING, ASYMMETRIC = fsq.MappingType
CASES = [
    *((name, SYMMETRIC) for name in ("int8", "uint4", "int2", "int16")),
    *((name, SYMMETRIC) for name in ("float8_e4m3fn", "float8_e5m2")),
    *((name, NO_CLIPPING) for name in ("int8", "int2")),
    *((name, ASYMMETRIC) for name in ("int8", "uint4", "int2")),
]


def draw(kind: str, n: int = SAMPLES) -> Array:
    return DATA[kind](np.random.default_rng(0), n).astype(np.float32).astype(np.float64)


def state_of(spec: fsq.QuantSpec, x: Array) -> fsq.State:
    t = torch.from_numpy(np.asarray(x, np.float32))
    return fsq.observe(spec, fsq.init(spec, t.shape), t)


def range_of(spec: fsq.QuantSpec, x: Array) -> tuple[float, float]:
    lo, hi = spec.observer.range(spec, state_of(spec, x))
    return lo.item(), hi.item()


# The oracle: formulas in float64, no torch.


def grid(name: str, mapping: str, lo: float, hi: float) -> tuple[float, float]:
    """Scale and zero point; arithmetic on a range runs in float32."""
    f = oracle.FORMATS[name]
    lo, hi = np.float32(min(lo, 0.0)), np.float32(max(hi, 0.0))
    qmin, qmax = np.float32(f.qmin), np.float32(f.qmax)
    if mapping == "ASYMMETRIC":
        scale = max((hi - lo) / (qmax - qmin), np.float32(2.0**-23))
        return float(scale), float(np.clip(qmin - np.round(lo / scale), qmin, qmax))
    half = (qmax - qmin) / np.float32(2)
    scale = max(-lo, hi) / half if mapping == "SYMMETRIC" else max(lo / qmin, hi / qmax)
    return float(max(scale, np.float32(2.0**-23))), float(int((f.qmax + f.qmin + 1) / 2))


def codes(name: str, mapping: str, x: Array, lo: float, hi: float) -> tuple[Array, float]:
    """Code values, the zero point subtracted, and the scale."""
    f = oracle.FORMATS[name]
    scale, zero_point = grid(name, mapping, lo, hi)
    if f.is_float:
        every = np.arange(256, dtype=np.uint8).view(f.storage).astype(np.float64)
        every = np.unique(every[np.isfinite(every)])
        # In float64: through float32 what is next to the middle of two codes becomes a tie.
        return every[np.searchsorted((every[1:] + every[:-1]) / 2, x / scale)], scale
    return np.clip(np.round(x / scale) + zero_point, f.qmin, f.qmax) - zero_point, scale


def errors(name: str, mapping: str, x: Array, lo: float, hi: float) -> Array:
    k, scale = codes(name, mapping, x, lo, hi)
    return (x - k * scale) ** 2


def brute_force(name: str, mapping: str, x: Array) -> tuple[float, float]:
    """The best range by the raw data: a fine search over one threshold, then around the best."""
    least, most = x.min(), x.max()
    extreme = max(-least, most)

    def tried(lo: float, hi: float) -> tuple[float, float, float]:
        return errors(name, mapping, x, lo, hi).mean(), lo, hi

    thresholds = extreme * np.concatenate([np.linspace(0.0125, 1, 80), 2.0 ** np.linspace(-10, -4, 13)])
    best = min(tried(max(least, -t), min(most, t)) for t in thresholds)
    for near in (np.linspace(0, 2, 9), 1 + np.linspace(-0.2, 0.2, 9), 1 + np.linspace(-0.03, 0.03, 5)):
        if mapping == "ASYMMETRIC":
            los, his = (np.unique(np.clip(np.append(end * near, [least, most]), least, most)) for end in best[1:])
            best = min(best, *(tried(lo, hi) for lo in los for hi in his if lo <= hi))
        elif near[0] > 0:
            t = max(-best[1], best[2])
            best = min(best, *(tried(max(least, -t * f), min(most, t * f)) for f in near))
    return best[1:]


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize(("name", "mapping"), CASES, ids=str)
def test_mse_is_the_best_of_the_raw_data(name: str, mapping: fsq.MappingType, kind: str) -> None:
    """At most 1 % above the brute force, and what is chance in the brute force.

    A brute force takes the least of over 100 sample means, each with a standard error, so its minimum
    is below the expected error of its own range: for data that no threshold should clip, the
    rounding errors alone give `0.9 / sqrt(n)` = 0.9 %. The chance part of the difference of two ranges
    is the standard error of the difference of their errors; three of it are allowed.
    """
    x = draw(kind)
    spec = fsq.QuantSpec(getattr(torch, name), fsq.PerTensor(), mapping=mapping, observer=Mse())
    chosen = errors(name, mapping.name, x, *range_of(spec, x))
    best = errors(name, mapping.name, x, *brute_force(name, mapping.name, x))
    chance = (chosen - best).std() / math.sqrt(SAMPLES)
    assert chosen.mean() <= 1.01 * best.mean() + 3 * chance


@pytest.mark.parametrize(("name", "mapping"), CASES, ids=str)
def test_mse_computes_the_error_of_the_very_grid(name: str, mapping: fsq.MappingType) -> None:
    """The closed form equals a numerical integral over the bins of the histogram.

    The midpoint rule on cells of width h is off by `h**2 / 12` of the error's second derivative, 2,
    and by one cell at each jump between codes (the error itself is continuous): below 1e-3 here.
    """
    from functional_sq.observers.mse import _Model

    x = draw("laplace", 2000)
    spec = fsq.QuantSpec(getattr(torch, name), fsq.PerTensor(), mapping=mapping, observer=Mse())
    state = state_of(spec, x)
    edges = Histogram().edges()
    model = _Model(spec, edges, 320, state["histogram"], state["min"], state["max"])
    lo, hi = state["min"].item() * 0.5, state["max"].item() * 0.75
    found = model.error(torch.tensor([[lo]]), torch.tensor([[hi]])).item()

    e, h = np.clip(edges.numpy(), x.min(), x.max()), state["histogram"][0].numpy().astype(float)
    total = errors(name, mapping.name, np.array([x.min(), x.max()]), lo, hi).sum()
    h[np.flatnonzero(h)[[0, -1]]] -= 1
    for a, b, count in zip(e[:-1], e[1:], h, strict=True):
        if count:
            u = a + (b - a) * (np.arange(2000) + 0.5) / 2000
            total += count * errors(name, mapping.name, u, lo, hi).mean()
    assert found == pytest.approx(total, rel=1e-3)


# The error of a given scale and zero point, from the histogram alone.


def steps(name: str, mapping: str, x: Array, lo: float, hi: float) -> Array:
    """Values in steps of the format, zero point added, as they are before they are limited to its codes.

    In float32, an integer's by the reciprocal: at a border of the codes the last bit decides.
    """
    scale, zero_point = grid(name, mapping, lo, hi)
    x, scale = x.astype(np.float32), np.float32(scale)
    if oracle.FORMATS[name].is_float:
        return x / scale
    return np.round(x * (np.float32(1) / scale)) + np.float32(zero_point)


def saturated(name: str, mapping: str, x: Array, lo: float, hi: float) -> Array:
    f, t = oracle.FORMATS[name], steps(name, mapping, x, lo, hi)
    return (t < f.qmin) | (t > f.qmax)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.1])
@pytest.mark.parametrize("kind", ["uniform", "student", "relu"])
@pytest.mark.parametrize(("name", "mapping"), CASES, ids=str)
def test_the_expected_error_is_that_of_the_raw_data_but_for_chance(
    name: str, mapping: fsq.MappingType, kind: str, share: float
) -> None:
    """Total, clipping and signal, of data that is uniform within each bin, as the closed form takes it to be.

    Each sum is then one of independent terms with the expected value that is computed, and the standard
    error of a sum of terms e is at most sqrt(sum of e**2). Five of them are allowed; and the error of
    one value, for the last bin of the data, which ends where the data does, and for float32 data.
    """
    g = np.random.default_rng(1)
    edges = Histogram().edges().numpy()
    x = draw(kind)
    at = np.searchsorted(edges, x, side="right") - 1
    x = np.where(x == 0, 0, g.uniform(edges[at], edges[at + 1])).clip(x.min(), x.max())
    x = x.astype(np.float32).astype(np.float64)
    spec = fsq.QuantSpec(getattr(torch, name), fsq.PerTensor(), mapping=mapping, observer=Histogram())
    lo, hi = x.min() * share, x.max() * share
    qp = fsq.from_range(spec, torch.tensor([lo], dtype=torch.float32), torch.tensor([hi], dtype=torch.float32))
    found = fsq.expected_error(spec, state_of(spec, x), qp)
    assert all(value.dtype == torch.float64 and value.shape == (1,) for value in found)
    e = errors(name, mapping.name, x, lo, hi)
    cut = np.where(saturated(name, mapping.name, x, lo, hi), e, 0)
    for value, terms in ((found.signal, x**2), (found.total, e), (found.clipping, cut)):
        assert abs(value.item() - terms.sum()) <= 5 * np.sqrt((terms**2).sum()) + terms.max()
    assert 0 <= found.clipping.item() <= found.total.item() * (1 + 1e-9)


@pytest.mark.parametrize(("name", "mapping"), CASES, ids=str)
def test_the_expected_error_is_an_integral_over_the_bins(name: str, mapping: fsq.MappingType) -> None:
    """By the midpoint rule, as for Mse above; and that of Mse, where the range is the one it would take.

    Whether a value saturates jumps within one cell of two bins: 1e-3 of what is clipped there.
    """
    x = draw("laplace", 2000)
    spec = fsq.QuantSpec(getattr(torch, name), fsq.PerTensor(), mapping=mapping, observer=Mse())
    state = state_of(spec, x)
    lo, hi = state["min"] * 0.5, state["max"] * 0.75
    found = fsq.expected_error(spec, state, fsq.from_range(spec, lo, hi))
    ends = (lo.item(), hi.item())
    e, h = np.clip(Histogram().edges().numpy(), x.min(), x.max()), state["histogram"][0].numpy().astype(float)
    h[np.flatnonzero(h)[[0, -1]]] -= 1
    points = [np.array([x.min(), x.max()])]
    weights = [np.ones(2)]
    for a, b, count in zip(e[:-1], e[1:], h, strict=True):
        if count:
            points.append(a + (b - a) * (np.arange(2000) + 0.5) / 2000)
            weights.append(np.full(2000, count / 2000))
    u, w = np.concatenate(points), np.concatenate(weights)
    error, cut = errors(name, mapping.name, u, *ends), saturated(name, mapping.name, u, *ends)
    for value, terms in ((found.signal, u**2), (found.total, error), (found.clipping, np.where(cut, error, 0))):
        assert value.item() == pytest.approx((w * terms).sum(), rel=1e-3, abs=1e-12)


def test_the_expected_error_of_each_block_is_its_own_and_says_what_it_has_not_seen() -> None:
    spec = fsq.QuantSpec(torch.int4, fsq.PerAxis(0), observer=fsq.SkipNonfinite(Percentile(99.0)))
    x = torch.from_numpy(np.stack([draw("laplace", 300), 8 * draw("gaussian", 300)])).float()
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    found = fsq.expected_error(spec, state, qp := fsq.calc_qparams(spec, state))
    for i in range(2):
        one = fsq.observe(spec, fsq.init(spec, (1, 300)), x[i : i + 1])
        alone = fsq.expected_error(spec, one, fsq.QParams(qp.scale[i : i + 1], qp.zero_point[i : i + 1]))
        for whole, part in zip(found, alone, strict=True):
            torch.testing.assert_close(whole[i : i + 1], part, rtol=1e-9, atol=0)
    nothing = fsq.expected_error(spec, fsq.init(spec, x.shape), qp)
    assert all(torch.equal(value, torch.zeros(2, 1, dtype=torch.float64)) for value in nothing)
    plain = dataclasses.replace(spec, observer=Histogram())
    x[0, 0] = math.inf
    bad = fsq.expected_error(plain, fsq.observe(plain, fsq.init(plain, x.shape), x), qp)
    assert all(value.isnan().tolist() == [[True], [False]] for value in bad)


def test_the_expected_error_takes_a_plain_pair() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Histogram())
    state = state_of(spec, draw("gaussian", 10))
    scale, zero_point = fsq.calc_qparams(spec, state)
    assert fsq.expected_error(spec, state, (scale, zero_point)) == fsq.expected_error(
        spec, state, fsq.QParams(scale, zero_point)
    )


def test_the_expected_error_refuses_what_it_cannot_read() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Histogram())
    state = state_of(spec, draw("gaussian", 10))
    qp = fsq.calc_qparams(spec, state)
    with pytest.raises(TypeError, match=r"qp is tensor\(.*; give QParams\(scale, zero_point\), two tensors"):
        fsq.expected_error(spec, state, qp.scale)
    plain = dataclasses.replace(spec, observer=fsq.MinMax())
    with pytest.raises(ValueError, match=r"MinMax\(\) records no histogram; record with Histogram\(\)"):
        fsq.expected_error(plain, fsq.init(plain, (1,)), qp)
    with pytest.raises(ValueError, match=r"Histogram\(\) reads \['count', 'histogram', 'max', 'min'\], this state is"):
        fsq.expected_error(spec, fsq.init(plain, (1,)), qp)
    with pytest.raises(ValueError, match=r"qp has the shape \(2,\), and the statistics \(1,\); they must be equal"):
        fsq.expected_error(spec, state, fsq.QParams(torch.ones(2), torch.zeros(2, dtype=torch.int32)))


@pytest.mark.parametrize(("name", "mapping"), CASES, ids=str)
def test_what_saturates_is_what_has_no_code(name: str, mapping: fsq.MappingType) -> None:
    """Values away from the middle of two codes, where float32 and float64 may round to either."""
    x = draw("laplace", 3000)
    spec = fsq.QuantSpec(getattr(torch, name), fsq.PerTensor(), mapping=mapping)
    lo, hi = -0.5, 0.75
    scale, zero_point = grid(name, mapping.name, lo, hi)
    x = x[np.abs((x / scale) % 1 - 0.5) > 1e-2]
    qp = fsq.QParams(torch.tensor([scale], dtype=torch.float32), torch.tensor([int(zero_point)], dtype=torch.int32))
    found = fsq.saturates(spec, torch.from_numpy(x.astype(np.float32)), qp)
    expected = saturated(name, mapping.name, x, lo, hi)
    assert 0 < expected.sum() < x.size
    assert (found.numpy() == expected).all()
    t = torch.from_numpy(x.astype(np.float32)).requires_grad_()
    fsq.fake_quantize(spec, t, qp).sum().backward()
    assert t.grad is not None
    assert torch.equal(t.grad == 0, found)
    assert fsq.saturates(spec, torch.tensor([math.nan, math.inf, -math.inf, 0.0]), qp).tolist() == [True] * 3 + [False]


# Entropy: the definition of its docstring, a loop over candidates and levels.


def kl_index(name: str, mapping: str, x: Array) -> tuple[int, list[tuple[float, float]]]:
    """The index of the best candidate, 0 the widest, and all candidate ranges."""
    magnitudes = np.concatenate([[0.0], *(2.0**e * (1 + np.arange(16) / 16) for e in range(-24, 24)), [2.0**24]])
    half = len(magnitudes) - 2
    edges = np.concatenate([-magnitudes[:0:-1], magnitudes[1:]])
    number = np.searchsorted(magnitudes, np.abs(x), side="right") - 1
    histogram = np.bincount(half + np.where(x < 0, -1, 1) * number, minlength=2 * half + 1).astype(float)
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    divergences, ranges = [], []
    for c in range(128):
        last = number.max() - c
        t = np.abs(x).max() if c == 0 else magnitudes[last + 1]
        lo, hi = max(x.min(), -t), min(x.max(), t)
        inside = slice(half - last, half + last + 1)
        p, kept, w = histogram[inside].copy(), histogram[inside], width[inside]
        p[0] += histogram[: half - last].sum()
        p[-1] += histogram[half + last + 1 :].sum()
        level, _ = codes(name, mapping, middle[inside], lo, hi)
        level = np.where(middle[inside] == 0, np.inf, level)  # 0 is apart
        q = np.zeros_like(p)
        for code in np.unique(level):
            bins = (level == code) & (p > 0)
            if bins.any():
                q[bins] = kept[level == code].sum() * w[bins] / w[bins].sum()
        seen = p > 0
        if q.sum() == 0 or (q[seen] == 0).any():
            divergences.append(math.inf)
        else:
            p, q = p[seen] / p.sum(), q[seen] / q.sum()
            divergences.append(float((p * np.log(p / q)).sum()))
        ranges.append((lo, hi))
    return int(np.argmin(divergences)), ranges


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "outliers", "relu", "uniform"])
@pytest.mark.parametrize(
    ("name", "mapping"),
    [
        ("int8", SYMMETRIC),
        ("int4", SYMMETRIC),
        ("int2", NO_CLIPPING),
        ("uint8", ASYMMETRIC),
        ("uint3", ASYMMETRIC),
        ("float8_e4m3fn", SYMMETRIC),
        ("float8_e5m2", SYMMETRIC),
    ],
    ids=str,
)
def test_entropy_is_its_definition(name: str, mapping: fsq.MappingType, kind: str) -> None:
    x = draw(kind)
    spec = fsq.QuantSpec(getattr(torch, name), fsq.PerTensor(), mapping=mapping, observer=Entropy())
    index, ranges = kl_index(name, mapping.name, x)
    assert range_of(spec, x) == ranges[index]


def test_entropy_of_zeros_and_one_value_grows_with_the_value() -> None:
    """The bin of 0 has one width whatever the data: spread over a level with others, it drew t to that width."""
    spec = fsq.QuantSpec(torch.int1, fsq.PerTensor(), observer=Entropy())
    once, twice = (np.float32([0, value, value]) for value in (2.0**-12, 2.0**-11))
    assert range_of(spec, twice) == tuple(2 * end for end in range_of(spec, once)) == (0, 2.0**-11)


def test_entropy_keeps_what_a_relu_leaves() -> None:
    """Half of it is 0."""
    x = draw("gaussian").clip(0)
    lo, hi = range_of(
        fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=Entropy()), x
    )
    assert lo == 0
    assert hi > 0.8 * x.max()


@pytest.mark.parametrize("kind", ["student", "outliers"])
@pytest.mark.parametrize(("name", "mapping"), [("int8", SYMMETRIC), ("uint8", ASYMMETRIC)], ids=str)
def test_entropy_clips_heavy_tails(name: str, mapping: fsq.MappingType, kind: str) -> None:
    x = draw(kind)
    lo, hi = range_of(fsq.QuantSpec(getattr(torch, name), fsq.PerTensor(), mapping=mapping, observer=Entropy()), x)
    clipped = ((x < lo) | (x > hi)).mean()
    assert 0 < clipped < 0.01


def test_entropy_keeps_uniform_data() -> None:
    """All of it, or all but the bin of the extreme, 1/32 of the range."""
    lo, hi = range_of(fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Entropy()), draw("uniform"))
    assert hi >= 1 - 1 / 32
    assert lo <= -1 + 1 / 32


@pytest.mark.parametrize(("bits", "spread"), [(3, 1.0), (4, 0.0), (8, 0.0)])
def test_mse_searches_where_no_value_is_near_zero(bits: int, spread: float) -> None:
    """A threshold inside of the data puts the last code on it; the one at its extreme lies half a step beyond."""
    spec = fsq.QuantSpec(getattr(torch, f"int{bits}"), fsq.PerTensor(), observer=Mse())
    x = -50 + spread * torch.randn(4096)

    def error(qp: fsq.QParams) -> float:
        return float((fsq.dequantize(spec, fsq.quantize(spec, x, qp), qp) - x).double().square().mean())

    def of(threshold: float) -> float:
        return error(fsq.from_range(spec, torch.tensor([-threshold]), torch.tensor([threshold])))

    extreme = float(x.abs().max())
    best = min(map(of, torch.linspace(0.8 * extreme, extreme, 400).tolist()))
    found = error(fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape), x)))
    assert found <= 1.05 * best + (0.005 * extreme) ** 2  # the threshold is found to half a percent
    assert found < 0.5 * of(extreme)


@pytest.mark.parametrize("value", [127.5, 1884.94, 50.0, -50.0, 1e-3])
@pytest.mark.parametrize("name", ["int8", "int2", "float8_e4m3fn"])
def test_what_saturates_at_the_very_border_is_clipped(name: str, value: float) -> None:
    """The largest value of a symmetric range is half a step beyond the last code, but for roundings."""
    spec, x = fsq.QuantSpec(getattr(torch, name), fsq.PerTensor(), observer=Histogram()), torch.full((5,), value)
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    qp = fsq.calc_qparams(spec, state)
    found = fsq.expected_error(spec, state, qp)
    assert bool(found.clipping > 0) == bool(fsq.saturates(spec, x, qp).all() and found.total > 0)


# Both rules.

RULES = [Mse(), Entropy()]
SPECS = [("int8", SYMMETRIC), ("uint4", ASYMMETRIC), ("int2", NO_CLIPPING), ("float8_e5m2", SYMMETRIC)]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(("name", "mapping"), SPECS, ids=str)
def test_what_has_no_range_stays_visible(rule: fsq.Observer, name: str, mapping: fsq.MappingType) -> None:
    spec = fsq.QuantSpec(getattr(torch, name), fsq.PerAxis(0), mapping=mapping, observer=rule)
    inf, nan = math.inf, math.nan
    x = torch.tensor([[1.0, nan, 2.0], [inf, 0.0, 1.0], [3.0, 3.0, 3.0], [0.0, 0.0, 0.0], [5.0, 6.0, 7.0]])
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    lo, hi = rule.range(spec, state)
    assert lo[0].isnan()
    assert hi[0].isnan()
    assert (lo[1].item(), hi[1].item()) == (0.0, inf)
    assert (lo[2:4] == hi[2:4]).all()
    assert lo[2].item() == 3.0
    assert 5 <= lo[4].item() <= hi[4].item() <= 7
    lo, hi = rule.range(spec, fsq.init(spec, x.shape))
    assert (lo == inf).all()
    assert (hi == -inf).all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_the_range_has_the_dtype_and_the_limits_of_the_state(rule: fsq.Observer, dtype: torch.dtype) -> None:
    spec = fsq.QuantSpec(torch.uint8, fsq.PerAxis(0), mapping=ASYMMETRIC, observer=rule)
    x = torch.from_numpy(draw("laplace", 4 * 500)).reshape(4, 500).to(dtype)
    state = fsq.observe(spec, fsq.init(spec, x.shape, dtype=dtype), x)
    lo, hi = rule.range(spec, state)
    assert lo.dtype == hi.dtype == dtype
    assert lo.shape == hi.shape == (4, 1)
    assert ((state["min"] <= lo) & (lo <= hi) & (hi <= state["max"])).all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(("name", "mapping"), SPECS, ids=str)
def test_a_block_is_chosen_for_itself(rule: fsq.Observer, name: str, mapping: fsq.MappingType) -> None:
    """Blocks in chunks of any size, and a state that another rule recorded, give the same bits."""
    spec = fsq.QuantSpec(getattr(torch, name), fsq.PerAxis(0), mapping=mapping, observer=rule)
    x = torch.from_numpy(np.stack([2.0**i * draw(kind, 300) for i, kind in enumerate(("laplace", "relu", "outliers"))]))
    recorder = dataclasses.replace(spec, observer=Percentile())
    lo, hi = rule.range(spec, fsq.observe(recorder, fsq.init(recorder, x.shape), x))
    for i in range(len(x)):
        one = fsq.observe(spec, fsq.init(spec, (1, 300)), x[i : i + 1])
        for whole, alone in zip((lo, hi), rule.range(spec, one), strict=True):
            # A sum over the same terms may be ordered differently: candidates next to each other tie.
            torch.testing.assert_close(whole[i], alone[0], rtol=2**-8, atol=0)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("mapping", fsq.MappingType)
@pytest.mark.parametrize("rule", [fsq.MinMax(), fsq.MeanRange(), Percentile(99.9), Mse(), Entropy()], ids=repr)
def test_a_range_does_not_depend_on_torchs_default_dtype(
    rule: fsq.Observer, mapping: fsq.MappingType, default: torch.dtype
) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=mapping, observer=rule)

    def chosen() -> fsq.QParams:
        return fsq.calc_qparams(spec, state_of(spec, draw("student")))

    expected = chosen()
    torch.set_default_dtype(default)
    try:
        assert chosen() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_rank_of_a_percentile_is_not_rounded() -> None:
    """Among 2**27 values, of which 7 are large: numpy's percentile lies between two of them."""
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=ASYMMETRIC, observer=Percentile(99.999995))
    state, n = state_of(spec, np.array([1.0, 1000.0])), 2**27
    counts = state["histogram"].flatten()
    counts[counts > 0] = torch.tensor([n - 7, 7])
    state = state | {"histogram": counts.reshape(state["histogram"].shape), "count": state["count"] * 0 + n}
    rank = (n - 1) * 0.99999995 - (n - 8)
    assert 0 < rank < 1
    hi = spec.observer.range(spec, state)[1].item()
    assert hi == pytest.approx(1 + rank * 999, rel=1 / 12)


def test_float8_table_is_every_finite_value() -> None:
    from functional_sq.observers.mse import code_table

    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        every = np.arange(256, dtype=np.uint8).view(getattr(ml_dtypes, name)).astype(np.float64)
        every = np.unique(every[np.isfinite(every)])
        values, area = code_table(getattr(torch, name), torch.device("cpu"))
        assert (np.unique(values.numpy()) == every).all(), name
        assert (area[values == 0] == 0).all()


@pytest.mark.parametrize("exponent", range(-12, 12))
def test_mse_sees_an_extreme_that_lies_on_the_edge_of_a_bin(exponent: int) -> None:
    """One value at a power of two among zeros: int1 represents it exactly with a scale of its size."""
    spec = fsq.QuantSpec(torch.int1, fsq.PerTensor(), observer=Mse(), eps=2.0**-126)
    x = torch.tensor([0.0] * 17 + [-(2.0**exponent)])
    qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
    assert qp.scale.item() == 2.0**exponent
