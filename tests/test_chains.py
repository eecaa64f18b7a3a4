"""Layers that hand codes on: what they compute against float64, and where a graph lets them.

A code is `round(v)` with `v = activation(y) / scale + zero_point`. Both paths compute `v` in float32: the
product, scale, bias, activation, reciprocal, product and sum are eight roundings of numbers that are at most
`M = max(|y| / scale, |v|) + 255`, and an activation is within 4 units in the last place; so `v` is off by at
most `16 * 2**-24 * M`, and a code by 1/2 more. `slack` is that bound.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import math
import operator
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_conv import FORMATS, GEOMETRIES, UNFIT, draw
from test_linear import BY, needs_bfloat16, needs_brgemm, needs_onednn, symmetric
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import run_and_get_code
from torch.utils.checkpoint import checkpoint

import bridge
import functional_sq as fsq
from bridge import StaticQuantConfig, inductor
from functional_sq import backends, brgemm, chains, onednn, onednn_conv

ASYMMETRIC = fsq.MappingType.ASYMMETRIC
erf = np.vectorize(math.erf, otypes=[float])
EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "relu6": lambda y: np.clip(y, 0, 6),
    "hardswish": lambda y: y * np.clip(y + 3, 0, 6) / 6,
    "gelu": lambda y: y * 0.5 * (1 + erf(y / math.sqrt(2))),
    "gelu_tanh": lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))),
    "silu": lambda y: y * 0.5 * (1 + np.tanh(y / 2)),
    "tanh": np.tanh,
}


def assert_codes(got: Tensor, y: np.ndarray, then: fsq.Requantization) -> None:
    """Assert that `got` are codes of `activation(y)`; what rounds otherwise than float64 lies on the border."""
    scale, (low, high) = float(then.qp.scale), then.spec.bounds
    v = EXACT[then.activation](y) / scale + int(then.qp.zero_point)
    slack = 0.5 + 16 * 2.0**-24 * (np.maximum(np.abs(y) / scale, np.abs(v)) + 255)
    assert (got.dtype, tuple(got.shape)) == (then.spec.format.storage, y.shape)
    assert (np.abs(got.numpy().astype(np.float64) - np.clip(v, low, high)) <= slack).all()


def to(dtype: torch.dtype, scale: float, zero_point: int, activation: str) -> fsq.Requantization:
    qp = fsq.QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
    return fsq.Requantization(fsq.QuantSpec(dtype, fsq.PerTensor(), mapping=ASYMMETRIC), qp, activation)


def test_assert_codes_sees_a_code_that_is_off_by_one() -> None:
    y, then = np.linspace(-1, 1, 100), to(torch.int8, 0.01, 3, "none")
    codes = fsq.requantize(torch.from_numpy(y), then)
    assert_codes(codes, y, then)
    with pytest.raises(AssertionError):
        assert_codes(codes + 1, y, then)


# --- the arithmetic --------------------------------------------------------------------------------


def test_every_activation_has_a_reference_here() -> None:
    assert EXACT.keys() == fsq.ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int4, torch.uint4], ids=str)
@pytest.mark.parametrize("by", BY)
def test_codes_are_those_of_float64_within_the_rounding(
    activation: str, dtype: torch.dtype, by: str, multiply_by: Callable[[str], None]
) -> None:
    multiply_by(by)
    rows, k, n = 33, 40, 65
    rng = np.random.default_rng(0)
    act = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
    qp = fsq.QParams(torch.tensor([0.03]), torch.tensor([-7], dtype=torch.int32))
    q = torch.from_numpy(rng.integers(-128, 128, (2, rows, k)).astype(np.int8))
    weight_spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0))
    w = torch.from_numpy(rng.integers(-127, 128, (n, k)).astype(np.int8))
    scale = torch.from_numpy(rng.uniform(1e-3, 5e-3, (n, 1)).astype(np.float32))
    weight = fsq.fold(weight_spec, w, fsq.QParams(scale, torch.zeros(n, 1, dtype=torch.int32)))
    bias = torch.from_numpy(rng.normal(size=n).astype(np.float32))
    then = to(dtype, 0.03 if activation == "relu6" else 0.017, 3, activation)
    got = fsq.linear(act, q, qp, weight, bias, epilogue=fsq.epilogue(act, qp, weight), then=then)

    exact = (q.numpy().astype(np.int64) + 7) @ w.numpy().astype(np.int64).T
    y = exact * (float(qp.scale) * scale.double().numpy().reshape(-1)) + bias.double().numpy()
    assert_codes(got, y, then)
    assert set(then.spec.bounds) <= set(got.unique().tolist()) or activation != "none"
    # Where no backend makes the codes, they are in bits those of the three steps.
    if by == "torch" or then.spec.bounds not in ((-128, 127), (0, 255)):
        assert torch.equal(got, fsq.requantize(fsq.linear(act, q, qp, weight, bias), then))


@needs_onednn
@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("name", [*GEOMETRIES, *UNFIT])
def test_codes_of_a_convolution_are_those_of_float64_within_the_rounding(
    name: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_conv, "WORTH", 0)
    for formats, dtype in (("uint8-int8", torch.uint8), ("int8-int8", torch.int8), ("int8-tensor", torch.uint8)):
        case = draw((GEOMETRIES | UNFIT)[name], *FORMATS[formats])
        y = case.total() * case.scale(np.dtype(np.float64)) + case.bias_array()
        then = to(dtype, float(np.abs(y).max() / 100) if y.size else 1.0, 5, activation)
        got = case.kept(then=then)
        assert got.is_contiguous()
        assert_codes(got, y, then)


@pytest.mark.parametrize("by", ["brgemm", "torch"])
@pytest.mark.parametrize("scale", [2.0**-5, 0.7, 40.0])
@pytest.mark.parametrize("activation", EXACT)
def test_codes_of_float8_are_those_of_float64_within_the_rounding(
    activation: str, scale: float, by: str, multiply_by: Callable[[str], None]
) -> None:
    """Casts are monotone, so a code lies between those of the ends of an interval. The sums are exact."""
    multiply_by(by)
    rows, k, n = 33, 41, 65
    rng = np.random.default_rng(0)
    spec = fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
    q, w = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((rows, k), (n, k)))
    s = rng.uniform(1e-3, 2e-2, (n, 1)).astype(np.float32)
    one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    w_qp = fsq.QParams(torch.from_numpy(s), torch.zeros(n, 1, dtype=torch.int32))
    q_codes, w_codes = (torch.from_numpy(each).to(torch.float8_e4m3fn) for each in (q, w))
    weight = fsq.fold(fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerAxis(0)), w_codes, w_qp)
    then = fsq.Requantization(spec, fsq.QParams(torch.tensor([scale]), one.zero_point), activation)
    known = fsq.epilogue(spec, one, weight)
    got = fsq.linear(spec, q_codes, one, weight, epilogue=known, then=then)
    assert got.dtype is torch.float8_e4m3fn
    y = q.astype(np.float64) @ w.astype(np.float64).T * s.astype(np.float64).reshape(-1)
    v = EXACT[activation](y) / float(np.float32(scale))
    slack = 16 * 2.0**-24 * (np.abs(v) + (np.abs(y) + 1) / scale)
    low, high = (np.clip(v + side, -448, 448).astype(ml_dtypes.float8_e4m3fn) for side in (-slack, slack))
    value = got.float().numpy()
    assert ((low.astype(np.float32) <= value) & (value <= high.astype(np.float32))).all()
    assert len(np.unique(value)) > 20 or activation == "relu6"


@needs_bfloat16
def test_codes_of_float8_are_those_of_quantize_for_numbers_of_all_sizes(multiply_by: Callable[[str], None]) -> None:
    """A product of 1 and 1, whose scale is the number: those that are not normal, infinite, or NaN too."""
    multiply_by("brgemm")
    spec = fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
    bits = np.random.default_rng(0).integers(0, 2**32, 2**16, dtype=np.uint32)
    near = (np.arange(-512, 512)[:, None] * 2.0**-11 * (1 + np.arange(-2, 3) * 2.0**-23)).astype(np.float32)
    numbers = torch.from_numpy(np.concatenate([bits.view(np.float32), near.ravel(), np.float32([0, -0.0, np.inf])]))
    q, codes = torch.ones(1, 1), torch.ones(len(numbers), 1)
    q, codes = (each.to(torch.float8_e4m3fn) for each in (q, codes))
    one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    weight = fsq.FoldedWeight(codes, torch.ones(len(numbers), 1), None, None)
    known = fsq.Epilogue(numbers, None)
    for scale in (1.0, 3.0):
        then = fsq.Requantization(spec, one._replace(scale=torch.tensor([scale])))
        got = fsq.linear(spec, q, one, weight, epilogue=known, then=then)[0]
        expected = fsq.quantize(spec, numbers, then.qp)
        nan = expected.float().isnan()
        assert torch.equal(got.float().isnan(), nan)
        assert torch.equal(got.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.usefixtures("packing")
def test_codes_of_sums_above_the_integers_of_float32(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There oneDNN's product is cut, and the steps behind it are torch's."""
    monkeypatch.setattr(onednn, "LARGEST_K", 9216)
    case = symmetric(3, 9216, 5, fill=("all", "high"))
    y = case.corrected() * case.scale(np.dtype(np.float64)) + case.bias_array()
    folded = case.folded()
    known = fsq.epilogue(case.act, case.qp, folded)
    then = to(torch.int8, float(np.abs(y).max() / 100), 5, activation)
    got = fsq.linear(case.act, case.q, case.qp, folded, case.bias, epilogue=known, then=then)
    assert_codes(got, y, then)
    assert torch.equal(got, fsq.requantize(case.kept(), then))


