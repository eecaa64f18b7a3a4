"""The product of codes: integers exact against int64 numpy, float8 within the bound of its sum.

Two references, neither of which imports torch: `corrected` is the sum of Jacob et al. (equation 7 of
arXiv:1712.05877) before any rounding, and `epilogue` the four float operations behind it, in their
order. With `u` the unit roundoff of the arithmetic (2**-24 for float32), `v` that of an output dtype
narrower than it (else 0), `E` the sum times its scales and `b` the bias,

    y = ((sum (1 + d1) * (s_x s_w (1 + d2)) (1 + d3) + b) (1 + d4)) (1 + d5),   |d1..d4| <= u, |d5| <= v

so `|y - (E + b)| <= 3.03 u |E| + (1.01 u + v) |E + b|`, and where the output dtype underflows half of
its least number comes on top. The reference in float64 errs itself, by no more than `u` of each
term when the arithmetic is float64 too: `bound` is `5 u |E| + (3 u + v) |E + b| + least / 2`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import find, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import functional_sq as fsq
from functional_sq import (
    FORMATS,
    FoldedWeight,
    MappingType,
    QParams,
    QuantSpec,
    backends,
    brgemm,
    chains,
    float8_mm,
    int_mm,
    onednn,
    triton_mm,
)
from functional_sq.formats import REAL_DTYPES, Float8, Integer
from functional_sq.int_mm import INT32_TERMS
from functional_sq.linear import quantized_linear
from functional_sq.operands import Operands

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    from torchao.quantization import quant_primitives as ao

INTEGERS = tuple(d for d, f in FORMATS.items() if isinstance(f, Integer) and f.bits <= 8)
FLOAT8S = tuple(d for d, f in FORMATS.items() if isinstance(f, Float8))
ARRAYS = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
} | {d: np.dtype(getattr(ml_dtypes, str(d).removeprefix("torch."))) for d in FLOAT8S}


# --- the references --------------------------------------------------------------------------------


def corrected(q: np.ndarray, z_x: np.ndarray, w: np.ndarray, z_w: np.ndarray) -> np.ndarray:
    """Return `sum_k (q - z_x) (w - z_w)` in int64; `q` (..., K), `w` (N, K), zero points with size 1 along K."""
    return (q.astype(np.int64) - z_x) @ (w.astype(np.int64) - z_w).T


def epilogue(
    total: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, dtype: np.dtype, residual: np.ndarray | None = None
) -> np.ndarray:
    """Scale, add the bias and a residual, round to `dtype`; in float32, or float64 where `dtype` is."""
    wide = np.promote_types(dtype, np.float32) if dtype.kind == "f" else np.dtype(np.float32)
    assert scale.dtype == wide
    y = total.astype(wide) * scale
    for term in (bias, residual):
        y = y if term is None else y + term.astype(wide)
    return y.astype(dtype)


def bound(exact: np.ndarray, bias: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Return how far the result may lie from `exact + bias`: the docstring of this module derives it."""
    info = ml_dtypes.finfo(dtype)
    u = 2.0**-53 if dtype == np.float64 else 2.0**-24
    v = 0.0 if dtype in (np.float64, np.float32) else float(info.eps) / 2
    total = exact if bias is None else exact + bias
    return 5 * u * np.abs(exact) + (3 * u + v) * np.abs(total) + float(info.smallest_subnormal) / 2


def array(x: Tensor) -> np.ndarray:
    """Return a tensor as numpy; what numpy itself has not, through its bytes."""
    x = x.detach().cpu()
    if x.dtype not in FLOAT8S and x.dtype is not torch.bfloat16:
        return x.numpy()
    return x.reshape(-1).view(torch.uint8).numpy().view(ARRAYS[x.dtype]).reshape(x.shape)


def test_array_keeps_the_values_of_every_float_dtype() -> None:
    for dtype in ARRAYS:
        assert array(torch.tensor([[0.5, -1.75, 0.0]]).to(dtype)).astype(float).tolist() == [[0.5, -1.75, 0.0]]


