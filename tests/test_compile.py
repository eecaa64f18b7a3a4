"""Compiled equals eager in bits, one compilation serves every batch, vmap equals the loop, gradients are torch's.

Graphs are captured whole (`fullgraph=True`). Where bits are compared, the compiler generates code;
where compilations are counted, a backend that only counts runs the graph as it was captured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import bridge
import functional_sq as fsq
from functional_sq import compat, onednn, onednn_conv

ASYMMETRIC = fsq.MappingType.ASYMMETRIC


def bits(value: Any) -> object:
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [bits(v) for v in value]
    return value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_bits_tells_zeros_apart() -> None:
    assert bits({"a": torch.tensor([0.0])}) != bits({"a": torch.tensor([-0.0])})


def everything(spec: fsq.QuantSpec, state: fsq.State, x: torch.Tensor) -> tuple[object, ...]:
    """The whole way from data to decoded values, with every result of the way."""
    state = fsq.observe(spec, state, x)
    qp = fsq.calc_qparams(spec, state)
    q = fsq.quantize(spec, x, qp)
    return state, qp, q, fsq.dequantize(spec, q, qp), fsq.fake_quantize(spec, x, qp)


SPECS = [
    fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=ASYMMETRIC),
    fsq.QuantSpec(torch.int8, fsq.PerAxis(-1)),
    fsq.QuantSpec(torch.int4, fsq.PerGroup(8), mapping=fsq.MappingType.SYMMETRIC_NO_CLIPPING_ERR),
    fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerBlock((4, 16))),
]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_compiled_equals_eager_in_bits(spec: fsq.QuantSpec) -> None:
    x = torch.randn(8, 32)
    x[0, :4] = torch.tensor([0.0, -0.0, 1e-30, 1e4])
    state = fsq.init(spec, x.shape)
    compiled = torch.compile(partial(everything, spec), fullgraph=True)
    assert bits(compiled(state, x)) == bits(everything(spec, state, x))


STEPS: dict[str, Callable[[fsq.QuantSpec, torch.Tensor, fsq.QParams], Any]] = {
    "observe": lambda spec, x, qp: fsq.observe(spec, fsq.init(spec, x.shape), x, mask=x[:, 0] > 0),
    "calc_qparams": lambda spec, x, qp: fsq.calc_qparams(
        spec, {"min": x[:1, :1], "max": x[1:2, :1], "count": x[:1, :1]}
    ),
    "quantize": fsq.quantize,
    "dequantize": lambda spec, x, qp: fsq.dequantize(spec, x.to(torch.uint8), qp, dtype=torch.bfloat16),
    "fake_quantize": fsq.fake_quantize,
}


@pytest.mark.parametrize("step", STEPS)
def test_each_step_alone(step: str) -> None:
    """Each function by itself: fused with others it may be right where alone it is not."""
    spec = SPECS[0]
    x = torch.randn(8, 32).abs() * 40
    qp = fsq.QParams(torch.tensor([[0.37]]), torch.tensor([[3]], dtype=torch.int32))
    compiled = torch.compile(partial(STEPS[step], spec), fullgraph=True)
    assert bits(compiled(x, qp)) == bits(STEPS[step](spec, x, qp))


def test_one_compilation_for_all_batches() -> None:
    counter = CompileCounter()
    spec = SPECS[1]
    step = torch.compile(partial(fsq.observe, spec), backend=counter, fullgraph=True)
    state = expected = fsq.init(spec, (8, 32))
    for _ in range(10):
        x = torch.randn(8, 32)
        state, expected = step(state, x), fsq.observe(spec, expected, x)
    assert counter.frame_count == 1
    assert bits(state) == bits(expected)


def test_one_compilation_for_equal_specs() -> None:
    counter = CompileCounter()
    x = torch.randn(8, 32)

    @torch.compile(backend=counter, fullgraph=True)
    def step(spec: fsq.QuantSpec, x: torch.Tensor) -> torch.Tensor:
        qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
        return fsq.quantize(spec, x, qp)

    def fresh(dtype: torch.dtype) -> fsq.QuantSpec:
        return fsq.QuantSpec(dtype, fsq.PerGroup(8), observer=fsq.MinMax())

    for _ in range(5):
        step(fresh(torch.int8), x)
    assert counter.frame_count == 1
    step(fresh(torch.int4), x)
    assert counter.frame_count == 2  # the counter counts: another spec is another graph


@pytest.mark.parametrize("granularity", [fsq.PerTensor(), fsq.PerAxis(-1), fsq.PerAxis(1)], ids=repr)
def test_one_compilation_for_any_batch_size(granularity: fsq.Granularity) -> None:
    counter = CompileCounter()
    spec = fsq.QuantSpec(torch.uint8, granularity, mapping=ASYMMETRIC)
    state = fsq.init(spec, (1, 6, 4))
    step = torch.compile(partial(everything, spec), backend=counter, fullgraph=True, dynamic=True)
    for batch in (3, 5, 8, 17, 64):
        x = torch.randn(batch, 6, 4)
        assert bits(step(state, x)) == bits(everything(spec, state, x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("granularity", [fsq.PerTensor(), fsq.PerAxis(-1)], ids=repr)
def test_one_compilation_for_any_number_of_rows(granularity: fsq.Granularity) -> None:
    """But one row, of which torch makes a graph of its own wherever a size may be any."""
    counter = CompileCounter()
    spec = fsq.QuantSpec(torch.int8, granularity)
    state = fsq.init(spec, (1, 6))
    step = torch.compile(partial(fsq.observe, spec), backend=counter, fullgraph=True, dynamic=True)
    for rows in (64, 16, 2, 100):
        x = torch.randn(rows, 6)
        assert bits(step(state, x)) == bits(fsq.observe(spec, state, x))
    assert counter.frame_count == 1
    step(state, torch.randn(1, 6))
    assert counter.frame_count == 2


class Observes(torch.nn.Module):
    """A module, as torch.export asks for one."""

    def __init__(self, spec: fsq.QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, state: fsq.State, x: torch.Tensor) -> fsq.State:
        return fsq.observe(self.spec, state, x)


@pytest.mark.parametrize("observer", [fsq.MinMax(), fsq.MovingAverage(), fsq.Histogram()], ids=repr)
@pytest.mark.parametrize("granularity", [fsq.PerTensor(), fsq.PerAxis(-1)], ids=repr)
def test_an_exported_observe_takes_any_number_of_rows(granularity: fsq.Granularity, observer: fsq.Observer) -> None:
    spec = fsq.QuantSpec(torch.int8, granularity, observer=observer)
    state = fsq.init(spec, (1, 6))
    shapes = (dict.fromkeys(state), {0: torch.export.Dim("rows", min=1)})
    program = torch.export.export(Observes(spec), (state, torch.randn(8, 6)), dynamic_shapes=shapes).module()
    for rows in (1, 2, 3, 40):
        x = torch.randn(rows, 6)
        assert bits(program(state, x)) == bits(fsq.observe(spec, state, x))


def test_a_dynamic_batch_compiles_to_code_of_the_same_bits() -> None:
    spec = SPECS[0]
    state = fsq.init(spec, (1, 32))
    step = torch.compile(partial(everything, spec), fullgraph=True, dynamic=True)
    for batch in (3, 7, 16):
        x = torch.randn(batch, 32)
        assert bits(step(state, x)) == bits(everything(spec, state, x))


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_vmap_equals_the_loop(spec: fsq.QuantSpec) -> None:
    """Over experts, each with its own state: the same specs, one more axis in front."""
    x = torch.randn(3, 8, 32)
    states = [fsq.observe(spec, fsq.init(spec, (8, 32)), v) for v in torch.randn(3, 8, 32)]
    stacked = {k: torch.stack([s[k] for s in states]) for k in states[0]}
    together = torch.vmap(partial(everything, spec))(stacked, x)
    for i, state in enumerate(states):
        one = torch.utils._pytree.tree_map(lambda t, i=i: t[i], together)
        assert bits(one) == bits(everything(spec, state, x[i]))


def test_the_rule_for_views_under_vmap_that_older_torch_gets() -> None:
    """Called as such, for newer torch has its own."""
    x = torch.randn(3, 4, 5)
    for axis in range(3):
        seen = torch.vmap(lambda t: compat._view(t, torch.int32) + 1, axis, axis)(x)
        assert torch.equal(seen, x.view(torch.int32) + 1)
    twice = torch.vmap(torch.vmap(lambda t: compat._view(t, torch.int32) + 1))(x)
    assert torch.equal(twice, x.view(torch.int32) + 1)
    with pytest.raises(NotImplementedError, match=r"from torch.float32 to torch.uint8; .* dtypes of one size"):
        torch.vmap(lambda t: compat._view(t, torch.uint8))(x)


def test_vmap_of_observe_with_a_mask() -> None:
    spec = SPECS[1]
    x, mask = torch.randn(3, 8, 32), torch.rand(3, 8) > 0.5
    state = fsq.init(spec, (8, 32))
    together = torch.vmap(lambda x, m: fsq.observe(spec, state, x, mask=m))(x, mask)
    for i in range(3):
        one = {k: v[i] for k, v in together.items()}
        assert bits(one) == bits(fsq.observe(spec, state, x[i], mask=mask[i]))


@pytest.mark.parametrize("size", [7, 8, 9, 64])
@pytest.mark.parametrize(
    "spec",
    [
        fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC),
        fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor()),
        fsq.QuantSpec(torch.int8, fsq.PerAxis(0)),
    ],
    ids=repr,
)
def test_large_tensors_are_quantized_in_pieces_of_the_same_bits(
    spec: fsq.QuantSpec, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(2, size, 3, 4)
    layouts = {
        "contiguous": images,
        "channels_last": images.to(memory_format=torch.channels_last),
        "strided": torch.randn(2 * size)[::2],
        "bfloat16": images.bfloat16(),
    }

    def codes_and_values(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
        q = fsq.quantize(spec, x, qp)
        return q, *(fsq.dequantize(spec, q, qp, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))

    def one_scale_each(x: torch.Tensor) -> torch.Tensor:
        """Scales have a batch, the tensor has none."""
        stats = fsq.init(spec, x.shape)["min"].shape
        qps = fsq.QParams(torch.rand(3, *stats) + 0.01, torch.zeros(3, *stats, dtype=torch.int32))
        return torch.vmap(lambda s, z: fsq.quantize(spec, x, fsq.QParams(s, z)))(*qps)

    for name, x in layouts.items():
        whole = codes_and_values(x)
        torch.manual_seed(0)
        batch = one_scale_each(x)
        with monkeypatch.context() as patch, torch.no_grad():  # vmap hides whether a scale has a gradient
            patch.setattr(sys.modules["functional_sq.quantize"], "_PIECE", 4)
            patch.setattr(sys.modules["functional_sq.quantize"], "_LARGE", 4)
            pieces = codes_and_values(x)
            torch.manual_seed(0)
            assert bits(batch) == bits(one_scale_each(x)), name
        for a, b in zip(whole, pieces, strict=True):
            assert (bits(a), a.stride()) == (bits(b), b.stride()), name


def test_vmap_over_one_of_scale_and_zero_point() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
    x, q = torch.randn(5), torch.arange(5, dtype=torch.int8)
    scale, zero_point = torch.rand(3, 1) + 0.1, torch.arange(3, dtype=torch.int32).reshape(3, 1)
    for f in (
        lambda s, z: fsq.quantize(spec, x, fsq.QParams(s, z)),
        lambda s, z: fsq.saturates(spec, x * 50, fsq.QParams(s, z)),
        lambda s, z: fsq.fake_quantize(spec, x, fsq.QParams(s, z)),
        lambda s, z: fsq.dequantize(spec, q, fsq.QParams(s, z)),
        lambda s, z: fsq.dequantize(spec, q, fsq.QParams(s, z), dtype=torch.bfloat16),
    ):
        for dims, given in (((0, None), (scale, zero_point[2])), ((None, 0), (scale[2], zero_point))):
            each = [f(*(v[i] if d == 0 else v for d, v in zip(dims, given, strict=True))) for i in range(3)]
            assert torch.equal(torch.vmap(f, dims)(*given), torch.stack(each))


def test_16_bit_scales_and_a_float32_zero_point_give_the_same_codes_one_by_one() -> None:
    """A loop adds the zero point in the dtype that vmap does: 16-bit codes are not exact in bfloat16."""
    spec = fsq.QuantSpec(torch.int16, fsq.PerTensor(), zero_point_dtype=torch.float32)
    x = torch.linspace(-1, 1, 50, dtype=torch.bfloat16)
    scale, zero_point = torch.tensor([2.0**-8], dtype=torch.bfloat16), torch.tensor([[1001.0], [3.0]])
    together = torch.vmap(lambda z: fsq.quantize(spec, x, fsq.QParams(scale, z)))(zero_point)
    for codes, z in zip(together, zero_point, strict=True):
        assert torch.equal(codes, (x * 256).round().float().add(z).to(torch.int16))
        assert torch.equal(codes, fsq.quantize(spec, x, fsq.QParams(scale, z)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float8_e4m3fn], ids=str)
def test_the_gradient_of_qparams_of_a_large_tensor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dequantize` is `(q - z) s`: the derivative by the scale is `q - z`, and by the zero point `-s`."""
    monkeypatch.setattr(sys.modules["functional_sq.quantize"], "_PIECE", 4)
    monkeypatch.setattr(sys.modules["functional_sq.quantize"], "_LARGE", 4)
    spec = fsq.QuantSpec(dtype, fsq.PerTensor(), zero_point_dtype=torch.float32)
    scale, zero_point, weight = torch.tensor([0.25]), torch.tensor([0.0]), torch.randn(64)
    codes = fsq.quantize(spec, torch.randn(64), fsq.QParams(scale, zero_point))

    def loss(scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        return (fsq.dequantize(spec, codes, fsq.QParams(scale, zero_point)) * weight).sum()

    expected = [(codes.float() * weight).sum()[None]]
    given = [scale.clone().requires_grad_()]
    if not dtype.is_floating_point:
        expected.append(-(scale * weight.sum()))
        given.append(zero_point.clone().requires_grad_())
    n = len(given)
    several = [value.detach().expand(2, 1) for value in (scale, zero_point)]
    by = tuple(range(n))
    gradients = {
        "autograd": torch.autograd.grad(loss(*given, *[zero_point][: 2 - n]), given),
        "func.grad": torch.func.grad(loss, by)(scale, zero_point),
        "vmap of func.grad": [g[0] for g in torch.vmap(torch.func.grad(loss, by))(*several)],
        "func.grad of vmap": [g[0] for g in torch.func.grad(lambda *v: torch.vmap(loss)(*v).sum(), by)(*several)],
    }
    for how, found in gradients.items():
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, msg=lambda text, how=how: f"{how}: {text}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float8_e4m3fn], ids=str)
def test_codes_have_no_gradient(dtype: torch.dtype) -> None:
    """A cast to an integer has none, one to float8 has: by way of the codes, a scale's would depend on the format."""
    spec = fsq.QuantSpec(dtype, fsq.PerTensor())
    scale, x = torch.tensor([0.25], requires_grad=True), torch.randn(64, requires_grad=True)
    qp = fsq.QParams(scale, torch.tensor([0]))
    codes = fsq.quantize(spec, x, qp)
    assert not codes.requires_grad
    fsq.dequantize(spec, codes, qp).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(scale.grad, codes.float().sum()[None])


def gradient(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (f(x) * weight).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("zero_point", [0, 3, 255])
@pytest.mark.parametrize("scale", [0.25, 0.37])
def test_fake_quantize_and_its_gradient_are_those_of_torch(scale: float, zero_point: int) -> None:
    """The data lie inside, on the edges of, and beyond the codes, with ties and infinities."""
    spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=ASYMMETRIC)
    steps = torch.arange(-280, 281) / 2
    x = torch.cat([steps * scale * 2, torch.randn(200) * 60, torch.tensor([float("inf"), -float("inf"), 0.0, -0.0])])
    weight = torch.randn(x.shape)
    qp = fsq.QParams(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32))
    ours = partial(fsq.fake_quantize, spec, qp=qp)

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)

    assert bits(ours(x) + 0) == bits(theirs(x) + 0)  # + 0: the sign of a zero is not compared
    expected = gradient(theirs, x, weight)
    assert bits(gradient(ours, x, weight)) == bits(expected)
    assert 0 < int((expected == 0).sum()) < x.numel()