def test_an_activation_that_is_none_is_refused() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
    one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    weight = fsq.fold(spec, torch.ones(2, 2, dtype=torch.int8), one)
    q = torch.ones(1, 2, dtype=torch.int8)
    window = fsq.FoldedWeight(weight.codes[..., None], *weight[1:])
    for multiply in (
        lambda then: fsq.linear(spec, q, one, weight, then=then),
        lambda then: fsq.conv(spec, q[..., None], one, window, then=then),
        lambda then: fsq.requantize(torch.ones(2), then),
    ):
        with pytest.raises(ValueError, match=r"activation='swish'; use one of 'none', 'relu', 'relu6', 'gelu'"):
            multiply(fsq.Requantization(spec, one, "swish"))
        with pytest.raises(TypeError, match=r"then is 'relu'; give a Requantization\(spec, qp, activation\)"):
            multiply("relu")


# --- where a graph has chains ----------------------------------------------------------------------


class Net(nn.Module):
    """Three layers, and what a test puts between them."""

    def __init__(self, between: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def converted(
    between: Callable[[Net, Tensor], Tensor], config: StaticQuantConfig | None = None, seed: int = 0
) -> tuple[Net, Tensor]:
    torch.manual_seed(seed)
    model, x = Net(between).eval(), torch.randn(6, 16) * (seed + 1)
    bridge.prepare_(model, config or StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x.clone()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that the test does not use
        bridge.convert_(model, on_unfit="float")
    return model, x


def handing_on(look: Callable[[torch.fx.Graph], None]) -> Callable[..., Any]:
    """Return a compiler that lets layers hand codes on, shows the graph, and runs it as it is then."""

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., Any]:
        chains.hand_on(graph.graph)
        look(graph.graph)
        graph.recompile()
        return graph.forward

    return backend


def found(between: Callable[[Net, Tensor], Tensor]) -> list[str]:
    model, x = converted(between)
    return [str(chain) for chain in bridge.chains(model, x)]


def inplace(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


@torch.compiler.nested_compile_region
def region(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)))


HANDS_ON: dict[str, tuple[str, Callable[[Net, Tensor], Tensor]]] = {
    "nothing": ("a -> b", lambda m, x: m.b(m.a(x))),
    "F.relu": ("a -> relu b", lambda m, x: m.b(F.relu(m.a(x)))),
    "in place": ("a -> relu b", lambda m, x: m.b(F.relu(m.a(x), inplace=True))),
    "torch.relu_": ("a -> relu b", lambda m, x: m.b(torch.relu_(m.a(x)))),
    "method": ("a -> relu b", lambda m, x: m.b(m.a(x).relu())),
    "method in place": ("a -> relu b", lambda m, x: m.b(m.a(x).relu_())),
    "nn.ReLU": ("a -> relu b", lambda m, x: m.b(nn.ReLU(inplace=True)(m.a(x)))),
    "nn.ReLU6": ("a -> relu6 b", lambda m, x: m.b(nn.ReLU6(inplace=True)(m.a(x)))),
    "F.relu6": ("a -> relu6 b", lambda m, x: m.b(F.relu6(m.a(x)))),
    "hardswish": ("a -> hardswish b", lambda m, x: m.b(nn.Hardswish(inplace=True)(m.a(x)))),
    "gelu": ("a -> gelu b", lambda m, x: m.b(F.gelu(m.a(x)))),
    "gelu tanh": ("a -> gelu_tanh b", lambda m, x: m.b(nn.GELU("tanh")(m.a(x)))),
    "silu": ("a -> silu b", lambda m, x: m.b(nn.SiLU(inplace=True)(m.a(x)))),
    "tanh": ("a -> tanh b", lambda m, x: m.b(nn.Tanh()(m.a(x)))),
    "F.tanh": ("a -> tanh b", lambda m, x: m.b(F.tanh(m.a(x)))),
    "dropout": ("a -> relu b", lambda m, x: m.b(F.dropout(F.relu(F.dropout(m.a(x), training=False)), 0.1, False))),
    "by name": ("a -> gelu b", lambda m, x: m.b(F.gelu(input=F.dropout(input=m.a(input=x), training=False)))),
    "identity": ("a -> b", lambda m, x: m.b(nn.Identity()(m.a(x)))),
    "no padding": ("a -> relu b", lambda m, x: m.b(F.pad(F.relu(F.pad(m.a(x), (0, 0))), pad=[0, 0, 0, 0]))),
    "in a region": ("a -> relu b", lambda m, x: region(m, x)),
    "in a branch": (
        "a -> relu b",
        lambda m, x: torch.cond(x.sum() < 999, lambda x: m.b(F.relu(m.a(x))), torch.cos, [x]),
    ),
    "recomputed": ("a -> relu b", lambda m, x: checkpoint(lambda x: m.b(F.relu(m.a(x))), x, use_reentrant=False)),
    "residual around": ("b -> gelu c", lambda m, x: x + m.c(F.gelu(m.b(m.norm(x + m.a(x)))))),
    "writes elsewhere": ("a -> b", lambda m, x: inplace(torch.zeros(6, 16), m.b(m.a(x)))),
}


@torch._dynamo.nonstrict_trace
def doubled_as_it_is(x: Tensor) -> Tensor:
    return x.mul_(2)


@torch.compiler.allow_in_graph
def doubled(x: Tensor) -> None:
    """Nothing but its code says that it writes."""
    x.mul_(2)


KEEPS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "another function": lambda m, x: m.b(torch.sigmoid(m.a(x))),
    "another clamp": lambda m, x: m.b(nn.Hardtanh()(m.a(x))),
    "a norm": lambda m, x: m.b(m.norm(m.a(x))),
    "two activations": lambda m, x: m.b(F.gelu(F.relu(m.a(x)))),
    "dropout that drops": lambda m, x: m.b(F.dropout(m.a(x), 0.0)),
    "a second reader of the layer": lambda m, x: (y := m.a(x)) + m.b(F.relu(y)),
    "a second reader of the activation": lambda m, x: (y := F.relu(m.a(x))) + m.b(y),
    "a residual": lambda m, x: m.b(x + m.a(x)),
    "a residual in place": lambda m, x: m.b(inplace(m.a(x), x)),
    "an activation into a tensor": lambda m, x: m.b(torch.tanh(m.a(x), out=(y := torch.empty(6, 16)))) + y,
    "padding": lambda m, x: m.b(F.pad(m.a(x)[:, 1:], (1, 0))),
    "padding behind": lambda m, x: m.b(F.pad(m.a(x), (1, -1))),
    "a view": lambda m, x: m.b(m.a(x).view(3, 2, 16)),
    "the last layer": lambda m, x: F.relu(m.a(x)),
    "a function that nobody knows between": lambda m, x: m.b((m.a(x), doubled(x))[0]),
    "a write to the input between": lambda m, x: m.b((m.a(x), x.mul_(2))[0]),
}


@pytest.mark.parametrize("case", HANDS_ON)
def test_a_layer_hands_on(case: str) -> None:
    if case == "in a branch" and torch.__version__ < "2.13":
        pytest.skip("this torch.cond takes no observers, which write what they see")
    expected, between = HANDS_ON[case]
    assert found(between) == [expected]