# --- drawing ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """Codes and qparams on both sides, and a bias."""

    act: QuantSpec
    q: Tensor
    qp: QParams
    weight: QuantSpec
    w: Tensor
    w_qp: QParams
    bias: Tensor | None

    def folded(self, device: str = "cpu") -> FoldedWeight:
        w_qp = QParams(*(t.to(device) for t in self.w_qp))
        return fsq.fold(self.weight, self.w.to(device), w_qp)

    def linear(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
        qp = QParams(*(t.to(device) for t in self.qp))
        bias = None if self.bias is None else self.bias.to(device)
        return fsq.linear(self.act, self.q.to(device), qp, self.folded(device), bias, dtype=dtype)

    def kept(self, dtype: torch.dtype = torch.float32, **then: Any) -> Tensor:
        """Multiply as a layer does that keeps its weight: with the epilogue computed before."""
        folded = self.folded()
        known = fsq.epilogue(self.act, self.qp, folded, dtype=torch.promote_types(dtype, torch.float32))
        least = (
            0 if onednn.WORTH < 10**18 else onednn.WORTH
        )  # by oneDNN, however small or long it is, unless switched off
        with mock.patch.multiple(onednn, WORTH=least, LARGEST_K=INT32_TERMS):
            return fsq.linear(self.act, self.q, self.qp, folded, self.bias, dtype=dtype, epilogue=known, **then)

    def corrected(self) -> np.ndarray:
        return corrected(*map(array, (self.q, self.qp.zero_point, self.w, self.w_qp.zero_point)))

    def scale(self, wide: np.dtype) -> np.ndarray:
        """Return the product of the scales, `(..., N)`, each of them and the product rounded to `wide`."""
        return array(self.qp.scale).astype(wide) * array(self.w_qp.scale).reshape(-1).astype(wide)

    def bias_array(self) -> np.ndarray | None:
        return None if self.bias is None else array(self.bias)


def codes(rng: np.random.Generator, spec: QuantSpec, shape: tuple[int, ...], fill: str) -> Tensor:
    """Draw codes of the format, all of them or the two at its ends."""
    low, high = spec.bounds
    if fill == "ends":
        values = np.where(rng.random(shape) < 0.5, low, high)
    else:
        values = {"low": np.full(shape, low), "high": np.full(shape, high)}.get(fill)
        values = rng.integers(low, high, shape, endpoint=True) if values is None else values
    return torch.from_numpy(values).to(spec.format.storage)


def qparams(rng: np.random.Generator, spec: QuantSpec, shape: tuple[int, ...], fill: str) -> QParams:
    """Draw scales from 2**-12 to 2**-5 and the zero points that the mapping allows."""
    stats = spec.granularity.stat_shape(shape)
    low, high = spec.bounds
    scale = torch.from_numpy(np.exp2(rng.uniform(-12, -5, stats)).astype(np.float32))
    if spec.mapping is not MappingType.ASYMMETRIC:
        zero_point = np.full(stats, int((low + high + 1) / 2))
    else:
        # Opposite to the codes: then every difference is as large as it can be.
        fixed = {"low": np.full(stats, high), "high": np.full(stats, low)}.get(fill)
        zero_point = rng.integers(low, high, stats, endpoint=True) if fixed is None else fixed
    return QParams(scale, torch.from_numpy(zero_point).to(spec.zero_point_dtype))


def product(
    rng: np.random.Generator,
    act: QuantSpec,
    weight: QuantSpec,
    shape: tuple[int, ...],
    n: int,
    *,
    bias: bool = True,
    fill: tuple[str, str] = ("all", "all"),
) -> Product:
    w_shape = (n, shape[-1])
    return Product(
        act,
        codes(rng, act, shape, fill[0]),
        qparams(rng, act, shape, fill[0]),
        weight,
        codes(rng, weight, w_shape, fill[1]),
        qparams(rng, weight, w_shape, fill[1]),
        torch.from_numpy(rng.standard_normal(n).astype(np.float32)) if bias else None,
    )


@st.composite
def products(draw: st.DrawFn) -> Product:
    """Every integer format of at most 8 bits on both sides, every legal granularity, any rank, zero rows too."""
    specs = []
    for granularities in ((fsq.PerTensor(), fsq.PerToken()), (fsq.PerTensor(), fsq.PerAxis(0), fsq.PerRow())):
        dtype = draw(st.sampled_from((torch.uint8, torch.int8, torch.uint4, torch.int4, *INTEGERS)))
        low, high = FORMATS[dtype].bounds
        low = draw(st.integers(low, high - 1) if draw(st.booleans()) else st.just(low))
        mapping = draw(st.sampled_from((MappingType.SYMMETRIC, MappingType.ASYMMETRIC)))
        specs.append(QuantSpec(dtype, draw(st.sampled_from(granularities)), mapping=mapping, quant_min=low))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lead = draw(st.lists(st.integers(0, 4), max_size=3))
    shape = (*lead, draw(st.integers(1, 40)))
    fills = st.sampled_from(("all", "ends", "low", "high"))
    return product(
        rng,
        *specs,
        shape,
        draw(st.integers(1, 20)),
        bias=draw(st.booleans()),
        fill=(draw(fills), draw(fills)),
    )


@pytest.mark.parametrize(
    "reached",
    [
        pytest.param(lambda p: p.q.shape[0] == 0 and p.q.ndim > 1, id="no-rows"),
        pytest.param(lambda p: p.q.ndim == 1, id="one-vector"),
        pytest.param(lambda p: p.q.ndim == 4 and p.q.numel() > 40 and p.qp.scale.numel() > 1, id="rank-4-per-token"),
        pytest.param(lambda p: p.q.shape[-1] % 8 > 0 and p.w.shape[0] % 8 > 0 and p.q.numel(), id="not-multiples-of-8"),
        pytest.param(
            lambda p: {p.act.dtype, p.weight.dtype} == {torch.uint8} and p.folded().zero_point is not None,
            id="uint8-asymmetric",
        ),
        pytest.param(
            lambda p: (
                FORMATS[p.act.dtype].bits < 8 and FORMATS[p.weight.dtype].bits < 8 and p.act.dtype != p.weight.dtype
            ),
            id="two-formats-below-8-bits",
        ),
    ],
)
def test_the_strategy_reaches(reached: Callable[[Product], bool]) -> None:
    find(products(), lambda p: bool(reached(p)))


# --- integers --------------------------------------------------------------------------------------


def assert_within(y: np.ndarray, exact: np.ndarray, bias: np.ndarray | None, limit: np.ndarray) -> None:
    """Assert `|y - (exact + bias)| <= limit`, everywhere."""
    error = np.abs(y.astype(np.float64) - (exact if bias is None else exact + bias))
    assert bool((error <= limit).all()), f"off by {np.max(error / limit)} of the bound"


def test_assert_within_fails_just_outside_the_bound() -> None:
    with pytest.raises(AssertionError, match="of the bound"):
        assert_within(np.array([1.0 + 2**-20]), np.array([1.0]), None, np.array([2**-21]))


@given(case=products(), dtype=st.sampled_from(REAL_DTYPES))
def test_the_product_is_exact_and_then_rounded_as_numpy_rounds(case: Product, dtype: torch.dtype) -> None:
    """Equal bits to int64 numpy with the float operations in their order; within the module's bound of the truth."""
    y = case.linear(dtype)
    assert y.dtype is dtype
    assert y.shape == (*case.q.shape[:-1], case.w.shape[0])
    kept = case.kept(dtype)
    assert kept.dtype is dtype
    np.testing.assert_array_equal(array(kept), array(y))

    total, bias, kind = case.corrected(), case.bias_array(), ARRAYS[dtype]
    wide = np.dtype(np.float64 if dtype is torch.float64 else np.float32)
    np.testing.assert_array_equal(array(y), epilogue(total, case.scale(wide), bias, kind))

    exact = total * case.scale(np.dtype(np.float64))
    assert_within(array(y), exact, bias, bound(exact, bias, kind))


@pytest.mark.parametrize("k", [33025, 33026, 131071, 131072, 300_000])
@pytest.mark.parametrize(
    ("dtype", "fill", "difference"),
    [
        pytest.param(torch.uint8, ("high", "high"), 255 * 255, id="255x255"),
        pytest.param(torch.uint8, ("low", "high"), -255 * 255, id="-255x255"),
        pytest.param(torch.uint8, ("low", "low"), 255 * 255, id="-255x-255"),
    ],
)
def test_codes_at_the_ends_are_exact_for_any_k(
    k: int, dtype: torch.dtype, fill: tuple[str, str], difference: int
) -> None:
    """33025 * 255**2 is the last product below 2**31, and 131071 * 128**2 that of bare int8 codes."""
    rng = np.random.default_rng(k)
    spec = QuantSpec(dtype, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
    case = product(rng, spec, spec, (2, k), 3, bias=False, fill=fill)
    assert (case.corrected() == k * difference).all()
    expected = k * difference * case.scale(np.dtype(np.float64))
    np.testing.assert_array_equal(array(case.linear(torch.float64)), np.broadcast_to(expected, (2, 3)))


def test_int8_codes_at_their_lowest_are_exact_where_their_sum_is_2_to_the_31() -> None:
    spec = QuantSpec(torch.int8, fsq.PerTensor())
    case = product(np.random.default_rng(0), spec, spec, (1, 131072), 1, bias=False, fill=("low", "low"))
    assert case.corrected().item() == 2**31
    assert case.linear(torch.float64).item() == 2.0**31 * case.scale(np.dtype(np.float64)).item()


def test_a_cpu_without_vnni_does_not_saturate() -> None:
    """oneDNN adds pairs of products in int16 there: 2 * 255 * 128 would be lost. The limit is read at import."""
    code = """
import torch, functional_sq as fsq
spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
one = fsq.QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
for k in (64, 1024, 1025):
    high, low = torch.full((40, k), 127, dtype=torch.int8), torch.full((32, k), -128, dtype=torch.int8)
    print(*fsq.linear(spec, high, one, fsq.fold(spec, low, one)).unique().tolist())
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [float(line) for line in run.stdout.split()] == [k * 127 * -128 for k in (64, 1024, 1025)]


def test_every_element_of_a_long_row_is_counted_once() -> None:
    """Random codes over three pieces: a cut in the wrong place or a piece left out changes the sum."""
    act = QuantSpec(torch.uint8, fsq.PerToken(), mapping=MappingType.ASYMMETRIC)
    weight = QuantSpec(torch.uint8, fsq.PerAxis(0), mapping=MappingType.ASYMMETRIC)
    case = product(np.random.default_rng(1), act, weight, (3, 2 * 131071 + 5), 4, bias=False)
    expected = case.corrected() * case.scale(np.dtype(np.float64))
    np.testing.assert_array_equal(array(case.linear(torch.float64)), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_stride_of_an_axis_of_size_one_is_not_read(dtype: torch.dtype) -> None:
    """torch leaves it undefined, Inductor writes 0, and oneDNN took it for a pitch (pytorch/pytorch#195066)."""
    act, weight = QuantSpec(dtype, fsq.PerTensor()), QuantSpec(dtype, fsq.PerTensor())
    zero_point = 128 if dtype is torch.uint8 else 0
    for k, n in ((64, 5), (1, 5), (64, 1), (1, 1)):
        q, w = (torch.randint(1, 100, (size, k)).to(dtype) for size in (1, n))
        qp = ones(act, 1, k, zero_point=zero_point)
        expected = (q.to(torch.float32) - zero_point) @ (w.to(torch.float32) - zero_point).T
        q, w = q.as_strided(q.shape, (0, 1)), w.as_strided(w.shape, (0 if n == 1 else k, 1))
        assert torch.equal(fsq.linear(act, q, qp, fsq.fold(weight, w, qp)), expected)


def test_rows_that_overlap_or_repeat_in_memory_are_read_as_they_are() -> None:
    spec = QuantSpec(torch.int8, fsq.PerTensor())
    w = torch.randint(-128, 128, (5, 64), dtype=torch.int8)
    long = torch.randint(-128, 128, (100,), dtype=torch.int8)
    for q in (long.unfold(0, 64, 1), long[:64].expand(7, 64)):
        y = fsq.linear(spec, q, ones(spec, *q.shape), fsq.fold(spec, w, ones(spec, 5, 64)))
        assert torch.equal(y, q.float() @ w.float().T)


# --- a weight that is kept: brgemm and oneDNN -----------------------------------------------------------------

BY = ("brgemm", "oneDNN", "torch")

CUTS = sorted({True, onednn.AMX})

REALS_OF_BRGEMM = (torch.float32, torch.bfloat16, torch.float16)

needs_onednn = pytest.mark.skipif(not onednn.AVAILABLE, reason="this machine has no oneDNN, or no VNNI")


def symmetric(rows: int, k: int, n: int, dtype: torch.dtype = torch.int8, **kwargs: object) -> Product:
    act = QuantSpec(dtype, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
    return product(np.random.default_rng(k), act, QuantSpec(torch.int8, fsq.PerAxis(0)), (rows, k), n, **kwargs)


@pytest.fixture
def calls(packing: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results that a backend gave, which is asked for small products too."""
    monkeypatch.setattr(onednn, "LARGEST_K", INT32_TERMS)
    found: list[Tensor] = []
    backend = {"brgemm": brgemm, "oneDNN": onednn}[packing]
    multiply = backend.product

    def recorded(*operands: Any, **how: Any) -> Tensor:
        found.append(multiply(*operands, **how))
        return found[-1]

    monkeypatch.setattr(backend, "product", recorded)
    return found


@pytest.mark.parametrize(
    "fill", [("all", "all"), ("high", "low"), ("low", "low"), ("high", "high"), ("ends", "ends"), ("all", "high")]
)
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [
        (49, 2048, 16),  # sums above 2**24, from which AMX kernels subtract in float32
        (16, 9216, 33),
        (0, 8, 5),
        (1, 1, 1),
        (1, 64, 1),
        (2, 1, 17),
        (3, 33025, 2),
        (17, 513, 33),
        (130, 96, 100),
        (1, 384, 384),
    ],
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint4, torch.int4], ids=str)
@pytest.mark.parametrize(
    ("packing", "cut"),
    [("brgemm", False), *(("oneDNN", cut) for cut in CUTS)],
    indirect=["packing"],
)
def test_a_packed_weight_has_the_integers_and_roundings_of_numpy(
    calls: list[Tensor],
    packing: str,
    cut: bool,
    dtype: torch.dtype,
    rows: int,
    k: int,
    n: int,
    fill: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No sum is rounded twice, and no float operation is fused into another."""
    monkeypatch.setattr(onednn, "AMX", cut)
    case = symmetric(rows, k, n, dtype, fill=fill)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        expected = epilogue(case.corrected(), case.scale(np.dtype(np.float32)), case.bias_array(), ARRAYS[out])
        np.testing.assert_array_equal(array(case.kept(out)), expected)
    least = 1 if packing == "brgemm" or cut else 2  # oneDNN takes one row with AMX alone
    assert len(calls) == 3 * (rows >= least)


@pytest.mark.parametrize(
    ("packing", "cut"),
    [("brgemm", False), *(("oneDNN", cut) for cut in CUTS)],
    indirect=["packing"],
)
@pytest.mark.parametrize(
    ("rows", "k", "fill"),
    [
        (2, 256, ("all", "all")),
        (8, 1024, ("all", "all")),  # in two parts, as the largest sum of a row of such codes could be above 2**24
        (8, 1024, ("low", "high")),
        (70, 9216, ("ends", "ends")),  # in four
    ],
)
def test_few_rows_and_an_asymmetric_weight_that_is_packed(
    calls: list[Tensor],
    packing: str,
    cut: bool,
    rows: int,
    k: int,
    fill: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onednn, "AMX", cut)
    granularities = fsq.PerTensor(), fsq.PerAxis(0)
    specs = (QuantSpec(torch.uint8, each, mapping=MappingType.ASYMMETRIC) for each in granularities)
    case = product(np.random.default_rng(k), *specs, (rows, k), 33, fill=fill)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        expected = epilogue(case.corrected(), case.scale(np.dtype(np.float32)), case.bias_array(), ARRAYS[out])
        np.testing.assert_array_equal(array(case.kept(out)), expected)
    assert len(calls) == 3
    residual = torch.randn(rows, 33)
    float32 = np.dtype(np.float32)
    total = epilogue(case.corrected(), case.scale(float32), case.bias_array(), float32, array(residual))
    np.testing.assert_array_equal(array(case.kept(residual=residual)), total)
    to = QuantSpec(torch.int8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
    then = fsq.Requantization(to, QParams(torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)), "relu")
    assert torch.equal(case.kept(then=then), fsq.requantize(case.kept(), then))  # both of the same floats
    qs = torch.stack([case.q, case.q.flip(0)])
    folded, known = case.folded(), fsq.epilogue(case.act, case.qp, case.folded())

    def forward(q: Tensor) -> Tensor:
        return fsq.linear(case.act, q, case.qp, folded, case.bias, epilogue=known)

    assert torch.equal(torch.vmap(forward)(qs), torch.stack([forward(q) for q in qs]))
    if k > 256:
        return
    for q, few in ((case.q, True), (case.q[:1], False), (torch.cat([case.q] * 5), False)):
        torch.compiler.reset()
        y, (source,) = run_and_get_code(torch.compile(forward, fullgraph=True), q)
        assert ("onednn_sums" in source) is (few and packing == "oneDNN")
        assert ("brgemm_product" in source) is (packing == "brgemm")
        assert torch.equal(y, forward(q))


@pytest.mark.parametrize(("k", "n"), [(64, 5), (2, 5), (64, 1), (1, 5), (4096, 70)])
def test_one_row_is_no_matrix_filled_up(k: int, n: int) -> None:
    spec = QuantSpec(torch.int8, fsq.PerTensor())
    case = product(np.random.default_rng(k), spec, spec, (1, k), n, bias=False)

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, w: Tensor) -> Tensor:
            return int_mm.integer_product(q, w)

    forward = Layer()
    expected = case.corrected()
    for function in (forward, torch.compile(forward, fullgraph=True), torch.compile(forward, dynamic=True)):
        for q in (case.q, case.q.as_strided((1, k), (0, 1)), case.q.reshape(k, 1).t()):
            np.testing.assert_array_equal(array(function(q, case.w)), expected)
    _, (source,) = run_and_get_code(torch.compile(forward, fullgraph=True), case.q, case.w)
    assert ("row_product" in source) == (k > 1 and not int_mm._SATURATES)
    exported = torch.export.export(forward, (case.q, case.w))
    assert not [node for node in exported.graph.nodes if "functional_sq" in str(node.target)]
    np.testing.assert_array_equal(array(exported.module()(case.q, case.w)), expected)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "n", "fill"),
    [
        (17, 513, 33, ("all", "all")),
        (49, 9216, 16, ("high", "low")),  # cut into parts, see onednn.exactly
        (1, 384, 384, ("ends", "ends")),
        (0, 8, 5, ("all", "all")),
    ],
)
def test_a_residual_is_added_before_the_one_rounding(
    rows: int,
    k: int,
    n: int,
    fill: tuple[str, str],
    dtype: torch.dtype,
    by: str,
    multiply_by: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    multiply_by(by)
    monkeypatch.setattr(onednn, "AMX", True)
    case = symmetric(rows, k, n, fill=fill)
    case = dataclasses.replace(case, qp=QParams(case.qp.scale / 64, case.qp.zero_point))  # float16 overflows otherwise
    for bias in (case.bias, None):
        case = dataclasses.replace(case, bias=bias)
        total, scale = case.corrected(), case.scale(np.promote_types(np.float32, ARRAYS[dtype]))
        # Of the result's magnitude: then each rounding counts.
        size = float(np.abs(total * scale).max()) if rows else 1.0
        residual = torch.from_numpy(np.random.default_rng(n).normal(scale=size, size=(rows, n))).to(dtype)
        before = residual.clone()
        y = case.kept(dtype, residual=residual)
        assert y.dtype is dtype
        assert torch.equal(residual, before)
        np.testing.assert_array_equal(array(y), epilogue(total, scale, case.bias_array(), ARRAYS[dtype], array(before)))


@pytest.mark.parametrize("by", BY)
def test_a_residual_of_any_rank_and_stride_with_a_gradient_and_under_vmap(
    by: str, multiply_by: Callable[[str], None]
) -> None:
    multiply_by(by)
    case = symmetric(12, 16, 8)
    case = dataclasses.replace(case, q=case.q.reshape(2, 6, 16))
    residual = torch.randn(8, 6, 2)[..., :1].expand(8, 6, 2).permute(2, 1, 0)
    expected = case.kept() + residual
    assert torch.equal(case.kept(residual=residual), expected)
    learned = residual.clone().requires_grad_()
    y = case.kept(residual=learned)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert torch.equal(learned.grad, torch.ones_like(residual))
    both = torch.stack([residual, -residual])
    y = torch.vmap(lambda each: case.kept(residual=each))(both)
    assert torch.equal(y, torch.stack([case.kept(residual=each) for each in both]))


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("real", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int4, *FLOAT8S], ids=str)
def test_what_codes_are_made_of_beside_them_changes_no_bit(
    dtype: torch.dtype, real: torch.dtype, by: str, multiply_by: Callable[[str], None]
) -> None:
    multiply_by(by)
    floats = dtype.is_floating_point
    spec = QuantSpec(dtype, fsq.PerTensor(), mapping=MappingType.SYMMETRIC if floats else MappingType.ASYMMETRIC)
    qp = QParams(torch.tensor([0.25]), torch.tensor([0 if floats else 3], dtype=torch.int32))
    draw = torch.Generator().manual_seed(0)
    # On the borders of two codes too, and beyond the last ones.
    x = (torch.randint(-600, 600, (2, 37, 70), generator=draw) / 8).to(real)
    w = torch.randn(33, 70, generator=draw)
    of_weight = QuantSpec(dtype if floats else torch.int8, fsq.PerAxis(0))
    weight_qp = fsq.calc_qparams(of_weight, fsq.observe(of_weight, fsq.init(of_weight, w.shape), w))
    weight = fsq.fold(of_weight, fsq.quantize(of_weight, w, weight_qp), weight_qp)
    q, known = fsq.quantize(spec, x, qp), fsq.epilogue(spec, qp, weight)
    bias, residual = torch.randn(33, generator=draw), torch.randn(2, 37, 33, generator=draw)
    to = QuantSpec(torch.float8_e4m3fn if floats else torch.int8, fsq.PerTensor())
    then = fsq.Requantization(to, QParams(torch.tensor([2.0]), torch.tensor([0], dtype=torch.int32)), "gelu")
    multiply = partial(fsq.linear, spec, q, qp, weight, bias, epilogue=known)
    for how in ({}, {"residual": residual}, {"then": then}):
        y, right = multiply(**how, x=x), multiply(**how)
        assert y.dtype is right.dtype
        assert y.view(torch.uint8).equal(right.view(torch.uint8))


def test_what_codes_are_not_made_of_is_refused() -> None:
    case = symmetric(3, 8, 5)
    with pytest.raises(
        ValueError, match=r"x has shape \(8,\), and its codes \(3, 8\); give what they are the codes of"
    ):
        case.kept(x=torch.ones(8))
    with pytest.raises(TypeError, match=r"a product \(x\)"):
        case.kept(x=torch.ones(3, 8, dtype=torch.int8))


def test_a_residual_and_then_codes() -> None:
    """The residual is part of what the activation and the quantization take."""
    case = symmetric(7, 16, 8)
    residual = torch.randn(7, 8)
    qp = QParams(torch.tensor([0.02]), torch.tensor([3], dtype=torch.int32))
    then = fsq.Requantization(QuantSpec(torch.int8, fsq.PerTensor()), qp, "relu")
    assert torch.equal(case.kept(residual=residual, then=then), fsq.requantize(case.kept(residual=residual), then))
    assert symmetric(5, 16, 0, bias=False).kept(residual=torch.ones(5, 0)).shape == (5, 0)


needs_brgemm = pytest.mark.skipif(not brgemm.AVAILABLE, reason="this machine has no VNNI, or no compiler")

needs_bfloat16 = pytest.mark.skipif(
    not (brgemm.AVAILABLE and brgemm.HAS_BFLOAT16),
    reason="this machine has no brgemm, or no bfloat16 instructions: float8 is multiplied as floats, by other tests",
)


def by_brgemm(case: Product, residual: Tensor | None, dtype: torch.dtype, *to: object) -> tuple[object, ...]:
    """Return what the operator is given."""
    (q, qp), (w, w_qp) = (case.q, case.qp), (case.w, case.w_qp)
    z = None if q.is_floating_point() else qp.zero_point.to(torch.int32)
    scale = fsq.epilogue(case.act, qp, case.folded()).scale
    of_weight = w_qp.zero_point.reshape(-1) if case.weight.mapping is MappingType.ASYMMETRIC else None
    return (q, z, w, of_weight, scale, case.bias, residual, *(to or ("none", None, None)), dtype)


def layer_of(act: QuantSpec, scale: float, zero_point: int, weight: torch.dtype, n: int, k: int) -> tuple[Any, ...]:
    """Return what `quantized_linear` takes but the values: qparams, an asymmetric weight where it has one, a bias."""
    rng = np.random.default_rng(n * k)
    qp = QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
    floats = isinstance(FORMATS[weight], Float8)
    spec = QuantSpec(weight, fsq.PerAxis(0), mapping=MappingType.SYMMETRIC if floats else MappingType.ASYMMETRIC)
    w = float8_codes(rng, weight, (n, k)) if floats else codes(rng, spec, (n, k), "all")
    w_qp = qparams(rng, spec, (n, k), "all")
    folded = fsq.fold(spec, w, w_qp)
    return qp, folded, torch.from_numpy(rng.standard_normal(n).astype(np.float32)), fsq.epilogue(act, qp, folded)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("dtype", [*REALS_OF_BRGEMM, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("act", "zero_point", "weight"),
    [
        (torch.int8, -7, torch.int8),
        (torch.uint8, 200, torch.int8),
        (torch.int4, 3, torch.int8),  # not all of a byte
        *((d, 0, torch.float8_e4m3fn) for d in FLOAT8S),
    ],
)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 71), (70, 130), (130, 4100), (0, 8)], ids=str)
def test_a_layer_makes_the_codes_that_quantize_makes(
    by: str,
    act: torch.dtype,
    zero_point: int,
    weight: torch.dtype,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    multiply_by: Callable[[str], None],
) -> None:
    """Of every binade, of values at the border of two codes, and of infinities; strides, and a gradient that ends."""
    multiply_by(by)
    floats = isinstance(FORMATS[act], Float8)
    spec = QuantSpec(act, fsq.PerTensor(), mapping=MappingType.SYMMETRIC if floats else MappingType.ASYMMETRIC)
    qp, folded, bias, known = layer_of(spec, 0.25, zero_point, weight, 5, shape[-1])
    rng = np.random.default_rng(7)
    wide = rng.standard_normal(shape) * np.exp2(rng.integers(-14, 12, shape))
    borders = rng.integers(-250, 250, shape) / 8  # halves of a step, and for float8 ties of both parities
    x = torch.from_numpy(np.where(rng.random(shape) < 0.5, wide, borders)).to(dtype)
    if x.numel():
        x.view(-1)[0] = -np.inf
        x.view(-1)[-1] = np.inf
    if x.ndim > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    known = None if dtype is torch.float64 else known
    expected = fsq.linear(spec, fsq.quantize(spec, x, qp), qp, folded, bias, dtype=dtype, epilogue=known)
    y = quantized_linear(spec, x.requires_grad_(), qp, folded, bias, epilogue=known)
    assert not y.requires_grad
    assert y.dtype is dtype
    np.testing.assert_array_equal(array(y), array(expected))  # a NaN as a NaN: infinities of float8 saturate


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch._int_mm under vmap
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # which torch.func.jvp calls
@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("act", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_layer_that_makes_codes_is_transformed_and_traced(
    by: str, act: torch.dtype, multiply_by: Callable[[str], None]
) -> None:
    multiply_by(by)
    spec = QuantSpec(act, fsq.PerTensor())
    qp, folded, bias, known = layer_of(spec, 0.25, 0, act, 5, 16)

    def forward(x: Tensor) -> Tensor:
        return quantized_linear(spec, x, qp, folded, bias, epilogue=known)

    x = torch.randn(3, 4, 16)
    y = forward(x)
    assert torch.equal(torch.vmap(forward)(x), y)
    assert torch.equal(torch.vmap(forward, in_dims=1, out_dims=1)(x), y)
    value, tangent = torch.func.jvp(lambda x: forward(x) + x.sum(), (x,), (torch.ones_like(x),))
    assert torch.equal(value, y + x.sum())
    assert torch.equal(tangent, torch.full_like(y, x.numel()))
    assert torch.equal(torch.func.grad(lambda x: (forward(x) * x.sum()).sum())(x), y.sum().expand(x.shape))
    assert torch.equal(torch.compile(forward, fullgraph=True)(x), y)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert forward(mode.from_tensor(x)).shape == y.shape
    with torch.inference_mode():
        assert torch.equal(forward(x), y)


@needs_brgemm
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=str)
@pytest.mark.parametrize("to", [*INTEGERS, torch.int16, torch.float8_e4m3fn], ids=str)
def test_one_pass_makes_the_codes_of_quantize(to: torch.dtype, dtype: torch.dtype) -> None:
    """Of any format, those that take several passes too; values at the borders of codes; as they lie in memory."""
    floats = isinstance(FORMATS[to], Float8)
    spec = QuantSpec(to, fsq.PerTensor(), mapping=MappingType.SYMMETRIC if floats else MappingType.ASYMMETRIC)
    qp = QParams(
        torch.tensor([0.25]), torch.tensor([0 if floats else spec.bounds[1] // 3], dtype=spec.zero_point_dtype)
    )
    values = (torch.randint(-700, 700, (3, 5, 6, 70)) / 16).to(dtype)
    values[0, 0, 0, :2] = torch.tensor([np.inf, -np.inf])
    images = values.contiguous(memory_format=torch.channels_last)
    for x in (values, images, values[..., ::3], images[:, 1:4], values[0, 0, 0, 0], values[:0], values.transpose(1, 3)):
        q, expected = brgemm.quantize(spec, x, qp), fsq.quantize(spec, x, qp)
        assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8)) if floats else torch.equal(q, expected)
        assert (q.dtype, q.stride()) == (expected.dtype, expected.stride())
    each = QuantSpec(torch.int8, fsq.PerAxis(0))
    several = QParams(torch.rand(3, 1, 1, 1) + 0.1, torch.zeros(3, 1, 1, 1, dtype=torch.int32))
    assert torch.equal(brgemm.quantize(each, values, several), fsq.quantize(each, values, several))
    learned = values.clone().requires_grad_()
    assert not brgemm.quantize(spec, learned, qp).requires_grad


