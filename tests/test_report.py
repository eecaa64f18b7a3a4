"""Where the loss comes from: `bridge.report` against numpy, conversion itself, and what it must not touch."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import functional_sq as fsq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import bridge
    from bridge import CalibrationError, LayerReport, Report, StaticQuantConfig
    from bridge.picture import recorded, short
    from bridge.steps import quantized_layer

Array = np.ndarray
INT8 = StaticQuantConfig(torch.int8)
ASYMMETRIC = fsq.MappingType.ASYMMETRIC


def config(observer: fsq.Observer, dtype: torch.dtype = torch.int8) -> StaticQuantConfig:
    act = fsq.QuantSpec(dtype, fsq.PerTensor(), mapping=ASYMMETRIC, observer=observer)
    return StaticQuantConfig(dtype, activation=act)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def batches(n: int = 3, rows: int = 64) -> Tensor:
    return torch.randn(n, rows, 16)


def calibrated(model: nn.Module, data: Any, *configs: StaticQuantConfig) -> Any:
    for each in configs or (INT8,):
        bridge.prepare_(model, each)
    # A report may be made of a model in any mode, a calibration not.
    modes = {module: module.training for module in model.modules()}
    bridge.calibrate(model.eval(), data)
    for module, training in modes.items():
        module.training = training
    return model


def by_name(found: Report) -> dict[str, LayerReport]:
    return {layer.name: layer for layer in found.layers}


def db(exact: Any, other: Any) -> float:
    exact, other = (np.asarray(v, np.float64) for v in (exact, other))
    return float(10 * np.log10((exact**2).sum() / ((exact - other) ** 2).sum()))


def same(value: float) -> Any:
    """Equal but for the order of a sum in float64: n values, n * 2**-53, of which 10 log10 takes 4.4."""
    return pytest.approx(value, rel=1e-11, abs=1e-10)


# --- numbers ---------------------------------------------------------------------------------------


def range_codes(x: Array, lo: float, hi: float) -> tuple[Array, Array, Array]:
    """Asymmetric int8 by the contract in float32: code minus zero point, scale, and what saturates."""
    f32 = np.float32
    lo, hi = min(f32(lo), f32(0)), max(f32(hi), f32(0))
    scale = (hi - lo) / f32(255)
    zero_point = np.clip(f32(-128) - np.round(lo / scale), f32(-128), f32(127))
    steps = np.round(x * (f32(1) / scale)) + zero_point
    return np.clip(steps, -128, 127) - zero_point, scale, (steps < -128) | (steps > 127)


def row_codes(w: Array) -> tuple[Array, Array]:
    """Symmetric int8 for each row."""
    f32 = np.float32
    scale = np.maximum(np.maximum(-w.min(1), w.max(1)), f32(0)) / f32(127.5)
    return np.clip(np.round(w * (f32(1) / scale)[:, None]), -128, 127), scale[:, None]


@pytest.mark.parametrize("observer", [fsq.MinMax(), fsq.Fixed(-1.5, 1.0)], ids=repr)
def test_the_figures_of_a_layer_are_those_of_numpy(observer: fsq.Observer) -> None:
    """Of two layers in a row, from the formulas of the contract, and products in float64.

    Inputs and weights have the bits of numpy's, so their figures differ by the order of a sum alone. The
    outputs differ by the float32 epilogue: a few 2**-24 of an output, whose quantization error is
    more than 2**-9 of it. Squared and summed that is below 2**-12 of the noise, or 1e-3 dB.
    """
    model, data = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).eval(), batches()
    found = by_name(bridge.report(calibrated(model, data, config(observer)), data))
    with torch.no_grad():
        inputs = [data, nn.functional.linear(data, model[0].weight, model[0].bias)]
    for name, x in zip("01", (t.numpy() for t in inputs), strict=True):
        layer, linear = found[name], model.get_submodule(name)
        lo, hi = (x.min(), x.max()) if isinstance(observer, fsq.MinMax) else (observer.lo, observer.hi)
        k, scale, saturates = range_codes(x, lo, hi)
        w, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
        wk, w_scale = row_codes(w)

        error = (x.astype(np.float64) - (k.astype(np.float32) * scale).astype(np.float64)) ** 2
        assert layer.values == x.size
        assert layer.calls == len(data)
        assert layer.input_sqnr == same(10 * math.log10((x.astype(np.float64) ** 2).sum() / error.sum()))
        assert layer.saturated == saturates.mean()
        assert layer.clipping == same(error[saturates].sum() / error.sum())
        assert layer.rounding == same(error[~saturates].sum() / error.sum())
        # Both are one rounding of shares of one sum.
        assert layer.clipping + layer.rounding == pytest.approx(1, abs=2**-52)
        assert layer.weight_sqnr == same(db(w, (wk * w_scale).astype(np.float32)))

        exact = x.astype(np.float64) @ w.T.astype(np.float64) + b
        ours = (k * np.float64(scale)) @ (wk * w_scale.astype(np.float64)).T + b
        assert layer.output_sqnr == pytest.approx(db(exact, ours), abs=1e-3)


def outputs(model: nn.Module, data: Tensor) -> Array:
    with torch.inference_mode():
        return torch.stack([model(batch) for batch in data]).numpy()


@pytest.mark.parametrize("rank", ["quantize", "float", None])
def test_the_model_alone_and_whole_is_what_conversion_makes_of_it(rank: Any) -> None:
    """To the last bit of each output: the same layers are put in place by hand."""
    model, data = mlp(), batches()
    exact = outputs(model, data)
    found = bridge.report(calibrated(model, data), data, rank=rank)
    assert (found.batches, found.rank) == (3, rank)
    assert found.model_sqnr == same(db(exact, outputs(bridge.convert_(copy.deepcopy(model)), data)))
    for name, layer in by_name(found).items():
        assert layer.weight_sqnr > 30
        if rank is None:
            assert layer.model_sqnr is None
            continue
        other = copy.deepcopy(model)
        for each in ("0", "2", "4"):
            if (each == name) == (rank == "quantize"):
                setattr(other, each, quantized_layer(None, other.get_submodule(each)))
        assert layer.model_sqnr == same(db(exact, outputs(other, data)))
    key = {"quantize": lambda layer: layer.model_sqnr, "float": lambda layer: -layer.model_sqnr}
    measured = [key.get(rank or "", lambda layer: layer.output_sqnr)(layer) for layer in found.layers]
    assert measured == sorted(measured)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.int4], ids=str)
def test_every_format_and_form_of_layer_is_reported(dtype: torch.dtype) -> None:
    data = batches()
    model = calibrated(mlp(), data, StaticQuantConfig(dtype))
    found = {
        form: bridge.report(model, data, rank=None, config=StaticQuantConfig(dtype, **form_of))
        for form, form_of in (("module", {}), ("tensor", {"form": "tensor"}), ("reference", {"reference": True}))
    }
    assert found["tensor"].model_sqnr == same(found["module"].model_sqnr)
    # The reference rounds its products to float32 one by one.
    assert found["reference"].model_sqnr == pytest.approx(found["module"].model_sqnr, abs=0.01)


BAD = {
    "narrow": fsq.Fixed(-1e-2, 1e-2),
    "wide": fsq.Fixed(-1e3, 1e3),
}


@pytest.mark.parametrize("rank", ["quantize", "float", None])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["0", "2", "4"])
def test_a_bad_layer_comes_first(name: str, bad: str, rank: Any) -> None:
    model, data = mlp(), batches()
    bridge.prepare_(model, config(BAD[bad]), lambda module, found: found == name)
    first = bridge.report(calibrated(model, data), data, rank=rank).layers[0]
    assert first.name == name
    # Of a range 1/100 as wide as the data nearly all is clipped; one 1000 times as wide clips nothing.
    assert (first.clipping > 0.99, first.saturated > 0.3) == (bad == "narrow",) * 2
    assert first.clipping == 0 or bad == "narrow"


def test_an_outlier_in_the_calibration_of_one_layer_ranks_it_first() -> None:
    model, data = mlp(), batches()
    calibrated(model, data)
    model[2].act_obs(torch.tensor([[500.0] + [0.0] * 31]))
    assert bridge.report(model, data).layers[0].name == "2"


# --- prediction ------------------------------------------------------------------------------------

RULES = [fsq.Histogram(), fsq.Percentile(95.0), fsq.SkipNonfinite(fsq.Percentile(95.0)), fsq.Mse()]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_prediction_from_a_histogram_is_the_measurement_but_for_chance(
    rule: fsq.Observer, dtype: torch.dtype
) -> None:
    """On the data that was calibrated with, which is uniform, as the model takes it to be within a bin.

    The prediction is then the expectation of the measured sum of squared errors e, a sum of independent
    terms, given how many are in each bin; its standard error is at most sqrt(sum of e**2). Five of them
    are allowed, as a share r of the sum: 10 log10(1 + r) dB. The power of the signal has a smaller one:
    within a bin a square varies by 1/8. It gets as much again.
    """
    data = torch.rand(4, 1024, 16) * 3 - 1
    model = calibrated(mlp(), data, config(rule, dtype))
    layer = by_name(bridge.report(model, data, rank=None))["0"]
    spec = model[0].act_obs.spec
    e = (data - fsq.fake_quantize(spec, data, model[0].act_obs.calculate_qparams())).double().square()
    chance = 5 * float(e.square().sum().sqrt() / e.sum())
    assert chance < 0.1
    assert layer.predicted_input_sqnr == pytest.approx(layer.input_sqnr, abs=2 * 10 * math.log10(1 + chance))


@pytest.mark.parametrize("observer", [fsq.MinMax(), fsq.Fixed(-3, 3), fsq.MeanRange()], ids=repr)
def test_what_no_state_holds_is_not_predicted(observer: fsq.Observer) -> None:
    data = batches()
    found = bridge.report(calibrated(mlp(), data, config(observer)), data, rank=None)
    assert {layer.predicted_input_sqnr for layer in found.layers} == {None}
    row = str(found).splitlines()[3].split()
    assert row[4] == "-"


# --- nothing is touched ----------------------------------------------------------------------------


class Eventful(nn.Module):
    """Has all that a forward pass may change: batch statistics, a counter, a cache, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(16, 4)
        self.register_buffer("passes", torch.zeros(1))
        self.register_buffer("cache", None)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.cache = x
        y = self.second(self.drop(self.norm(self.first(x))))
        if y.isnan().any():
            raise RuntimeError("a batch fails")
        return y + torch.rand(1)