@pytest.mark.parametrize("case", KEEPS)
def test_a_layer_keeps_its_floats(case: str) -> None:
    assert found(KEEPS[case]) == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4], ids=str)
def test_a_zero_point_may_be_held_in_a_dtype_that_has_the_codes_alone(dtype: torch.dtype) -> None:
    spec = fsq.QuantSpec(dtype, fsq.PerTensor(), zero_point_dtype=torch.int8)
    model, x = converted(HANDS_ON["F.relu"][1], StaticQuantConfig(dtype, activation=spec))
    assert quantizations(model, x) == 1


def test_a_chain_of_three_and_one_to_two() -> None:
    assert found(lambda m, x: m.c(F.relu(m.b(F.gelu(m.a(x)))))) == ["a -> gelu b", "b -> relu c"]
    model, x = converted(lambda m, x: (y := F.relu(m.a(x))) * 0 + m.b(y) + m.c(y))
    assert bridge.chains(model, x) == ()
    model, x = converted(lambda m, x: m.b(y := F.relu(m.a(x))) + m.c(y))
    assert bridge.chains(model, x) == (bridge.Chain("a", "relu", ("b", "c")),)


# --- the compiled model ----------------------------------------------------------------------------


def difference(model: nn.Module, *inputs: Tensor) -> float:
    """The largest difference of compiled and eager, in steps of the last layer's product."""
    with torch.inference_mode():
        eager = model(*(x.clone() for x in inputs))
        compiled = torch.compile(model, fullgraph=True)(*(x.clone() for x in inputs))
    assert (compiled.dtype, compiled.shape, compiled.stride()) == (eager.dtype, eager.shape, eager.stride())
    return ((compiled - eager).abs().max() / eager.abs().max()).item()


DTYPES = torch.int8, torch.uint8, torch.float8_e4m3fn
IN_TURN = HANDS_ON["residual around"][1], HANDS_ON["in place"][1], KEEPS["a residual in place"]


# Every pair of a case, a backend and a dtype.
@pytest.mark.parametrize(("i", "j"), [(i, j) for i in range(3) for j in range(3)])
def test_compiled_computes_what_eager_computes(i: int, j: int, multiply_by: Callable[[str], None]) -> None:
    """One code that falls to the other side of a border moves the output by one step of 255, or of 8 for float8."""
    multiply_by(BY[i])
    model, x = converted(IN_TURN[(i + j) % 3], StaticQuantConfig(DTYPES[j]))
    assert difference(model, x) < (0.1 if DTYPES[j].is_floating_point else 0.02)


# Each case with one backend: which of them multiplies decides nothing here.
@pytest.mark.parametrize(("case", "by"), [(case, BY[i % 2]) for i, case in enumerate(KEEPS)])
@pytest.mark.usefixtures("kernels_of_torch")
def test_what_keeps_its_floats_is_right_too(case: str, by: str, multiply_by: Callable[[str], None]) -> None:
    multiply_by(by)
    model, x = converted(KEEPS[case])
    assert difference(model, x) < 0.02


def test_the_compiled_code_has_no_float_between(packing: str) -> None:
    model, x = converted(HANDS_ON["gelu"][1])
    with torch.inference_mode():
        _, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert source.count(f"functional_sq.{packing.lower()}_product.default(") == 2
        assert "'gelu'" in source
        assert ".erf()" not in source
        for layer in (model.a, model.b):
            layer.hand_on = False
        torch.compiler.reset()
        _, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert ".erf()" in source


@pytest.mark.usefixtures("packing")
def test_a_chain_is_compiled_once_for_any_batch_and_follows_a_loaded_state() -> None:
    model, x = converted(HANDS_ON["gelu"][1])
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.inference_mode():
        for rows in (5, 2, 33):
            x = torch.randn(rows, 16)
            assert (compiled(x) - model(x)).abs().max() < 0.02
        assert counter.frame_count == 1
        other, _ = converted(HANDS_ON["gelu"][1], seed=2)
        model.load_state_dict(other.state_dict())
        assert (model(x) - other(x)).abs().max() == 0
        assert (compiled(x) - other(x)).abs().max() < 0.05
        twin = copy.deepcopy(model)
        assert (torch.compile(twin, fullgraph=True)(x) - other(x)).abs().max() < 0.05