@needs_brgemm
def test_one_pass_is_transformed_traced_and_refuses_as_quantize() -> None:
    spec = QuantSpec(torch.int8, fsq.PerTensor())
    qp = QParams(torch.tensor([0.25]), torch.tensor([0], dtype=torch.int32))
    x = torch.randn(3, 4)
    q = fsq.quantize(spec, x, qp)
    quantize = partial(brgemm.quantize, spec)
    assert torch.equal(torch.vmap(lambda x: quantize(x, qp))(x), q)
    assert torch.equal(torch.compile(quantize, fullgraph=True)(x, qp), q)
    scales = torch.tensor([[0.25], [0.5]])
    expected = torch.stack([fsq.quantize(spec, x, qp._replace(scale=scale)) for scale in scales])
    assert torch.equal(torch.vmap(lambda scale: quantize(x, qp._replace(scale=scale)))(scales), expected)
    for wrong, said in ((x.long(), r"quantize got a tensor of torch\.int64"), ([1.0], "quantize got a list")):
        with pytest.raises(TypeError, match=said):
            quantize(wrong, qp)
    op = torch.ops.functional_sq.brgemm_quantize.default
    for reals in (x, x.T, torch.randn(2, 6, 4)[:, ::2].bfloat16(), x[:0]):
        torch.library.opcheck(op, (reals, *qp, -8, 7, torch.int8), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="real values are made codes of"):
        op(x.double(), *qp, -8, 7, torch.int8)
    with pytest.raises(RuntimeError, match="scale has 2 elements"):
        op(x, torch.ones(2), qp.zero_point, -8, 7, torch.int8)


