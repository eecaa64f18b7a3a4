"""A quantized model to a file and back: the same bits without calibrating, and clear refusals of the rest."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import functional_sq as fsq
from functional_sq import serialize

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import bridge
    from bridge import QuantizedLinear, StaticQuantConfig

ROOT = Path(__file__).parent.parent
INT8 = StaticQuantConfig(torch.int8)
T, A0 = fsq.PerTensor(), fsq.PerAxis(0)
SYMMETRIC, ASYMMETRIC = fsq.MappingType.SYMMETRIC, fsq.MappingType.ASYMMETRIC


def build() -> nn.Sequential:
    """A model with every sort of state: parameters and buffers, with and without a bias, in nested containers."""
    inner = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.BatchNorm1d(32))
    return nn.Sequential(nn.ModuleDict({"a": nn.ModuleList([inner])})["a"][0], nn.LayerNorm(32), nn.Linear(32, 8))


def on_meta(factory: Callable[[], nn.Module] = build) -> nn.Module:
    with torch.device("meta"):
        return factory()


def x_of(model: nn.Module) -> Tensor:
    """An input of a fixed seed, in the model's dtype."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(5)).to(dtype)


def quantized(model: nn.Module, config: StaticQuantConfig = INT8, data: Tensor | None = None) -> nn.Module:
    """Prepare, calibrate and convert; running statistics are moved by a pass in training mode."""
    data = x_of(model) if data is None else data
    model.train()(data)
    model.eval()
    bridge.prepare_(model, config)
    bridge.calibrate(model, [data])
    return bridge.convert_(model, config=config)


def bits(t: Tensor) -> tuple[object, ...]:
    """Everything about a tensor; NaN and -0.0 are compared by their bits."""
    return t.dtype, tuple(t.shape), t.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = ({k: bits(v) for k, v in m.state_dict().items()} for m in (a, b))
    return x == y


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What the public reader finds: tensors, and metadata parsed as far as it is JSON."""
    with safetensors.safe_open(path, "pt") as f:
        metadata = f.metadata()
    return safetensors.torch.load_file(path), {
        k: v if k in ("format", "version") else json.loads(v) for k, v in metadata.items()
    }


# --- the same model --------------------------------------------------------------------------------


CONFIGS = {
    "uint8": StaticQuantConfig(torch.uint8),
    "int8": INT8,
    "int8, one scale": StaticQuantConfig(torch.int8, weight=fsq.QuantSpec(torch.int8, T)),
    "int8, asymmetric weight": StaticQuantConfig(
        torch.int8, weight=fsq.QuantSpec(torch.int8, A0, mapping=ASYMMETRIC, quant_min=-100)
    ),
    "uint8, symmetric weight": StaticQuantConfig(torch.uint8, weight=fsq.QuantSpec(torch.uint8, A0, mapping=SYMMETRIC)),
    "uint8 and int4": StaticQuantConfig(torch.uint8, weight=fsq.QuantSpec(torch.int4, A0)),
    "uint4": StaticQuantConfig(torch.uint4),
    "float8_e4m3fn": StaticQuantConfig(torch.float8_e4m3fn),
    "float8_e5m2fnuz": StaticQuantConfig(torch.float8_e5m2fnuz),
    "groups, by reference": StaticQuantConfig(
        torch.int8, weight=fsq.QuantSpec(torch.int4, fsq.PerGroup(8)), reference=True
    ),
    "int16, by reference": StaticQuantConfig(torch.int16, reference=True),
    "other scales": StaticQuantConfig(
        torch.int8,
        activation=fsq.QuantSpec(torch.int8, T, scale_dtype=torch.float64, zero_point_dtype=torch.int64, eps=1e-3),
        weight=fsq.QuantSpec(torch.int8, A0, scale_dtype=torch.bfloat16),
    ),
    "other observers": StaticQuantConfig(
        torch.int8,
        activation=fsq.QuantSpec(torch.int8, T, mapping=ASYMMETRIC, observer=fsq.Percentile(99.0)),
        weight=fsq.QuantSpec(torch.int8, A0, observer=fsq.Mse()),
    ),
    "fixed": StaticQuantConfig(torch.int8, activation=fsq.QuantSpec(torch.int8, T, observer=fsq.Fixed(-4.0, 4.0))),
}


@pytest.mark.parametrize("factory", [build, on_meta], ids=["random", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_state_and_specs_are_those_of_the_saved_model(
    tmp_path: Path, kind: str, dtype: torch.dtype, factory: Callable[[], nn.Module]
) -> None:
    model = quantized(build().to(dtype), CONFIGS[kind])
    x, before = x_of(model), copy.deepcopy(model)
    bridge.save(model, tmp_path / "m")
    assert same(model, before)  # saving changes nothing
    loaded = bridge.load(tmp_path / "m", lambda: factory().to(dtype))
    assert same(loaded, model)
    assert bits(loaded(x)) == bits(model(x))
    assert repr(loaded) == repr(model)
    assert not any(m.training for m in loaded.modules())
    for name in ("0.0", "2"):
        ours, theirs = loaded.get_submodule(name), model.get_submodule(name)
        assert type(ours) is QuantizedLinear
        assert (ours.act_spec, ours.weight_spec) == (theirs.act_spec, theirs.weight_spec)
        assert ours.arguments() == theirs.arguments()
        assert ours.dtype is theirs.dtype is dtype
        assert ours.product_scale is None or not ours.product_scale.is_meta
    assert (loaded[0][0].bias is None, loaded[2].bias is None) == (True, False)
    # What the float model lets learn still learns, and the codes do not.
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    model = quantized(build())
    bridge.save(model, tmp_path / "model.safetensors")
    x = x_of(model)
    torch.save({"x": x, "y": model(x)}, tmp_path / "pair")
    code = f"""
