"""Models as they come: what a prepared model keeps, what is quantized in it, and what is told of the rest.

Each model goes the same way: its outputs in float, prepared (the same bits), its float checkpoint loaded
strictly, calibrated, unprepared (the very modules, the same bits) or converted (close to float).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bridge
import functional_sq as fsq
from bridge import PRESETS, StaticQuantConfig
from bridge.torchao import compute_error

INT8 = PRESETS["int8"]


class ByName(nn.Module):
    """Calls its layers with keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=torch.relu(self.a(input=x)))


class Shared(nn.Module):
    """One layer under two names, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.again = nn.ModuleList([self.a])

    def forward(self, x: Tensor) -> Tensor:
        return self.a(torch.tanh(self.again[0](torch.tanh(self.a(x)))))


class Tied(nn.Module):
    """An embedding and the output projection have one weight, as in most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.body = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 50, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = ((x[..., :5] > 0) * (2 ** torch.arange(5, device=x.device))).sum(-1)
        return self.lm_head(torch.tanh(self.body(self.embedding(tokens))))


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ModuleList([nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 16))])
        self.dict = nn.ModuleDict({"x.y".replace(".", "_"): nn.Linear(16, 16)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.list, *self.dict.values()):
            x = layer(x)
        return x


class Positive(nn.Linear):
    """A subclass of the user's, with an attribute and a method, that computes what its base computes."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.note = "mine"

    def norm(self) -> Tensor:
        return self.weight.norm()


class Lazily(nn.Module):
    """Takes one of two branches, by the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.small(x) if x.shape[0] < 3 else self.large(x)


def encoder(**kwargs: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not kwargs)


MODELS: Mapping[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "keyword arguments": (ByName, {"a", "b"}),
    "a shared module": (Shared, {"a"}),
    "tied weights": (Tied, {"body", "lm_head"}),
    "containers": (Containers, {"list.0", "list.1.1", "dict.x_y"}),
    "a subclass": (lambda: nn.Sequential(Positive(16, 16), nn.Linear(16, 16)), {"0", "1"}),
    "TransformerEncoder": (encoder, {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)}),
    "TransformerEncoder, norm first": (
        lambda: encoder(norm_first=True),
        {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)},
    ),
    "TransformerEncoder, gelu": (
        lambda: encoder(activation="gelu"),
        {f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)},
    ),
    "TransformerEncoder, quantizable": (
        lambda: bridge.make_quantizable_(encoder()),
        {
            *(f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)),
            *(f"layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in ("q", "k", "v", "out")),
        },
    ),
}

DTYPES = [torch.float32, torch.bfloat16]
SQNR = {torch.float32: 25.0, torch.bfloat16: 22.0}
"""dB. Each layer costs 38 dB or better (see test_workflow.py); chains of three to five with LayerNorm stay
10 dB above this bound, and a layer that is wrong falls below 10."""


@pytest.fixture(params=MODELS, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, set[str]]:
    make, layers = MODELS[request.param]
    return make().eval(), layers


def inputs(n: int = 4) -> Tensor:
    return torch.randn(n, 6, 16)


def prepared(model: nn.Module, config: StaticQuantConfig = INT8) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*modules? left in float.*MultiheadAttention")
        return bridge.prepare_(model, config)