@needs_brgemm
@pytest.mark.parametrize("act", FLOAT8S, ids=str)
def test_a_nan_stays_one_in_a_layer_of_float8(act: torch.dtype) -> None:
    spec = QuantSpec(act, fsq.PerTensor())
    qp, folded, bias, known = layer_of(spec, 0.25, 0, torch.float8_e4m3fn, 5, 16)
    x = torch.randn(3, 16)
    x[1, 2] = float("nan")
    y = quantized_linear(spec, x, qp, folded, bias, epilogue=known)
    assert y.isnan().any(1).tolist() == y.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("by", BY)
def test_what_a_layer_cannot_make_codes_of_is_refused(by: str, multiply_by: Callable[[str], None]) -> None:
    multiply_by(by)
    spec = QuantSpec(torch.int8, fsq.PerTensor())
    qp, folded, bias, known = layer_of(spec, 0.25, 0, torch.int8, 5, 16)
    x = torch.randn(3, 16)
    run = partial(quantized_linear, spec)
    with pytest.raises(TypeError, match=r"quantized_linear got a tensor of torch\.int64; convert it"):
        run(x.long(), qp, folded, epilogue=known)
    with pytest.raises(ValueError, match=r"activations of shape \(16, 3\) meet a weight of shape \(5, 16\)"):
        run(x.T, qp, folded, epilogue=known)
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), and the weight 5 outputs"):
        run(x, qp, folded, bias[:4], epilogue=known)
    with pytest.raises(TypeError, match=r"a product \(bias\) got a tensor of torch\.int64; convert it to one of"):
        run(x, qp, folded, bias.long(), epilogue=known)
    with pytest.raises(TypeError, match="epilogue is a tuple"):
        run(x, qp, folded, bias, epilogue=tuple(known))
    _, float8, _, scales = layer_of(spec, 0.25, 0, torch.float8_e4m3fn, 5, 16)
    with pytest.raises(TypeError, match=r"activations of torch\.int8 meet a weight of torch\.float8_e4m3fn"):
        run(x, qp, float8, bias, epilogue=scales)


@needs_brgemm
def test_what_the_compiler_expects_of_brgemm_is_what_it_does() -> None:
    """Shape, dtype, strides, and that nothing is written to."""
    op, of_reals = (getattr(torch.ops.functional_sq, f"brgemm_product{of}").default for of in ("", "_of_reals"))
    to = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)
    float8 = QuantSpec(torch.float8_e4m3fn, fsq.PerTensor()), QuantSpec(torch.float8_e4m3fn, fsq.PerAxis(0))
    assert brgemm.is_built()
    for rows, n in ((5, 8), (0, 8), (1, 1)):
        one = QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        codes = (float8_codes(np.random.default_rng(n), torch.float8_e4m3fn, (size, 16)) for size in (rows, n))
        weight = QParams(torch.ones(n, 1), torch.zeros(n, 1, dtype=torch.int32))
        q, w = codes
        floats = Product(float8[0], q, one, float8[1], w, weight, None)
        for case, then in itertools.product((symmetric(rows, 16, n, torch.uint8), floats), ((), ("gelu", *to))):
            for dtype in (torch.float32, torch.bfloat16):
                residual = None if then else torch.randn(rows, n).to(dtype)
                given = by_brgemm(case, residual, dtype, *then)
                # The first compares float8 with what it was, which torch does not.
                tests = ("test_schema", "test_faketensor")[case is floats :]
                torch.library.opcheck(op, given, test_utils=tests)
                if not then:
                    made = torch.randn(1, rows, 16).to(dtype), torch.rand(1), case.act.format.storage
                    z = torch.zeros(1, dtype=torch.int32)
                    torch.library.opcheck(of_reals, (*made, z, *given[2:6]), test_utils=tests)


@needs_bfloat16
@pytest.mark.parametrize("dtype", REALS_OF_BRGEMM, ids=str)
@pytest.mark.parametrize(
    ("act", "weight"),
    [*((d, d) for d in FLOAT8S), *itertools.permutations((torch.float8_e4m3fn, torch.float8_e5m2))],
)
@pytest.mark.parametrize(("rows", "k"), [(1, 64), (5, 71), (130, 4100), (0, 8)])
def test_brgemm_sums_float8_within_the_bound_of_a_float32_sum(
    rows: int, k: int, act: torch.dtype, weight: torch.dtype, dtype: torch.dtype
) -> None:
    """Every code is a bfloat16 value; K above DEPTH is summed in parts. The residual is added before the rounding."""
    rng = np.random.default_rng(k)
    spec = QuantSpec(act, fsq.PerTensor())
    case = float8_product(rng, act, weight, rows=rows, k=k)
    largest = float(np.abs(array(case.q).astype(np.float64) @ array(case.w).astype(np.float64).T).max(initial=1.0))
    one = QParams(torch.tensor([1000 / largest]), torch.zeros(1, dtype=torch.int32))
    case = dataclasses.replace(case, act=spec, qp=one)
    known = fsq.epilogue(case.act, case.qp, case.folded())
    multiply = partial(fsq.linear, case.act, case.q, case.qp, case.folded(), epilogue=known, dtype=dtype)
    assert_float8_product(multiply(case.bias), case, 2.0**-24)
    residual = torch.from_numpy(rng.standard_normal((rows, 6))).to(dtype)
    y, sums = multiply(residual=residual), multiply(dtype=torch.float32)
    assert y.dtype is dtype
    assert torch.equal(y, (sums + residual.float()).to(dtype))


@needs_brgemm
@pytest.mark.parametrize(
    ("dtype", "residual"),
    [*itertools.product((torch.float32, torch.bfloat16, torch.float16), (False, True)), (torch.uint8, False)],
    ids=str,
)
@pytest.mark.parametrize("columns", [4160, 4168])
def test_brgemm_writes_results_of_16_megabytes_past_the_caches(
    columns: int, dtype: torch.dtype, residual: bool
) -> None:
    """Where rows are whole lines of memory; else, and where they are larger, as others."""
    rng = np.random.default_rng(0)
    rows = 2**24 // (columns * dtype.itemsize) + 30
    q, w = rng.integers(0, 256, (rows, 8), np.uint8), rng.integers(-128, 128, (columns, 8), np.int8)
    scale, bias = (rng.uniform(0.001, 0.002, columns).astype(np.float32) for _ in range(2))
    z, to_scale, to_zero_point = 3, np.float32(0.5), 100
    expected = ((q.astype(np.int32) - z) @ w.T.astype(np.int32)).astype(np.float32) * scale + bias
    of = (torch.from_numpy(each) for each in (q, np.array([z], np.int32), w))
    operands = Operands(*of, None, torch.from_numpy(scale), None, torch.from_numpy(bias))
    if dtype is torch.uint8:
        to = torch.tensor([to_scale]), torch.tensor([to_zero_point], dtype=torch.int32)
        y = brgemm.product(operands, "none", *to).numpy()
        np.testing.assert_array_equal(y, np.clip(np.rint(expected / to_scale) + to_zero_point, 0, 255))
        return
    added = torch.from_numpy(rng.standard_normal((rows, columns), np.float32)).to(dtype)
    y = brgemm.plus(added, operands) if residual else brgemm.product(operands, dtype=dtype)
    expected = torch.from_numpy(expected + added.float().numpy() if residual else expected).to(dtype)
    assert torch.equal(y, expected)


@needs_brgemm
def test_brgemm_packs_again_what_was_written_to_or_is_another_tensor() -> None:
    case = symmetric(4, 16, 8, torch.uint8, bias=False)
    given = by_brgemm(case, None, torch.float32)
    assert brgemm.is_built()

    def multiply(codes: Tensor) -> Tensor:
        return torch.ops.functional_sq.brgemm_product.default(*given[:2], codes, *given[3:])

    y, codes = multiply(case.w), case.w
    assert y.any()
    detached, copied = codes.detach(), copy.deepcopy(codes)
    for other in (detached, copied):
        assert torch.equal(multiply(other), y)
    codes.zero_()
    for other in (codes, detached):
        assert not multiply(other).any()
    assert torch.equal(multiply(copied), y)
    codes.data = copied
    assert torch.equal(multiply(codes), y)
    with torch.inference_mode():
        made = copied.clone()
        assert torch.equal(multiply(made), y)
        made.zero_()
        assert not multiply(made).any()


@needs_brgemm
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # which the flags ask for, whatever the device
def test_brgemm_multiplies_where_onednn_is_turned_off() -> None:
    for case in (
        symmetric(5, 64, 7),
        float8_product(np.random.default_rng(0), *[torch.float8_e4m3fn] * 2, rows=5, k=64),
    ):
        case = dataclasses.replace(case, qp=QParams(*(value.reshape(-1)[:1] for value in case.qp)))
        case = dataclasses.replace(case, act=dataclasses.replace(case.act, granularity=fsq.PerTensor()))
        y = case.kept()
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(case.kept(), y)
            assert not torch._C._get_mkldnn_enabled()


@needs_brgemm
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"q": torch.zeros(3, 9, dtype=torch.uint8)}, "the last axes must be equal"),
        ({"q": torch.zeros(3, 8)}, "a weight of integers meets codes of Float"),
        ({"q": torch.zeros(3, 8, dtype=torch.int8)}, "a weight of integers meets codes of Char"),
        ({"zero_point": None}, "integers have a zero point"),
        ({"scale": torch.ones(4)}, "scale has 4 elements"),
        ({"scale": torch.ones(5).double()}, "scale has 5 elements of"),
        ({"bias": torch.ones(1)}, "bias has 1 elements"),
        ({"weight_zero_point": torch.zeros(5)}, "weight_zero_point has 5 elements of"),
    ],
)
def test_brgemm_reads_no_memory_but_that_of_operands_that_fit(wrong: dict[str, Any], said: str) -> None:
    q, w = torch.zeros(3, 8, dtype=torch.uint8), torch.ones(5, 8, dtype=torch.int8)
    right = Operands(q, torch.zeros(1, dtype=torch.int32), w, None, torch.ones(5), None, None)
    assert brgemm.product(right).tolist() == [[0.0] * 5] * 3
    with pytest.raises(RuntimeError, match=said):
        brgemm.product(right._replace(**wrong))
    for residual in (torch.ones(3, 5).double(), torch.ones(2, 5)):
        with pytest.raises(RuntimeError, match=r"the result is|residual has 10 elements"):
            brgemm.plus(residual, right)
    with pytest.raises(RuntimeError, match="or neither"):
        brgemm.product(right, "relu", torch.ones(1))
    images = right._replace(q=q[:1, :, None, None].expand(1, 8, 3, 3), codes=w[:, :4, None, None])
    with pytest.raises(RuntimeError, match="in 2 groups"):
        brgemm.convolve(images, (1, 1), (0, 0, 0, 0), (1, 1), 2)


@needs_brgemm
def test_what_brgemm_packed_is_freed_with_its_codes() -> None:
    """What torch allocates and frees is counted: a process also grows by what the C library keeps for later."""
    case = symmetric(4, 128, 128, torch.uint8, bias=False)
    given = by_brgemm(case, None, torch.float32)
    assert brgemm.is_built()

    def grown(kept: int) -> int:
        weights = []
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            for _ in range(3):
                weights.append(case.w.clone())
                torch.ops.functional_sq.brgemm_product.default(*given[:2], weights[-1], *given[3:])
            del weights[kept:]
        return sum(event.self_cpu_memory_usage for event in profiler.events())

    assert grown(0) == 0
    assert grown(3) == 3 * (2 * case.w.nbytes + 4 * len(case.w))  # codes, packed codes and their sums