def test_operators_traced_without_word_of_it_are_traced_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.13 does not say that it compiles while it takes a composed operator apart."""
    monkeypatch.setattr(torch.compiler, "_compile_session_context", nullcontext, raising=False)
    monkeypatch.setattr(sys.modules["functional_sq.quantize"], "_PIECE", 64)
    monkeypatch.setattr(sys.modules["functional_sq.quantize"], "_LARGE", 64)
    model, _ = converted(HANDS_ON["gelu"][1])
    seen: list[bool] = []
    backend = backends.product_for(40, model.a.weight_codes, None) or onednn
    rows_of = backend.rows
    monkeypatch.setattr(backend, "rows", lambda *a: seen.append(torch.compiler.is_compiling()) or rows_of(*a))
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.inference_mode():
        x = torch.randn(40, 16)
        _, (source,) = run_and_get_code(compiled, x)
        assert source.count("round()") <= 2 * 2  # vectors and a tail, of one or two layers' inputs
        for rows in (3, 2000):
            x = torch.randn(rows, 16)
            assert (compiled(x) - model(x)).abs().max() < 0.02
    assert counter.frame_count == 1
    assert not onednn.AVAILABLE or False in seen


# --- residuals -------------------------------------------------------------------------------------


def read_later(m: Net, x: Tensor) -> Tensor:
    h = m.norm(x)
    return (h + m.a(h)) * h


ADDED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "the operator": lambda m, x: (h := m.norm(x)) + m.a(h),
    "the product first": lambda m, x: m.a(h := m.norm(x)) + h,
    "torch.add": lambda m, x: torch.add(h := m.norm(x), m.a(h)),
    "the method": lambda m, x: (h := m.norm(x)).add(m.a(h)),
    "in place": lambda m, x: inplace(m.a(h := m.norm(x)), h),
    "the method in place": lambda m, x: m.a(h := m.norm(x)).add_(h),
    "through dropout": lambda m, x: F.dropout(m.a(h := m.norm(x)), 0.1, False) + h,
    "behind a chain": lambda m, x: (h := m.norm(x)) + m.b(F.gelu(m.a(h))),
    "before a norm and a layer": lambda m, x: m.b(m.norm(m.a(h := m.norm(x)) + h)),
    "two products": lambda m, x: m.a(x) + m.b(x),
    "two in a row": lambda m, x: m.b(h := m.norm(x) + m.a(x)) + h,
    "an input of the graph": lambda m, x: x + m.a(x),
    "a value that is read later": read_later,
    "three dimensions": lambda m, x: (h := m.norm(x.view(3, 2, 16))) + m.a(h),
    "a view of what is read later": lambda m, x: ((h := m.norm(x))[:] + m.a(h)) * h,
    "of three terms": lambda m, x: (h := m.norm(x)) + m.a(h) + h.cos(),
}
NOT_ADDED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "to all rows": lambda m, x: m.a(x) + m.norm(x)[0],
    "more rows": lambda m, x: m.a(x[:1]) + x,
    "a number": lambda m, x: m.a(x) + 1.0,
    "scaled": lambda m, x: torch.add(m.norm(x), m.a(x), alpha=2),
    "another dtype": lambda m, x: m.norm(x).double() + m.a(x),
    "into a tensor": lambda m, x: torch.add(m.norm(x), m.a(x), out=torch.empty_like(x)),
    "into the residual": lambda m, x: inplace(m.norm(x), m.a(x)),
    "after an activation": lambda m, x: m.norm(x) + F.relu(m.a(x)),
    "a layer that is read again": lambda m, x: (y := m.a(x)) * (m.norm(x) + y),
    "a residual that is written between": lambda m, x: (m.a(x), x.mul_(2))[0] + x,
    "the layer itself": lambda m, x: (y := m.a(x)) + y,
    "another layout": lambda m, x: m.norm(x.view(3, 2, 16)).transpose(0, 1) + m.a(x.view(2, 3, 16)),
    # oneDNN adds in place, to a copy that Inductor then takes from the start of the storage.
    "within a tensor": lambda m, x: (h := m.norm(x))[3:] + m.a(h[:3]),
    "within a tensor that is read later": lambda m, x: torch.cat([(h := m.norm(x))[3:] + m.a(h[:3]), h]),
    "a piece": lambda m, x: (h := m.norm(x).chunk(2))[1] + m.a(h[0]),
    "rows of an input": lambda m, x: x[1:] + m.a(x[:-1]),
}


def compiled_source(model: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    with torch.inference_mode():
        y, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x.clone())
    return y, source


def has_added(source: str) -> bool:
    """Whether a product in compiled code adds a residual."""
    return "onednn_add_product.default(" in source or given("residual", "brgemm_product", source) > 0


def given(argument: str, name: str, source: str) -> int:
    """Return how many calls of an operator in compiled code are given an argument."""
    names = [each.name for each in getattr(torch.ops.functional_sq, name).default._schema.arguments]
    found = re.findall(rf"functional_sq\.{name}\.default(\(.*\))", source)
    calls = [ast.parse(f"f{call}").body[0].value for call in found]
    arguments = [dict(zip(names, call.args)) | {word.arg: word.value for word in call.keywords} for call in calls]  # noqa: B905
    return sum(argument in of and ast.unparse(of[argument]) != "None" for of in arguments)


# Every pair of a case and a backend that adds, and some of one that does not; each of both with each dtype.
@pytest.mark.parametrize(
    ("case", "by", "dtype"),
    [
        (case, by, (torch.float32, torch.bfloat16)[(i + j) % 2])
        for i, case in enumerate(ADDED)
        for j, by in enumerate(BY)
        if by != "torch" or i < 4
    ],
    ids=str,
)
def test_a_residual_is_added_inside_the_product(
    case: str, by: str, dtype: torch.dtype, multiply_by: Callable[[str], None]
) -> None:
    multiply_by(by)
    model, x = converted(ADDED[case])
    model, x = model.to(dtype), x.to(dtype)
    with torch.inference_mode():
        before, eager = x.clone(), model(x.clone())
    y, source = compiled_source(model, x)
    assert torch.equal(x, before)
    assert has_added(source) == (by != "torch")
    # Compiled rounds once where eager rounds twice, and a code of a chain may differ by one.
    step = eager.abs().max() * (0.02 if dtype is torch.float32 else 0.03)
    assert (y - eager).abs().max() < step


WITHIN = "within a tensor", "within a tensor that is read later", "a piece", "rows of an input"
"""What one backend adds and the other does not; the other cases are with one of both."""


@pytest.mark.parametrize(
    ("case", "by"),
    [(case, by) for i, case in enumerate(NOT_ADDED) for j, by in enumerate(BY[:2]) if case in WITHIN or i % 2 == j],
)
@pytest.mark.usefixtures("kernels_of_torch")
def test_what_is_no_residual_is_added_as_before(case: str, by: str, multiply_by: Callable[[str], None]) -> None:
    multiply_by(by)
    model, x = converted(NOT_ADDED[case])
    y, source = compiled_source(model, x)
    with torch.inference_mode():
        eager = model(x.clone())
    assert (y.dtype, y.shape, y.stride()) == (eager.dtype, eager.shape, eager.stride())
    assert (y - eager).abs().max() < 0.001 * eager.abs().max()
    assert has_added(source) == (case in WITHIN and by == "brgemm")


@pytest.mark.usefixtures("packing")
def test_a_residual_may_lie_anywhere_in_its_storage() -> None:
    """No guard tells a compiled graph of another offset."""
    model, _ = converted(lambda m, x: m.a(x[0]) + x[1])
    rows = [torch.randn(12, 16)[i : i + 6] for i in (0, 6, 3)]
    for first in (0, 1):
        torch.compiler.reset()
        compiled = torch.compile(lambda x, r: model([x, r]), fullgraph=True)
        with torch.no_grad():
            for r in (rows[first], *rows):
                torch.testing.assert_close(compiled(rows[0], r), model([rows[0], r]))


@pytest.mark.parametrize("by", BY)
def test_a_sum_has_the_strides_of_eager(by: str, multiply_by: Callable[[str], None]) -> None:
    multiply_by(by)
    model, x = converted(NOT_ADDED["another layout"])
    with torch.no_grad():
        assert torch.compile(model)(x).stride() == model(x).stride()


def test_a_residual_is_copied_only_where_it_is_read_later(multiply_by: Callable[[str], None]) -> None:
    """Inductor removes the copy: the product of oneDNN adds to what the norm wrote."""
    multiply_by("oneDNN")
    counts = []
    for between in (ADDED["before a norm and a layer"], lambda m, x: m.b(m.norm(m.a(h := m.norm(x)) + h)) * h):
        torch.compiler.reset()
        _, source = compiled_source(*converted(between))
        counts.append(len(re.findall(r"empty_strided_cpu\(\((?:6, 16|96, )\), .*float32", source)))
    assert counts[1] == counts[0] + 1


@pytest.mark.usefixtures("packing")
def test_a_residual_that_is_learned_has_its_gradient() -> None:
    model, x = converted(ADDED["the operator"])
    grads = []
    for call in (model, torch.compile(model, fullgraph=True)):
        y = call(x)
        y.square().sum().backward()
        grads.append(model.norm.weight.grad)
        model.norm.weight.grad = None
    assert grads[0].abs().min() > 0
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.usefixtures("packing")
def test_a_residual_of_any_batch_is_compiled_once() -> None:
    model, _ = converted(lambda m, x: (h := x.unsqueeze(1).cos()) + m.a(h))
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    with torch.inference_mode():
        _, (source,) = run_and_get_code(compiled, torch.randn(6, 16))
        assert has_added(source)
        for rows in (2, 33):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.other = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, write: bool = False) -> Tensor:
        y = self.query(x)
        if write:
            x.mul_(2)
        return y * self.key(x) * self.value(x) + self.other(x.clone())


def quantizations(model: nn.Module, *args: Any) -> int:
    """How often the compiled model quantizes."""
    counts = []

    def look(graph: torch.fx.Graph) -> None:
        counts.append(len(graph.find_nodes(op="call_function", target=torch.ops.functional_sq.quantize.default)))

    torch.compiler.reset()
    with torch.inference_mode():
        expected = model(*(a.clone() if isinstance(a, Tensor) else a for a in args))
        torch.testing.assert_close(torch.compile(model, backend=handing_on(look), fullgraph=True)(*args), expected)
    return counts[0]


def test_layers_that_quantize_one_input_alike_share_its_codes() -> None:
    model, x = Attention().eval(), torch.randn(5, 16)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x])
    bridge.convert_(model)
    assert quantizations(model, x) == 2  # one for three, and one of the copy
    torch.compiler.reset()
    assert quantizations(model, x, True) == 3  # the query's input is another one
    # Equal values are what counts, not where they came from; others do not share.
    torch.compiler.reset()
    state = model.state_dict()
    state["key.act_scale"] = state["key.act_scale"] * 2
    model.load_state_dict(state)
    assert quantizations(model, x) == 3


@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
def test_shared_codes_are_written_once(shape: tuple[int, ...]) -> None:
    model, x = Attention().eval(), torch.randn(shape)
    bridge.prepare_(model, StaticQuantConfig(torch.uint8))
    bridge.calibrate(model, [x])
    bridge.convert_(model)
    torch.compiler.reset()
    with torch.inference_mode():
        y, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        torch.testing.assert_close(y, model(x))
    written = re.findall(r"= empty_strided_cpu\(.*, torch.uint8\)", source)
    assert len(written) == 2, source  # codes of the input, and of its copy


torch.library.define("functional_sq_tests::twice", "(Tensor(a!) x) -> ()")
torch.library.impl("functional_sq_tests::twice", "CompositeExplicitAutograd", lambda x: (x.mul_(2), None)[1])
torch.library.register_fake("functional_sq_tests::twice", lambda x: None)
torch.library.define("functional_sq_tests::twice_each", "(Tensor(a!)[] xs) -> ()")
torch.library.impl(
    "functional_sq_tests::twice_each", "CompositeExplicitAutograd", lambda xs: (torch._foreach_mul_(xs, 2), None)[1]
)
torch.library.register_fake("functional_sq_tests::twice_each", lambda xs: None)


class Doubling(torch.autograd.Function):
    """Writes, as functions with a gradient of their own may."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def in_numpy(write: Callable[[np.ndarray], object]) -> Callable[[Tensor, Tensor], object]:
    return lambda h, x: write(h.numpy())


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "an operator by its name": lambda h, x: torch.ops.functional_sq_tests.twice(h),
    "an operator": lambda h, x: torch.ops.functional_sq_tests.twice.default(h),
    "an operator of a list": lambda h, x: torch.ops.functional_sq_tests.twice_each([h]),
    "an operator that does not say it": lambda h, x: torch.ops.aten.batch_norm.default(
        x, None, None, h[0], h[1], True, 0.1, 1e-5, False
    ),
    "a dunder": lambda h, x: h.__iadd__(x),
    "bits taken": lambda h, x: operator.iand(h.view(torch.int32), 0x7FFFFFFF),
    "bits added": lambda h, x: operator.ior(h.view(torch.int32), -(2**31)),
    "bits by a dunder": lambda h, x: h.view(torch.int32).__iand__(0x7FFFFFFF),
    "bits added by a dunder": lambda h, x: h.view(torch.int32).__ior__(-(2**31)),
    "an item": lambda h, x: h.__setitem__(0, x[0]),
    "items by index": lambda h, x: h.index_put_((torch.tensor([1]),), x[:1]),
    "a copy": lambda h, x: h.copy_(x),
    "other memory": lambda h, x: h.set_(x.clone()),
    "out": lambda h, x: F.normalize(x, out=h),
    "out by position": lambda h, x: F.normalize(x, 2.0, 1, 1e-12, h),
    "out of a builtin": lambda h, x: torch.add(x, 1, out=h),
    "out of a norm": lambda h, x: torch.norm(x, 2, 1, True, h[:, :1]),
    "several": lambda h, x: torch._foreach_add_([h], [x]),
    "an embedding": lambda h, x: F.embedding(torch.tensor([0, 1]), h, max_norm=0.1),
    "a bag": lambda h, x: F.embedding_bag(torch.tensor([[0, 1]]), h, max_norm=0.1),
    "statistics": lambda h, x: F.batch_norm(x, h[0], h[1], training=True),
    "statistics by position": lambda h, x: torch.batch_norm(x, None, None, h[0], h[1], True, 0.1, 1e-5, True),
    "of instances": lambda h, x: F.instance_norm(x[None].transpose(1, 2), h[0], h[1]),
    "ranges": lambda h, x: torch.fused_moving_avg_obs_fake_quant(
        x, *torch.ones(2, 1), h[0, :1], h[0, 1:2], torch.ones(1), torch.zeros(1, dtype=torch.int32), 0.1, 0, 255, 0
    ),
    "numpy": in_numpy(lambda v: operator.imul(v, 2)),
    "a function of numpy": in_numpy(lambda v: np.fill_diagonal(v, 9)),
    "a method of numpy": in_numpy(lambda v: v.sort()),
    "out of numpy": in_numpy(lambda v: np.add(v, 1, out=v)),
    "out of numpy by position": in_numpy(lambda v: np.add(v, 1, v)),
    "a function with a gradient of its own": lambda h, x: Doubling.apply(h),
    "what is traced as it is": lambda h, x: doubled_as_it_is(h),
}