import torch
from torch import nn
import bridge

def build():
    inner = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.BatchNorm1d(32))
    return nn.Sequential(inner, nn.LayerNorm(32), nn.Linear(32, 8))

torch.set_num_threads({torch.get_num_threads()})
model = bridge.load("model.safetensors", build)
pair = torch.load("pair", weights_only=True)
print(torch.equal(model(pair["x"]), pair["y"]))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "True"


def test_the_public_reader_finds_the_state_dict_and_how_it_is_quantized(tmp_path: Path) -> None:
    model = quantized(build(), StaticQuantConfig(torch.uint8))
    bridge.save(model, tmp_path / "m")
    tensors, metadata = parts(tmp_path / "m")
    assert {k: bits(v) for k, v in tensors.items()} == {k: bits(v) for k, v in model.state_dict().items()}
    assert tensors["0.2.num_batches_tracked"].item() == 1
    assert metadata.keys() == {"format", "version", "layers", "aliases", "versions"}
    assert (metadata["format"], metadata["version"], metadata["aliases"]) == ("bridge", "1", {})
    assert metadata["versions"] == {"0.2": 2}  # BatchNorm's own
    assert [layer["names"] for layer in metadata["layers"]] == [["0.0"], ["2"]]
    first = metadata["layers"][0]
    assert first["kind"] == "QuantizedLinear"
    assert first["dtype"] == "float32"
    switches = {"reference": False, "hand_on": True, "fast_accum": False}
    assert first["arguments"] == {"in_features": 16, "out_features": 32, "bias": False, **switches}
    assert first["act"] == json.loads(serialize.spec_to_json(model[0][0].act_spec))


def test_the_same_model_gives_the_same_bytes_and_so_does_the_one_loaded(tmp_path: Path) -> None:
    model = quantized(build())
    bridge.save(model, tmp_path / "a")
    bridge.save(copy.deepcopy(model), tmp_path / "b")
    bridge.save(bridge.load(tmp_path / "a", on_meta), tmp_path / "c")
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1


def test_a_plain_state_dict_goes_into_a_loaded_model(tmp_path: Path) -> None:
    first, second = quantized(build()), quantized(build())
    bridge.save(first, tmp_path / "first")
    torch.save(second.state_dict(), tmp_path / "second")
    model = bridge.load(tmp_path / "first", build)
    assert not same(model, second)
    model.load_state_dict(torch.load(tmp_path / "second", weights_only=True), strict=True)
    assert bits(model(x_of(model))) == bits(second(x_of(second)))


def test_a_loaded_model_can_be_moved_cast_copied_and_compiled_as_any_other(tmp_path: Path) -> None:
    model = quantized(build())
    bridge.save(model, tmp_path / "m")
    with torch.inference_mode():
        loaded = bridge.load(tmp_path / "m", build, device="cpu")
    x = x_of(model)
    loaded.load_state_dict(copy.deepcopy(loaded).state_dict())  # no inference tensors in it
    assert bits(loaded.bfloat16()(x.bfloat16())) == bits(model.bfloat16()(x.bfloat16()))


def test_a_model_is_loaded_and_moved_where_meta_is_the_default_device(tmp_path: Path) -> None:
    model = quantized(build())
    bridge.save(model, tmp_path / "m")
    with torch.device("meta"):
        loaded = bridge.load(tmp_path / "m", build, device="cpu")
    x = x_of(model)
    assert bits(loaded(x)) == bits(model(x))


def test_a_layer_that_the_factory_compiles_is_loaded_into_its_wrapper(tmp_path: Path) -> None:
    def compiled() -> nn.Module:
        model = build()
        model[0][0], model[2] = (torch.compile(layer, backend="eager") for layer in (model[0][0], model[2]))
        return model

    model = quantized(build())
    bridge.save(model, tmp_path / "model.safetensors")
    loaded = bridge.load(tmp_path / "model.safetensors", compiled)
    with torch.no_grad():
        assert torch.equal(loaded(x_of(model)), model(x_of(model)))


