"""One configuration: rules by name and type, presets, what it prints and its JSON."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bridge
import functional_sq as fsq
from bridge import PRESETS, StaticQuantConfig

FLOAT8 = StaticQuantConfig(torch.float8_e4m3fn)
UINT8 = StaticQuantConfig(torch.uint8)


class Mine(nn.Linear):
    """A subclass of the user's that computes what its base does."""


def model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "encoder": nn.ModuleDict({n: nn.Linear(16, 16) for n in ("query", "key", "value")}),
            "mine": Mine(16, 16),
            "lm_head": nn.Linear(16, 16),
        }
    ).eval()


def dtypes(prepared: nn.Module) -> dict[str, torch.dtype]:
    return {n: m.act_obs.spec.dtype for n, m in prepared.named_modules() if isinstance(m, bridge.ObservedLinear)}


def test_the_first_rule_that_fits_decides() -> None:
    config = StaticQuantConfig(torch.int8, rules={"lm_head": None, "encoder.query": UINT8, "encoder.*": FLOAT8})
    assert dtypes(bridge.prepare_(model(), config)) == {
        "encoder.query": torch.uint8,
        "encoder.key": torch.float8_e4m3fn,
        "encoder.value": torch.float8_e4m3fn,
        "mine": torch.int8,
    }
    swapped = StaticQuantConfig(torch.int8, rules={"encoder.*": FLOAT8, "encoder.query": UINT8})
    assert dtypes(bridge.prepare_(model(), swapped))["encoder.query"] is torch.float8_e4m3fn


def test_a_rule_for_a_class_fits_its_subclasses() -> None:
    one, every = (StaticQuantConfig(torch.int8, rules={kind: UINT8}) for kind in (Mine, nn.Linear))
    assert [name for name, d in dtypes(bridge.prepare_(model(), one)).items() if d is torch.uint8] == ["mine"]
    assert set(dtypes(bridge.prepare_(model(), every)).values()) == {torch.uint8}


def test_rules_see_the_names_of_a_compiled_model() -> None:
    config = StaticQuantConfig(torch.int8, rules={"encoder.*": None})
    assert dtypes(bridge.prepare_(torch.compile(model()), config)).keys() == {"_orig_mod.mine", "_orig_mod.lm_head"}


def test_each_layer_becomes_what_its_own_config_says() -> None:
    reference = StaticQuantConfig(torch.uint8, reference=True)
    tensor = StaticQuantConfig(torch.int8, form="tensor")
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    bridge.prepare_(net, StaticQuantConfig(torch.int8, rules={"1": reference, "2": tensor, "3": None}))
    bridge.calibrate(net, torch.randn(2, 16, 8))
    bridge.convert_(net)
    assert [type(m).__name__ for m in net] == ["QuantizedLinear", "QuantizedLinear", "Linear", "Linear"]
    assert [net[0].reference, net[1].reference] == [False, True]
    assert net[1].act_spec.dtype is torch.uint8
    assert isinstance(net[2].weight.data, bridge.LinearActivationQuantizedTensor)
    assert type(net[3].weight.data) is torch.Tensor


def test_rules_at_conversion_choose_the_form_and_give_floats_back() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    plain = net[1]
    bridge.prepare_(net, PRESETS["int8"])
    bridge.calibrate(net, torch.randn(2, 16, 8))
    bridge.convert_(net, config=StaticQuantConfig(torch.int8, reference=True, rules={"1": None}))
    assert net[0].reference
    assert net[1] is plain


def test_a_config_is_a_value_that_nothing_changes() -> None:
    rules = {"lm_head": None, nn.Conv2d: FLOAT8}
    config = StaticQuantConfig(torch.int8, rules=rules)
    before, h = repr(config), hash(config)
    rules.clear()
    net = nn.Sequential(bridge.prepare_(model(), config)["mine"]).eval()
    bridge.calibrate(net, torch.randn(2, 4, 16))
    bridge.convert_(net)
    assert (repr(config), hash(config)) == (before, h)
    assert pickle.loads(pickle.dumps(config)) == config