@pytest.mark.parametrize("case", WRITES)
@pytest.mark.usefixtures("kernels_of_torch")
def test_codes_are_made_anew_after_a_write(case: str) -> None:
    def between(m: Net, x: Tensor) -> Tensor:
        h = m.norm(x)
        y = m.a(h)
        WRITES[case](h, x)
        return torch.cat([y, m.a(h)])

    model, x = converted(between)
    torch.compiler.reset()
    assert quantizations(model, x) == 2


def test_codes_are_shared_past_what_writes_to_other_memory() -> None:
    def between(m: Net, x: Tensor) -> Tensor:
        h = m.norm(x)
        y = m.a(h).relu_()
        x.mul_(2)
        return torch.cat([y, m.a(h)])

    model, x = converted(between)
    torch.compiler.reset()
    assert quantizations(model, x) == 1


def test_codes_are_shared_past_what_writes_nothing() -> None:
    def between(m: Net, x: Tensor) -> Tensor:
        h = m.norm(x)
        y = m.a(h)
        z = torch.norm(F.normalize(h), 2, 1).sort()[0] + F.dropout(F.hardtanh(h), 0.1, False).sum(1) - abs(-h).sum(1)
        return torch.cat([y, m.a(h), z[:, None]], 1)

    model, x = converted(between)
    assert quantizations(model, x) == 1


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "moved": lambda model, path: model.to("meta").to_empty(device="cpu"),
    "in bfloat16": lambda model, path: model.bfloat16(),
    "pickled": lambda model, path: (torch.save(model, path), torch.load(path, weights_only=False))[1],
    "saved": lambda model, path: (bridge.save(model, path), bridge.load(path, lambda: Attention().eval()))[1],
}


@pytest.mark.parametrize("case", COPIES)
def test_layers_that_quantize_alike_are_known_in_a_copy(case: str, tmp_path: Path) -> None:
    model = Attention().eval()
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [torch.randn(5, 16)])
    bridge.convert_(model)
    state = copy.deepcopy(model.state_dict())
    other = COPIES[case](model, tmp_path / "model")
    if case == "moved":  # to memory that nothing was written to
        other.load_state_dict(state)
    for name in ("shared_scale", "shared_zero_point"):
        assert getattr(other.query, name) is getattr(other.key, name) is getattr(other.value, name)
    # One layer's range is its own.
    other.query.act_scale.mul_(2)
    assert torch.equal(other.key.act_scale, state["key.act_scale"])
    state["query.act_scale"] = state["query.act_scale"] * 2
    other.load_state_dict(state)
    for layer, size in ((other.query, 2), (other.key, 1)):
        assert torch.equal(layer.shared_scale, layer.act_scale)
        assert torch.equal(layer.act_scale, state["value.act_scale"] * size)


def test_what_layers_share_serves_outside_of_inference_mode_too() -> None:
    model, _ = converted(HANDS_ON["nothing"][1])
    state = copy.deepcopy(model.state_dict())
    state["a.act_scale"] += 1
    with torch.inference_mode():
        model.load_state_dict(state)
    assert not model.a.shared_scale.is_inference()
    assert torch.equal(model.a.shared_scale, state["a.act_scale"])


@pytest.mark.parametrize("config", [StaticQuantConfig(torch.int8), StaticQuantConfig(torch.int8, hand_on=False)])
def test_blocks_that_are_compiled_one_by_one_share_their_code(config: StaticQuantConfig) -> None:
    """As large models are compiled: what differs from block to block is in tensors alone."""
    model = nn.Sequential(*(Attention() for _ in range(10))).eval()
    x = torch.randn(5, 16)
    bridge.prepare_(model, config)
    bridge.calibrate(model, [x])
    bridge.convert_(model)
    expected = model(x)
    counter = CompileCounterWithBackend("eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("worth", [0, 10**18], ids=["by oneDNN", "not by oneDNN"])
def test_convolutions_hand_on(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_conv, "WORTH", worth)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 4, 6, 6)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x])
    bridge.convert_(model)
    assert list(map(str, bridge.chains(model, x))) == ["0 -> relu 2"]
    assert difference(model, x) < 0.02
    assert difference(model, x.to(memory_format=torch.channels_last)) < 0.02


NORMED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), lambda: nn.BatchNorm1d(6), (9, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), lambda: nn.BatchNorm1d(6), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 6, 3, padding=1, bias=False), lambda: nn.BatchNorm2d(6, eps=0.1), (2, 8, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: nn.BatchNorm2d(6, affine=False), (2, 6, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(8, 6, 2), lambda: nn.BatchNorm3d(6), (2, 8, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 2, 2), lambda: nn.BatchNorm2d(6), (2, 8, 3, 4)),
}


def normed(case: str, dtype: torch.dtype = torch.int8, *behind: nn.Module) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    make, norm, size = NORMED[case]
    model, x = nn.Sequential(make(), norm(), *behind).eval(), torch.randn(size)
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.1, 9)
        for value in model[1].parameters():
            value.normal_()  # of either sign
    bridge.prepare_(model, StaticQuantConfig(dtype))
    bridge.calibrate(model, [x])
    return bridge.convert_(model), x