class PlainStateDict(nn.Sequential):
    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return dict(super().state_dict(*args, **kwargs))


def test_a_model_with_a_state_dict_of_its_own_is_saved(tmp_path: Path) -> None:
    model = quantized(PlainStateDict(*build()).eval())
    bridge.save(model, tmp_path / "model.safetensors")
    assert same(bridge.load(tmp_path / "model.safetensors", build), model)


def test_by_reference_may_have_been_changed_after_conversion(tmp_path: Path) -> None:
    model = quantized(build())
    model[2].reference = True
    bridge.save(model, tmp_path / "m")
    loaded = bridge.load(tmp_path / "m", build)
    assert [loaded[0][0].reference, loaded[2].reference] == [False, True]


# --- one tensor, several names ---------------------------------------------------------------------


class Tied(nn.Module):
    """A float layer that shares its weight with an embedding, and a module that is used in two places."""

    def __init__(self, *, tie: bool = True, share: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.first = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
        self.second = self.first if share else copy.deepcopy(self.first)
        self.head = nn.Linear(16, 50, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embedding(ids))))


IDS = torch.arange(12).reshape(2, 6)


def tied(factory: Callable[[], nn.Module] = Tied) -> nn.Module:
    model = factory().eval()
    bridge.prepare_(model, INT8, lambda module, name: name != "head")
    bridge.calibrate(model, [IDS])
    return bridge.convert_(model)


@pytest.mark.parametrize("meta", [False, True])
def test_what_several_names_reach_is_written_once_and_shared_again(tmp_path: Path, meta: bool) -> None:
    model = tied()
    assert model.first[0] is model.second[0]
    bridge.save(model, tmp_path / "m")
    tensors, metadata = parts(tmp_path / "m")
    assert metadata["aliases"].pop("head.weight") == "embedding.weight"
    assert metadata["aliases"] == {
        name.replace("first", "second"): name for name in tensors if name.startswith("first.")
    }
    assert [layer["names"] for layer in metadata["layers"]] == [["first.0", "second.0"]]
    loaded = bridge.load(tmp_path / "m", (lambda: on_meta(Tied)) if meta else Tied)
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.first[0] is loaded.second[0]
    assert isinstance(loaded.first[0], QuantizedLinear)
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    assert torch.equal(loaded(IDS), model(IDS))
    assert same(loaded, model)


def test_what_was_shared_is_shared_again_though_the_factory_shares_nothing(tmp_path: Path) -> None:
    model = tied()
    bridge.save(model, tmp_path / "m")
    loaded = bridge.load(tmp_path / "m", lambda: Tied(tie=False, share=False))
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.first[0] is loaded.second[0]
    assert loaded.first[1].weight is loaded.second[1].weight
    assert torch.equal(loaded(IDS), model(IDS))


def test_what_was_apart_is_apart_though_the_factory_ties_it(tmp_path: Path) -> None:
    model = tied(lambda: Tied(tie=False))
    bridge.save(model, tmp_path / "m")
    loaded = bridge.load(tmp_path / "m", Tied)
    assert loaded.head.weight is not loaded.embedding.weight
    assert torch.equal(loaded(IDS), model(IDS))


def test_two_quantized_layers_where_the_factory_has_one(tmp_path: Path) -> None:
    """torchao's quantize_ makes two layers of a layer that two parents hold."""

    def factory(share: bool = True) -> nn.Module:
        a, b = nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 16))
        if share:
            b[0] = a[0]
        return nn.Sequential(a, b)

    model = quantized(factory(share=False))
    bridge.save(model, tmp_path / "m")
    loaded = bridge.load(tmp_path / "m", factory)
    assert loaded[0][0] is not loaded[1][0]
    assert torch.equal(loaded(x_of(model)), model(x_of(model)))


def test_two_modules_in_the_file_that_are_one_in_the_factorys_model_are_refused(tmp_path: Path) -> None:
    """The last one loaded would be both."""
    model = tied(lambda: Tied(share=False))
    bridge.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"second.0: the same module as first.0; in the file one of its own"):
        bridge.load(tmp_path / "m", Tied)


def test_views_of_one_storage_are_separate_tensors(tmp_path: Path) -> None:
    model = quantized(build())
    base = torch.arange(4.0)
    model.register_buffer("whole", base)
    model.register_buffer("part", base[:2])
    model.register_buffer("square", base.view(2, 2))
    model.register_buffer("turned", base.view(2, 2).T)
    model.register_buffer("again", base.view(4))
    model.register_buffer("empty", base[:0])
    model.register_buffer("void", base[:0])
    bridge.save(model, tmp_path / "m")
    tensors, metadata = parts(tmp_path / "m")
    assert metadata["aliases"] == {"whole": "again"}
    assert tensors["part"].tolist() == [0.0, 1.0]
    assert tensors["turned"].tolist() == [[0.0, 2.0], [1.0, 3.0]]

    def factory() -> nn.Module:
        other = build()
        for name, size in (("whole", 4), ("part", 2), ("again", 4), ("empty", 0), ("void", 0)):
            other.register_buffer(name, torch.zeros(size))
        for name in ("square", "turned"):
            other.register_buffer(name, torch.zeros(2, 2))
        return other

    loaded = bridge.load(tmp_path / "m", factory)
    assert loaded.whole.data_ptr() == loaded.again.data_ptr()
    assert same(loaded, model)