def names(model: nn.Module, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


@torch.inference_mode()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def test_a_prepared_model_is_the_float_model(case: tuple[nn.Module, set[str]]) -> None:
    model, layers = case
    x = inputs()
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():  # the fused encoder adds in another order; what is compared calls its layers
        calls = copy.deepcopy(model)
        prepared(calls)
        expected = calls(x)
    parameters = [name for name, _ in model.named_parameters()]
    prepared(model)
    assert names(model, bridge.ObservedLinear) == layers
    assert torch.equal(run(model, x), expected)
    assert compute_error(run(bridge.unprepare_(copy.deepcopy(model)), x), expected) > 100
    assert [name for name, _ in model.named_parameters()] == parameters
    model.load_state_dict(other.state_dict(), strict=True)
    loaded = run(bridge.unprepare_(model), x)
    assert torch.equal(loaded, run(other, x))


def test_unprepared_is_the_very_model(case: tuple[nn.Module, set[str]]) -> None:
    model, _ = case
    x = inputs()
    before, expected = dict(model.named_modules(remove_duplicate=False)), run(model, x)
    attributes = {name: set(vars(module)) for name, module in before.items()}
    prepared(model)
    bridge.calibrate(model, [x])
    bridge.unprepare_(model)
    after = dict(model.named_modules(remove_duplicate=False))
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())
    assert {name: set(vars(module)) for name, module in after.items()} == attributes
    assert torch.equal(run(model, x), expected)


@pytest.mark.parametrize(
    ("dtype", "compiled"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["eager-float32", "eager-bfloat16", "compiled-float32"],
)
def test_a_converted_model_is_close_to_float(
    case: tuple[nn.Module, set[str]], dtype: torch.dtype, compiled: bool
) -> None:
    model, layers = case
    model, x = model.to(dtype), inputs(16).to(dtype)
    expected = run(model, x)
    counter = CompileCounterWithBackend("eager")  # what observes, compiled, is tests/test_workflow.py's
    model = torch.compile(model, backend=counter) if compiled else model
    prepared(model)
    bridge.calibrate(model, x.split(4))
    bridge.convert_(model)
    counter.backend = "inductor"
    assert {name.removeprefix("_orig_mod.") for name in names(model, bridge.QuantizedLinear)} == layers
    before = counter.frame_count
    y = run(model, x)
    assert (counter.frame_count > before) == compiled
    assert y.dtype is dtype
    assert compute_error(expected.float(), y.float()) > SQNR[dtype]


def test_parameters_changed_while_prepared_come_back_with_the_float_model() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    plain = model[0]
    prepared(model)
    model.bfloat16()
    model[0].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.bfloat16))
    bridge.unprepare_(model)
    assert model[0] is plain
    assert plain.weight.dtype is torch.bfloat16
    assert torch.equal(plain.weight, torch.ones(16, 16))
    assert plain.bias.dtype is torch.bfloat16


def test_the_weight_of_a_tied_embedding_stays_a_float_parameter() -> None:
    model, x = Tied().eval(), inputs()
    prepared(model)
    assert model.lm_head.weight is model.embedding.weight
    bridge.calibrate(model, [x])
    weight = model.embedding.weight
    bridge.convert_(model)
    assert model.embedding.weight is weight
    assert weight.is_floating_point()


@pytest.mark.parametrize("padded", [False, True], ids=["no mask", "padding mask"])
def test_an_encoder_in_eval_mode_calls_the_layers_that_observe(padded: bool) -> None:
    """It would hand their weights to one fused operator otherwise, and nested tensors to the next layer."""
    model, x = encoder().eval(), inputs()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, 4:] = padded
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        expected = run_masked(model, x, mask)
    prepared(model)
    run_masked(model, x, mask)
    assert {int(layer.linear1.act_obs.state["count"]) for layer in model.layers} == {x.numel()}
    bridge.convert_(model)
    y = run_masked(model, x, mask)[:, :4]
    assert compute_error(expected[:, :4], y) > SQNR[torch.float32]


def test_an_encoder_calls_its_layers_whoever_put_the_observers_in() -> None:
    """Here a part of it was prepared, and the encoder around it has learned nothing of that."""
    x = inputs()
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[:, 4:] = True
    model = encoder().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in model.layers:
            for name in ("linear1", "linear2"):
                setattr(layer, name, bridge.prepare_(nn.Sequential(getattr(layer, name)), INT8)[0])
        bridge.calibrate(model, [{"src": x, "src_key_padding_mask": padding}])
    assert {int(layer.linear1.act_obs.state["count"]) for layer in model.layers} == {x.numel()}
    for layer in model.layers:
        for name in ("linear1", "linear2"):
            setattr(layer, name, bridge.convert_(nn.Sequential(getattr(layer, name)))[0])
    assert len(bridge.chains(model, x)) == 2


