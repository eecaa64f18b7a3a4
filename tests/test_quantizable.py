"""Modules that multiply parameters themselves, made of layers: the same numbers in float, and then quantized.

In float the oracle is torch's own module, run in float64. Sums are of at most 16 products below 100, so 1e-12 is
hundreds of roundings, and nothing that is computed otherwise is so close.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_chains import quantizations
from torch import Tensor, nn

import bridge
from bridge import PRESETS, QuantizableMultiheadAttention, StaticQuantConfig, make_quantizable_
from bridge.torchao import compute_error

ROOT = Path(__file__).parent.parent
INT8 = PRESETS["int8"]
N, L, S, E, H = 3, 4, 5, 8, 2
LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "other sizes": {"kdim": 6, "vdim": 10},
    "one other size, no bias": {"vdim": 10, "bias": False},
    "a bias as a token": {"add_bias_kv": True},
    "a token of zeros": {"add_zero_attn": True},
    "both tokens": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6},
}
LAYOUTS = ["batch first", "sequence first", "one sequence"]


def attention(**settings: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, H, dropout=0.3, dtype=torch.float64, **settings).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def tokens(layout: str, length: int, features: int) -> Tensor:
    shape = {"batch first": (N, length), "sequence first": (length, N), "one sequence": (length,)}[layout]
    return torch.randn(*shape, features, dtype=torch.float64)


def masks(layout: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each kind of mask as arguments, and for which number of keys. Some key is always seen."""
    n = 1 if layout == "one sequence" else N
    padding = (S,) if layout == "one sequence" else (N, S)
    pairs = [torch.rand(L, S) < 0.4, torch.rand(n * H, L, S) < 0.4]
    for mask in (*pairs, torch.rand(padding) < 0.4):
        mask[..., 0] = False
        name = "key_padding_mask" if mask.shape == padding else "attn_mask"
        yield S, {name: mask}
        yield S, {name: torch.randn(mask.shape, dtype=torch.float64)}
        if name == "key_padding_mask":
            yield S, {name: mask, "attn_mask": pairs[0]}
            yield S, {name: torch.randn(padding, dtype=torch.float64), "attn_mask": torch.randn(n * H, L, S).double()}
    causal = {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1), "is_causal": True}
    yield L, causal
    yield L, {**causal, "key_padding_mask": torch.arange(L).expand(*padding[:-1], L) >= 3}
    yield S, {}