# --- factories -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["as calc_qparams gives them", "numbers", "a pair", "a float zero point"])
def test_a_layer_of_qparams_in_any_form_is_loaded_again(tmp_path: Path, form: str) -> None:
    act = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
    x = torch.randn(32, 16)
    qp = fsq.calc_qparams(act, fsq.observe(act, fsq.init(act, x.shape), x))
    assert qp.scale.shape == (1, 1)
    if form == "numbers":
        qp = fsq.QParams(*(value.reshape(()) for value in qp))
    elif form == "a pair":
        qp = tuple(qp)
    elif form == "a float zero point":
        qp = fsq.QParams(qp.scale, qp.zero_point.float())
    weight = fsq.QuantSpec(torch.int8, fsq.PerAxis(0))
    for kind, float_layer in ((QuantizedLinear, nn.Linear(16, 8)), (bridge.QuantizedConv1d, nn.Conv1d(32, 8, 3))):
        model = nn.Sequential(kind.from_float(float_layer, act, qp, weight))
        assert (model[0].act_scale.shape, model[0].act_zero_point.dtype) == ((1,), torch.int32)
        bridge.save(model, tmp_path / "m.safetensors")
        loaded = bridge.load(tmp_path / "m.safetensors", lambda layer=float_layer: nn.Sequential(copy.deepcopy(layer)))
        assert torch.equal(loaded(x), model(x))
        kind(act=act, weight=weight, **model[0].arguments()).load_state_dict(model[0].state_dict())
    for wrong, error, message in (
        (fsq.QParams(torch.ones(2), torch.zeros(2)), ValueError, r"the input's scale has shape \(2,\), but PerTensor"),
        (torch.ones(1), TypeError, "give QParams"),
    ):
        with pytest.raises(error, match=message):
            QuantizedLinear.from_float(nn.Linear(16, 8), act, wrong, weight)
    with pytest.raises(TypeError, match=r"QuantizedLinear.from_float got a Conv1d; give a torch.nn.Linear"):
        QuantizedLinear.from_float(nn.Conv1d(16, 8, 3), act, qp, weight)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_factorys_layer_that_does_more_is_not_replaced(tmp_path: Path) -> None:
    bridge.save(quantized(build()), tmp_path / "m.safetensors")

    def hooked() -> nn.Module:
        model = build()
        next(m for m in model if isinstance(m, nn.Linear)).register_forward_hook(lambda *_: None)
        return model

    def doubled() -> nn.Module:
        model = build()
        i, layer = next((i, m) for i, m in enumerate(model) if isinstance(m, nn.Linear))
        model[i] = Doubled(layer.in_features, layer.out_features, layer.bias is not None)
        return model

    for factory, message in ((hooked, "the layer has hooks"), (doubled, "Doubled has a forward of its own")):
        with pytest.raises(ValueError, match=message):
            bridge.load(tmp_path / "m.safetensors", factory)


