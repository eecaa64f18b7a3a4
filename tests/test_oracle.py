"""functional_sq gives the bits of the numpy oracle, and its error stays within a derived bound."""

from __future__ import annotations

import ast
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import functional_sq as fsq

NP = {torch.float32: oracle.F32, torch.float64: oracle.F64, torch.float16: oracle.F16, torch.bfloat16: oracle.BF16}
REALS = list(NP)
INTEGERS = {torch.int8: np.int8, torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64}
LIMIT = 2.0**100  # of magnitudes; larger ones are in test_ranges_at_the_limits


def test_the_oracle_is_independent() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {n for n in names if n.split(".")[0] in ("torch", "functional_sq", "torchao", "bridge")}


def to_numpy(t: torch.Tensor) -> np.ndarray:
    """The same bits as an array; bfloat16 and float8 in ml_dtypes' dtypes."""
    t = t.detach().contiguous()
    name = str(t.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        raw = t.reshape(-1).view(torch.uint8).numpy()
        return raw.view(getattr(ml_dtypes, name)).reshape(t.shape)
    return t.numpy()


def assert_same_bits(t: torch.Tensor, expected: np.ndarray, what: str) -> None:
    """Same dtype, shape and bits; all NaN are one."""
    actual = to_numpy(t)
    assert actual.dtype == expected.dtype, what
    assert actual.shape == expected.shape, what
    unsigned = f"u{actual.dtype.itemsize}"
    differ = np.ascontiguousarray(actual).view(unsigned) != np.ascontiguousarray(expected).view(unsigned)
    differ &= ~((actual != actual) & (expected != expected))
    assert not differ.any(), f"{what}: {actual[differ][:4]} instead of {expected[differ][:4]}"


def test_assert_same_bits_fails() -> None:
    zero = torch.zeros(2)
    assert_same_bits(zero, np.zeros(2, np.float32), "equal")
    assert_same_bits(torch.tensor([float("nan")]), np.array([np.nan], np.float32), "NaN")
    for other in (np.array([0.0, -0.0], np.float32), np.zeros(2), np.zeros((2, 1), np.float32)):
        with pytest.raises(AssertionError, match="different"):
            assert_same_bits(zero, other, "different")


# Strategies. They favour what is rare at random: ties, ends of the range, one sign, zeros.

GRANULARITIES = ["PerTensor", "PerAxis", "PerRow", "PerToken", "PerGroup", "PerBlock"]


@st.composite
def granularities(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[fsq.Granularity, tuple[int, ...]]:
    """Draw a granularity that applies to `shape`, and its block size by the oracle."""
    kind = draw(st.sampled_from(GRANULARITIES))
    arg: object = None
    divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in shape]
    if kind in ("PerAxis", "PerRow"):
        arg = draw(st.integers(-len(shape), len(shape) - 1))
    elif kind == "PerGroup":
        arg = draw(st.sampled_from(divisors[-1]))
    elif kind == "PerBlock":
        arg = tuple(draw(st.sampled_from(d)) for d in divisors)
    cls = getattr(fsq, kind)
    return (cls() if arg is None else cls(arg)), oracle.block_size(kind, arg, shape)


@st.composite
def specs(
    draw: st.DrawFn, granularity: fsq.Granularity, dtypes: list[torch.dtype], *, plain: bool = False
) -> fsq.QuantSpec:
    """Draw everything else of a spec; `plain` keeps float32 scales and int32 zero points."""
    dtype = draw(st.sampled_from(dtypes))
    facts = oracle.FORMATS[str(dtype).removeprefix("torch.")]
    options: dict[str, object] = {"eps": draw(st.sampled_from([2.0**-23, 1e-3, 2.0**-12, 1e-30]))}
    qmin, qmax = facts.qmin, facts.qmax
    if not facts.is_float:
        if draw(st.booleans()):
            qmin = draw(st.integers(qmin, qmax - 1))
            qmax = draw(st.integers(qmin + 1, qmax))
            options |= {"quant_min": qmin, "quant_max": qmax}
        mappings = list(fsq.MappingType)
        if not qmin < 0 < qmax or int((qmax + qmin + 1) / 2) != 0:
            mappings.remove(fsq.MappingType.SYMMETRIC_NO_CLIPPING_ERR)
        options["mapping"] = draw(st.sampled_from(mappings))
    if not plain:
        narrow = [] if facts.bits == 16 else [torch.float16, torch.bfloat16]
        options["scale_dtype"] = draw(st.sampled_from([torch.float32, torch.float64, *narrow]))
        if options["scale_dtype"] is torch.float16:
            options["eps"] = max(options["eps"], 2.0**-14)
        zero_points = [torch.int32, torch.int64, torch.float32]
        zero_points += [torch.int16] * (not facts.is_float) + [torch.int8] * (facts.storage == np.int8)
        options["zero_point_dtype"] = draw(st.sampled_from(zero_points))
    return fsq.QuantSpec(dtype, granularity, **options)


@st.composite
def arrays(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Draw real values: at random, of one sign, constant, or on ties of a power-of-two scale."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["normal", "positive", "negative", "constant", "ties", "wide", "sparse"]))
    x = rng.standard_normal(shape)
    if kind in ("positive", "negative"):
        x = np.abs(x) * (1 if kind == "positive" else -1)
    elif kind == "constant":
        x = np.full(shape, draw(st.sampled_from([0.0, -0.0, 1.0, -3.7])))
    elif kind == "ties":
        x = rng.integers(-256, 257, shape) / 2
    elif kind == "wide":
        x = x * 2.0 ** rng.integers(-30, 30, shape)
    elif kind == "sparse":
        x = np.where(rng.random(shape) < 0.7, 0.0, x)
    exponent = draw(st.sampled_from([0, 0, 0, 8, -8, 10, -20, 80, -120]))
    x = np.clip(x * 2.0**exponent, -LIMIT, LIMIT)
    if dtype is torch.float16:
        x = np.clip(x, -60000, 60000)
    return torch.from_numpy(x).to(dtype)


@st.composite
def cases(
    draw: st.DrawFn, dtypes: list[torch.dtype], reals: list[torch.dtype], *, plain: bool = False
) -> tuple[fsq.QuantSpec, torch.Tensor, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    granularity, size = draw(granularities(shape))
    spec = draw(specs(granularity, dtypes, plain=plain))
    return spec, draw(arrays(shape, draw(st.sampled_from(reals)))), size


def oracle_of(spec: fsq.QuantSpec) -> dict[str, object]:
    qmin, qmax = spec.bounds
    return {"qmin": qmin, "qmax": qmax}


def check_against_oracle(
    spec: fsq.QuantSpec, x: torch.Tensor, size: tuple[int, ...], state_dtype: torch.dtype, out: torch.dtype
) -> None:
    """Compare every step from data to decoded values, each fed with what the package gave."""
    state = fsq.observe(spec, fsq.init(spec, x.shape, dtype=state_dtype), x)
    lo, hi = oracle.min_max(to_numpy(x), size, NP[state_dtype])
    assert_same_bits(state["min"], lo, "min")
    assert_same_bits(state["max"], hi, "max")

    qp = fsq.calc_qparams(spec, state)
    zero_points = INTEGERS | NP
    scale, zero_point = oracle.qparams(
        lo,
        hi,
        mapping=spec.mapping.name,
        eps=spec.eps,
        scale_dtype=NP[spec.scale_dtype],
        zero_point_dtype=zero_points[spec.zero_point_dtype],
        **oracle_of(spec),
    )
    assert_same_bits(qp.scale, scale, "scale")
    assert_same_bits(qp.zero_point, zero_point, "zero point")

    facts = oracle.FORMATS[str(spec.dtype).removeprefix("torch.")]
    q = fsq.quantize(spec, x, qp)
    codes = oracle.quantize(to_numpy(x), scale, zero_point, facts, **oracle_of(spec))
    assert_same_bits(q, codes, "codes")
    assert_same_bits(
        fsq.dequantize(spec, q, qp, dtype=out), oracle.dequantize(codes, scale, zero_point, NP[out]), "decoded"
    )


@settings(max_examples=600)
@given(cases(list(fsq.FORMATS), REALS), st.sampled_from(REALS), st.sampled_from(REALS))
def test_equals_the_oracle_in_bits(
    case: tuple[fsq.QuantSpec, torch.Tensor, tuple[int, ...]], state_dtype: torch.dtype, out: torch.dtype
) -> None:
    spec, x, size = case
    if state_dtype is torch.float16:
        assume(x.abs().max() <= 60000)
    check_against_oracle(spec, x, size, state_dtype, out)


@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize("dtype", [torch.int1, torch.uint4, torch.int8, torch.uint8, torch.int16], ids=str)
@pytest.mark.parametrize("real", REALS, ids=str)
def test_ranges_at_the_limits(real: torch.dtype, dtype: torch.dtype, mapping: str) -> None:
    """The largest finite range, whose width overflows, and the smallest positive one."""
    spec = fsq.QuantSpec(dtype, fsq.PerTensor(), mapping=fsq.MappingType[mapping])
    largest = torch.finfo(real).max if real is not torch.float64 else torch.finfo(torch.float32).max
    for lo, hi in ((-largest, largest), (-largest, 0), (0, largest), (0, torch.finfo(real).smallest_normal)):
        x = torch.tensor([lo, hi, lo / 2, hi / 3], dtype=torch.float64).to(real)
        check_against_oracle(spec, x, (4,), real, real if real is not torch.float16 else torch.float32)


@settings(max_examples=200)
@given(cases(list(fsq.FORMATS), REALS), st.sampled_from([float("inf"), float("-inf"), 1e38]))
def test_what_lies_outside_the_range_saturates(
    case: tuple[fsq.QuantSpec, torch.Tensor, tuple[int, ...]], far: float
) -> None:
    spec, x, _ = case
    qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
    low, high = spec.bounds
    y = torch.full(x.shape, far, dtype=torch.float64).to(x.dtype)
    q = fsq.quantize(spec, y, qp).to(torch.float32)
    facts = oracle.FORMATS[str(spec.dtype).removeprefix("torch.")]
    codes = oracle.quantize(to_numpy(y), to_numpy(qp.scale), to_numpy(qp.zero_point), facts, **oracle_of(spec))
    assert_same_bits(fsq.quantize(spec, y, qp), codes, "codes")
    if abs(far) == float("inf"):
        assert (q == (high if far > 0 else low)).all()


# The bound. The value and scale of uint8 that show why it is three roundings and not one.
WORST = (torch.tensor([494.10086, 0.0]), 1.9803643)


def bound(spec: fsq.QuantSpec, zero_point: np.ndarray) -> np.ndarray:
    """Return the largest `|x - dq(q(x))|` inside the range, in steps of the scale.

    All in float32, u = 2**-24 (half a unit in the last place, relative), s the scale, z the zero
    point, and no subnormals. What runs is

        r = (1/s)(1 + d1)         reciprocal
        p = x r (1 + d2)          product
        n = rint(p)               |n - p| <= 1/2; adding z is exact below 2**24
        y = n s (1 + d3)          dequantize; code - z = n is exact

    with |d| <= u. So |x - y| / s <= |x/s - p| + |p - n| + |n| |d3| <= 1/2 + (2 |x/s| + |n|) u to first order.
    Where the code saturates inside the range, the end of the range in steps is off by at most `edge`
    in exact arithmetic (half a step, for the zero point is rounded) and by what was rounded on
    the way to it: width and scale, 2 u of at most qmax - qmin steps, and lo/s, u. With the
    dequantization that is again three roundings of a number of steps. M = max(qmax - z, z - qmin)
    is the largest |n|, and |x/s| <= M + 1/2 but for what is already counted; at an end the three
    roundings concern N = qmax - qmin steps in all. Hence

        |x - y| <= (edge + 3 (K + 1) u) s,    K = M inside, N where a range end may saturate

    where the 1 takes the halves and all second-order terms (3 K**2 u**2 < u for 16 bits). K = N is
    used for ASYMMETRIC. One rounding, (1/2 + N u) s, is false: test_one_rounding_is_not_enough.
    """
    qmin, qmax = spec.bounds
    z = zero_point.astype(np.float64)
    asymmetric = spec.mapping is fsq.MappingType.ASYMMETRIC
    most = np.full(z.shape, qmax - qmin) if asymmetric else np.maximum(qmax - z, z - qmin)
    return oracle.edge(spec.mapping.name, qmin, qmax) + 3 * (most + 1) * 2.0**-24


INTEGER_DTYPES = [d for d in fsq.FORMATS if not str(d).startswith("torch.float8")]


@settings(max_examples=400)
@given(cases(INTEGER_DTYPES, [torch.float32], plain=True))
@example((fsq.QuantSpec(torch.int4, fsq.PerTensor(), quant_min=-8, quant_max=6), torch.tensor([-7.0, 7.0]), (2,)))
def test_the_error_is_bounded_inside_the_range(case: tuple[fsq.QuantSpec, torch.Tensor, tuple[int, ...]]) -> None:
    spec, x, _ = case
    qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
    y = fsq.dequantize(spec, fsq.quantize(spec, x, qp), qp)
    error = oracle.error(to_numpy(x), to_numpy(y), to_numpy(qp.scale))
    assert (error <= oracle.spread(bound(spec, to_numpy(qp.zero_point)), x.shape)).all(), error.max()


def test_one_rounding_is_not_enough() -> None:
    """A value, inside its range, whose error is more than `(0.5 + (qmax - qmin) u) s`."""
    spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
    x, scale = WORST
    qp = fsq.QParams(torch.tensor([scale]), torch.tensor([0], dtype=torch.int32))
    assert x.max() < scale * 255
    y = fsq.dequantize(spec, fsq.quantize(spec, x, qp), qp)
    error = oracle.error(to_numpy(x), to_numpy(y), to_numpy(qp.scale)).max()
    assert 0.5 + 255 * 2.0**-24 < error <= bound(spec, to_numpy(qp.zero_point)).max()


@settings(max_examples=100)
@given(cases(INTEGER_DTYPES, [torch.float64], plain=True))
def test_float64_has_the_same_bound_with_its_own_unit(
    case: tuple[fsq.QuantSpec, torch.Tensor, tuple[int, ...]],
) -> None:
    """With range and scale in float64 the roundings are 2**-53: the error is half a step to 1e-10 of it.

    3 (65535 + 1) 2**-53 < 1e-10, and what computes the error in float64 rounds less than that again.
    """
    spec, x, _ = case
    spec = fsq.QuantSpec(
        spec.dtype,
        spec.granularity,
        mapping=spec.mapping,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        scale_dtype=torch.float64,
    )
    qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape, dtype=torch.float64), x))
    y = fsq.dequantize(spec, fsq.quantize(spec, x, qp), qp, dtype=torch.float64)
    error = oracle.error(to_numpy(x), to_numpy(y), to_numpy(qp.scale))
    assert (error <= oracle.edge(spec.mapping.name, *spec.bounds) + 1e-10).all()