CONFIGS = [
    *PRESETS.values(),
    StaticQuantConfig(torch.int8, step="prepare", reference=True),
    StaticQuantConfig(torch.int8, form="tensor"),
    StaticQuantConfig(
        torch.uint8,
        activation=fsq.QuantSpec(
            torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=fsq.Percentile(99.9)
        ),
        weight=fsq.QuantSpec(torch.int4, fsq.PerAxis(0), observer=fsq.Mse()),
    ),
    StaticQuantConfig(torch.int8, rules={"a.*": None, nn.Conv2d: FLOAT8, Mine: UINT8, "b": PRESETS["int8_symmetric"]}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_prints_as_the_call_that_makes_it(config: StaticQuantConfig) -> None:
    names = {"torch": torch, "StaticQuantConfig": StaticQuantConfig, **vars(fsq), "Mine": Mine}
    assert eval(repr(config).replace(f"{__name__}.Mine", "Mine"), names) == config


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_json_and_back(config: StaticQuantConfig) -> None:
    text = config.to_json()
    assert "\n" not in text
    again = StaticQuantConfig.from_json(text, classes=(Mine,))
    assert again == config
    assert again.to_json() == text


def nested() -> nn.ModuleDict:
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "head": nn.Linear(8, 8)}).eval()


def calibrated(model: nn.ModuleDict) -> nn.ModuleDict:
    bridge.prepare_(model, PRESETS["int8"])
    for layer in (model["body"], model["head"]):
        bridge.calibrate(layer, torch.randn(2, 4, 8))
    return model


def test_a_rule_by_a_name_with_brackets_fits_that_module() -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(8, 8), "a0": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    bridge.prepare_(net, StaticQuantConfig(torch.int8, rules={"a[0]": None}))
    assert [name for name, m in net.items() if type(m) is nn.Linear] == ["a[0]", "a0"]  # which the pattern fits too


def test_a_rule_may_fit_what_has_no_layer_in_it() -> None:
    rules = {"body.1": None, nn.ReLU: None, nn.LSTM: None, "head": PRESETS["float8"], "body.*": None}
    model = bridge.prepare_(nested(), StaticQuantConfig(torch.int8, rules=rules))
    assert [type(layer).__name__ for layer in (model["body"][0], model["head"])] == ["Linear", "ObservedLinear"]