class Buffered(nn.Module):
    """Has a buffer that is not saved, and a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.plain = torch.ones(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.table + self.plain


def test_what_is_not_saved_comes_from_the_factory(tmp_path: Path) -> None:
    model = quantized(Buffered())
    bridge.save(model, tmp_path / "m")
    assert "table" not in parts(tmp_path / "m")[0]
    loaded = bridge.load(tmp_path / "m", Buffered, device="cpu")
    assert torch.equal(loaded(x_of(model)), model(x_of(model)))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_what_is_left_on_meta_is_named(tmp_path: Path, device: str | None) -> None:
    bridge.save(quantized(nn.Sequential(Buffered())), tmp_path / "m")
    factory = lambda: on_meta(lambda: nn.Sequential(Buffered()))  # noqa: E731
    message = "not in the file, and on the meta device in the model of the factory: 0.plain, 0.table; make them on a"
    with pytest.raises(ValueError, match=re.escape(message)):
        bridge.load(tmp_path / "m", factory, device=device)

    def mended() -> nn.Module:
        model = factory()
        model[0].table, model[0].plain = torch.arange(8.0), torch.ones(8)
        return model

    assert bridge.load(tmp_path / "m", mended)[0].table.tolist() == list(range(8))


@pytest.mark.parametrize("nested", [False, True])
def test_a_compiled_model_has_the_file_of_the_model_inside(tmp_path: Path, nested: bool) -> None:
    def compiled(model: nn.Module) -> nn.Module:
        if nested:
            model[0] = torch.compile(model[0])
            return model
        return torch.compile(model)

    model = quantized(build())
    bridge.save(model, tmp_path / "plain")
    bridge.save(compiled(copy.deepcopy(model)), tmp_path / "compiled")
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "compiled").read_bytes()
    # A factory may compile, too.
    loaded = bridge.load(tmp_path / "plain", lambda: compiled(build()))
    names = [name for name, m in loaded.named_modules() if isinstance(m, QuantizedLinear)]
    assert names == (["0._orig_mod.0", "2"] if nested else ["_orig_mod.0.0", "_orig_mod.2"])
    inside = loaded if nested else loaded._orig_mod
    with torch.compiler.set_stance("force_eager"):
        assert bits(inside(x_of(model))) == bits(model(x_of(model)))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_is_one_quantized_layer(tmp_path: Path, compiled: bool) -> None:
    layer = quantized(nn.Sequential(nn.Linear(16, 8)))[0]
    bridge.save(torch.compile(layer) if compiled else layer, tmp_path / "m")
    loaded = bridge.load(tmp_path / "m", lambda: on_meta(lambda: nn.Linear(16, 8)))
    assert isinstance(loaded, QuantizedLinear)
    assert torch.equal(loaded(x_of(layer)), layer(x_of(layer)))


@pytest.mark.parametrize("version", [3, "0.0.5"])  # transformers' Phi-3 has text
def test_the_version_of_a_modules_state_reaches_it_again(tmp_path: Path, version: int | str) -> None:
    versions: list[object] = []

    class Versioned(nn.LayerNorm):
        _version = version

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            versions.append(local_metadata["version"])
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    factory = lambda: nn.Sequential(nn.Linear(16, 8), Versioned(8))  # noqa: E731
    bridge.save(quantized(factory()), tmp_path / "m")
    bridge.load(tmp_path / "m", factory)
    assert versions == [version]


def test_attention_recurrent_and_parametrized_layers_beside(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.lstm = nn.LSTM(16, 8, num_layers=2, batch_first=True)
            self.norm = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return self.norm(self.lstm(self.attention(x, x, x, need_weights=False)[0])[0])

    data = torch.randn(2, 6, 16)
    floats = StaticQuantConfig(torch.int8, rules={"attention": None, "norm": None, "lstm": None})
    model = quantized(Mixed(), floats, data)
    bridge.save(model, tmp_path / "m")
    for factory in (Mixed, lambda: on_meta(Mixed)):
        assert torch.equal(bridge.load(tmp_path / "m", factory)(data), model(data))


@dataclasses.dataclass(frozen=True)
class Wide(fsq.MinMax):
    """An observer of the user's own."""

    factor: float = 1.0


def test_a_class_of_the_users_own_is_given_never_imported(tmp_path: Path) -> None:
    activation = fsq.QuantSpec(torch.int8, T, observer=Wide(2.0))
    model = quantized(build(), StaticQuantConfig(torch.int8, activation=activation))
    bridge.save(model, tmp_path / "m")
    message = r"m: layer '0\.0': act: observer: class 'Wide' is not known; known: .*classes=\(Wide,\)"
    with pytest.raises(ValueError, match=message):
        bridge.load(tmp_path / "m", build)
    loaded = bridge.load(tmp_path / "m", build, classes=iter([Wide]))
    assert loaded[2].act_spec == activation
    with pytest.raises(TypeError, match=r"classes has .*; give observer and granularity classes"):
        bridge.load(tmp_path / "m", build, classes=(int,))


# --- what save refuses -----------------------------------------------------------------------------


def prepared() -> nn.Module:
    return bridge.prepare_(build(), INT8)


def with_extra_state() -> nn.Module:
    class Extra(nn.Identity):
        def get_extra_state(self) -> object:
            return {"a": 1}

    return quantized(nn.Sequential(nn.Linear(16, 8), Extra()))


def of_a_subclass() -> nn.Module:
    class Mine(QuantizedLinear):
        pass

    model = quantized(build())
    model[2].__class__ = Mine
    return model