def everything(model: nn.Module) -> dict[str, Any]:
    """All that a model has, by identity where it has one, and tensors by their bytes too."""
    found: dict[str, Any] = {"random": torch.get_rng_state().tolist()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found[f"{name}.{key}"] = {k: id(v) for k, v in value.items()}
            else:
                found[f"{name}.{key}"] = value if isinstance(value, bool) else id(value)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{name}.{key}.value"] = tensor.tolist()
                found[f"{name}.{key}.grad"] = (tensor.requires_grad, id(tensor.grad))
    return found


def eventful(training: bool) -> nn.Module:
    model = Eventful().train(training)
    model.get_submodule("drop").train(not training)
    data = batches()
    calibrated(model, data, config(fsq.Histogram()))
    model.get_submodule("first").register_forward_hook(lambda *_: None)
    model.get_submodule("first").act_obs.register_forward_pre_hook(lambda *_: None)
    return model


def raises(batch: Tensor) -> Tensor:
    raise KeyError("no such thing")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", ["quantize", "float", None])
def test_a_report_changes_nothing(training: bool, rank: Any) -> None:
    model, data = eventful(training), batches()
    before = everything(model)
    bridge.report(model, data, rank=rank)
    assert everything(model) == before
    found = model.get_submodule("second").act_obs.state["count"].item()
    model(data[0])
    assert model.get_submodule("second").act_obs.state["count"].item() == found + 64 * 16, "it records again"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        pytest.param(lambda m, x: bridge.report(m, [x[0], x[1] * math.nan]), RuntimeError, id="the model"),
        pytest.param(lambda m, x: bridge.report(m, [x[0], x[1][:, :3]]), RuntimeError, id="a layer"),
        pytest.param(lambda m, x: bridge.report(m, x, output=raises), KeyError, id="output"),
        pytest.param(lambda m, x: bridge.report(m, x, mask=raises), KeyError, id="mask"),
        pytest.param(lambda m, x: bridge.report(m, map(raises, x)), KeyError, id="batches"),
        pytest.param(lambda m, x: bridge.report(m, []), ValueError, id="no batches"),
    ],
)
def test_a_report_that_fails_changes_nothing(call: Callable[..., Any], error: type[Exception]) -> None:
    model, data = eventful(True), batches()
    before = everything(model)
    with pytest.raises(error):
        call(model, data)
    assert everything(model) == before