def test_what_a_preset_is() -> None:
    sym, asym = fsq.MappingType.SYMMETRIC, fsq.MappingType.ASYMMETRIC
    found = {
        name: (c.activation.dtype, c.activation.mapping, c.weight.dtype, c.weight.mapping)
        for name, c in PRESETS.items()
    }
    assert found == {
        "int8": (torch.int8, asym, torch.int8, sym),
        "int8_symmetric": (torch.int8, sym, torch.int8, sym),
        "uint8": (torch.uint8, asym, torch.uint8, asym),
        "float8": (torch.float8_e4m3fn, sym, torch.float8_e4m3fn, sym),
    }


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bridge.prepare_(model(), StaticQuantConfig(torch.int8, rules={"lm_haed": None})),
            ValueError,
            "the rule for 'lm_haed' fits no module of ModuleDict; did you mean 'lm_head'?",
        ),
        (
            lambda: bridge.prepare_(model(), StaticQuantConfig(torch.int8, rules={"query": None})),
            ValueError,
            "the rule for 'query' fits no module",
        ),
        (
            lambda: bridge.prepare_(model(), StaticQuantConfig(torch.int8, rules={"*": None})),
            ValueError,
            "no module of ModuleDict is one of torch.nn.Linear",
        ),
        (
            lambda: bridge.prepare_(nested(), StaticQuantConfig(torch.int8, rules={"body": None})),
            ValueError,
            "the rule for 'body' fits 'body', which is no layer, and says nothing of those in it; use 'body.*'",
        ),
        (
            lambda: bridge.prepare_(nested(), StaticQuantConfig(torch.int8, rules={nn.Sequential: None})),
            ValueError,
            "the rule for torch.nn.Sequential fits 'body', which is no layer, and says nothing of those in it",
        ),
        (
            lambda: bridge.convert_(calibrated(nested()), config=StaticQuantConfig(torch.int8, rules={"body": None})),
            ValueError,
            "the rule for 'body' fits 'body', which is no layer",
        ),
        (
            lambda: bridge.reread_(calibrated(nested()), StaticQuantConfig(torch.int8, rules={"haed": None})),
            ValueError,
            "the rule for 'haed' fits no module of ModuleDict; did you mean 'head'?",
        ),
        (lambda: StaticQuantConfig(torch.int8, rules=["lm_head"]), TypeError, "rules has 'lm_head'; give a dict of"),
        (lambda: StaticQuantConfig(torch.int8, rules={3: None}), TypeError, "rules has the key 3; give a name pattern"),
        (lambda: StaticQuantConfig(torch.int8, rules={int: None}), TypeError, "rules has the key <class 'int'>"),
        (
            lambda: StaticQuantConfig(torch.int8, rules={"a": torch.int8}),
            TypeError,
            "rules has torch.int8 for 'a'; give a StaticQuantConfig, or None for float",
        ),
        (
            lambda: StaticQuantConfig(torch.int8, rules={"a": StaticQuantConfig(torch.int8, rules={"b": None})}),
            ValueError,
            "the rule for 'a' has rules itself; put them into the outer ones",
        ),
        (lambda: StaticQuantConfig.from_json("{"), ValueError, "not the JSON of a StaticQuantConfig"),
        (
            lambda: StaticQuantConfig.from_json("{}", classes=["Mine"]),
            TypeError,
            "classes has 'Mine', which is no class",
        ),
        (lambda: StaticQuantConfig.from_json("[]"), ValueError, "not the JSON of a StaticQuantConfig"),
        (
            lambda: StaticQuantConfig.from_json(PRESETS["int8"].to_json().replace('"step"', '"stop"')),
            ValueError,
            "not the JSON of a StaticQuantConfig",
        ),
        (
            lambda: StaticQuantConfig.from_json(StaticQuantConfig(torch.int8, rules={Mine: None}).to_json()),
            ValueError,
            r"the module class .*test_config\.Mine is not known; give it as classes=\(Mine,\)",
        ),
    ],
)
def test_a_refusal_says_value_rule_and_remedy(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- one record, read by another config ------------------------------------------------------------


def recorded(config: StaticQuantConfig) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    x = torch.randn(4, 64, 16)
    x[0, 0, 0] = 30.0  # what MinMax takes and Mse clips
    bridge.calibrate(bridge.prepare_(net, config), x)
    return net


def with_rule(rule: fsq.Observer, dtype: torch.dtype = torch.int8) -> StaticQuantConfig:
    activation = dataclasses.replace(StaticQuantConfig(dtype).activation, observer=rule)
    return StaticQuantConfig(dtype, activation=activation)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("rule", [fsq.Mse(), fsq.Percentile(99.0), fsq.MinMax(), fsq.Histogram()], ids=repr)
def test_a_record_read_by_another_config_gives_the_model_that_was_prepared_with_it(
    rule: fsq.Observer, dtype: torch.dtype
) -> None:
    other = with_rule(rule, dtype)
    net, fresh = recorded(with_rule(fsq.Histogram())), recorded(other)
    bridge.convert_(bridge.reread_(net, other))
    bridge.convert_(fresh)
    assert [layer.act_spec for layer in net[::2]] == [other.activation, other.activation]
    x = torch.randn(5, 16)
    assert torch.equal(net(x), fresh(x))


def test_rereading_layer_by_layer_leaves_floats_and_reference_to_conversion() -> None:
    net = recorded(with_rule(fsq.Histogram()))
    before = net[0].act_obs.spec
    config = StaticQuantConfig(
        torch.int8, rules={"0": None, "2": dataclasses.replace(with_rule(fsq.Mse()), reference=True)}
    )
    bridge.reread_(net, config)
    assert net[0].act_obs.spec == before
    assert bridge.convert_(net)[2].reference


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bridge.reread_(recorded(PRESETS["int8"]), with_rule(fsq.Mse())),
            r"2 layers cannot be read so, and nothing was changed:\n  0: .*Mse\(\) reads .*histogram.*\n  2: ",
        ),
        (
            lambda: bridge.reread_(
                recorded(PRESETS["int8"]),
                StaticQuantConfig(torch.int8, activation=fsq.QuantSpec(torch.int8, fsq.PerAxis(-1)), reference=True),
            ),
            r"\n  0: recorded for PerTensor\(\), which cannot be read as PerAxis\(axis=-1\); calibrate again",
        ),
        (lambda: bridge.reread_(model(), PRESETS["int8"]), "ModuleDict has no observed layer; call prepare_ and"),
        (
            lambda: bridge.convert_(recorded(with_rule(fsq.Histogram())), config=with_rule(fsq.Mse())),
            r"observer=Mse\(\)\), but they were observed for .*Histogram\(\)\); call reread_\(model, config\) before",
        ),
    ],
)
def test_a_record_that_does_not_have_what_is_asked_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