@needs_brgemm
def test_a_compiler_that_fails_leaves_products_to_others(tmp_path: Path) -> None:
    """What it says is in the warning; nothing is left behind."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    program = (
        "import torch, bridge; from functional_sq import brgemm\n"
        "layer = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(); x = torch.randn(3, 8)\n"
        "bridge.prepare_(layer, bridge.StaticQuantConfig(torch.int8)); bridge.calibrate(layer, [x])\n"
        "bridge.convert_(layer); layer(x); print(brgemm.AVAILABLE, brgemm.is_built())\n"
    )
    folder = tmp_path / "cache"
    environment = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.stdout == "True False\n", run.stderr
    assert run.stderr.count("no such header") == 1
    assert not list((folder / "functional_sq").iterdir())


@needs_brgemm
def test_the_kernel_is_built_once_by_threads_that_ask_together_and_again_where_it_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a compiler that copies what there is, and notes that it was called."""
    built, calls = brgemm._compiled(), tmp_path / "calls"
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho $1 >> {calls}\nsleep 0.2\nwhile [ "$1" != -o ]; do shift; done\ncp {built} $2\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(brgemm, "_COMPILER", [str(compiler), "given"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with ThreadPoolExecutor(4) as pool:
        (path,) = set(pool.map(lambda _: brgemm._compiled(), range(4)))
    assert calls.read_text() == "given\n"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_bytes(b"")
    assert brgemm._library().works()
    assert (calls.read_text(), path.read_bytes()) == ("given\n" * 2, built.read_bytes())


@needs_brgemm
def test_a_graph_that_was_cached_with_the_kernel_is_none_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = backends.fingerprint("cpu")
    monkeypatch.setattr(brgemm, "_works", lambda: False)
    assert backends.fingerprint("cpu") != with_it


def test_nothing_is_built_where_layers_are_compiled_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brgemm, "_works", lambda: pytest.fail("the kernel for a CPU was built"))
    assert backends.fingerprint("cuda") != backends.sources()


@needs_brgemm
def test_threads_multiply_where_onednn_is_off_and_leave_it_off() -> None:
    assert brgemm.is_built()
    given = by_brgemm(symmetric(500, 512, 512, torch.uint8), None, torch.float32)
    multiply = torch.ops.functional_sq.brgemm_product.default
    y = multiply(*given)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None), ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: torch.equal(multiply(*given), y), range(100)))
        assert not torch.backends.mkldnn.enabled


@needs_brgemm
def test_a_weight_of_another_shape_in_the_same_memory_is_packed_again() -> None:
    """In inference mode, where that is no version."""
    assert brgemm.is_built()
    with torch.inference_mode():
        case = symmetric(4, 16, 8, torch.uint8, bias=False)
        q, w = case.q, case.w.clone()
        multiply = torch.ops.functional_sq.brgemm_product.default

        def product(q: Tensor) -> Tensor:
            z = torch.zeros(1, dtype=torch.int32)
            ones = torch.ones(w.shape[0])
            return multiply(q, z, w, None, ones, None, None, "none", None, None, torch.float32)

        assert torch.equal(product(q), q.float() @ w.float().T)
        w.as_strided_((16, 8), (8, 1))
        assert torch.equal(product(q[:, :8]), q[:, :8].float() @ w.float().T)


@needs_brgemm
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stride": [0, 1]}, "strides and dilations from 1"),
        ({"dilation": [1, 0]}, "strides and dilations from 1"),
        ({"padding": [0, -1, 0, 0]}, "padding \\[0, -1, 0, 0\\]"),
        ({"stride": [1]}, "give 2, 4 and 2 numbers"),
        ({"padding": []}, "give 2, 4 and 2 numbers"),
        ({"groups": 0}, "in 0 groups"),
        ({"codes": torch.ones(4, 3, 3, 3, dtype=torch.int32)}, "give codes of int8 or float8"),
        ({"codes": torch.ones(4, 3, 3, 3, dtype=torch.uint8)}, "give codes of int8 or float8"),
        ({"q": torch.ones(1, 0, 5, 5).byte(), "codes": torch.ones(4, 0, 3, 3, dtype=torch.int8)}, "at least one"),
    ],
    ids=str,
)
def test_the_operator_refuses_what_would_be_read_or_divided_wrongly(changed: dict[str, Any], message: str) -> None:
    given = {
        "q": torch.ones(1, 3, 5, 5, dtype=torch.uint8),
        "zero_point": torch.zeros(1, dtype=torch.int32),
        "codes": torch.ones(4, 3, 3, 3, dtype=torch.int8),
        "weight_zero_point": None,
        "scale": torch.ones(4),
        "bias": None,
        "residual": None,
        "stride": [1, 1],
        "padding": [0, 0, 0, 0],
        "dilation": [1, 1],
        "groups": 1,
        "activation": "none",
        "to_scale": None,
        "to_zero_point": None,
        "dtype": torch.float32,
    }
    operator = torch.ops.functional_sq.brgemm_convolution.default
    assert brgemm.is_built()
    assert (operator(**given) == 27).all()
    with pytest.raises(RuntimeError, match=message):
        operator(**given | changed)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_compiler_expects_of_the_operators_is_what_they_do(dtype: torch.dtype) -> None:
    """Shape, dtype, strides, and that nothing else is written."""
    ops = torch.ops.functional_sq
    for rows, n in ((5, 8), (0, 8), (1, 1)):
        q, w = torch.randint(0, 256, (rows, 16), dtype=torch.uint8), torch.randint(-128, 128, (n, 16), dtype=torch.int8)
        known = q, torch.tensor([3], dtype=torch.int32), w, torch.rand(n), torch.randn(n)
        to = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)
        calls = [
            (ops.onednn_product.default, (*known, "none", None, None, dtype)),
            (ops.onednn_product.default, (*known, "gelu", *to, dtype)),
            (ops.onednn_add_product.default, (torch.randn(rows, n).to(dtype), *known)),
        ]
        for op, operands in calls:
            torch.library.opcheck(op, operands, test_utils=("test_schema", "test_faketensor"))


def test_results_below_the_normal_numbers(calls: list[Tensor], packing: str) -> None:
    """They are exact, but for bfloat16 by oneDNN: the instruction that writes it makes 0 of them on some CPUs."""
    case = symmetric(5, 64, 48, bias=False)
    case = dataclasses.replace(case, qp=QParams(case.qp.scale * 2.0**-124, case.qp.zero_point))
    for dtype in (torch.float32, torch.bfloat16):
        y, exact = case.kept(dtype), case.linear(dtype)
        small = exact.abs() <= torch.finfo(dtype).smallest_normal  # what is rounded up to it too
        assert (small & (exact != 0)).any()
        assert (~small).any()
        flushed = small & (y == 0) & (dtype is torch.bfloat16 and packing == "oneDNN")
        assert torch.equal(torch.where(flushed, exact, y), exact)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(symmetric(3, 33026, 2), torch.float32, id="K above 33025"),
        pytest.param(symmetric(3, 8, 2), torch.float64, id="float64"),
        pytest.param(
            product(
                np.random.default_rng(0),
                QuantSpec(torch.int8, fsq.PerToken()),
                QuantSpec(torch.int8, fsq.PerAxis(0)),
                (3, 8),
                5,
            ),
            torch.float32,
            id="a scale a token",
        ),
        pytest.param(
            product(
                np.random.default_rng(0),
                QuantSpec(torch.uint8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC),
                QuantSpec(torch.uint8, fsq.PerAxis(0), mapping=MappingType.ASYMMETRIC),
                (3, 8),
                5,
            ),
            torch.float32,
            id="asymmetric weight",
        ),
    ],
)
def test_what_is_not_packed_is_multiplied_as_before(
    calls: list[Tensor], packing: str, case: Product, dtype: torch.dtype
) -> None:
    assert torch.equal(case.kept(dtype), case.linear(dtype))
    asymmetric = case.weight.mapping is MappingType.ASYMMETRIC
    assert len(calls) == (asymmetric and packing == "brgemm")