def test_what_is_compared_of_everything_is_seen_to_change() -> None:
    model = eventful(False)
    before = everything(model)
    model(batches()[0] * 9)
    changed = {key for key, value in everything(model).items() if before.get(key) != value}
    assert {"random", ".passes.value", "._buffers", "first.act_obs.count.value", "second.act_obs.max.value"} <= changed


def test_random_numbers_are_the_same_in_each_run() -> None:
    """The model adds a random number to its output, which would be an error of 0.1 in each."""
    model, data = eventful(False), batches()
    assert bridge.report(model, data).model_sqnr > 30


class Grows(nn.Module):
    """Writes to its input, and appends to a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, cache: list[torch.Tensor]) -> torch.Tensor:
        cache.append(x.mul_(2))
        return self.layer(torch.cat(cache))


def test_a_model_that_writes_to_its_batch_is_given_a_new_one_each_time() -> None:
    data = [(torch.randn(4, 16), [torch.randn(3, 16)]) for _ in range(3)]
    model = bridge.prepare_(Grows().eval(), config(fsq.MinMax()))
    bridge.calibrate(model, copy.deepcopy(data))
    kept = copy.deepcopy(data)
    found = bridge.report(model, data)
    assert all(torch.equal(a[0], b[0]) and len(b[1]) == 1 for a, b in zip(kept, data, strict=True))
    with torch.no_grad():
        exact = [model(*batch).numpy() for batch in copy.deepcopy(data)]
        bridge.convert_(model)
        other = [model(*batch).numpy() for batch in copy.deepcopy(data)]
    assert found.model_sqnr == pytest.approx(db(np.concatenate(exact), np.concatenate(other)), abs=1e-6)
    assert found.model_sqnr > 35


def test_a_layer_with_a_forward_of_its_own_keeps_it() -> None:
    model, data = calibrated(mlp(), batches()), batches()
    plain = model[2].forward
    model[2].forward = lambda x: plain(x) * 2
    own = model[2].forward
    exact = outputs(model, data)
    found = bridge.report(model, data)
    assert model[2].forward is own
    assert np.array_equal(outputs(model, data), exact)
    assert by_name(found)["2"].output_sqnr == pytest.approx(20 * math.log10(2), abs=0.1)  # the twin gives half of it


@pytest.mark.filterwarnings("ignore:torch.compile with fullgraph=True found no compiled frames")  # torch 2.12 warns
def test_a_compiled_model_is_reported_eagerly_and_not_compiled_anew() -> None:
    model, data = mlp(), batches()
    compiled = torch.compile(calibrated(model, data), backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(data[0])
        found = bridge.report(compiled, data)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(data[0])
    assert {layer.name for layer in found.layers} == {"0", "2", "4"}  # not _orig_mod.0
    assert found.model_sqnr == bridge.report(model, data).model_sqnr


# --- models and batches of all kinds ---------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.fc(x)


@pytest.mark.parametrize("kind", ["mask", "attention_mask"])
def test_what_the_mask_leaves_out_does_not_count(kind: str) -> None:
    keep = torch.rand(2, 5) < 0.5
    x = torch.randn(2, 5, 16)
    model = calibrated(Named(), [x[keep]])
    padded = torch.where(keep[..., None], x, 99.0)
    alone = bridge.report(model, [x[keep]])
    if kind == "mask":
        found = bridge.report(model, [padded], mask=lambda batch: keep)
    else:
        found = bridge.report(model, [{"x": padded, "attention_mask": keep.long()}])
    assert found.model_sqnr == same(alone.model_sqnr)
    for field in ("values", "input_sqnr", "output_sqnr", "saturated", "clipping", "model_sqnr"):
        assert getattr(found.layers[0], field) == same(getattr(alone.layers[0], field)), field
    assert bridge.report(model, [padded]).layers[0].saturated > 0.1


def test_a_mask_of_the_input_of_a_strided_convolution_is_none_of_its_output() -> None:
    """As audio and character models have; positions of the output mix those that count and those that do not."""
    x, keep = torch.randn(2, 4, 12), torch.arange(12) < torch.tensor([[12], [7]])
    model = calibrated(nn.Sequential(nn.Conv1d(4, 3, 3, stride=2)), [x])
    (layer,) = bridge.report(model, [x], mask=lambda batch: keep).layers
    with torch.no_grad():
        exact, other = model(x), bridge.convert_(copy.deepcopy(model))(x)
    assert layer.values == 19 * 4
    assert layer.output_sqnr == same(db(exact, other))


def test_layers_that_the_rules_leave_in_float_stay_so() -> None:
    data, float8 = batches(), bridge.PRESETS["float8"]
    model = calibrated(mlp(), data)
    rules = StaticQuantConfig(torch.int8, rules={"0": None})
    found = bridge.report(model, data, config=rules)
    exact = torch.stack([bridge.unprepare_(copy.deepcopy(model))(x) for x in data])
    assert sorted(by_name(found)) == ["2", "4"]
    converted = bridge.convert_(copy.deepcopy(model), config=rules)
    assert found.model_sqnr == same(db(exact.detach(), torch.stack([converted(x) for x in data])))
    with pytest.raises(ValueError, match="leave every layer in float: there is nothing to report on"):
        bridge.report(model, data, config=StaticQuantConfig(torch.int8, rules={"*": None}))
    mixed = StaticQuantConfig(torch.int8, rules={"2": float8})
    report = bridge.report(calibrated(mlp(), data, mixed), data, config=mixed)
    assert "float8_e4m3fn" in by_name(report)["2"].path


def test_a_part_that_is_converted_already_is_part_of_the_model() -> None:
    data = batches()
    body = bridge.convert_(calibrated(mlp(), data))
    model = calibrated(nn.Sequential(body, nn.Linear(8, 8), nn.Linear(8, 4)).eval(), data)
    assert {name: layer.hands_on for name, layer in by_name(bridge.report(model, data)).items()} == {"1": "2", "2": ""}


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "graph breaks"])
def test_chains_are_seen_however_often_one_asks_and_a_compilation_is_left_alone(broken: bool) -> None:
    class Breaks(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[2](self[1](self[0](x)))
            if broken:
                torch._dynamo.graph_break()
            return self[4](self[3](x))

    data, graphs = batches(1), []
    model = calibrated(Breaks(*mlp()).eval(), data)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            assert by_name(bridge.report(model, data, rank=None))["0"].hands_on == "relu 2"
        bridge.convert_(model)
        for _ in range(2):
            assert len(bridge.chains(model, data[0])) == 2 - broken
    assert str(bridge.chains(torch.compile(model), data[0])[0]) == "0 -> relu 2"
    torch._dynamo.reset()
    torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)(data[0])
    assert len(graphs) == 1 + broken


def test_what_is_no_model_config_or_function_is_refused() -> None:
    data = batches()
    model = calibrated(mlp(), data)
    for call, message in (
        (lambda: bridge.report("model", data), "model is a str; give a torch.nn.Module"),
        (lambda: bridge.report(model, data, config="int8"), "config is 'int8'; give a StaticQuantConfig"),
        (lambda: bridge.report(model, data, output="logits"), "output is a str; give a function from what the model"),
        (lambda: bridge.prepare_(mlp(), INT8, "0.*"), "filter_fn is a str; give a function from a module and its"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    with pytest.raises(
        ValueError, match=r"0 has observers, which would record this call; call convert_\(model\) first"
    ):
        bridge.chains(model, data[0])


def test_a_mask_that_fits_no_input_is_refused() -> None:
    model = calibrated(Named(), [torch.ones(2, 5, 16)])
    with pytest.raises(ValueError, match=re.escape("mask(batch) has shape (5, 2), and no layer's input")):
        bridge.report(model, [torch.ones(2, 5, 16)], mask=lambda batch: torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask is a Tensor; give a function from a batch to a bool tensor"):
        bridge.report(model, [torch.ones(2, 5, 16)], mask=torch.ones(2, 5, dtype=torch.bool))
    empty = bridge.report(model, [torch.ones(0, 5, 16)], mask=lambda batch: torch.ones(0, 5, dtype=torch.bool))
    assert empty.layers[0].values == 0


@pytest.mark.parametrize("batch", [torch.ones(3, 16), (torch.ones(3, 16),), {"x": torch.ones(3, 16)}], ids=type)
def test_batches_are_those_of_calibrate(batch: Any) -> None:
    found = bridge.report(calibrated(Named(), [batch]), [batch, batch])
    assert (found.batches, found.layers[0].values) == (2, 96)


class Repeated(nn.Module):
    """One layer under two names, called twice; another that never runs in a short pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a
        self.rare = nn.Linear(16, 16)

    def forward(self, x: Tensor, often: bool = False) -> Tensor:
        x = self.b(self.a(x))
        return self.rare(x) if often else x