def test_the_gradient_per_channel_is_that_of_torch() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0), quant_min=-127)
    x, weight = torch.randn(2, 4, 16).unbind()
    qp = fsq.QParams(torch.tensor([[0.01], [0.02], [0.005], [1.0]]), torch.zeros(4, 1, dtype=torch.int32))

    def theirs(x: torch.Tensor) -> torch.Tensor:
        return torch.fake_quantize_per_channel_affine(x, qp.scale[:, 0], qp.zero_point[:, 0], 0, -127, 127)

    ours = partial(fsq.fake_quantize, spec, qp=qp)
    assert bits(ours(x) + 0) == bits(theirs(x) + 0)
    assert bits(gradient(ours, x, weight)) == bits(gradient(theirs, x, weight))


def test_the_gradient_compiles() -> None:
    spec = SPECS[2]
    x, weight = torch.randn(2, 8, 32).unbind()
    qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape), x / 2))
    ours = partial(fsq.fake_quantize, spec, qp=qp)
    compiled = torch.compile(ours, fullgraph=True)
    assert bits(gradient(compiled, x, weight)) == bits(gradient(ours, x, weight))


def test_float8_gradient_is_one_inside_and_zero_outside() -> None:
    spec = fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
    qp = fsq.QParams(torch.tensor([2.0]), torch.tensor([0], dtype=torch.int32))
    x = torch.tensor([-897.0, -896.0, 0.1, 895.9, 896.0, 896.1])
    assert gradient(partial(fsq.fake_quantize, spec, qp=qp), x, torch.ones(6)).tolist() == [0, 1, 1, 1, 1, 0]