def both(ours: nn.Module, torchs: nn.Module, *args: Tensor, **kwargs: Any) -> None:
    """Assert that two modules return the same, and draw the same random numbers."""
    results = []
    for module in (torchs, ours):
        torch.manual_seed(1)
        results.append(module(*args, **kwargs))
    for expected, found in zip(*(y if isinstance(y, tuple) else (y,) for y in results), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_attention_is_torchs(settings: str, layout: str, train: bool) -> None:
    torchs = attention(batch_first=layout == "batch first", **SETTINGS[settings]).train(train)
    ours = QuantizableMultiheadAttention(torchs)
    assert ours.training is train
    query = tokens(layout, L, E)
    for size, kwargs in masks(layout):
        key, value = tokens(layout, size, torchs.kdim), tokens(layout, size, torchs.vdim)
        for wanted in ({"need_weights": False}, {}, {"average_attn_weights": False}):
            both(ours, torchs, query, key, value, **wanted, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("wanted", [{"need_weights": False}, {}, {"average_attn_weights": False}], ids=str)
def test_attention_is_torchs_fused_one(wanted: dict[str, bool]) -> None:
    torchs, x = attention(batch_first=True), tokens("batch first", S, E)
    ours = QuantizableMultiheadAttention(torchs)
    both(ours, torchs, x, x, x, **wanted)
    both(ours, torchs, x, x, x, key_padding_mask=torch.arange(S).expand(N, S) >= 3, **wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_of_16_bits(dtype: torch.dtype) -> None:
    """A mask in float32, as code that makes it once has it, is taken too."""
    torchs, x = attention(batch_first=True).to(dtype), tokens("batch first", L, E).to(dtype)
    ours, mask = QuantizableMultiheadAttention(torchs), torch.randn(L, L)
    for need in (False, True):
        expected, _ = torchs(x, x, x, need_weights=need, attn_mask=mask.to(dtype))
        y, _ = ours(x, x, x, need_weights=need, attn_mask=mask)
        assert y.dtype is dtype
        assert compute_error(expected.float(), y.float()) > 40
        with torch.autocast("cpu", dtype):
            y, _ = copy.deepcopy(ours).float()(x.float(), x.float(), x.float(), need_weights=need, attn_mask=mask)
        assert compute_error(expected.float(), y.float()) > 30


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "axes": (
        lambda: {"query": torch.ones(4, E)},
        r"shapes \(4, 8\), \(3, 5, 8\) and \(3, 5, 8\); give three axes, or two",
    ),
    "one axis": (lambda: dict.fromkeys(("query", "key", "value"), torch.ones(E)), "give three axes, or two"),
    "sequences": (lambda: {"query": torch.ones(1, L, E)}, "give as many sequences in each"),
    "keys": (lambda: {"key": torch.ones(N, 1, E)}, "as many tokens in key and value"),
    "integers": (
        lambda: {"attn_mask": torch.ones(L, S).long()},
        r"attn_mask is of torch.int64; give a bool mask",
    ),
    "integer padding": (lambda: {"key_padding_mask": torch.ones(N, S).int()}, r"key_padding_mask is of torch.int32"),
    "a mask of one row": (lambda: {"attn_mask": torch.ones(1, S)}, r"shape \(1, 5\); it must be \(4, 5\)"),
    "a mask of a batch": (lambda: {"attn_mask": torch.ones(N, L, S)}, r"shape \(3, 4, 5\); it must be \(6, 4, 5\)"),
    "padding the wrong way": (lambda: {"key_padding_mask": torch.ones(S, N)}, r"shape \(5, 3\); it must be \(3, 5\)"),
    "causal alone": (lambda: {"is_causal": True}, "is_causal=True says .* attn_mask is None; give it too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    given, message = REFUSED[case]
    module = make_quantizable_(nn.Sequential(nn.MultiheadAttention(E, H, batch_first=True)))[0]
    fits = {"query": torch.ones(N, L, E), "key": torch.ones(N, S, E), "value": torch.ones(N, S, E)}
    with pytest.raises(ValueError, match=message):
        module(**{**fits, **given()})


# --- in torch's transformers -----------------------------------------------------------------------


def encoder(layers: int = 2, **kwargs: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, layers, **kwargs).eval()


X = torch.linspace(-2, 2, 3 * 6 * 16, dtype=torch.float64).sin().reshape(3, 6, 16)
PADDING = torch.arange(6).expand(3, 6) >= 4
CAUSAL = torch.ones(6, 6, dtype=torch.bool).triu(1)


def in_parts(model: nn.TransformerEncoder) -> nn.Module:
    for layer in model.layers:
        make_quantizable_(layer)
    return model


@pytest.mark.parametrize("step", [make_quantizable_, in_parts], ids=["whole", "in parts"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_computes_what_it_computed(step: Callable[[Any], nn.Module], mode: Callable[[], Any]) -> None:
    """Without gradients torch's takes a fused path, which would look for weights that are no more."""
    torchs = encoder()
    ours = step(copy.deepcopy(torchs))
    assert not [name for name, _ in ours.named_parameters() if "in_proj" in name]
    with mode():
        both(ours, torchs, X)
        both(ours, torchs, X, mask=CAUSAL, is_causal=True)
        seen = [model(X, src_key_padding_mask=PADDING)[:, :4] for model in (torchs, ours)]
        torch.testing.assert_close(*seen, rtol=0, atol=1e-12)
        both(ours.layers[0], torchs.layers[0], X, src_key_padding_mask=PADDING)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_a_transformer_computes_what_it_computed(batch_first: bool) -> None:
    torchs = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=batch_first, dtype=torch.float64)
    ours = make_quantizable_(copy.deepcopy(torchs))
    assert sum(isinstance(m, QuantizableMultiheadAttention) for m in ours.modules()) == 3
    x = X if batch_first else X.transpose(0, 1)
    kwargs = {"tgt_mask": CAUSAL, "tgt_is_causal": True, "memory_key_padding_mask": PADDING}
    both(ours, torchs, x, x, **kwargs)
    both(ours.eval(), torchs.eval(), x, x, **kwargs)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_an_encoder_may_be_made_of_such_a_layer() -> None:
    layer = make_quantizable_(encoder().layers[0])
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        expected = layer(layer(X, src_key_padding_mask=PADDING), src_key_padding_mask=PADDING)
        assert torch.equal(model(X, src_key_padding_mask=PADDING), expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "mask_check"), [("mask", True), ("src_key_padding_mask", False)])
def test_it_is_one_graph(name: str, mask_check: bool) -> None:
    """Also where torch's encoder looks at a mask to find out whether it is the causal one, or for the fused path."""
    model = make_quantizable_(encoder(mask_check=mask_check, layers=1))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, length in ((3, 6), (2, 5)):
        given = CAUSAL[:length, :length] if name == "mask" else PADDING[:n, :length]
        both(compiled, model, X[:n, :length], **{name: given})


@torch.no_grad()
def test_it_is_exported() -> None:
    model = make_quantizable_(encoder())
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    shapes = {"src": sizes, "src_key_padding_mask": sizes}
    exported = torch.export.export(model, (X,), {"src_key_padding_mask": PADDING}, dynamic_shapes=shapes)
    both(exported.module(), model, X[:2, :5], src_key_padding_mask=PADDING[:2, :5])


# --- what is replaced, and what is not -------------------------------------------------------------


def conv1d() -> type[nn.Module]:
    class Conv1D(nn.Module):
        """As that of transformers: the weight is (inputs, outputs)."""

        def __init__(self, nf: int, nx: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])

    return Conv1D


@pytest.fixture
def Conv1D(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = conv1d()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    return module.Conv1D


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_conv1d_becomes_a_linear_layer(Conv1D: Any, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"a": Conv1D(6, 4), "b": nn.Tanh()}).to(dtype).eval()
    model["a"].weight.requires_grad_(False)
    model["again"], plain, x = model["a"], model["a"], torch.randn(2, 3, 4, dtype=dtype)
    assert make_quantizable_(model) is model
    linear = model["a"]
    assert type(linear) is nn.Linear
    assert linear is model["again"]
    assert (linear.in_features, linear.out_features, linear.training) == (4, 6, False)
    assert (linear.weight.dtype, linear.weight.is_contiguous(), linear.weight.requires_grad) == (dtype, True, False)
    assert torch.equal(linear.weight, plain.weight.T)
    assert linear.bias is plain.bias
    torch.testing.assert_close(linear(x), plain(x))


def test_a_conv1d_of_somebody_else_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers.pytorch_utils", raising=False)
    other = conv1d()(6, 4)
    model = nn.Sequential(other, nn.Linear(6, 6)).eval()
    assert make_quantizable_(model)[0] is other
    with pytest.warns(UserWarning, match=r"0: Conv1D has weight of its own .*let a torch.nn.Linear multiply it"):
        bridge.prepare_(model, INT8)


def test_parameters_keep_what_they_are() -> None:
    plain = nn.MultiheadAttention(E, H, add_bias_kv=True)
    plain.in_proj_weight.requires_grad_(False)
    model = make_quantizable_(nn.ModuleList([plain, plain]).train())
    (ours,) = set(model)
    assert isinstance(ours, QuantizableMultiheadAttention)
    assert all(type(getattr(ours, name)) is nn.Linear and getattr(ours, name).training for name in LAYERS)
    names = [f"{name}.{part}" for name in LAYERS for part in ("weight", "bias")]
    parameters = dict(ours.named_parameters())
    assert sorted(parameters) == sorted([*names, "bias_k", "bias_v"])
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    assert frozen == {f"{name}.weight" for name in LAYERS[:3]}
    assert torch.equal(torch.cat([parameters[f"{name}.weight"] for name in LAYERS[:3]]), plain.in_proj_weight)
    assert len({p.untyped_storage().data_ptr() for p in parameters.values()}) == len(parameters)
    assert parameters["out_proj.weight"] is plain.out_proj.weight
    assert parameters["bias_k"] is plain.bias_k


def test_what_was_frozen_is_told_from_what_was_not_in_any_mode() -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        model = nn.Sequential(nn.MultiheadAttention(E, H))
        with mode():
            ours = make_quantizable_(model)[0]
        assert all(p.requires_grad and not p.is_inference() for p in ours.parameters())


def test_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = make_quantizable_(nn.Sequential(nn.MultiheadAttention(E, H)))
    assert all(p.is_meta for p in model.parameters())


def test_nothing_to_replace_is_nothing_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.MultiheadAttention(E, H))
    attended = make_quantizable_(model)[2]
    before = list(model)
    assert make_quantizable_(model) is model
    assert list(model) == before
    assert model[2] is attended


def test_the_filter_is_asked_by_public_name_once() -> None:
    asked: list[str] = []

    def wanted(module: nn.Module, name: str) -> bool:
        asked.append(name)
        return name != "a"

    model = nn.ModuleDict({name: nn.MultiheadAttention(E, H) for name in "abc"})
    model["d"] = model["b"]
    make_quantizable_(torch.compile(model), wanted)
    assert asked == ["a", "b", "c"]
    assert [name for name, m in model.items() if isinstance(m, QuantizableMultiheadAttention)] == ["b", "c", "d"]
    assert model["d"] is model["b"]


class Other(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class More(nn.MultiheadAttention):
    def __init__(self) -> None:
        super().__init__(E, H)
        self.scale = nn.Parameter(torch.ones(E))


class Noted(nn.MultiheadAttention):
    """Computes what its base does."""

    note = "mine"


def test_subclasses_that_are_something_else_stay_and_are_named() -> None:
    model = nn.Sequential(Other(E, H), More(), Noted(E, H)).eval()
    assert [type(m) for m in make_quantizable_(model)] == [Other, More, QuantizableMultiheadAttention]
    with pytest.warns(UserWarning, match="2 modules left in float") as caught:
        bridge.prepare_(model, INT8)
    for line, kind in zip(str(caught[0].message).splitlines()[1:], ("0: Other", "1: More"), strict=True):
        assert line.startswith(f"  {kind} multiplies its projections itself")
        assert line.endswith("use an attention that calls torch.nn.Linear")


@pytest.mark.parametrize("make", [lambda: Other(E, H), More, lambda: nn.Linear(E, E), lambda: E])
def test_what_is_no_attention_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(
        TypeError,
        match=r"QuantizableMultiheadAttention got a (Other|More|Linear|int); give a torch.nn.MultiheadAttention",
    ):
        QuantizableMultiheadAttention(make())


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


LOST: dict[str, tuple[Callable[[Any], object], str]] = {
    "a hook": (lambda m: m.register_forward_hook(lambda *_: None), "has hooks, which would be lost"),
    "a forward": (lambda m: setattr(m, "forward", lambda *x: x), "a forward of its own, which would be lost"),
    "a parametrization": (
        lambda m: nn.utils.parametrize.register_parametrization(m, "in_proj_weight", Doubled()),
        "computed by a parametrization",
    ),
    "a sharded weight": (lambda m: setattr(m.in_proj_weight, "placements", ()), "the weight is sharded"),
    "a parametrization inside": (
        lambda m: nn.utils.parametrize.register_parametrization(m.out_proj, "weight", Doubled()),
        "computed by a parametrization",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_would_be_lost_is_refused_and_nothing_changed(case: str) -> None:
    put, message = LOST[case]
    model = nn.ModuleDict({"fine": nn.MultiheadAttention(E, H), "odd": nn.MultiheadAttention(E, H)})
    put(model["odd"])
    before = list(model.values())
    with pytest.raises(ValueError, match=f"odd: .*{message}"):
        make_quantizable_(model)
    assert list(model.values()) == before
    make_quantizable_(model, lambda module, name: name != "odd")
    assert [isinstance(m, QuantizableMultiheadAttention) for m in model.values()] == [True, False]


def test_hooks_of_a_conv1d_are_refused(Conv1D: Any) -> None:
    model = nn.Sequential(Conv1D(4, 4))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="0: the layer has hooks"):
        make_quantizable_(model)


def test_a_model_that_is_itself_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model is itself one that make_quantizable_ replaces .*; wrap it"):
        make_quantizable_(nn.MultiheadAttention(E, H))
    with pytest.raises(TypeError, match=r"model is a list; give a torch.nn.Module"):
        make_quantizable_([])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="filter_fn is a str; give a function"):
        make_quantizable_(nn.Sequential(), "*.attn")  # type: ignore[arg-type]


def test_prepare_names_the_remedy(Conv1D: Any) -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(E, H), "b": Conv1D(4, 4), "c": nn.Linear(4, 4)}).eval()
    with pytest.warns(UserWarning, match="2 modules left in float") as caught:
        bridge.prepare_(copy.deepcopy(model), INT8)
    for line in str(caught[0].message).splitlines()[1:]:
        assert line.endswith("quantized, call bridge.make_quantizable_(model) first")
    bridge.prepare_(make_quantizable_(model), INT8)  # warns of nothing


# --- quantized -------------------------------------------------------------------------------------


class Block(nn.Module):
    """An attention to something else, or to itself."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        y = x if y is None else y
        return self.fc(self.attention(x, y, y, need_weights=False)[0])


def quantized(model: nn.Module, *batches: Any, config: StaticQuantConfig = INT8) -> nn.Module:
    bridge.prepare_(make_quantizable_(model.eval()), config)
    bridge.calibrate(model, batches)
    return bridge.convert_(model)


@pytest.mark.parametrize("reference", [False, True], ids=["codes", "reference"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_quantized_attention_is_its_layers_and_a_softmax(reference: bool, batch_first: bool) -> None:
    model, x, y = Block(batch_first), torch.randn(N, L, 16), torch.randn(N, S, 16)
    args = (x, y) if batch_first else (x.transpose(0, 1), y.transpose(0, 1))
    expected = model(*args)
    quantized(model, args, config=StaticQuantConfig(torch.int8, reference=reference))
    q, k, v, out = (getattr(model.attention, name) for name in LAYERS)
    assert all(isinstance(layer, bridge.QuantizedLinear) and layer.reference is reference for layer in (q, k, v, out))
    heads = (layer(t).reshape(N, -1, 2, 8).transpose(1, 2) for layer, t in ((q, x), (k, y), (v, y)))
    attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(N, L, 16)
    found = model(*args)
    assert torch.equal(found if batch_first else found.transpose(0, 1), model.fc(out(attended)))
    assert compute_error(expected, found) > 30


@pytest.mark.parametrize("batch_first", [False, True])
def test_query_key_and_value_share_one_quantization(batch_first: bool) -> None:
    x, y = torch.randn(N, L, 16), torch.randn(N, L, 16)
    assert quantizations(quantized(Block(batch_first), x), x) == 2  # also the output projection's, which hands on
    model = quantized(Block(batch_first), (x, y))
    assert quantizations(model, x, y) == 3
    encoder = quantized(nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first), x)
    assert quantizations(encoder, x) == 3  # of the layer's input, of the attention's result, of the norm's


def test_padding_is_left_out_of_what_is_recorded() -> None:
    model = make_quantizable_(encoder().float())
    bridge.prepare_(model, INT8)
    batch = {"src": X.float(), "src_key_padding_mask": PADDING}
    bridge.calibrate(model, [batch], mask=lambda batch: ~batch["src_key_padding_mask"])
    for name in LAYERS:
        assert getattr(model.layers[0].self_attn, name).rows == int((~PADDING).sum())


def test_observers_out_again_leave_the_layers() -> None:
    model = make_quantizable_(encoder())
    expected, before = model(X), dict(model.named_modules())
    bridge.calibrate(bridge.prepare_(model, INT8), [X])
    bridge.unprepare_(model)
    assert dict(model.named_modules()) == before
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
        assert model(X, src_key_padding_mask=PADDING).shape == X.shape


# --- saved -----------------------------------------------------------------------------------------


def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    model = quantized(nn.TransformerEncoderLayer(16, 2, 32), x := torch.randn(N, L, 16))
    bridge.save(model, tmp_path / "model.safetensors")
    torch.save({"x": x, "y": model(x)}, tmp_path / "pair")
    code = f"""
import sys, torch, bridge

def build():
    with torch.device("meta"):
        return bridge.make_quantizable_(torch.nn.TransformerEncoderLayer(16, 2, 32))

torch.set_num_threads({torch.get_num_threads()})
model = bridge.load("model.safetensors", build)
pair = torch.load("pair", weights_only=True)
print(torch.equal(model(pair["x"]), pair["y"]), "transformers" in sys.modules)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True False"


STEP = r"after make_quantizable_ if that was called: lambda: bridge\.make_quantizable_\(build\(\)\)"
ALONE: dict[str, dict[str, None]] = {"all": {}, "one": dict.fromkeys(("*.[qkv]_proj",)), "none": {"*attention.*": None}}


@pytest.mark.parametrize("case", ALONE)
def test_a_factory_that_left_the_step_out_is_told(case: str, tmp_path: Path) -> None:
    """Whether the projections are quantized or stay float in the file."""
    config, x = StaticQuantConfig(torch.int8, rules=ALONE[case]), torch.randn(N, L, 16)
    model = quantized(nn.Sequential(Block()), x, config=config)
    bridge.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=STEP):
        bridge.load(tmp_path / "m", lambda: nn.Sequential(Block()))
    loaded = bridge.load(tmp_path / "m", lambda: make_quantizable_(nn.Sequential(Block())))
    assert torch.equal(loaded(x), model(x))