def test_a_layer_that_is_called_twice_sums_over_its_calls() -> None:
    model, data = Repeated(), batches()
    calibrated(model, [(x, True) for x in data])
    layer = by_name(bridge.report(model, data))["a"]
    with torch.no_grad():
        second = nn.functional.linear(data, model.a.weight, model.a.bias)
    both = torch.cat([data, second])
    assert (layer.calls, layer.values) == (6, both.numel())
    qp = model.a.act_obs.calculate_qparams()
    assert layer.input_sqnr == same(db(both, fsq.fake_quantize(model.a.act_obs.spec, both, qp)))


def test_a_layer_that_never_ran_is_listed_last_and_says_so() -> None:
    model, data = Repeated(), batches()
    calibrated(model, [(x, True) for x in data])
    found = bridge.report(model, data)
    last = found.layers[-1]
    assert (last.name, last.calls, last.values) == ("rare", 0, 0)
    assert (last.output_sqnr, last.input_sqnr, last.saturated, last.model_sqnr, last.time_share) == (None,) * 5
    assert "\nrare   never ran in these batches\n" in str(found)
    assert json.loads(found.to_json())["layers"][-1]["output_sqnr"] is None
    # In some batches only: the others count as they are without it.
    some = by_name(bridge.report(model, [(data[0], True), data[1]]))
    assert some["rare"].calls == 1
    for rank in ("quantize", "float"):
        split = bridge.report(model, [(data[0], True), data[1]], rank=rank)
        whole, part = split.model_sqnr, by_name(split)["rare"].model_sqnr
        assert part > whole