@torch.inference_mode()
def run_masked(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return model(x, src_key_padding_mask=mask)


def test_what_stays_in_float_is_listed_once_with_its_reason() -> None:
    with pytest.warns(UserWarning, match="2 modules left in float") as caught:
        bridge.prepare_(encoder().eval(), INT8)
    assert len(caught) == 1
    (told,) = str(caught[0].message).splitlines()[1:]
    assert told.startswith("  layers.0.self_attn, layers.1.self_attn: ")
    assert "multiplies its projections itself, calling no layer; to have them quantized" in told


def test_what_the_user_leaves_in_float_is_not_listed() -> None:
    bridge.prepare_(encoder().eval(), StaticQuantConfig(torch.int8, rules={"*self_attn": None}))
    bridge.prepare_(encoder().eval(), INT8, lambda module, name: "self_attn" not in name)


class Mixed(nn.modules.conv._ConvNd):
    """A convolution of somebody's own."""

    def __init__(self) -> None:
        super().__init__(3, 3, (2,), (1,), (0,), (1,), False, (0,), 1, True, "zeros")


def test_a_kind_that_has_no_quantized_layer_is_listed() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Mixed(), "c": nn.LazyLinear(3)})
    with pytest.warns(UserWarning, match=r"b: no quantized layer does what Mixed does\n  c: LazyLinear has no"):
        bridge.prepare_(model.eval(), INT8)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Parameter(torch.ones(3, 4, 4)), nn.Parameter(torch.ones(1, 5, 4))


class Positions(nn.Module):
    """As SAM's encoder has them: for a grid of positions, the same in each image of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.ones(1, 5, 5, 4))


def test_what_multiplies_a_parameter_of_its_own_is_listed() -> None:
    layers = {
        "a": nn.Linear(4, 4),
        "lstm": nn.LSTM(4, 4),
        "cell": nn.GRUCell(4, 4),
        "bilinear": nn.Bilinear(4, 4, 4),
        "experts": Experts(),
        "embedding": nn.Embedding(5, 4),
        "norm": nn.LayerNorm((4, 4)),
        "positions": Positions(),
        "prelu": nn.PReLU(4),
    }
    with pytest.warns(UserWarning, match="4 modules left in float") as caught:
        bridge.prepare_(nn.ModuleDict(layers).eval(), INT8)
    told = str(caught[0].message).splitlines()[1:]
    assert [line.split(" of its own")[0] for line in told] == [
        "  lstm: LSTM has weight_ih_l0",
        "  cell: GRUCell has weight_ih",
        "  bilinear: Bilinear has weight",
        "  experts: Experts has up",
    ]
    rules = dict.fromkeys(("lstm", "cell", "bilinear", "experts"))
    bridge.prepare_(nn.ModuleDict(layers).eval(), StaticQuantConfig(torch.int8, rules=rules))


class Looks(nn.Module):
    """Casts its input to the dtype of its layers' weights, as many vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.conv(x.to(self.conv.weight.dtype)).to(self.up.weight.dtype))
        assert y.shape[1] == self.up.weight.shape[1] * 2
        return self.linear(y.mean((2, 3)).to(self.linear.weight.device))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_quantized_layer_shows_its_weight_to_who_looks_at_it(preset: str) -> None:
    model, x = Looks().eval().bfloat16(), torch.randn(2, 3, 8, 8)
    bridge.prepare_(model, PRESETS[preset])
    bridge.calibrate(model, [x])
    before = {name: getattr(model, name).weight for name in ("conv", "up", "linear")}
    bridge.convert_(model)
    keys = set(model.state_dict())
    for name, weight in before.items():
        shown = getattr(model, name).weight
        assert (shown.shape, shown.dtype, shown.device) == (weight.shape, weight.dtype, weight.device)
        values = shown.dequantize() if hasattr(shown, "int_data") else shown
        assert compute_error(weight.float(), values.float()) > 25
    assert not [name for name in keys if name.endswith("weight")]
    with torch.no_grad():
        y = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), y, atol=0.05, rtol=0.05)