SAVES = {
    "save(state_dict)": (lambda: build().state_dict(), TypeError, "model is a OrderedDict; give a torch.nn.Module"),
    "save(prepared)": (
        prepared,
        ValueError,
        r"the model still has observers, in 0\.0, 2; call convert_\(model\) first, or .*functional_sq\.serialize\.save",
    ),
    "save(prepared and compiled)": (lambda: torch.compile(prepared()), ValueError, r"observers, in 0\.0, 2; call"),
    "save(a prepared layer)": (lambda: prepared()[2], ValueError, "the model still has observers, in the model itself"),
    "save(partly converted)": (
        lambda: bridge.prepare_(quantized(nn.Sequential(nn.Linear(16, 8))).append(nn.Linear(8, 8)), INT8),
        ValueError,
        "the model still has observers, in 1; call",
    ),
    "save(float model)": (build, ValueError, r"Sequential has no quantized layer; call prepare_, .*torch\.save"),
    "save(tensor form)": (
        lambda: quantized(build(), StaticQuantConfig(torch.int8, form="tensor")),
        TypeError,
        r"(?s)0\.0\.weight: is a LinearActivationQuantizedTensor, .*form='module', .*as_linear.*\n  2\.weight: is a",
    ),
    "save(on meta)": (
        lambda: quantized(build()).to("meta"),
        TypeError,
        r"(?s)0\.0\.act_scale: is on the meta device and has no values; load them first.*\n  2\.weight_sum: is",
    ),
    "save(extra state)": (with_extra_state, TypeError, r"1\._extra_state: is a dict; give a tensor"),
    "save(complex128)": (
        lambda: nn.Sequential(quantized(build()), nn.ParameterList([torch.ones(1, dtype=torch.complex128)])),
        TypeError,
        r"1\.0: is torch\.complex128; safetensors holds torch\.float64, ",
    ),
    "save(a subclass)": (of_a_subclass, TypeError, "2: is a Mine, a class of your own; convert to one of QuantizedLin"),
}


@pytest.mark.parametrize("call", SAVES)
def test_save_refuses(tmp_path: Path, call: str) -> None:
    make, error, message = SAVES[call]
    with pytest.raises(error, match=message):
        bridge.save(make(), tmp_path / "m")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    first, second = quantized(build()), quantized(build())
    bridge.save(first, tmp_path / "m")

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="no space left"):
        bridge.save(second, tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]
    assert same(bridge.load(tmp_path / "m", build), first)


# --- what load refuses -----------------------------------------------------------------------------