@dataclasses.dataclass
class Result:
    loss: None
    hidden: Tensor


WRAPPED: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda y: (None, y, y * 0),
    "list": lambda y: [y],
    "dict": lambda y: {"name": "x", "y": y},
    "dataclass": lambda y: Result(None, y),
}


class Wrapped(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(16, 8), kind

    def forward(self, x: Tensor) -> Any:
        return WRAPPED[self.kind](self.fc(x))


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_first_tensor_of_what_a_model_returns_is_compared(kind: str) -> None:
    model, data = calibrated(Wrapped(kind), batches()), batches()
    found = bridge.report(model, data)
    assert found.model_sqnr == same(found.layers[0].output_sqnr)


def test_what_is_compared_can_be_chosen() -> None:
    model = calibrated(mlp(), batches())
    # A tensor in which nothing is lost.
    assert bridge.report(model, batches(), output=lambda y: torch.ones(3)).model_sqnr == math.inf


def test_time_is_measured_of_each_layer_and_of_the_whole() -> None:
    data = batches(5)
    found = bridge.report(calibrated(mlp(), data), data, rank=None)
    assert all(layer.milliseconds > 0 for layer in found.layers)
    # A share is the median of shares: no layer takes more than the pass that it is part of.
    assert all(0 < layer.time_share < 1 for layer in found.layers)
    assert found.milliseconds > max(layer.milliseconds for layer in found.layers)


def test_a_layer_whose_calibration_saw_nothing_is_named_as_in_conversion() -> None:
    model = calibrated(Repeated(), batches())
    with pytest.raises(CalibrationError) as refused:
        bridge.report(model, batches())
    with pytest.raises(CalibrationError) as converting:
        bridge.convert_(model)
    assert str(refused.value) == str(converting.value)
    assert "\n  rare: nothing was seen" in str(refused.value)


@pytest.mark.cuda
def test_cuda_model_is_reported_as_on_the_cpu() -> None:
    """Inputs have the same bits; the products differ by float32 sums, as in the test with numpy."""
    model, data = calibrated(mlp(), batches()), batches()
    host, device = bridge.report(model, data), bridge.report(model.cuda(), data.cuda())
    for ours, theirs in zip(device.layers, host.layers, strict=True):
        assert ours.name == theirs.name
        assert ours.output_sqnr == pytest.approx(theirs.output_sqnr, abs=1e-2)
    assert device.layers[0].time_share < 1


# --- the table, JSON, CSV, pictures ----------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Report:
    torch.manual_seed(0)
    data = batches()
    return bridge.report(calibrated(mlp(), data, config(fsq.Histogram())), data)


def layer(name: str, **changes: Any) -> LayerReport:
    values = dict.fromkeys((f.name for f in dataclasses.fields(LayerReport)), 12.25)
    return LayerReport(
        **{
            **values,
            "name": name,
            "calls": 1,
            "values": 8,
            "path": "int8 product",
            "hands_on": "",
            "recorded": None,
            **changes,
        }
    )


ODD = Report(
    (
        layer(
            "decoder." * 20 + "7.attention.out_proj",
            hands_on="gelu " + "b." * 60,
            output_sqnr=math.nan,
            model_sqnr=-math.inf,
            clipping=1e-9,
        ),
        layer("a", output_sqnr=-123.4, weight_sqnr=math.inf, predicted_input_sqnr=None, clipping=0.0, saturated=1.0),
    ),
    math.inf,
    1234.5,
    1,
    "float",
)


def test_the_table_has_a_row_for_each_layer_worst_first_in_100_columns(found: Report) -> None:
    lines = str(found).splitlines()
    assert lines[0].startswith(f"model's output {found.model_sqnr:.1f} dB; 3 layers, 3 batches, ")
    assert [line.split()[0] for line in lines[3:6]] == [layer.name for layer in found.layers]
    for line, layer in zip(lines[3:6], found.layers, strict=True):
        assert line.split()[1:5] == [
            f"{v:.1f}" for v in (layer.model_sqnr, layer.output_sqnr, layer.weight_sqnr, layer.input_sqnr)
        ]
    odd = str(ODD).splitlines()
    assert max(map(len, (*lines, *odd))) <= 100
    assert odd[3].startswith("decoder.decoder.….7.attention.out_proj ")
    assert odd[3].split()[1:3] == ["-inf", "nan"]
    assert odd[3].split()[6] == "<0.1%"
    assert odd[4].split() == ["a", "12.2", "-123.4", "inf", "12.2", "-", "0%", "100%", "1225%"]
    assert "1 batch," in odd[0]


def test_the_table_without_a_ranking_has_no_column_for_it(found: Report) -> None:
    plain = dataclasses.replace(found, rank=None)
    assert str(plain).splitlines()[2].split() == ["layer", "output", "weight", "input", "pred.", "clip", "sat.", "time"]


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("model.layers.3.q_proj", 30, "model.layers.3.q_proj"),
        ("model.layers.13.attention.q_proj", 28, "model.….13.attention.q_proj"),
        ("model.layers.13.attention.q_proj", 20, "model.….13.….q_proj"),
        ("averyveryverylongname", 10, "ave…ngname"),
    ],
)
def test_a_name_is_shortened_in_its_middle(name: str, width: int, expected: str) -> None:
    assert short(name, width) == expected
    assert len(expected) <= width