LOST: dict[str, Callable[[nn.Module], object]] = {
    "hooks": lambda layer: layer.register_forward_hook(lambda module, args, y: y + 100),
    "a forward of its own": lambda layer: setattr(layer, "forward", lambda x: x),
    "computed by a parametrization": lambda layer: nn.utils.parametrizations.weight_norm(layer).eval(),
}


@pytest.mark.parametrize("case", LOST)
def test_what_was_put_on_an_observed_layer_is_not_lost(case: str) -> None:
    for take in (bridge.convert_, bridge.unprepare_):
        model = prepared(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval())
        bridge.calibrate(model, [inputs()])
        LOST[case](model[1])
        with pytest.raises(ValueError, match=rf"1: .*{case}, which would be lost; .*rule"):
            take(model)
        assert type(model[0]) is bridge.ObservedLinear


def test_the_forward_of_the_class_on_a_layer_itself_loses_nothing() -> None:
    """As accelerate leaves it when it takes its hooks away."""
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), inputs()
    plain = model[0]
    plain.forward = plain.forward
    prepared(model)
    model[0].forward = model[0].forward
    bridge.calibrate(model, [x])
    assert bridge.unprepare_(copy.deepcopy(model))(x).shape == x.shape
    bridge.convert_(model)
    assert type(model[0]) is bridge.QuantizedLinear
    other = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    other[1].forward = other[0].forward
    with pytest.raises(ValueError, match="1: the layer has a forward of its own"):
        bridge.prepare_(other, INT8)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")  # of torch 2.15
def test_a_scripted_part_stays_what_it_is() -> None:
    norm = nn.BatchNorm1d(6).eval()
    nn.init.uniform_(norm.running_mean)
    model, x = nn.Sequential(nn.Linear(16, 16), torch.jit.script(norm), nn.Linear(16, 16)).eval(), inputs()
    scripted, expected = model[1], run(model, x)
    prepared(model)
    bridge.calibrate(model, [x])
    found = bridge.report(model, [x])
    bridge.convert_(model)
    assert names(model, bridge.QuantizedLinear) == {"0", "2"}
    assert model[1] is scripted
    assert torch.equal(scripted.running_mean, norm.running_mean)
    # Sums of 384 values in float64, in another order.
    assert found.model_sqnr == pytest.approx(float(compute_error(expected.double(), run(model, x).double())), rel=1e-11)