# Every pair of a case, a backend and a dtype.
@pytest.mark.parametrize(
    ("case", "by", "dtype"),
    [(case, BY[(i + j) % 3], dtype) for i, case in enumerate(NORMED) for j, dtype in enumerate(DTYPES)],
    ids=str,
)
@pytest.mark.usefixtures("kernels_of_torch")
def test_a_batch_norm_is_part_of_the_layer_before_it(
    case: str, by: str, dtype: torch.dtype, multiply_by: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside float64. With `u = 2**-24` and the factor `a`: the scale is rounded as the product of the input's and the
    weight's, and times `a`; the sum once, if it is an integer; then the product, the folded bias, and what is added."""
    multiply_by(by)
    monkeypatch.setattr(onednn_conv, "WORTH", 10**18 if by == "torch" else 0)
    model, x = normed(case, dtype)
    with torch.inference_mode():
        y, source = compiled_source(model, x)
        layer, norm = copy.deepcopy(model).double()
        layer.reference = True
        summed = layer(x.double())

        def along(value: Tensor | float | None) -> Tensor:
            return torch.as_tensor(0.0 if value is None else value).abs().reshape(-1, *(1,) * (x.ndim - 2))

        a = along((norm.running_var + norm.eps).rsqrt()) * along(1.0 if norm.weight is None else norm.weight)
        terms = summed.abs() + 2 * along(layer.bias) + along(norm.running_mean)
        if dtype.is_floating_point:  # each addition rounds, by no more than what all K terms at their largest sum to
            k = layer.weight_codes[0].numel()
            w = fsq.dequantize(layer.weight_spec, *fsq.unfold(layer.weight_spec, layer.folded), dtype=torch.float64)
            terms += k * (k * w.abs().max() * x.double().abs().max())
        limit = 2.0**-24 * 8 * (terms * a + along(norm.bias))
        assert ((y - norm(summed)).abs() <= limit).all()
    assert "batch_norm" not in source


@pytest.mark.parametrize("case", ["linear", "conv2d", "transposed"])
@pytest.mark.usefixtures("kernels_of_torch")
def test_a_layer_hands_on_through_a_batch_norm(case: str) -> None:
    last = nn.Linear(6, 4) if case == "linear" else nn.Conv2d(6, 4, 1)
    model, x = normed(case, torch.int8, nn.ReLU(), last)
    assert list(map(str, bridge.chains(model, x))) == ["0 -> relu 3"]
    assert difference(model, x) < 0.02
    model.bfloat16()
    assert difference(model, x.bfloat16()) < 0.05
    with torch.no_grad():
        model[1].running_mean += 1  # a tensor of the graph, as every other
        assert difference(model, x.bfloat16()) < 0.05


class Norms(nn.Module):
    """Two layers with batch norms, and what a test does between them."""

    def __init__(self, between: Callable[[Any, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1, bias=False)
        self.of_a, self.of_b = nn.BatchNorm2d(6), nn.BatchNorm2d(6, affine=False)
        self.between = between

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.of_a(self.a(x))
        self.between(self, y, other)
        return self.of_b(self.b(y))


BETWEEN: dict[str, tuple[int, Callable[[Any, Tensor, Tensor], object]]] = {
    "nothing": (1, lambda m, y, other: None),
    "what writes to a result": (1, lambda m, y, other: y.relu_()),
    "what writes to a result of two": (1, lambda m, y, other: (y * 2).add_(y.flip(0))),
    "what writes to a statistic": (2, lambda m, y, other: m.of_b.running_var.mul_(4)),
    "what writes to a view of a statistic": (2, lambda m, y, other: m.of_b.running_mean[2:].add_(1)),
    "what writes to an input": (1, lambda m, y, other: other.mul_(4)),
}


@pytest.mark.parametrize("case", [*BETWEEN, "what writes to an input that is a statistic"])
def test_batch_norms_are_computed_at_once_where_nothing_writes_to_them(case: str) -> None:
    torch.manual_seed(0)
    count, between = BETWEEN.get(case) or (2, BETWEEN["what writes to an input"][1])
    model, x = Norms(between).eval(), torch.randn(2, 6, 5, 5)
    for norm in (model.of_a, model.of_b):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 9)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [(x, torch.ones(6))])
    bridge.convert_(model)
    seen: list[int] = []

    def look(graph: torch.fx.Graph) -> None:
        seen.append(len(graph.find_nodes(op="call_function", target=torch.ops.functional_sq.batch_norms.default)))

    def run(function: Callable[..., Tensor], of: Any) -> Tensor:
        with torch.no_grad():
            return function(x.clone(), of.of_b.running_var if case not in BETWEEN else torch.ones(6))

    eager = copy.deepcopy(model)
    torch.compiler.reset()
    y = run(torch.compile(model, backend=handing_on(look), fullgraph=True), model)
    torch.testing.assert_close(y, run(eager, eager), rtol=0, atol=0.02 * y.abs().max().item())
    assert seen == [count]


@pytest.mark.parametrize(
    "between", [nn.Identity(), nn.Dropout2d(), nn.ZeroPad2d(0), nn.Dropout2d(inplace=True)], ids=str
)
def test_what_computes_nothing_keeps_no_batch_norm_from_its_layer(between: nn.Module) -> None:
    model, x = nn.Sequential(nn.Conv2d(6, 6, 1), between, nn.BatchNorm2d(6)).eval(), torch.randn(2, 6, 5, 5)
    model[2].running_mean.normal_()
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x])
    bridge.convert_(model)

    def look(graph: torch.fx.Graph) -> None:
        graph.lint()
        assert not graph.find_nodes(op="call_function", target=F.batch_norm)

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=handing_on(look), fullgraph=True)(x), model(x))


@pytest.mark.parametrize("case", ["linear", "conv2d", "conv1d"])
@pytest.mark.usefixtures("kernels_of_torch")
def test_a_batch_norm_keeps_its_gradient(case: str) -> None:
    """Where a quantization follows there is none."""
    last = {"linear": nn.Linear(6, 4), "conv1d": nn.Conv1d(6, 4, 1), "conv2d": nn.Conv2d(6, 4, 1)}[case]
    for behind, handed in (((nn.ReLU(), last), True), ((nn.ReLU(),), False)):
        model, x = normed(case, torch.int8, *behind)
        other = copy.deepcopy(model)
        torch.compiler.reset()
        (y,), (expected,) = [torch.compile(other)(x)], [model(x)]
        assert y.requires_grad == expected.requires_grad == (not handed)
        assert (y - expected).abs().max() <= expected.abs().max() * (0.02 if handed else 1e-5)
        if not handed:
            expected.square().sum().backward()
            y.square().sum().backward()
            for ours, theirs in zip(other[1].parameters(), model[1].parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)


class Normed(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.use = use
        self.conv, self.linear, self.norm = nn.Conv1d(6, 6, 1), nn.Linear(6, 6), nn.BatchNorm1d(6)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def after_a_write(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.no_grad():
        m.conv.bias.add_(1)
    return m.norm(y)


def by_what_is_computed(m: Any, x: Tensor) -> Tensor:
    return F.batch_norm(m.conv(x), m.norm.running_mean + 1, m.norm.running_var.sqrt())


@pytest.mark.parametrize("use", [after_a_write, by_what_is_computed])
@pytest.mark.filterwarnings("ignore:1 layer left in float")  # the linear one
@pytest.mark.usefixtures("kernels_of_torch")
def test_a_batch_norm_of_what_is_written_or_computed_in_the_graph(use: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = Normed(use).eval(), torch.randn(2, 6, 5)
    model.norm.running_var.fill_(4)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x])
    bridge.convert_(model, on_unfit="float")
    eager = copy.deepcopy(model)
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True)(x)
        torch.testing.assert_close(y, eager(x))
    assert torch.equal(model.conv.bias, eager.conv.bias)


OTHER_NORMS: tuple[Callable[[Any, Tensor], Tensor], ...] = (
    lambda m, x: m.norm(m.linear(x)),  # its channels are not the layer's
    lambda m, x: m.norm(y := m.conv(x)) + y,
    lambda m, x: m.norm(m.conv(x).relu()),
    lambda m, x: m.norm(m.conv(x) + x),
    lambda m, x: F.batch_norm(m.conv(x), None, None, m.norm.weight, m.norm.bias, True),
    lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var, training=True),
    lambda m, x: F.instance_norm(m.conv(x)),
    lambda m, x: (y := m.conv(x), m.conv.bias.add_(1), m.norm(y))[2],
)


class OtherNorms(nn.ModuleList):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [each(x) for each in self]


@pytest.mark.filterwarnings("ignore:8 layers left in float")
@pytest.mark.usefixtures("kernels_of_torch")
def test_another_norm_stays_what_it_is() -> None:
    model, x = OtherNorms(map(Normed, OTHER_NORMS)).eval(), torch.randn(3, 6, 6)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x])
    bridge.convert_(model, on_unfit="float")  # each uses one of its two layers
    with torch.inference_mode():
        expected = copy.deepcopy(model)(x)
        for ours, eager in zip(torch.compile(model)(x), expected, strict=True):
            torch.testing.assert_close(ours, eager)


