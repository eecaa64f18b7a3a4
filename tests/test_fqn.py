"""torchao's way in: `quantize_` with a filter, and configs by name, for both steps.

Two rules of torchao's name configs that the tests here keep to, in 0.16 and in 0.18:
a pattern must match the names of modules and of no parameter (`re:layers[.][0-9]+`, not `re:layers.*`), and
what is to stay in float is given by its exact name (0.16 goes on to the next match from a pattern's None).
"""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functional_sq as fsq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import torchao.quantization
    from torchao.quantization import quantize_

    import bridge
    from bridge import ObservedLinear, QuantizedLinear, StaticQuantConfig

INT8, UINT8, FLOAT8 = torch.int8, torch.uint8, torch.float8_e4m3fn
Names = Mapping[str, torch.dtype | None]


class Net(nn.Module):
    """Layers at several depths, and one that is a Linear by class but not called as one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


def data() -> Tensor:
    return torch.randn(3, 2, 5, 16)


def dtypes(model: nn.Module, kind: type[nn.Module]) -> dict[str, torch.dtype]:
    """Name and dtype of the layers of a kind."""
    spec = (lambda m: m.act_obs.spec) if kind is ObservedLinear else (lambda m: m.act_spec)
    return {name: spec(m).dtype for name, m in model.named_modules() if isinstance(m, kind)}


def by_hand(model: nn.Module, chosen: Mapping[str, StaticQuantConfig], batches: Tensor) -> nn.Module:
    """Quantize the layers of these names by the bridge alone."""
    for name, config in chosen.items():
        bridge.prepare_(model, config, lambda module, own, name=name: own == name)
    bridge.calibrate(model, batches)
    return bridge.convert_(model)


# --- one config and a filter -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [INT8, UINT8, FLOAT8], ids=str)
def test_one_config_with_a_filter_for_each_step(dtype: torch.dtype) -> None:
    model, batches = Net().eval(), data()
    wanted = {"layers.0", "layers.2", "head"}
    expected = by_hand(copy.deepcopy(model), dict.fromkeys(wanted, StaticQuantConfig(dtype)), batches)
    takes = lambda module, name: name in wanted  # noqa: E731
    quantize_(model, StaticQuantConfig(dtype, step="prepare"), takes)
    assert dtypes(model, ObservedLinear) == dict.fromkeys(wanted, dtype)
    for batch in batches:
        model(batch)
    quantize_(model, StaticQuantConfig(dtype, step="convert"), takes)
    assert dtypes(model, QuantizedLinear) == dict.fromkeys(wanted, dtype)
    assert type(model.stem) is nn.Linear
    assert torch.equal(model(batches[0]), expected(batches[0]))


def test_a_filter_may_convert_in_parts_and_ask_for_the_class() -> None:
    model, batches = Net().eval(), data()
    quantize_(model, StaticQuantConfig(INT8, step="prepare"))
    every = dtypes(model, ObservedLinear)
    assert every.keys() == {"stem", "layers.0", "layers.1", "layers.2", "head"}
    for batch in batches:
        model(batch)
    quantize_(
        model, StaticQuantConfig(INT8), lambda module, name: isinstance(module, ObservedLinear) and name == "head"
    )
    assert dtypes(model, QuantizedLinear).keys() == {"head"}
    quantize_(model, StaticQuantConfig(INT8), lambda module, name: isinstance(module, ObservedLinear))
    assert dtypes(model, QuantizedLinear) == every


# --- configs by name -------------------------------------------------------------------------------


def by_name(kind: str, configs: Mapping[str, StaticQuantConfig | None]) -> Any:
    """Return torchao's config of configs, under either of its names."""
    cls = getattr(torchao.quantization, kind, None)
    if cls is None:
        pytest.skip(f"torchao {importlib.metadata.version('torchao')} has no torchao.quantization.{kind}")
    with warnings.catch_warnings():
        # Both versions warn that _default will go.
        warnings.filterwarnings("ignore", message="Config Deprecation: _default")
        return cls(OrderedDict(configs))


def test_this_torchao_has_a_config_of_configs() -> None:
    """Else every test below would be skipped."""
    assert any(hasattr(torchao.quantization, kind) for kind in KINDS)


KINDS = ["FqnToConfig", "ModuleFqnToConfig"]

TABLES: dict[str, tuple[Names, Names]] = {
    "by name": (
        {"stem": INT8, "layers.1": UINT8, "head": FLOAT8},
        {"stem": INT8, "layers.1": UINT8, "head": FLOAT8},
    ),
    "one is None, the rest by default": (
        {"stem": UINT8, "head": None, "_default": INT8},
        {"stem": UINT8, "layers.0": INT8, "layers.1": INT8, "layers.2": INT8},
    ),
    "by pattern, the first that matches": (
        {"re:layers[.][01]": UINT8, "re:layers[.][0-9]": FLOAT8, "re:(stem|head)": INT8},
        {"stem": INT8, "layers.0": UINT8, "layers.1": UINT8, "layers.2": FLOAT8, "head": INT8},
    ),
    "a name before a pattern before the default": (
        {"re:layers[.][0-9]": FLOAT8, "layers.1": None, "layers.2": UINT8, "_default": INT8},
        {"stem": INT8, "layers.0": FLOAT8, "layers.2": UINT8, "head": INT8},
    ),
    "all by default": (
        {"_default": INT8},
        {"stem": INT8, "layers.0": INT8, "layers.1": INT8, "layers.2": INT8, "head": INT8},
    ),
}