def test_a_factory_is_not_told_of_the_step_where_something_else_is_wrong(tmp_path: Path) -> None:
    config = StaticQuantConfig(torch.int8, rules={"attention": None})
    bridge.save(bridge.convert_(calibrated(bridge.prepare_(Block().eval(), config))), tmp_path / "m")

    def other() -> nn.Module:
        model = Block()
        model.fc = nn.Linear(16, 3)
        return model

    with pytest.raises(ValueError, match="fc: out_features=3, in the file 16") as error:
        bridge.load(tmp_path / "m", other)
    assert "make_quantizable_" not in str(error.value)


def calibrated(model: nn.Module) -> nn.Module:
    bridge.calibrate(model, [torch.randn(N, L, 16)])
    return model


def test_a_saved_conv1d(Conv1D: Any, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Conv1D(16, 16), nn.Tanh(), Conv1D(8, 16))

    model, x = quantized(build(), torch.randn(N, 16)), torch.randn(N, 16)
    bridge.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=rf"0: a Conv1D; in the file a QuantizedLinear[\s\S]*{STEP}"):
        bridge.load(tmp_path / "m", build)
    assert torch.equal(bridge.load(tmp_path / "m", lambda: make_quantizable_(build()))(x), model(x))


# --- transformers' own -----------------------------------------------------------------------------


def test_gpt2() -> None:
    """With the embedding's weight as that of the head; text is generated, in float and by codes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="its GPT-2 is what is quantized")
        config = transformers.GPT2Config(
            n_layer=2,
            n_embd=32,
            n_head=2,
            vocab_size=50,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
        torchs = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(1, 50, (2, 8))
    ours = make_quantizable_(copy.deepcopy(torchs))
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert sum(type(m) is nn.Linear for m in ours.modules()) == 9

    def generate(model: Any) -> Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )

    with torch.no_grad():
        expected = torchs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected)
        assert torch.equal(generate(ours), generate(torchs))
        bridge.calibrate(bridge.prepare_(ours, INT8), [{"input_ids": ids}])
        bridge.convert_(ours)
        assert compute_error(expected, ours(ids).logits) > 25
        assert generate(ours).shape == (2, 16)