def test_a_layer_alone_and_a_model_in_half_precision() -> None:
    layer = converted(HANDS_ON["nothing"][1])[0].a
    assert bridge.chains(layer, torch.randn(2, 16)) == ()
    model, x = converted(HANDS_ON["gelu"][1])
    model.bfloat16()
    assert difference(model, x.bfloat16()) < 0.02


def test_an_exported_program_has_operators_of_torch_alone() -> None:
    model, x = converted(HANDS_ON["gelu"][1])
    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "functional_sq" in str(node.target)]
    assert torch.equal(exported.module()(x), model(x))


# --- convolutions as on CUDA -----------------------------------------------------------------------


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decided by the device of a weight alone, and computed on any."""

    def is_conv(node: torch.fx.Node) -> bool:
        is_layer = node.target is torch.ops.functional_sq.product.default
        return is_layer and '"output_padding"' not in (geometry := str(node.args[chains._GEOMETRY])) and geometry != ""

    monkeypatch.setattr(chains, "_is_cuda_conv", is_conv)


class Convs(nn.Module):
    """Three layers of images, a batch norm, and what a test puts between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, x)


def fused(
    between: Callable[[Any, Tensor], Tensor],
    dtype: torch.dtype = torch.int8,
    layout: torch.memory_format = torch.channels_last,
) -> list[str]:
    """Say of each layer of a compiled model whether it adds, applies, and is given floats; it computes the same."""
    torch.manual_seed(0)
    model, x = Convs(between).eval(), torch.randn(2, 8, 5, 5).contiguous(memory_format=layout)
    model.norm.running_mean.normal_()
    bridge.prepare_(model, StaticQuantConfig(dtype))
    bridge.calibrate(model, [x.clone()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that the test does not use
        bridge.convert_(model, on_unfit="float")
    told, y, eager = handed(model, x)
    step = eager.abs().max() * (0.1 if dtype.is_floating_point else 0.02)
    assert (y - eager).abs().max() < step
    return told


def handed(model: nn.Module, x: Tensor) -> tuple[list[str], Tensor, Tensor]:
    """Say it of each layer; return what the changed graph computes, and what the model does."""
    told: list[str] = []

    def look(graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.functional_sq.product.default):
            _, residual, activation, _, _, codes, floats = node.args[chains._RESIDUAL - 1 :]
            words = (("plus", residual), (activation, activation != "none"), ("codes", codes), ("of floats", floats))
            told.append(" ".join(word for word, there in words if there))

    with torch.no_grad():
        eager = model(x.clone())
        torch.compiler.reset()
        return told, torch.compile(model, backend=handing_on(look), fullgraph=True)(x.clone()), eager


FUSED: dict[str, tuple[list[str], Callable[[Any, Tensor], Tensor]]] = {
    "a block": (
        ["relu codes of floats", "relu codes", "plus relu"],
        lambda m, x: F.relu(inplace(m.norm(m.c(F.relu(m.b(F.relu(m.a(x)))))), x), inplace=True),
    ),
    "the residual first": (["plus relu of floats"], lambda m, x: (x + m.a(x)).relu_()),
    "no ReLU": (["plus of floats"], lambda m, x: x + m.a(x)),
    "another activation": (["plus of floats"], lambda m, x: F.silu(x + m.a(x))),
    "two ReLUs of one sum": (["plus of floats"], lambda m, x: F.relu(y := x + m.a(x)) + 2 * F.relu(y)),
    "a sum that is read later": (["plus of floats"], lambda m, x: F.relu(y := x + m.a(x)) * y),
    "a ReLU without a sum": (["of floats"], lambda m, x: F.relu(m.a(x))),
    "two blocks": (
        ["plus relu of floats", "plus relu of floats"],
        lambda m, x: F.relu((y := F.relu(m.a(x) + x)) + m.c(y)),
    ),
    "two layers of one input, which share codes": (["", ""], lambda m, x: m.a(x) * m.b(x)),
    "two layers of one input, of which none needs codes": (
        ["of floats", "of floats"],
        lambda m, x: m.a(x).relu_() * m.c(x),
    ),
    "two layers of one input that is written to": (
        ["of floats", "of floats"],
        lambda m, x: m.a(x) + m.c(x.mul_(2)),
    ),
    "what is computed for codes alone": ([""], lambda m, x: m.a(x.cos())),
    "what is computed and read later": (["of floats"], lambda m, x: m.a(y := x.cos()) * y),
    "a sum that is written to": (["plus of floats"], lambda m, x: F.relu((x + m.a(x)).mul_(2))),
    "a residual that is written to": (["plus of floats"], lambda m, x: (x + m.a(x), x.mul_(2))[0].relu()),
}


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", FUSED)
def test_a_convolution_adds_and_reads_floats_as_on_cuda(case: str, dtype: torch.dtype) -> None:
    told, between = FUSED[case]
    assert fused(between, dtype) == told


@pytest.mark.usefixtures("as_on_cuda")
def test_a_quantization_that_nothing_reads_is_left_as_it_is() -> None:
    graph = torch.fx.Graph()
    x, scale, zero_point = (graph.placeholder(name) for name in ("x", "scale", "zero_point"))
    text = chains.describe(fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=ASYMMETRIC))
    graph.call_function(torch.ops.functional_sq.quantize.default, (x, scale, zero_point, text))
    graph.output(x)
    assert chains.hand_on(graph) == []


@pytest.mark.usefixtures("as_on_cuda")
def test_a_convolution_adds_no_residual_that_would_be_copied() -> None:
    assert fused(FUSED["no ReLU"][1], layout=torch.contiguous_format) == ["of floats"]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_a_convolution_on_a_cpu_reads_floats_and_adds_by_brgemm(
    by: str, dtype: torch.dtype, multiply_by: Callable[[str], None]
) -> None:
    multiply_by(by)
    codes, taken = "relu codes", by == "brgemm" and (brgemm.HAS_BFLOAT16 or not dtype.is_floating_point)
    read, added = (" of floats", "plus relu") if taken else ("", "")
    assert fused(FUSED["a block"][1], dtype) == [codes + read, codes, added]
    assert fused(FUSED["no ReLU"][1], dtype, torch.contiguous_format) == [read.strip()]


by_schemes = pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (torch.int8, torch.float32),
        (torch.uint8, torch.bfloat16),
        pytest.param(torch.float8_e4m3fn, torch.float16, marks=needs_bfloat16),
    ],
    ids=str,
)


@by_schemes
@pytest.mark.parametrize("case", ["a block", "two blocks", "no ReLU", "a sum that is read later"])
@pytest.mark.usefixtures("kernels_of_torch")
def test_a_compiled_convolution_by_brgemm_adds_and_rounds_once(
    case: str, scheme: torch.dtype, dtype: torch.dtype, multiply_by: Callable[[str], None]
) -> None:
    multiply_by("brgemm")
    torch.manual_seed(0)
    model, x = Convs(FUSED[case][1]).eval(), torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    bridge.prepare_(model, StaticQuantConfig(scheme))
    bridge.calibrate(model, [x.clone()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that the test does not use
        bridge.convert_(model, on_unfit="float")
    model, x = model.to(dtype), x.to(dtype)
    with torch.inference_mode():
        eager = model(x.clone())
        y, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x.clone())
    assert given("residual", "brgemm_convolution", source) == (2 if case == "two blocks" else 1)
    # Eager rounds the product before it is added, and a code of a chain may differ by one.
    step = eager.abs().max() * (0.02 if dtype is torch.float32 else 0.03)
    assert (y - eager).abs().max() < step


# --- codes that the next product makes --------------------------------------------------------------


def attention(x: Tensor) -> Tensor:
    heads = x.reshape(1, 6, 2, 8).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)