def changed(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        model = build()
        change(model)
        return model

    return factory


def replaced(name: str, module: nn.Module) -> Callable[[], nn.Module]:
    return changed(lambda model: model.set_submodule(name, module))


MISFITS = {
    "no such layer": (
        changed(lambda m: m.__delitem__(2)),
        r"1 places:\n  2: no such layer; in the file a QuantizedLinear, made of a torch\.nn\.Linear\nmake the factory",
    ),
    "another type": (
        replaced("2", nn.Identity()),
        r"\n  2: a Identity; in the file a QuantizedLinear, made of a torch\.nn\.Linear\n",
    ),
    "quantized already": (
        lambda: quantized(build()),
        r"\n  0\.0: a QuantizedLinear; .*\n  2: a QuantizedLinear; in the file a QuantizedLinear, made of a torch",
    ),
    "other sizes": (
        replaced("2", nn.Linear(24, 4)),
        r"\n  2: in_features=24, in the file 32; out_features=4, in the file 8\n",
    ),
    "a bias that was not": (replaced("0.0", nn.Linear(16, 32)), r"\n  0\.0: bias=True, in the file False\n"),
    "no bias": (replaced("2", nn.Linear(32, 8, bias=False)), r"\n  2: bias=False, in the file True\n"),
    "another dtype": (
        changed(lambda m: m.bfloat16()),
        r"4 places:\n  0\.0: weight of torch\.bfloat16, in the file torch\.float32\n"
        r"  0\.2: bias is torch\.bfloat16 \(32,\), in the file torch\.float32 \(32,\); running_mean is .*; weight .*\n"
        r"  1: bias is torch\.bfloat16 .*\n  2: weight of torch\.bfloat16, in the file torch\.float32\n"
        r"make the factory return the float model that was quantized, of the same classes, sizes and dtype",
    ),
    "another size of a float layer": (
        replaced("1", nn.LayerNorm(16)),
        r"\n  1: bias is torch\.float32 \(16,\), in the file torch\.float32 \(32,\); weight is .*\n",
    ),
    "a tensor that the file lacks": (
        changed(lambda m: m.append(nn.LayerNorm(8))),
        r"1 places:\n  3: bias is not in the file; weight is not in the file\n",
    ),
    "a tensor that the model lacks": (
        replaced("1", nn.LayerNorm(32, bias=False)),
        r"1 places:\n  1: no bias; in the file torch\.float32 \(32,\)\n",
    ),
    "observers": (
        changed(lambda m: bridge.prepare_(m.append(nn.Linear(8, 8)), INT8)),
        r"(?s)\n  3: bias is not .*\n  3\.act_obs: count is not in the file; max is not in the file",
    ),
    "several": (
        changed(lambda m: (m.set_submodule("0.0", nn.Identity()), m.__delitem__(2), m.append(nn.Linear(4, 4)))),
        r"2 places:\n  0\.0: a Identity; .*\n  2: in_features=4, .*\n",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_model_that_does_not_fit_is_refused_and_every_layer_named_with_the_reason(tmp_path: Path, kind: str) -> None:
    factory, message = MISFITS[kind]
    bridge.save(quantized(build()), tmp_path / "m")
    with pytest.raises(ValueError, match=r"m: the model of the factory does not fit, in [0-9]+ places:\n") as caught:
        bridge.load(tmp_path / "m", factory)
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        pytest.param(build(), "float_model_factory is a Sequential; give a function that returns", id="load(model)"),
        pytest.param({}, "float_model_factory is a dict; give a function that returns the float model", id="load({})"),
        pytest.param(dict, "float_model_factory returned a dict; it must return the float model", id="load(dict)"),
    ],
)
def test_a_factory_is_a_function_that_returns_a_model(tmp_path: Path, factory: object, message: str) -> None:
    bridge.save(quantized(build()), tmp_path / "m")
    with pytest.raises(TypeError, match=message):
        bridge.load(tmp_path / "m", factory)


def edit(raw: bytes, change: Callable[[dict[str, str]], object]) -> bytes:
    """Change the metadata of a file."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def put(key: str, value: object) -> Callable[[bytes], bytes]:
    return lambda raw: edit(raw, lambda m: m.update({key: value if isinstance(value, str) else json.dumps(value)}))


def in_layer(**values: object) -> Callable[[bytes], bytes]:
    """Replace entries of the first layer's record."""

    def change(metadata: dict[str, str]) -> None:
        layers = json.loads(metadata["layers"])
        layers[0].update(values)
        metadata["layers"] = json.dumps(layers)

    return lambda raw: edit(raw, change)


def calibration(raw: bytes) -> bytes:
    spec = fsq.QuantSpec(torch.int8, T)
    path = Path(os.environ["PYTEST_TMP"], "calibration")
    serialize.save(path, {"2": (spec, fsq.init(spec, (1,)))})
    return path.read_bytes()


NO_DTYPE = ": argument 'dtype'" if torch.__version__ >= "2.13" else " received an invalid combination of arguments"

FILES = {
    "nothing": (lambda raw: b"", "cut short: 0 bytes"),
    "half": (lambda raw: raw[: len(raw) // 2], "cut short: "),
    "one byte missing": (lambda raw: raw[:-1], "cut short: "),
    "a pickle": (lambda raw: b"PK\3\4 and so on", "not a safetensors file; give a file written by save()"),
    "plain safetensors": (
        lambda raw: safetensors.torch.save({"2.weight": torch.ones(8, 32)}),
        "a safetensors file, but not one that bridge.save() wrote",
    ),
    "of another library": (
        lambda raw: safetensors.torch.save({"2.weight": torch.ones(8, 32)}, {"format": "pt"}),
        "a safetensors file, but not one that bridge.save() wrote",
    ),
    "a calibration": (
        calibration,
        "a calibration; read it with functional_sq.serialize.load, or give a file of bridge",
    ),
    "newer": (put("version", "2"), "written in version 2 of the format, and this is 1; update functional_sq"),
    "no version": (put("version", "one"), "not one that bridge.save() wrote"),
    "no layers": (lambda raw: edit(raw, lambda m: m.pop("layers")), "its metadata cannot be read (KeyError('layers'))"),
    "layers that are not JSON": (put("layers", "["), "its metadata cannot be read (JSONDecodeError"),
    "deep layers": (put("layers", "[" * 10**5), "its metadata cannot be read (RecursionError"),
    "layers of numbers": (put("layers", [1]), "its metadata cannot be read (TypeError"),
    "layers that are a number": (put("layers", 1), "its metadata cannot be read (TypeError"),
    "names of numbers": (in_layer(names=[1]), "its metadata does not fit its tensors; the file is damaged"),
    "a name twice": (in_layer(names=["2"]), "its metadata does not fit its tensors; the file is damaged"),
    "aliases that are a list": (put("aliases", []), "its metadata cannot be read (AttributeError"),
    "an alias of nothing": (put("aliases", {"a": "b"}), "its metadata does not fit its tensors; the file is damaged"),
    "an alias of a list": (put("aliases", {"a": []}), "its metadata cannot be read (TypeError"),
    "an alias that is written": (put("aliases", {"2.bias": "2.act_scale"}), "its metadata does not fit its tensors"),
    "versions of lists": (put("versions", {"2": []}), "its metadata does not fit its tensors; the file is damaged"),
    "an unknown kind": (
        in_layer(kind="QuantizedFold"),
        "layer '0.0' is a QuantizedFold, known: QuantizedLinear",
    ),
    "a kind of numbers": (in_layer(kind=[1]), "layer '0.0' is a [1], known: QuantizedLinear"),
    "no spec": (in_layer(act=None), "layer '0.0': act: not the JSON of a spec"),
    "a spec of nothing": (in_layer(weight={}), "layer '0.0': weight: QuantSpec: "),
    "a module for a dtype": (
        in_layer(dtype="nn"),
        f"layer '0.0' cannot be made (empty(){NO_DTYPE}",
    ),
    "no such dtype": (in_layer(dtype="float9"), "layer '0.0' cannot be read (AttributeError"),
    "arguments in a list": (in_layer(arguments=[1]), "layer '0.0' cannot be read (AttributeError"),
    "an unknown argument": (in_layer(arguments={"in_features": 1, "depth": 2}), "layer '0.0' cannot be made ("),
    "an argument of text": (
        in_layer(arguments={"in_features": "x", "out_features": 2}),
        "layer '0.0' cannot be made (",
    ),
    "a negative size": (in_layer(arguments={"in_features": -1, "out_features": 2}), "layer '0.0' cannot be made ("),
    "specs that have no product": (
        lambda raw: in_layer(act=json.loads(serialize.spec_to_json(fsq.QuantSpec(torch.float8_e4m3fn, T))))(raw),
        "layer '0.0' cannot be made (activations of torch.float8_e4m3fn and a weight of torch.int8 have no common",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_load_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    make, message = FILES[kind]
    bridge.save(quantized(build()), tmp_path / "m")
    path = tmp_path / "bad"
    path.write_bytes(make((tmp_path / "m").read_bytes()))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        bridge.load(path, lambda: pytest.fail("the factory was called for a file that cannot be read"))
    assert str(caught.value).startswith(f"{path}: ")


def test_the_file_that_was_edited_is_good(tmp_path: Path) -> None:
    bridge.save(quantized(build()), tmp_path / "m")
    path = tmp_path / "edited"
    path.write_bytes(in_layer(kind="QuantizedLinear")((tmp_path / "m").read_bytes()))
    assert same(bridge.load(path, build), bridge.load(tmp_path / "m", build))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "m"
    bridge.save(quantized(nn.Sequential(nn.Linear(16, 8))), path)
    return path


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
def test_no_damage_escapes_as_another_error(good: Path, data: st.DataObject) -> None:
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = good.with_name("bad")
    path.write_bytes(raw)
    try:
        bridge.load(path, lambda: nn.Sequential(nn.Linear(16, 8)))  # damage to the data can still be a valid file
    except ValueError as e:
        assert str(e).startswith(f"{path}: ")  # noqa: PT017 (either outcome is right)


def test_a_code_that_its_format_has_not_is_damage(good: Path) -> None:
    raw = bytearray(good.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + size])["0.act_zero_point"]["data_offsets"]
    raw[8 + size + start : 8 + size + end] = (-256).to_bytes(end - start, "little", signed=True)
    path = good.with_name("bad")
    path.write_bytes(raw)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))}: 0.act_zero_point has codes from -256 to -256, and "
    ):
        bridge.load(path, lambda: nn.Sequential(nn.Linear(16, 8)))


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        bridge.load(tmp_path / "none", build)