def test_a_layer_that_is_called_otherwise_is_left_alone() -> None:
    class Twice(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    model = nn.Sequential(Twice(16, 16), nn.Linear(16, 16)).eval()
    with pytest.warns(UserWarning, match="0: Twice has a forward of its own"):
        bridge.prepare_(model, INT8)
    assert type(model[0]) is Twice


def test_a_sharded_weight_is_refused() -> None:
    layer = nn.Linear(16, 16)
    layer.weight.placements = ()  # what a DTensor has
    with pytest.raises(ValueError, match="0: the weight is sharded; quantize the model before it is sharded"):
        bridge.prepare_(nn.Sequential(layer).eval(), INT8)


@pytest.mark.parametrize("assign", [True, False])
def test_a_model_may_be_prepared_before_it_has_memory(assign: bool) -> None:
    model = prepared(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval())
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    bridge.prepare_(other, INT8)
    if not assign:
        other.to_empty(device="cpu")
        assert all(int(layer.act_obs.count) == 0 for layer in (other[0], other[2]))
    float_state = {name: value for name, value in model.state_dict().items() if "obs" not in name}
    assert not other.load_state_dict(float_state, assign=assign, strict=False).unexpected_keys
    x = inputs()
    for each in (model, other):
        bridge.calibrate(each, [x])
        each(x)  # records outside of inference mode too
        bridge.convert_(each)
    assert torch.equal(run(model, x), run(other, x))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.int8, torch.int4),
        (torch.int8, torch.int2),
        (torch.uint8, torch.uint4),
        (torch.float8_e4m3fn, torch.float8_e5m2),
        (torch.float8_e4m3fn, torch.int8),
        (torch.int8, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_the_state_of_another_format_is_refused(source: torch.dtype, target: torch.dtype) -> None:
    models = []
    for dtype in (source, target):
        torch.manual_seed(0)
        models.append(prepared(nn.Sequential(nn.Linear(16, 16)).eval(), StaticQuantConfig(dtype)))
        bridge.calibrate(models[-1], [inputs()])
        bridge.convert_(models[-1])
    before = copy.deepcopy(models[1].state_dict())
    with pytest.raises(RuntimeError, match=r"0.weight_codes .*; load the state of a layer that was quantized alike"):
        models[1].load_state_dict(models[0].state_dict(), strict=False)
    for name, value in models[1].state_dict().items():
        assert torch.equal(value, before[name])
    models[1].load_state_dict(before)


def test_a_zero_point_that_a_symmetric_format_has_not_is_refused() -> None:
    """Kernels that know it to be 0 do not read it."""
    spec, linear = fsq.QuantSpec(torch.int8, fsq.PerTensor()), nn.Linear(4, 4)
    qps = [fsq.QParams(torch.ones(1), torch.tensor([z], dtype=torch.int32)) for z in (0, 3)]
    layer = bridge.QuantizedLinear.from_float(linear, spec, qps[0], spec)
    with pytest.raises(ValueError, match=r"has the zero point 0, got \[3\] .*; use MappingType.ASYMMETRIC"):
        bridge.QuantizedLinear.from_float(linear, spec, qps[1], spec)
    state = layer.state_dict() | {"act_zero_point": torch.full_like(layer.act_zero_point, 3)}
    with pytest.raises(RuntimeError, match=r"act_zero_point is \[3\], and that of .* 0; load the state of a layer"):
        layer.load_state_dict(state)
    assert int(layer.act_zero_point) == 0


def test_all_layers_that_cannot_be_prepared_are_named_at_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[0].register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(model[2])
    before = list(model)
    with pytest.raises(
        ValueError, match=r"2 layers cannot be replaced, and nothing .*\n  0: .*hooks.*\n  2: .*parametri"
    ):
        bridge.prepare_(model, INT8)
    assert all(a is b for a, b in zip(model, before, strict=True))
    bridge.prepare_(model, StaticQuantConfig(torch.int8, rules={"0": None, "2": None}))
    assert names(model, bridge.ObservedLinear) == {"1"}


def test_a_branch_taken_later_is_named_until_it_was_taken() -> None:
    model = prepared(Lazily().eval())
    bridge.calibrate(model, [inputs(2)])
    with pytest.raises(bridge.CalibrationError, match=r"1 layer cannot be converted.*\n  large: nothing was seen"):
        bridge.convert_(model)
    bridge.calibrate(model, [inputs(4)])
    bridge.convert_(model)
    assert names(model, bridge.QuantizedLinear) == {"small", "large"}


@pytest.mark.cuda
def test_cuda_a_model_on_two_devices_is_observed_and_quantized_where_its_layers_are() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16).cuda()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).cuda())

    model, x = Split().eval(), inputs(16)
    expected = run(model, x)
    prepared(model)
    bridge.calibrate(model, x.split(4), until_stable=0.5, window=1)
    bridge.convert_(model)
    devices = {name: {b.device.type for b in layer.buffers()} for name, layer in model.named_children()}
    assert devices == {"a": {"cpu"}, "b": {"cuda"}}
    assert compute_error(expected, run(model, x)) > SQNR[torch.float32]