READ: dict[str, tuple[list[str], Callable[[Net, Tensor], Tensor]]] = {
    "an input": (["of floats"], lambda m, x: m.a(x)),
    "a view of an input": (["of floats"], lambda m, x: m.a(x.reshape(2, 3, 16))),
    "what is read later": (["of floats", "of floats"], lambda m, x: m.norm(y := m.norm(m.a(x))) * m.b(y)),
    "what attention writes": (["of floats"], lambda m, x: m.a(attention(x).reshape(6, 16))),
    "what a float product writes": (["of floats"], lambda m, x: m.a(x @ x.t() @ x)),
    "what is computed for codes alone": ([""], lambda m, x: m.a(m.norm(x))),
    "what is computed for codes alone, and viewed": ([""], lambda m, x: m.a(m.norm(x).reshape(2, 3, 16))),
    "what is copied for codes alone": ([""], lambda m, x: m.a(x.reshape(4, 4, 6).transpose(0, 1).reshape(6, 16))),
    "what several layers share": (["", ""], lambda m, x: m.a(x) * m.b(x)),
    "what is written to": (["of floats", "of floats"], lambda m, x: m.a(x) * m.c(x.mul_(2))),
    "codes of another layer": (["gelu codes of floats", ""], lambda m, x: m.b(F.gelu(m.a(x)))),
    "beside a residual": (["plus of floats"], lambda m, x: m.a(x) + x),
}


@needs_brgemm
@pytest.mark.parametrize(
    "scheme", [torch.int8, torch.uint8, pytest.param(torch.float8_e4m3fn, marks=needs_bfloat16)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", READ)
def test_a_product_by_brgemm_reads_what_is_in_memory(
    case: str, dtype: torch.dtype, scheme: torch.dtype, multiply_by: Callable[[str], None]
) -> None:
    multiply_by("brgemm")
    expected, between = READ[case]
    model, x = converted(between, StaticQuantConfig(scheme))
    told, y, eager = handed(model.to(dtype), x.to(dtype))
    assert told == expected
    if "plus" in "".join(told) or "codes" in "".join(told):  # rounded once, where eager rounds twice; or to codes
        assert (y - eager).abs().max() < 0.1 * eager.abs().max()
    else:
        assert torch.equal(y, eager)


@needs_brgemm
@by_schemes
def test_compiled_products_make_the_codes_of_what_they_read(
    scheme: torch.dtype, dtype: torch.dtype, multiply_by: Callable[[str], None]
) -> None:
    multiply_by("brgemm")
    model, x = converted(lambda m, x: m.norm(m.a(x)) + m.b(attention(x).reshape(6, 16)), StaticQuantConfig(scheme))
    model, x = model.to(dtype), x.to(dtype)
    with torch.inference_mode():
        eager, before = model(x), x.clone()
        y, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert given("q_scale", "brgemm_product", source) == 2
    assert torch.equal(x, before)
    assert (y - eager).abs().max() < 0.03 * eager.abs().max()


@needs_brgemm
def test_codes_that_a_compiler_makes_are_those_that_backends_multiply(multiply_by: Callable[[str], None]) -> None:
    """And none of int8, whose top bit another pass flips."""
    multiply_by("brgemm")
    model, x = converted(lambda m, x: m.a(y := m.norm(x)) * m.b(y))
    with torch.inference_mode():
        _, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
    assert "uint8_t*" in source
    assert "int8_t" not in source.replace("uint8_t", "")


# --- the switch, and what tells --------------------------------------------------------------------


def test_the_switch_is_in_the_config_the_layer_and_the_saved_file(tmp_path: Path) -> None:
    config = StaticQuantConfig(torch.int8, hand_on=False, fast_accum=True)
    assert repr(config) == "StaticQuantConfig(torch.int8, hand_on=False, fast_accum=True)"
    assert StaticQuantConfig.from_json(config.to_json()) == config
    model, x = converted(HANDS_ON["gelu"][1], config)
    assert not model.a.hand_on
    assert bridge.chains(model, x) == ()
    bridge.save(model, tmp_path / "model")
    again = bridge.load(tmp_path / "model", lambda: Net(HANDS_ON["gelu"][1]).eval())
    assert (again.a.hand_on, again.a.fast_accum) == (False, True)
    again.a.hand_on = again.b.hand_on = True
    assert list(map(str, bridge.chains(again, x))) == ["a -> gelu b"]
    rules = StaticQuantConfig(torch.int8, rules={"a": config})
    assert bridge.chains(*converted(HANDS_ON["gelu"][1], rules)) == ()


def test_a_stance_of_the_caller_changes_no_answer() -> None:
    model, x = converted(HANDS_ON["gelu"][1])
    expected = bridge.chains(model, x)
    for stance in ("force_eager", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            assert bridge.chains(model, x) == expected != ()


def test_what_is_no_switch_and_no_model_is_refused() -> None:
    for name in ("reference", "hand_on", "fast_accum"):
        with pytest.raises(TypeError, match=f"{name}='no'; use True or False"):
            StaticQuantConfig(torch.int8, **{name: "no"})
    with pytest.raises(TypeError, match=r"model is a str; give a torch\.nn\.Module"):
        bridge.chains("model", torch.ones(1))


class CallsForward(nn.Module):
    """Its first and last layer are not called, but their method is."""

    def __init__(self, one: nn.Module, two: nn.Module, three: nn.Module) -> None:
        super().__init__()
        self.one, self.rest = one, nn.Sequential(two, three)

    def forward(self, x: Tensor) -> Tensor:
        two, three = self.rest
        return three.forward(F.relu(two(F.gelu(self.one.forward(x)))))


@pytest.mark.parametrize("kind", [partial(nn.Linear, 16, 16), partial(nn.Conv1d, 16, 16, 1)], ids=["linear", "conv"])
def test_a_layer_that_is_called_by_its_method_has_its_own_name(kind: Callable[[], nn.Module]) -> None:
    """Dynamo's record of such a layer names the module that calls it. Of a shared weight each layer has codes."""
    layers = [kind() for _ in range(3)]
    layers[2].weight = layers[1].weight
    model, x = CallsForward(*layers).eval(), torch.randn(4, 16, 16)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, x[None])
    bridge.convert_(model)
    assert list(map(str, bridge.chains(model, x))) == ["one -> gelu rest.0", "rest.0 -> relu rest.1"]


def test_the_report_tells() -> None:
    model, x = Net(lambda m, x: m.c(m.norm(m.b(F.gelu(m.a(x)))))).eval(), torch.randn(6, 16)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x])
    report = bridge.report(model, [x])
    assert {layer.name: layer.hands_on for layer in report.layers} == {"a": "gelu b", "b": "", "c": ""}
    lines = str(report).splitlines()
    assert "a -> gelu b" in lines
    path = report.layers[0].path
    assert f"3 x {path.partition(' from ')[0]}" in lines
    assert path in repr(bridge.convert_(model).a)


class Theirs(CustomGraphPass):
    def __init__(self, name: str | None) -> None:
        self.name, self.ran = name, 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.ran += 1

    def uuid(self) -> str | None:
        return self.name


lists = pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch takes one pass, no list of them")


@pytest.mark.parametrize("listed", [pytest.param(True, marks=lists), False])
@pytest.mark.usefixtures("packing")
def test_a_pass_that_was_set_since_runs_too(listed: bool) -> None:
    model, x = converted(HANDS_ON["gelu"][1])
    theirs = Theirs(uuid4().hex)  # of no graph that is in a cache on disk
    with inductor_config.patch(pre_grad_custom_pass=[theirs] if listed else theirs), torch.inference_mode():
        _, (source,) = run_and_get_code(torch.compile(model), x)
        installed = inductor_config.pre_grad_custom_pass
    if not listed:
        assert (installed.first, installed.uuid()[0]) == (theirs, theirs.name)
    else:
        assert [type(each) for each in installed] == [Theirs, inductor.HandOn]
    assert theirs.ran
    assert source.count(".erf()") == 0


def test_a_graph_is_cached_only_where_every_pass_has_a_name() -> None:
    ours = inductor.HandOn().uuid()
    assert len(ours) == 64
    assert inductor.HandOn(Theirs("a")).uuid() == ("a", ours)
    assert inductor.HandOn(Theirs(None)).uuid() is None
    assert inductor.HandOn(lambda graph: None).uuid() is None


@needs_onednn
def test_a_graph_in_the_cache_is_not_taken_where_another_backend_is_chosen(multiply_by: Callable[[str], None]) -> None:
    model, x = converted(HANDS_ON["nothing"][1])
    for by in BY:
        multiply_by(by)
        torch.compiler.reset()
        with torch.inference_mode():
            _, (source,) = run_and_get_code(torch.compile(model), x)
        assert [name for name in ("brgemm", "onednn") if f"{name}_product" in source] == [by.lower()] * (by != "torch")


def test_the_description_of_a_spec_is_what_quantizes() -> None:
    spec = fsq.QuantSpec(torch.uint4, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, quant_max=14)
    described = fsq.serialize.spec_from_json(chains.describe(dataclasses.replace(spec, observer=fsq.Mse())))
    assert described == spec