@needs_onednn
def test_few_rows_of_a_small_weight_are_multiplied_as_before_unless_the_graph_is_for_any_number(
    multiply_by: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    worth = onednn.WORTH
    multiply_by("oneDNN")
    monkeypatch.setattr(onednn, "WORTH", worth)
    case = symmetric(4, 384, 384)
    folded = case.folded()
    known = fsq.epilogue(case.act, case.qp, folded)
    least = onednn.rows(folded.codes, None).start
    assert 384 * (384 + 10 * least) >= onednn.WORTH > 384 * (384 + 10 * (least - 1))

    def forward(q: Tensor) -> Tensor:
        return fsq.linear(case.act, q, case.qp, folded, case.bias, epilogue=known)

    for rows, dynamic, by_onednn in ((least - 1, False, False), (least, False, True), (4, True, True)):
        torch.compiler.reset()
        q = codes(np.random.default_rng(rows), case.act, (rows, 384), "all")
        y, (source,) = run_and_get_code(torch.compile(forward, fullgraph=True, dynamic=dynamic), q)
        assert ("onednn_product" in source) == by_onednn
        assert torch.equal(y, forward(q))
        assert (folded.codes in onednn._PACKED) == (rows >= least or dynamic)
        onednn._PACKED.pop(folded.codes, None)


def test_without_a_backend_the_bits_are_the_same(calls: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    case = symmetric(5, 64, 7)
    y = case.kept()
    assert len(calls) == 1
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    monkeypatch.setattr(brgemm, "AVAILABLE", False)
    assert torch.equal(case.kept(), y)
    assert len(calls) == 1


@needs_onednn
def test_a_weight_is_packed_once_again_when_it_changes_and_forgotten_with_its_codes(
    multiply_by: Callable[[str], None],
) -> None:
    multiply_by("oneDNN")
    case = symmetric(4, 16, 8, bias=False)
    folded = case.folded()
    known = fsq.epilogue(case.act, case.qp, folded)
    multiply = partial(fsq.linear, case.act, case.q, case.qp, folded)
    multiply()
    assert folded.codes not in onednn._PACKED  # a weight that was not said to be kept
    y = multiply(epilogue=known)
    packed = onednn._PACKED[folded.codes]
    assert torch.equal(multiply(epilogue=known), y)
    assert onednn._PACKED[folded.codes] is packed
    folded.codes.zero_()
    assert not multiply(epilogue=known).any()
    held = len(onednn._PACKED)
    del case, folded, multiply
    assert len(onednn._PACKED) == held - 1


@pytest.mark.usefixtures("calls")
def test_a_weight_packed_in_inference_mode_serves_outside_of_it_and_one_made_in_it_too() -> None:
    case = symmetric(4, 16, 8)
    folded = case.folded()
    known = fsq.epilogue(case.act, case.qp, folded)
    with torch.inference_mode():
        y = case.kept()
        assert torch.equal(fsq.linear(case.act, case.q, case.qp, folded, case.bias, epilogue=known), y)
    assert torch.equal(fsq.linear(case.act, case.q, case.qp, folded, case.bias, epilogue=known), y)


@pytest.mark.usefixtures("calls")
def test_a_weight_made_in_inference_mode_is_packed_once_too_and_again_when_it_changes(packing: str) -> None:
    """It counts no versions."""
    with torch.inference_mode():
        case = symmetric(4, 16, 8, bias=False)
        folded = case.folded()
        folded = folded._replace(codes=folded.codes.clone())
        assert folded.codes.is_inference()
        known = fsq.epilogue(case.act, case.qp, folded)
        multiply = partial(fsq.linear, case.act, case.q, case.qp, folded, epilogue=known)
        y = multiply()
        packed = onednn._PACKED.get(folded.codes)
        assert (packed is not None) == (packing == "oneDNN")
        assert torch.equal(multiply(), y)
        assert onednn._PACKED.get(folded.codes) is packed
        folded.codes.zero_()
        assert not multiply().any()


@pytest.mark.usefixtures("packing")
def test_a_bias_or_scale_with_any_stride_has_the_same_bits() -> None:
    """oneDNN, and our kernel, read both as if they had none."""
    case = symmetric(12, 16, 8)
    y = case.kept()
    spread = torch.stack([case.bias, torch.full_like(case.bias, 7.0)], 1)[:, 0]
    assert spread.stride() == (2,)
    assert torch.equal(dataclasses.replace(case, bias=spread).kept(), y)
    one = torch.full((1,), 5.0)
    expected = dataclasses.replace(case, bias=one.repeat(8)).kept()
    assert torch.equal(dataclasses.replace(case, bias=one.expand(8)).kept(), expected)
    folded, biases = case.folded(), torch.stack([case.bias, -case.bias], 1)
    known = fsq.epilogue(case.act, case.qp, folded)
    multiply = partial(fsq.linear, case.act, case.q, case.qp, folded)
    y = torch.vmap(lambda bias: multiply(bias, epilogue=known), in_dims=1)(biases)
    assert torch.equal(y, torch.stack([multiply(bias.contiguous()) for bias in biases.unbind(1)]))
    strided = fsq.Epilogue(torch.stack([known.scale, known.scale + 1], 1)[:, 0], known.offset)
    assert torch.equal(multiply(epilogue=strided), multiply())


def test_codes_of_a_zero_point_of_8_bits() -> None:
    """It is shifted by 128 on the way, which int8 does not hold."""
    case = symmetric(12, 16, 8)
    codes = []
    for dtype in (torch.int8, torch.int32):
        spec = QuantSpec(torch.int8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC, zero_point_dtype=dtype)
        qp = QParams(case.qp.scale.new_tensor([0.5]), torch.tensor([10], dtype=dtype))
        codes.append(case.kept(then=fsq.Requantization(spec, qp, "relu")))
    assert torch.equal(*codes)
    assert codes[0].unique().numel() > 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fast", [True, False])
def test_under_autocast_codes_are_multiplied_as_they_are(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are held as floats: without VNNI, and float8."""
    monkeypatch.setattr(int_mm, "_SATURATES", not fast)
    monkeypatch.setattr(float8_mm, "HAS_ONEDNN", fast)
    float8 = float8_product(np.random.default_rng(0), torch.float8_e4m3fn, torch.float8_e4m3fn, rows=5, k=64)
    for case in (symmetric(12, 16, 8, fill=("high", "high")), float8):
        y = case.linear()
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(case.linear(), y)


def test_no_terms_sum_to_zero() -> None:
    spec, one = QuantSpec(torch.int8, fsq.PerTensor()), QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    weight = fsq.fold(spec, torch.zeros(3, 0, dtype=torch.int8), one)
    for lead in ((5,), (2, 3), (0,), ()):
        y = fsq.linear(spec, torch.zeros(*lead, 0, dtype=torch.int8), one, weight, torch.tensor([1.0, 2.0, 3.0]))
        assert torch.equal(y, torch.tensor([1.0, 2.0, 3.0]).expand(*lead, 3))


@needs_onednn
def test_a_weight_is_taken_up_to_its_longest() -> None:
    assert (5000 if onednn.AMX else INT32_TERMS) == onednn.LARGEST_K
    assert onednn.supports(torch.ones(1, onednn.LARGEST_K, dtype=torch.int8), None)
    assert not onednn.supports(torch.ones(1, onednn.LARGEST_K + 1, dtype=torch.int8), None)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch._int_mm has no batching rule
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_vmap_over_experts_folds_their_weights(dtype: torch.dtype) -> None:
    act, of_weight = QuantSpec(dtype, fsq.PerTensor()), QuantSpec(dtype, fsq.PerAxis(0))
    weights, x = torch.randn(3, 5, 16), torch.randn(3, 4, 16)

    def expert(w: Tensor, x: Tensor) -> Tensor:
        qps = [fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, t.shape), t)) for spec, t in given(w, x)]
        q_w, q_x = (fsq.quantize(spec, t, qp) for (spec, t), qp in zip(given(w, x), qps, strict=True))
        return fsq.linear(act, q_x, qps[1], fsq.fold(of_weight, q_w, qps[0]))

    def given(w: Tensor, x: Tensor) -> tuple[tuple[QuantSpec, Tensor], ...]:
        return (of_weight, w), (act, x)

    expected = torch.stack([expert(*each) for each in zip(weights, x, strict=True)])
    assert torch.equal(torch.vmap(expert)(weights, x), expected)


@pytest.mark.usefixtures("calls")
def test_vmap_over_kept_weights_equals_the_loop() -> None:
    cases = [symmetric(3, k, 5) for k in (16, 16)]
    folded = [case.folded() for case in cases]
    known = [fsq.epilogue(case.act, case.qp, weight) for case, weight in zip(cases, folded, strict=True)]
    codes, scale, offset = (
        torch.stack(parts) for parts in ([w.codes for w in folded], [e.scale for e in known], [e.offset for e in known])
    )

    def one(codes: Tensor, scale: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
        weight = FoldedWeight(codes, folded[0].scale, None, folded[0].sum)
        return fsq.linear(cases[0].act, cases[0].q, cases[0].qp, weight, bias, epilogue=fsq.Epilogue(scale, offset))

    bias = torch.stack([case.bias for case in cases])
    expected = [one(*each) for each in zip(codes, scale, offset, bias, strict=True)]
    assert torch.equal(torch.vmap(one)(codes, scale, offset, bias), torch.stack(expected))


def test_a_bias_that_is_learned_has_its_gradient() -> None:
    case = symmetric(4, 16, 8, bias=False)
    folded, bias = case.folded(), torch.zeros(8, requires_grad=True)
    known = fsq.epilogue(case.act, case.qp, folded)
    fsq.linear(case.act, case.q, case.qp, folded, bias, epilogue=known).sum().backward()
    assert bias.grad.tolist() == [4.0] * 8


def test_compiled_multiplies_a_kept_weight_in_one_compilation_and_exported_by_torch_alone(packing: str) -> None:
    case = symmetric(2, 20, 12)
    folded = case.folded()
    known = fsq.epilogue(case.act, case.qp, folded)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = fsq.quantize(case.act, x, case.qp)
            return fsq.linear(case.act, q, case.qp, folded, case.bias, epilogue=known).relu()

    forward = Layer()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    x = torch.randn(5, 20)
    torch._dynamo.mark_dynamic(x, 0)
    y, (source,) = run_and_get_code(compiled, x)
    assert f"{packing.lower()}_product" in source
    assert "_int_mm" not in source
    assert torch.equal(y, forward(x))
    for rows in (2, 17, 33):
        x = torch.randn(rows, 20)
        assert torch.equal(compiled(x), forward(x))
    assert counter.frame_count == 1

    exported = torch.export.export(forward, (x,))
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "aten._int_mm.default" in targets
    assert not [target for target in targets if "functional_sq" in target]
    assert torch.equal(exported.module()(x), forward(x))


# --- float8 ----------------------------------------------------------------------------------------


def float8_codes(rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Draw among all finite codes of a float8 format."""
    every = np.arange(256, dtype=np.uint8).view(ARRAYS[dtype])
    finite = every[np.isfinite(every.astype(np.float32))].view(np.uint8)
    return torch.from_numpy(rng.choice(finite, shape)).view(dtype)


def float8_product(rng: np.random.Generator, act: torch.dtype, weight: torch.dtype, *, rows: int, k: int) -> Product:
    specs = QuantSpec(act, fsq.PerToken()), QuantSpec(weight, fsq.PerAxis(0))
    n = 6
    return Product(
        specs[0],
        float8_codes(rng, act, (rows, k)),
        qparams(rng, specs[0], (rows, k), "all"),
        specs[1],
        float8_codes(rng, weight, (n, k)),
        qparams(rng, specs[1], (n, k), "all"),
        torch.from_numpy(rng.standard_normal(n).astype(np.float32)),
    )


def assert_float8_product(y: Tensor, case: Product, unit: float) -> None:
    """Assert the bound of a sum of K exact products in any order, each addition within `unit` of its terms.

    Two float8 values have at most 4 significant bits each, so a product is exact in float32. A sum of
    K terms in any order errs by at most `(K - 1) u / (1 - (K - 1) u) < K u` of the sum of magnitudes
    (Higham 2002, 4.4). The roundings behind it enlarge that by less than a hundredth.
    """
    q, w = (array(t).astype(np.float64) for t in (case.q, case.w))
    scale, bias = case.scale(np.dtype(np.float64)), case.bias_array()
    exact = q @ w.T * scale
    magnitude = np.abs(q) @ np.abs(w).T * scale
    limit = 1.01 * q.shape[-1] * unit * magnitude + bound(exact, bias, ARRAYS[y.dtype])
    assert_within(array(y), exact, bias, limit)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(
    ("act", "weight"),
    [*((d, d) for d in FLOAT8S), *itertools.permutations((torch.float8_e4m3fn, torch.float8_e5m2))],
)
def test_the_float8_product_is_within_the_bound_of_a_float32_sum(
    act: torch.dtype, weight: torch.dtype, rows: int
) -> None:
    case = float8_product(np.random.default_rng(rows), act, weight, rows=rows, k=71)
    for dtype in (torch.float32, torch.bfloat16):
        assert_float8_product(case.linear(dtype), case, 2.0**-24)


@pytest.mark.parametrize("weight", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_products_under_vmap_compiled_and_exported(weight: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU oneDNN multiplies the floats, in an operator that an exported program has not."""
    cases = [float8_product(np.random.default_rng(i), torch.float8_e4m3fn, weight, rows=5, k=16) for i in range(2)]
    folded = cases[0].folded()

    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, qp: QParams) -> Tensor:
            return fsq.linear(cases[0].act, q, qp, folded, cases[0].bias)

    forward = Layer()
    loop = torch.stack([forward(case.q, case.qp) for case in cases])
    qps = QParams(*map(torch.stack, zip(*(case.qp for case in cases), strict=True)))
    bits = torch.stack([case.q.view(torch.uint8) for case in cases])
    batch = torch.vmap(lambda q, qp: forward(q.view(torch.float8_e4m3fn), qp))(bits, qps)
    assert torch.equal(batch, loop)
    given = cases[1].q, cases[1].qp
    y, (source,) = run_and_get_code(torch.compile(forward, fullgraph=True, dynamic=True), *given)
    assert ("onednn_float_product" in source) == float8_mm.HAS_ONEDNN
    assert torch.equal(y, loop[1])
    exported = torch.export.export(forward, given)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert not [name for name in targets if "functional_sq" in name or "bitwise" in name]
    torch.testing.assert_close(exported.module()(*given), y)
    monkeypatch.setattr(float8_mm, "HAS_ONEDNN", False)
    assert_float8_product(cases[0].linear(), cases[0], 2.0**-24)


@pytest.mark.parametrize("rows", [0, 1, 2, 8, 9])
def test_float8_products_of_few_rows_compiled(rows: int) -> None:
    """A loop reads each code of the weight once, and finds the rows quantized: it does not quantize them for each."""
    case = float8_product(np.random.default_rng(rows), torch.float8_e4m3fn, torch.float8_e4m3fn, rows=rows, k=71)
    folded = case.folded()

    def forward(x: Tensor, qp: QParams) -> Tensor:
        return fsq.linear(case.act, fsq.quantize(case.act, x, qp), qp, folded, case.bias)

    x = fsq.dequantize(case.act, case.q, case.qp)
    y, (source,) = run_and_get_code(torch.compile(forward, fullgraph=True), x, case.qp)
    assert_float8_product(y, case, 2.0**-24)
    by_onednn = "onednn_float_product" in source
    assert by_onednn == (float8_mm.HAS_ONEDNN and rows > 8)
    if 0 < rows <= 8 and float8_mm.HAS_ONEDNN:
        assert source.rindex("convert<at::Float8_e4m3fn>") < source.index("tmp_acc0")


@pytest.mark.parametrize("captured", ["as it is", "as an operator"])
def test_float8_products_of_a_number_of_rows_that_is_known_to_be_small(captured: str) -> None:
    """Its rows are no nodes of a graph that is for each of these numbers."""
    spec = QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
    qp = QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    folded = fsq.fold(spec, fsq.quantize(spec, torch.randn(6, 16), qp), qp)
    known, described = fsq.epilogue(spec, qp, folded), chains.describe(spec)

    def forward(x: Tensor) -> Tensor:
        if captured == "as it is":
            return fsq.linear(spec, fsq.quantize(spec, x, qp), qp, folded)
        return chains.layer(described, x, qp, folded.codes, None, None, known)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    for rows in (5, 2, 8):
        x = torch.randn(rows, 16)
        torch._dynamo.mark_dynamic(x, 0, min=2, max=8)
        torch.testing.assert_close(compiled(x), forward(x))
    assert counter.frame_count == 1


def test_the_sum_of_so_many_codes_that_it_leaves_32_bits_is_exact() -> None:
    """Of 2**24 codes of -128 it is -2**31, the last one in them."""
    one = QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
    five = QParams(torch.ones(1, 1), torch.full((1, 1), 5, dtype=torch.int32))
    for k, code in ((2**24 - 1, -128), (2**24 + 1, -128), (17_000_000, 127)):
        weight = fsq.fold(QuantSpec(torch.int8, fsq.PerTensor()), torch.full((1, k), code, dtype=torch.int8), one)
        assert weight.sum.item() == k * code
        act = QuantSpec(torch.uint8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
        assert fsq.linear(act, torch.full((1, k), 5, dtype=torch.uint8), five, weight).item() == 0


def test_float8_products_of_a_large_weight() -> None:
    """Its codes become floats piece by piece; each result is that of its own row of the weight."""
    k = 4096
    rng = np.random.default_rng(0)
    a, b = (float8_codes(rng, torch.float8_e4m3fn, (rows, k)) for rows in (9, 1100))
    q, w = (array(codes).astype(np.float64) for codes in (a, b))
    compiled = torch.compile(float8_mm.float8_product, fullgraph=True)
    for product in (float8_mm.float8_product, compiled):
        assert (np.abs(product(a, b, False).numpy() - q @ w.T) <= k * 2.0**-24 * (np.abs(q) @ np.abs(w).T)).all()
    b[1090, 7] = torch.nan
    for rows, product in itertools.product((1, 9), (float8_mm.float8_product, compiled)):
        found = product(a[:rows], b, False).isnan()
        assert found[:, 1090].all()
        assert found.sum() == rows


# --- folding ---------------------------------------------------------------------------------------

GRANULARITIES = (
    fsq.PerTensor(),
    fsq.PerAxis(0),
    fsq.PerAxis(-1),
    fsq.PerRow(),
    fsq.PerToken(),
    fsq.PerGroup(4),
    fsq.PerBlock((2, 4)),
)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_unfold_gives_back_what_fold_took(dtype: torch.dtype, granularity: fsq.Granularity) -> None:
    rng, shape = np.random.default_rng(0), (4, 8)
    low, high = FORMATS[dtype].bounds
    for mapping in MappingType:
        try:
            spec = QuantSpec(dtype, granularity, mapping=mapping)
        except ValueError:
            continue  # float8 is symmetric, and NO_CLIPPING needs codes on both sides of 0
        qp = qparams(rng, spec, shape, "all")
        if dtype in FLOAT8S:
            q, qp = float8_codes(rng, dtype, shape), QParams(qp.scale, torch.zeros_like(qp.zero_point))
        else:
            q = codes(rng, spec, shape, "all")
        folded = fsq.fold(spec, q, qp)
        again, (scale, zero_point) = fsq.unfold(spec, folded)
        assert again.dtype is q.dtype
        assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(scale, qp.scale)
        assert zero_point.dtype is qp.zero_point.dtype
        assert torch.equal(zero_point, qp.zero_point)
        if dtype in FLOAT8S:
            assert folded.sum is None
        else:
            assert folded.sum.tolist() == array(folded.codes).astype(np.int64).sum(1).tolist()
            assert folded.codes.dtype is (torch.int16 if high > 255 else torch.int8)
            # Left out where it is 0 by construction: no sum over the activations is needed.
            at_zero = mapping is not MappingType.ASYMMETRIC and (low < 0 or dtype is torch.uint8)
            assert (folded.zero_point is None) == at_zero


# --- refusals --------------------------------------------------------------------------------------

ACT = QuantSpec(torch.uint8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
WEIGHT = QuantSpec(torch.int8, fsq.PerAxis(0))
ACT8, WEIGHT8 = QuantSpec(torch.float8_e4m3fn, fsq.PerTensor()), QuantSpec(torch.float8_e4m3fn, fsq.PerAxis(0))
INT16 = QuantSpec(torch.int16, fsq.PerTensor())


def zeros(spec: QuantSpec, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=spec.format.storage)


def ones(spec: QuantSpec, *shape: int, zero_point: int = 0) -> QParams:
    stats = spec.granularity.stat_shape(shape)
    return QParams(torch.ones(stats), torch.full(stats, zero_point, dtype=torch.int32))


def fold(spec: QuantSpec, shape: tuple[int, ...] = (4, 8), zero_point: int = 0) -> FoldedWeight:
    return fsq.fold(spec, zeros(spec, *shape), ones(spec, *shape, zero_point=zero_point))


def linear(act: QuantSpec, weight: QuantSpec, shape: tuple[int, ...] = (2, 8), **kwargs: object) -> Tensor:
    return fsq.linear(act, zeros(act, *shape), ones(act, *shape), fold(weight), **kwargs)


def check(act: QuantSpec, weight: QuantSpec) -> None:
    fsq.check_product(act, weight, (4, 8))


def per(granularity: fsq.Granularity, spec: QuantSpec) -> QuantSpec:
    return QuantSpec(spec.dtype, granularity, mapping=spec.mapping)


@pytest.mark.parametrize(
    ("call", "error", "value", "rule", "remedy"),
    [
        pytest.param(
            lambda: fold(QuantSpec(torch.uint8, fsq.PerTensor()), zero_point=7),
            ValueError,
            r"got \[7\]",
            "has the zero point 128",
            "use MappingType.ASYMMETRIC",
            id="fold(symmetric uint8, zero_point=7)",
        ),
        pytest.param(
            lambda: fold(WEIGHT, zero_point=1),
            ValueError,
            r"got \[1, 1, 1, 1\]",
            "has the zero point 0",
            "use MappingType.ASYMMETRIC",
            id="fold(symmetric int8, zero_point=1)",
        ),
        pytest.param(
            lambda: fold(WEIGHT, (8,)),
            ValueError,
            r"shape \(8,\)",
            "weight of a linear layer",
            r"\(out, in\)",
            id="fold(vector)",
        ),
        pytest.param(
            lambda: fold(WEIGHT, (2, 4, 8, 3, 3, 3)),
            ValueError,
            r"shape \(2, 4, 8, 3, 3, 3\)",
            "that of a convolution",
            r"\(out, in / groups, \*kernel\) with one to three dimensions",
            id="fold(rank 6)",
        ),
        pytest.param(
            lambda: fsq.fold(WEIGHT, zeros(WEIGHT, 4, 8), ones(WEIGHT, 5, 8)),
            ValueError,
            r"shape \(5, 1\)",
            r"needs \(4, 1\)",
            "use the granularity and the sizes it was made with",
            id="fold(scale of another weight)",
        ),
        pytest.param(
            lambda: fsq.fold(WEIGHT, zeros(ACT, 4, 8), ones(WEIGHT, 4, 8)),
            TypeError,
            "got torch.uint8",
            "the codes of torch.int8",
            "are a tensor of torch.int8",
            id="fold(uint8 codes, int8 spec)",
        ),
        pytest.param(
            lambda: check(ACT, WEIGHT8),
            ValueError,
            "torch.uint8 .* torch.float8_e4m3fn",
            "no common product",
            "use integers or float8 for both, or the reference path",
            id="check_product(uint8, float8)",
        ),
        pytest.param(
            lambda: check(INT16, WEIGHT),
            ValueError,
            "torch.int16",
            "no integer product",
            "at most 8 bits, or the reference path",
            id="check_product(int16, int8)",
        ),
        pytest.param(
            lambda: check(ACT, per(fsq.PerGroup(4), WEIGHT)),
            ValueError,
            r"PerGroup\(group_size=4\)",
            "several scales along the axis that a product sums over",
            r"use PerAxis\(0\) or PerTensor\(\) for the weight, or the reference path",
            id="check_product(weight per group)",
        ),
        pytest.param(
            lambda: check(per(fsq.PerAxis(-1), ACT), WEIGHT),
            ValueError,
            r"PerAxis\(axis=-1\)",
            "several scales along the axis that a product sums over",
            r"use PerTensor\(\) for the activations",
            id="check_product(activations per input channel)",
        ),
        pytest.param(
            lambda: linear(ACT, WEIGHT, (2, 9)),
            ValueError,
            r"shape \(2, 9\) .* shape \(4, 8\)",
            "the last axes",
            "must be equal",
            id="linear(K=9, K=8)",
        ),
        pytest.param(
            lambda: fsq.linear(ACT, zeros(ACT, 2, 8), ones(ACT, 2, 8), fold(WEIGHT, (4, 8, 3))),
            ValueError,
            r"shape \(2, 8\) .* shape \(4, 8, 3\)",
            "the last axes",
            "must be equal",
            id="linear(weight of a convolution)",
        ),
        pytest.param(
            lambda: linear(ACT, WEIGHT, dtype=torch.int32),
            TypeError,
            "torch.int32",
            "linear to",
            "use one of torch.float32",
            id="linear(dtype=int32)",
        ),
        pytest.param(
            lambda: linear(ACT, per(fsq.PerGroup(4), WEIGHT)),
            ValueError,
            r"shape \(4, 2\)",
            "needs one a row",
            r"use PerAxis\(0\) or PerTensor\(\) for the weight, or linear_reference",
            id="linear(weight per group)",
        ),
        pytest.param(
            lambda: linear(per(fsq.PerAxis(-1), ACT), WEIGHT),
            ValueError,
            r"scales of shape \(1, 8\)",
            "one for the tensor or for each token",
            r"use PerTensor\(\), or linear_reference",
            id="linear(activations per input channel)",
        ),
        pytest.param(
            lambda: linear(INT16, WEIGHT),
            ValueError,
            "16-bit",
            "no integer product",
            "at most 8 bits, or linear_reference",
            id="linear(int16, int8)",
        ),
        pytest.param(
            lambda: linear(ACT, INT16),
            ValueError,
            "16-bit",
            "no integer product",
            "at most 8 bits, or linear_reference",
            id="linear(uint8, int16)",
        ),
        pytest.param(
            lambda: linear(ACT, WEIGHT8),
            TypeError,
            "torch.uint8",
            "torch.float8_e4m3fn",
            "quantize both alike",
            id="linear(uint8, float8)",
        ),
        pytest.param(
            lambda: linear(ACT8, WEIGHT),
            TypeError,
            "torch.float8_e4m3fn",
            "torch.int8",
            "quantize both alike",
            id="linear(float8, int8)",
        ),
        pytest.param(
            lambda: fsq.linear(ACT, zeros(WEIGHT, 2, 8), ones(ACT, 2, 8), fold(WEIGHT)),
            TypeError,
            "got torch.int8",
            "the codes of torch.uint8",
            "are a tensor of torch.uint8",
            id="linear(int8 codes, uint8 spec)",
        ),
    ],
)
def test_a_refusal_has_value_rule_and_remedy(
    call: Callable[[], object], error: type[Exception], value: str, rule: str, remedy: str
) -> None:
    for part in (value, rule, remedy):
        with pytest.raises(error, match=part):
            call()


def test_check_product_takes_what_linear_multiplies() -> None:
    for act, weight in ((ACT, WEIGHT), (WEIGHT, ACT), (ACT8, WEIGHT8), (per(fsq.PerToken(), ACT), WEIGHT)):
        check(act, per(fsq.PerTensor(), weight))
        check(per(fsq.PerTensor(), act), weight)


# --- compiled --------------------------------------------------------------------------------------


def test_compiled_has_the_bits_of_eager_and_multiplies_int8_in_one_compilation_for_any_batch() -> None:
    weight = QuantSpec(torch.uint8, fsq.PerAxis(0), mapping=MappingType.ASYMMETRIC)
    case = product(np.random.default_rng(0), ACT, weight, (2, 20), 12)
    folded = case.folded()

    def forward(x: Tensor) -> Tensor:
        return fsq.linear(ACT, fsq.quantize(ACT, x, case.qp), case.qp, folded, case.bias)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(forward, fullgraph=True, backend=counter)
    x = torch.randn(5, 20)
    torch._dynamo.mark_dynamic(x, 0)
    y, (source,) = run_and_get_code(compiled, x)
    assert "_int_mm" in source
    assert torch.equal(y, forward(x))
    for rows in (2, 17, 33):
        x = torch.randn(rows, 20)
        assert torch.equal(compiled(x), forward(x))
    assert counter.frame_count == 1


def test_compiled_has_the_bits_of_eager_for_one_token_between_other_operations() -> None:
    """Inductor then views (1, 1, K) codes as (1, K) with the stride 0, which `_int_mm` misreads."""
    weight = QuantSpec(torch.int8, fsq.PerAxis(0))
    act = QuantSpec(torch.int8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
    case = product(np.random.default_rng(0), act, weight, (1, 64), 64)
    folded = case.folded()

    def forward(x: Tensor) -> Tensor:
        for _ in range(2):
            x = fsq.linear(act, fsq.quantize(act, x[:, -1:], case.qp), case.qp, folded, case.bias).relu() + x
        return x

    x = torch.randn(1, 5, 64)
    assert torch.equal(torch.compile(forward, fullgraph=True)(x), forward(x))


# --- the reference path ----------------------------------------------------------------------------


def torchao_dequantized(spec: QuantSpec, q: Tensor, qp: QParams, dtype: torch.dtype) -> Tensor:
    if spec.dtype in FLOAT8S:
        return ao._dequantize_affine_float8(q, qp.scale, dtype)
    stats = spec.granularity.stat_shape(q.shape)
    block_size = tuple(n // s for n, s in zip(q.shape, stats, strict=True))
    exact = torch.float32 if q.dtype is torch.int16 else dtype  # torchao subtracts 16-bit codes in 16 bits
    return ao.dequantize_affine(
        q, block_size, qp.scale, qp.zero_point, spec.format.storage, *spec.bounds, output_dtype=exact
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("target", [torch.uint8, torch.int8, torch.int4, torch.int16, torch.float8_e4m3fn], ids=str)
def test_the_reference_has_the_bits_of_linear_on_torchao_dequantized_operands(
    target: torch.dtype, granularity: fsq.Granularity, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(0)
    act = QuantSpec(target, fsq.PerTensor())
    weight = QuantSpec(target, granularity)
    x, w = torch.randn(6, 8), torch.randn(4, 8)
    qps = [qparams(rng, spec, tuple(t.shape), "all") for spec, t in ((act, x), (weight, w))]
    if target in FLOAT8S:
        qps = [QParams(scale, torch.zeros_like(zero_point)) for scale, zero_point in qps]
    q, q_w = fsq.quantize(act, x, qps[0]), fsq.quantize(weight, w, qps[1])
    bias = torch.randn(4, dtype=dtype)
    ours = fsq.linear_reference(act, q, qps[0], fsq.dequantize(weight, q_w, qps[1], dtype=dtype), bias)
    theirs = F.linear(torchao_dequantized(act, q, qps[0], dtype), torchao_dequantized(weight, q_w, qps[1], dtype), bias)
    assert ours.dtype is dtype
    assert torch.equal(ours, theirs)


# --- CUDA ------------------------------------------------------------------------------------------

SIZES = [(1, 16, 8), (16, 32, 24), (17, 32, 24), (16, 29, 13), (17, 20, 12), (64, 33026, 10)]
"""Rows, K, N: on both sides of what cuBLASLt takes, and above what int32 holds."""
LARGE = (3, 4096, 1030)
"""A weight that is not copied to be filled up: the last rows are a product of their own."""


@pytest.mark.parametrize(("rows", "k", "n"), [*SIZES, LARGE, (20, 4096, 1032), (2, 4100, 1029)])
def test_the_product_in_eights_is_exact(rows: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA is asked for, asked of the CPU; a large weight is handed on where it lies, all but its last rows."""
    codes = np.random.default_rng(k).integers(-128, 128, (rows + n, k), dtype=np.int8)
    a, b = torch.from_numpy(codes).split([rows, n])
    asked, multiply = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: asked.append(b) or multiply(a, b))
    y = int_mm._in_eights(a, b)
    exact = codes[:rows].astype(np.int64) @ codes[rows:].astype(np.int64).T
    np.testing.assert_array_equal(y.numpy(), exact)
    for each in asked:
        assert each.shape[0] % 8 == each.shape[1] % 8 == 0
    copied = sum(each.numel() for each in asked if each.data_ptr() != b.data_ptr())
    assert copied <= 8 * k or k % 8 or n * k < 2**22


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(0, 8, 8), (3, 0, 16), (3, 16, 0), (1, 1, 1), (1, 64, 48), (16, 30, 7), (17, 32, 32), (40, 33026, 5), LARGE],
)
def test_what_is_asked_of_cuda_is_what_cublaslt_takes(
    dtype: torch.dtype, rows: int, k: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors have a CUDA device, shapes and strides; the two products are replaced by their documented demands:
    more than 16 rows, K and N in eights, for float8 in sixteens, none of them 0, the second matrix column-major."""
    asked = []

    def int_mm(a: Tensor, b: Tensor) -> Tensor:
        assert (a.dtype, b.dtype, a.stride(1), b.stride(0)) == (torch.int8, torch.int8, 1, 1)
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0 < min(b.shape)
        asked.append("int")
        return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)

    def scaled_mm(a: Tensor, b: Tensor, one: Tensor, other: Tensor, **settings: object) -> Tensor:
        assert (a.dtype, b.dtype, a.stride(1), b.stride(0), one.device.type) == (dtype, dtype, 1, 1, "cuda")
        assert dtype is torch.float8_e4m3fn
        assert a.shape[1] % 16 == b.shape[1] % 16 == 0 < min(*a.shape, *b.shape)
        asked.append("float8")
        return a.new_empty((a.shape[0], b.shape[1]), dtype=settings["out_dtype"])

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(triton_mm, "AVAILABLE", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asymmetric = dtype is torch.uint8
    mapping = MappingType.ASYMMETRIC if asymmetric else MappingType.SYMMETRIC
    act = QuantSpec(dtype, fsq.PerTensor(), mapping=mapping)
    with FakeTensorMode():
        empty = partial(torch.empty, device="cuda")
        qp = QParams(empty(1), empty(1, dtype=torch.int32))
        w_qp = QParams(empty(n, 1), empty(n, 1, dtype=torch.int32))
        zero_point, total = (None, None) if dtype.is_floating_point else (w_qp.zero_point, empty(n, dtype=torch.int32))
        codes = empty(n, k, dtype=dtype if dtype.is_floating_point else torch.int8)
        weight = FoldedWeight(codes, w_qp.scale, zero_point if asymmetric else None, total)
        known = fsq.epilogue(act, qp, weight)
        q = fsq.quantize(act, empty(2, rows, k), qp)
        y = fsq.linear(act, q, qp, weight, empty(n), dtype=torch.bfloat16, epilogue=known)
    assert (y.device.type, y.dtype, y.shape) == ("cuda", torch.bfloat16, (2, rows, n))
    fits = dtype is torch.float8_e4m3fn and k % 16 == n % 16 == 0 < min(rows, k, n)
    if (rows, k, n) == LARGE and dtype is torch.float8_e4m3fn:
        assert asked == ["float8"]  # and a bfloat16 product for the rest
    elif dtype.is_floating_point:
        assert asked == (["float8"] if fits else [])
    else:
        assert asked == ["int"] * (2 if (rows, k, n) == LARGE else 1)


@pytest.mark.cuda
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize(("rows", "bias"), [(255, True), (256, True), (300, False)])
def test_cuda_float8_to_bfloat16_is_rounded_once(rows: int, bias: bool, fast: bool) -> None:
    """Sums are integers below 2**14, which any tensor core adds exactly. The bias leaves a few units of the first row:
    what the product lacks to be a bfloat16, and is 0 if it was rounded to one before."""
    codes = torch.randint(-16, 17, (rows + 64, 64)).float()
    q, w = (t.cuda().to(torch.float8_e4m3fn) for t in (codes[:rows], codes[rows:]))
    one = QParams(torch.ones(1).cuda(), torch.zeros(1, dtype=torch.int32).cuda())
    spec = QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
    scale = torch.ones(64, 1).cuda()
    weight = FoldedWeight(w, scale, None, None)
    product = codes[:rows] @ codes[rows:].t()
    b = -product[0].bfloat16().float() if bias else torch.zeros(64)
    kept = fsq.epilogue(spec, one, weight)
    y = fsq.linear(
        spec,
        q,
        one,
        weight,
        b.bfloat16().cuda() if bias else None,
        dtype=torch.bfloat16,
        epilogue=kept,
        fast_accum=fast,
    )
    assert torch.equal(y.cpu(), (product + b).bfloat16())


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "k", "n"), SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_cuda_has_the_integers_and_roundings_of_numpy(dtype: torch.dtype, rows: int, k: int, n: int) -> None:
    """Eager: each float operation is a kernel of its own, so nothing is fused and the bits are numpy's."""
    act = QuantSpec(dtype, fsq.PerToken(), mapping=MappingType.ASYMMETRIC)
    weight = QuantSpec(dtype, fsq.PerAxis(0), mapping=MappingType.ASYMMETRIC)
    case = product(np.random.default_rng(k), act, weight, (rows, k), n)
    scale = case.scale(np.dtype(np.float32))
    for out in (torch.float32, torch.bfloat16):
        expected = epilogue(case.corrected(), scale, case.bias_array(), ARRAYS[out])
        np.testing.assert_array_equal(array(case.linear(out, "cuda")), expected)


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 16, 8), (17, 20, 12)])
def test_cuda_compiled_is_within_the_bound(rows: int, k: int, n: int) -> None:
    """Triton may fuse the multiplication and the addition: one rounding fewer, within the module's bound."""
    weight = QuantSpec(torch.uint8, fsq.PerAxis(0), mapping=MappingType.ASYMMETRIC)
    case = product(np.random.default_rng(k), ACT, weight, (rows, k), n)
    folded, bias = case.folded("cuda"), case.bias.cuda()
    qp = QParams(*(t.cuda() for t in case.qp))
    compiled = torch.compile(partial(fsq.linear, ACT), fullgraph=True, mode="max-autotune")
    y = compiled(case.q.cuda(), qp, folded, bias)
    exact, b = case.corrected() * case.scale(np.dtype(np.float64)), case.bias_array()
    assert_within(array(y), exact, b, bound(exact, b, ARRAYS[torch.float32]))


@pytest.mark.cuda
@pytest.mark.parametrize(("rows", "k"), [(1, 32), (5, 64), (17, 71)])
@pytest.mark.parametrize(
    ("act", "weight"),
    [*((d, d) for d in FLOAT8S), *itertools.permutations((torch.float8_e4m3fn, torch.float8_e5m2))],
)
def test_cuda_float8_is_within_the_bound_of_the_tensor_core_sum(
    act: torch.dtype, weight: torch.dtype, rows: int, k: int
) -> None:
    """Hopper's tensor cores align float8 products to the largest and keep 13 bits of fraction below it.

    So an addition errs by less than 2**-13 of the largest magnitude in its sum, which the sum of all
    magnitudes bounds (DeepSeek-V3, arXiv:2412.19437, 3.3.2).
    """
    case = float8_product(np.random.default_rng(k), act, weight, rows=rows, k=k)
    assert_float8_product(case.linear(device="cuda"), case, 2.0**-13)