class Kept(nn.Module):
    """A layer whose number of rows depends on data."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return self.layer(x[keep])


CONFIGS = ("int8", "int8_symmetric", "uint8", "float8")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 6), (16,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 5, 6)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, 2), (4, 5, 6)),
}


def kept(name: str, config: str) -> tuple[Kept, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A quantized layer, and inputs of which so many rows are kept."""
    make, size = LAYERS[name]
    model, x = Kept(make()).eval(), torch.randn(9, *size)
    inputs = [(x, torch.arange(9) < count) for count in (3, 0, 1, 2, 9)]
    bridge.prepare_(model, bridge.PRESETS[config])
    bridge.calibrate(model, [inputs[-1]])
    return bridge.convert_(model), inputs


@pytest.mark.parametrize(
    ("name", "config"),
    [*product(["linear"], CONFIGS), *product(["conv", "depthwise", "transposed"], ["int8", "uint8"])],
)
def test_exported_for_a_number_of_rows_that_depends_on_data(name: str, config: str) -> None:
    model, inputs = kept(name, config)
    exported = torch.export.export(model, inputs[0])
    assert not [node for node in exported.graph.nodes if "functional_sq" in str(node.target)]
    program = exported.module()
    for given in inputs:
        torch.testing.assert_close(program(*given), model(*given))