def floats(value: str | float | None) -> float | None:
    return None if value in (None, "") else float(value)


@pytest.mark.parametrize("odd", [False, True])
def test_json_and_csv_give_back_every_number(found: Report, odd: bool) -> None:
    found = ODD if odd else found

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    read = json.loads(found.to_json(), parse_constant=refused)
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert (read["batches"], read["rank"]) == (found.batches, found.rank)
    assert float(read["model_sqnr"]) == found.model_sqnr
    for layer, *texts in zip(found.layers, read["layers"], rows, strict=True):
        for text in texts:
            words = ("name", "path", "hands_on")
            assert [text.pop(word) for word in words] == [getattr(layer, word) for word in words]
            for key, value in text.items():
                # NaN is not equal to itself; its text is.
                assert repr(floats(value)) == repr(floats(getattr(layer, key))), key
            assert "recorded" not in text


def test_a_report_is_a_value(found: Report) -> None:
    assert copy.deepcopy(found) == found
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.rank = None  # type: ignore[misc]


MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".json": b"{", ".csv": b"name,"}


@pytest.mark.parametrize("suffix", MAGIC)
def test_a_file_is_written_in_the_form_of_its_suffix(found: Report, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"report{suffix.upper()}"
    path.write_text("old")
    found.save(path)
    assert path.read_bytes().startswith(MAGIC[suffix])
    assert list(tmp_path.iterdir()) == [path]
    if suffix in (".png", ".svg", ".pdf"):
        found.plot_layer("2", path)
        assert path.read_bytes().startswith(MAGIC[suffix])


def test_a_file_that_cannot_be_written_leaves_what_was_there(
    found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.csv"
    path.write_text("old")

    def fails(*args: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        found.save(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_bars_are_the_figures_of_the_report(found: Report) -> None:
    model, own, error = found.plot().axes
    for axis, values in ((model, "model_sqnr"), (own, "output_sqnr")):
        assert [bar.get_width() for bar in axis.patches] == [getattr(layer, values) for layer in found.layers]
    assert len(error.patches) == 2 * len(found.layers)
    assert [label.get_text() for label in model.get_yticklabels()] == [layer.name for layer in found.layers]
    assert len(dataclasses.replace(found, rank=None).plot().axes) == 2
    assert len(ODD.plot().axes) == 3  # no figure for NaN, Inf or None is no failure


@pytest.mark.parametrize("observer", [fsq.Histogram(), fsq.Percentile(90.0), fsq.SkipNonfinite(fsq.Mse())], ids=repr)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_a_histogram_is_drawn_as_a_density_with_the_range_on_it(observer: fsq.Observer, scale: float) -> None:
    data = batches() * scale
    data[0, 0, 0] = 100 * scale
    model = calibrated(mlp(), data, config(observer))
    found = bridge.report(model, data, rank=None)
    axis = found.plot_layer("0").axes[0]
    (stairs,) = [patch for patch in axis.patches if hasattr(patch, "get_data")]
    density, edges, _ = stairs.get_data()
    assert np.sum(density * np.diff(edges)) == pytest.approx(1, abs=1e-12)
    assert (edges[0], edges[-1]) == (data.min().item(), data.max().item())
    spec, qp = model[0].act_obs.spec, model[0].act_obs.calculate_qparams()
    ends = fsq.dequantize(spec, torch.tensor([-128, 127], dtype=torch.int8), qp).tolist()
    assert [line.get_xdata()[0] for line in axis.lines] == pytest.approx(ends, rel=1e-6)
    left, right = axis.get_xlim()
    assert left < min(ends[0], edges[0])
    assert right > max(ends[1], edges[-1])
    assert 3 <= len(axis.get_xticks()) <= 15


@pytest.mark.parametrize("value", [2.0, -0.7])
def test_a_constant_input_is_drawn_too(value: float) -> None:
    data = torch.full((1, 4, 16), value)
    found = bridge.report(calibrated(mlp(), data, config(fsq.Histogram())), data, rank=None)
    assert len(by_name(found)["0"].recorded.counts) == 1
    found.plot_layer("0").canvas.draw()


def test_several_scales_are_drawn_as_one_histogram() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(1), observer=fsq.Histogram())
    x = torch.randn(50, 3) * torch.tensor([1.0, 4.0, 0.1])
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    found = recorded(spec, state, fsq.calc_qparams(spec, state))
    assert found is not None
    assert (found.scales, sum(found.counts)) == (3, 150)
    assert found.edges[0] == x.min()
    assert found.high == pytest.approx(x.abs().max().item() * 127 / 127.5, rel=1e-6)


def test_without_matplotlib_a_picture_names_the_extra_and_a_table_needs_none(
    found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (found.plot, lambda: found.plot_layer("0"), lambda: found.save(tmp_path / "a.png")):
        with pytest.raises(ImportError, match=r"pip install 'functional-sq\[report\]'"):
            draw()
    assert not list(tmp_path.iterdir())
    found.save(tmp_path / "a.json")


# --- refusals --------------------------------------------------------------------------------------


def ready() -> nn.Module:
    return calibrated(mlp(), batches())


def nothing() -> Iterator[Tensor]:
    yield from ()


def sizes(y: Tensor) -> Tensor:
    """As many as are above 0: another number in each run."""
    return y[y > y.mean() + 1e-3 * y.std()]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: bridge.report(mlp(), batches()),
            ValueError,
            r"Sequential has no observed layers; call prepare_\(model, config\) and calibrate\(model, batches\) first",
            id="report(float model)",
        ),
        pytest.param(
            lambda: bridge.report(bridge.convert_(ready()), batches()),
            ValueError,
            r"no observed layers; .* and convert_\(model\) only after the report",
            id="report(converted model)",
        ),
        pytest.param(
            lambda: bridge.report(bridge.prepare_(mlp(), INT8), batches()),
            CalibrationError,
            r"3 layers cannot be converted, and the model is as it was: call calibrate.*\n  0: nothing was seen",
            id="report(model that is not calibrated)",
        ),
        pytest.param(
            lambda: bridge.report(ready(), nothing()),
            ValueError,
            r"no batches to report on; give at least one \(an iterator is used up once\)",
            id="report(empty)",
        ),
        pytest.param(
            lambda: bridge.report(ready(), batches(), rank="drop"),
            ValueError,
            "rank='drop'; use one of 'quantize', 'float', None",
            id="report(rank='drop')",
        ),
        pytest.param(
            lambda: bridge.report(ready(), batches(), on_unfit="skip"),
            ValueError,
            "on_unfit='skip'; use 'refuse' or 'float'",
            id="report(on_unfit='skip')",
        ),
        pytest.param(
            lambda: bridge.report(ready(), batches(), config=StaticQuantConfig(torch.uint8)),
            ValueError,
            "^0: the config quantizes the activations to torch.uint8, .* observed for torch.int8; use the dtype",
            id="report(config of another dtype)",
        ),
        pytest.param(
            lambda: bridge.report(ready(), batches(), output=lambda y: y.argmax(-1)),
            TypeError,
            "the output to compare is a tensor of torch.int64; give output=, .* real values",
            id="report(output of integers)",
        ),
        pytest.param(
            lambda: bridge.report(ready(), batches(), output=lambda y: "text"),
            TypeError,
            "the output to compare is a str; give output=",
            id="report(output without a tensor)",
        ),
        pytest.param(
            lambda: bridge.report(calibrated(mlp(), batches(), config(fsq.Fixed(-1, 1))), batches(), output=sizes),
            ValueError,
            r"the float model's output has shape \(\d+,\) and the quantized one's \(\d+,\); give output=",
            id="report(output of another shape)",
        ),
        pytest.param(lambda: ODD.save("report.txt"), ValueError, r"'report.txt' .* '.txt'; use one of .json, .csv, "),
        pytest.param(lambda: ODD.save("report"), ValueError, "'report' has the suffix ''; use one of .json, .csv"),
        pytest.param(lambda: ODD.plot("r.json"), ValueError, "'.json'; use one of .png, .svg, .pdf", id="plot(.json)"),
        pytest.param(
            lambda: ODD.plot_layer("b"), ValueError, "no layer of the report is called 'b'; use one of", id="plot_layer"
        ),
        pytest.param(
            lambda: ODD.plot_layer("a"),
            ValueError,
            r"a: the recorded state has no histogram; .*observer=fsq.Histogram\(\)\) and calibrate again",
            id="plot_layer(no histogram)",
        ),
    ],
)
def test_a_refusal_says_value_rule_and_remedy(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_oracle_is_the_package() -> None:
    """The two hand-written quantizations above are those of the longer oracle, which imports no torch."""
    x = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    k, scale, saturates = range_codes(x, x.min(), x.max())
    assert (oracle.FORMATS["int8"].qmin, oracle.FORMATS["int8"].qmax) == (-128, 127)
    assert np.abs(x - k * scale)[~saturates].max() <= (0.5 + 255 * 2**-24) * scale
    wk, w_scale = row_codes(x)
    assert np.abs(x - wk * w_scale).max() <= (0.5 + 255 * 2**-24) * w_scale.max()