# --- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("meta", [False, True])
def test_cuda_model_is_saved_from_there_and_loaded_to_any_device(tmp_path: Path, meta: bool) -> None:
    model = quantized(build())
    bridge.save(model, tmp_path / "cpu")
    bridge.save(copy.deepcopy(model).cuda(), tmp_path / "cuda")
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes()
    factory = on_meta if meta else build
    for load in (
        lambda: bridge.load(tmp_path / "cpu", factory, device="cuda"),
        lambda: bridge.load(tmp_path / "cpu", lambda: build().cuda()),
    ):
        loaded = load()
        assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
        assert same(loaded.cpu(), model)
    assert same(bridge.load(tmp_path / "cuda", factory), model)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            nn.Conv1d(6, 8, 3, padding="same"),
            nn.Conv2d(2, 4, (3, 1), 2, padding_mode="reflect", padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).unflatten(1, (2, 4)))


def test_convolutions(tmp_path: Path) -> None:
    model, data = quantized(Image(), data=(x := torch.randn(3, 6, 16))), x
    bridge.save(model, tmp_path / "m")
    assert [type(m).__name__ for m in model.children()] == ["QuantizedConv1d", "QuantizedConv2d"]
    for factory in (Image, lambda: on_meta(Image)):
        assert torch.equal(bridge.load(tmp_path / "m", factory)(data), model(data))

    def other() -> nn.Module:
        image = Image()
        image.two = nn.Conv2d(2, 4, (3, 1), 1, padding_mode="zeros", padding=1)
        return image

    message = r"two: padding_mode=zeros, in the file reflect; stride=\(1, 1\), in the file \(2, 2\)"
    with pytest.raises(ValueError, match=message):
        bridge.load(tmp_path / "m", other)


def test_an_encoder_that_was_loaded_calls_its_quantized_layers(tmp_path: Path) -> None:
    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()

    model, x = encoder(), torch.randn(2, 5, 16)
    bridge.prepare_(model, StaticQuantConfig(torch.int8, rules={"*.self_attn": None}))
    bridge.calibrate(model, [x])
    bridge.save(bridge.convert_(model), tmp_path / "m")
    with torch.inference_mode():
        assert torch.equal(bridge.load(tmp_path / "m", encoder)(x), model(x))