def table(kind: str, names: Names, **arguments: Any) -> Any:
    return by_name(kind, {n: None if d is None else StaticQuantConfig(d, **arguments) for n, d in names.items()})


@pytest.mark.parametrize("convert", ["by the same names", "bridge.convert_", "bridge.quantize_"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", TABLES)
def test_configs_by_name_prepare_and_convert(names: str, kind: str, convert: str) -> None:
    given, expected = TABLES[names]
    model, batches = Net().eval(), data()
    reference = by_hand(copy.deepcopy(model), {n: StaticQuantConfig(d) for n, d in expected.items()}, batches)
    quantize_(model, table(kind, given, step="prepare"), filter_fn=None)
    assert dtypes(model, ObservedLinear) == expected
    for batch in batches:
        model(batch)
    if convert == "bridge.convert_":
        bridge.convert_(model)
    elif convert == "bridge.quantize_":
        bridge.quantize_(model, table(kind, given), filter_fn=None)
    else:
        quantize_(model, table(kind, given), filter_fn=None)
    assert dtypes(model, QuantizedLinear) == expected
    assert dtypes(model, ObservedLinear) == {}
    assert [name for name, m in model.named_modules() if isinstance(m, bridge.ObserverModule)] == []
    assert type(model.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert torch.equal(model(batches[0]), reference(batches[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_each_name_has_its_own_specs_and_form(kind: str) -> None:
    asymmetric = fsq.QuantSpec(INT8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=fsq.Mse())
    groups = fsq.QuantSpec(torch.int4, fsq.PerGroup(8))

    def configs(step: str) -> Any:
        return by_name(
            kind,
            {
                "stem": StaticQuantConfig(INT8, step=step, activation=asymmetric),
                "layers.0": StaticQuantConfig(INT8, step=step, weight=groups, reference=True),
                "head": StaticQuantConfig(UINT8, step=step, form="tensor"),
            },
        )

    model, batches = Net().eval(), data()
    quantize_(model, configs("prepare"), filter_fn=None)
    for batch in batches:
        model(batch)
    quantize_(model, configs("convert"), filter_fn=None)
    assert model.stem.act_spec == asymmetric
    assert (model.layers[0].reference, model.layers[0].weight_spec) == (True, groups)
    assert isinstance(model.head, nn.Linear)
    assert type(model.head.weight.data).__name__ == "LinearActivationQuantizedTensor"
    assert model(batches[0]).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_converting_by_other_names_leaves_the_rest_observed(kind: str) -> None:
    model, batches = Net().eval(), data()
    quantize_(model, table(kind, {"_default": INT8}, step="prepare"), filter_fn=None)
    for batch in batches:
        model(batch)
    quantize_(model, table(kind, {"head": INT8, "stem": None}), filter_fn=None)
    assert dtypes(model, QuantizedLinear) == {"head": INT8}
    assert dtypes(model, ObservedLinear).keys() == {"stem", "layers.0", "layers.1", "layers.2"}


REFUSALS: dict[str, tuple[Callable[[nn.Module, str], object], type[Exception], str]] = {
    "convert(another dtype)": (
        lambda model, kind: quantize_(model, table(kind, {"head": UINT8}), filter_fn=None),
        ValueError,
        r"quantizes the activations to torch\.uint8, but they were observed for torch\.int8; use the dtype",
    ),
    "convert(what saw nothing)": (
        lambda model, kind: quantize_(model, table(kind, {"head": INT8}), filter_fn=None),
        bridge.CalibrationError,
        "nothing was seen",
    ),
    # torchao's own: with a pattern that reaches into a layer it asks to quantize the parameter by itself.
    "convert(a pattern that matches a parameter)": (
        lambda model, kind: quantize_(model, table(kind, {"re:head.*": INT8}), filter_fn=None),
        NotImplementedError,
        "StaticQuantConfig'> does not yet support parameter quantization",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", REFUSALS)
def test_a_refusal_reaches_the_caller(call: str, kind: str) -> None:
    act, error, message = REFUSALS[call]
    model = bridge.prepare_(Net().eval(), StaticQuantConfig(INT8, rules={"attention": None}))
    with pytest.raises(error, match=message):
        act(model, kind)
    assert isinstance(model.head, ObservedLinear)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_several_dtypes_is_saved_and_loaded(tmp_path: Any, kind: str) -> None:
    given, _ = TABLES["by name"]
    model, batches = Net().eval(), data()
    quantize_(model, table(kind, given, step="prepare"), filter_fn=None)
    bridge.calibrate(model, batches)
    quantize_(model, table(kind, given), filter_fn=None)
    bridge.save(model, tmp_path / "m")
    assert torch.equal(bridge.load(tmp_path / "m", Net)(batches[0]), model(batches[0]))