@pytest.mark.parametrize(
    ("name", "config", "by_onednn"),
    [
        *product(["linear"], CONFIGS, [True]),
        *product(["conv", "depthwise"], ["int8"], [True]),
        *product(LAYERS, ["int8", "float8"], [False]),
    ],
)
def test_compiled_for_a_number_of_rows_that_depends_on_data(
    name: str, config: str, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (onednn, onednn_conv):
        monkeypatch.setattr(module, "WORTH", 0 if by_onednn else 10**18)
    model, inputs = kept(name, config)
    # Inductor finds other strides for the image of a float convolution than it has (torch 2.13).
    counter = CompileCounterWithBackend("inductor" if name == "linear" else "aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), torch.inference_mode():
        for given in inputs:
            torch.testing.assert_close(compiled(*given), model(*given))
    assert counter.frame_count == 1


def in_one_graph(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(torch.vmap(layer), fullgraph=True, backend="aot_eager")  # Dynamo is what is asked


def behind_a_graph_break(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def mapped(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return torch.vmap(layer)(x)

    return torch.compile(mapped)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # neither our operators nor torch._int_mm have a rule
@pytest.mark.parametrize(
    ("name", "config", "by_onednn", "compiled"),
    [
        ("linear", "int8", True, in_one_graph),
        ("conv", "int8", False, in_one_graph),
        ("linear", "int8", True, behind_a_graph_break),
        ("linear", "int8", False, behind_a_graph_break),
        ("linear", "uint8", True, behind_a_graph_break),
        ("linear", "float8", False, behind_a_graph_break),
        ("conv", "int8", True, behind_a_graph_break),
    ],
)
def test_a_layer_under_vmap_in_compiled_code(
    name: str, config: str, by_onednn: bool, compiled: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Dynamo looks at each frame, it compiles none of those behind an operator of ours."""
    for module in (onednn, onednn_conv):
        monkeypatch.setattr(module, "WORTH", 0 if by_onednn else 10**18)
    model, ((x, _), *_) = kept(name, config)
    x = x.unflatten(0, (3, 3)) if by_onednn else x.unflatten(0, (9, 1))  # or each by itself
    with torch.inference_mode():
        expected = torch.stack([model.layer(each) for each in x])
        torch.testing.assert_close(compiled(model.layer)(x), expected)


@pytest.mark.skipif(not onednn.AVAILABLE, reason="this machine has no oneDNN, or no VNNI")
def test_a_kernel_is_not_compiled_behind_a_frame_that_is_not() -> None:
    q, codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8), torch.ones(4, 8, dtype=torch.int8)
    operands = q, torch.zeros(1, dtype=torch.int32), codes, torch.ones(4), None, "none", None, None, torch.float32

    @torch.compile
    def products() -> torch.Tensor:
        total = torch.zeros(2, 4)
        for _ in range(2):
            torch._dynamo.graph_break()  # in a loop: Dynamo leaves the frame as it is, but not what it calls
            total += torch.ops.functional_sq.onednn_product.default(*operands)
        return total

    assert torch.equal(products(), 2 * (q.float() @ codes.float().t()))


@pytest.mark.cuda
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_cuda_device_gives_the_bits_of_the_cpu(spec: fsq.QuantSpec) -> None:
    x = torch.randn(8, 32)
    state = fsq.init(spec, x.shape)
    on_device = everything(spec, {k: v.cuda() for k, v in state.items()}, x.cuda())
    on_cpu = torch.utils._pytree.tree_map(torch.Tensor.cpu, on_device)
    assert bits(on_cpu) == bits(everything(spec, state, x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_statistic_is_computed_once_and_not_in_the_loop_that_reads_it(
    dynamic: bool, multiply_by: Callable[[str], None]
) -> None:
    """The reciprocals of the scales are stored as one number each, the roots of the variances in a loop over them."""
    multiply_by("torch")  # so that Inductor makes the codes
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    bridge.prepare_(model, bridge.StaticQuantConfig(torch.uint8))
    bridge.calibrate(model, torch.randn(2, 4, 3, 40, 40))
    bridge.convert_(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        _, (source,) = run_and_get_code(compiled, torch.randn(4, 3, 40, 40))
    lines = [line.strip() for line in source.splitlines()]
    divided = [i for i, line in enumerate(lines) if re.fullmatch(r"auto tmp\d+ = tmp\d+ / tmp\d+;", line)]
    assert len(divided) == 2
    assert all(re.match(r"out_ptr\d+\[static_cast<int64_t>\(0L\)\] = ", lines[i + 1]) for i in divided)
    (root,) = (i for i, line in enumerate(lines) if "rsqrt(" in line)
    loop = next(line for line in reversed(lines[:root]) if line.startswith("for("))
    assert "<static_cast<int64_t>(16L);" in loop
