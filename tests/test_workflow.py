"""From a float model to a quantized one: prepare_, calibrate, convert_, and torchao's `quantize_`."""

from __future__ import annotations

import copy
import dataclasses
import gc
import re
import types
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import functional_sq as fsq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    import bridge
    from bridge import CalibrationError, ObservedLinear, QuantizedLinear, StaticQuantConfig
    from bridge.torchao import compute_error

INT8 = StaticQuantConfig(torch.int8)


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def batches(n: int = 4, rows: int = 8) -> Tensor:
    return torch.randn(n, rows, 16)


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.children()]


def prepared(model: nn.Module, config: StaticQuantConfig = INT8) -> nn.Module:
    return bridge.prepare_(model.eval(), config)


def calibrated(model: nn.Module, config: StaticQuantConfig = INT8, data: Tensor | None = None) -> nn.Module:
    bridge.calibrate(prepared(model, config), batches() if data is None else data)
    return model


# --- the short way ---------------------------------------------------------------------------------


SQNR = {torch.uint8: 37, torch.int8: 37, torch.float8_e4m3fn: 25, torch.float8_e5m2: 19}
"""dB that a model of two layers must reach, a decibel or two below what its four roundings give.

An operand of range r is rounded to 255 steps: noise of r / (255 sqrt 12). Normal inputs that reach
3.7 deviations: 41.5 dB; behind a ReLU 44.5; weights that are uniform: 48. The four together: 38.6.
A float with m bits of fraction is rounded by 2**-m / sqrt 12 of a significand of 1.47 in the mean
square: 32.2 dB for m = 3, 26.2 for m = 2. Four together cost 6 dB: 26.2 and 20.2.
"""


@pytest.mark.parametrize("dtype", SQNR, ids=str)
def test_a_two_layer_model_keeps_its_output(dtype: torch.dtype) -> None:
    model = two_layers()
    x = batches(1, 256)
    expected = model(x)
    bridge.convert_(calibrated(model, StaticQuantConfig(dtype), x))
    assert kinds(model) == ["QuantizedLinear", "ReLU", "QuantizedLinear"]
    assert compute_error(expected, model(x)) > SQNR[dtype]


def test_prepared_is_the_float_model_in_bits_and_loads_its_checkpoint() -> None:
    model, other = two_layers(), two_layers()
    x = batches()
    expected = model(x)
    names = [name for name, _ in model.named_parameters()]
    prepared(model)
    assert torch.equal(model(x), expected)
    assert [name for name, _ in model.named_parameters()] == names
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))
    assert model[0].act_obs.state["count"].item() == 2 * x.numel()


def test_statistics_saved_by_one_process_convert_in_another() -> None:
    first, second = two_layers(), two_layers()
    calibrated(first)
    prepared(second).load_state_dict(first.state_dict(), strict=True)
    x = batches()
    assert torch.equal(bridge.convert_(second)(x), bridge.convert_(first)(x))


class Named(nn.Module):
    """Takes its input by name, and a mask beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        return self.fc(x)


def largest(model: nn.Module) -> float:
    return model.get_submodule("fc").act_obs.state["max"].item()


@pytest.mark.parametrize(
    "batch",
    [torch.ones(2, 3, 16), (torch.ones(2, 3, 16),), [torch.ones(2, 3, 16)], {"x": torch.ones(2, 3, 16)}],
    ids=lambda b: type(b).__name__,
)
def test_a_batch_is_a_tensor_positional_arguments_or_keyword_arguments(batch: object) -> None:
    model = prepared(Named())
    assert bridge.calibrate(model, [batch, batch]) == 2
    assert model.fc.act_obs.state["count"].item() == 2 * 96


def test_padding_is_left_out_by_the_attention_mask_of_a_batch_or_by_a_function() -> None:
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.where(keep[..., None] == 1, 1.0, 99.0).expand(2, 3, 16)
    added = (1.0 - keep) * torch.finfo(torch.float32).min
    for mask, batch in (
        (None, {"x": x, "attention_mask": keep}),
        (None, {"x": x, "attention_mask": keep.float()}),
        (None, {"x": x, "attention_mask": added}),
        (lambda b: keep != 0, x),
    ):
        model = prepared(Named())
        bridge.calibrate(model, [batch], mask=mask)
        assert largest(model) == 1.0
        assert model.fc.act_obs.state["count"].item() == 3 * 16
        model(x)  # the mask was for that batch alone
        assert largest(model) == 99.0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_of_positions_that_no_input_has_is_refused_and_nothing_recorded(compiled: bool) -> None:
    """Padding would be recorded, and the range be that of padding, without a word."""
    model = prepared(torch.compile(Named(), fullgraph=True) if compiled else Named())
    x = torch.ones(2, 3, 16)
    bridge.calibrate(model, [x], mask=lambda batch: torch.ones(2, 3, dtype=torch.bool))
    before = copy.deepcopy(model.fc.act_obs.state)
    for shape in ((2, 4), (3, 2), (2, 1, 3), (7,)):
        with pytest.raises(ValueError, match=re.escape(f"mask(batch) has shape {shape}, and no layer's input has")):
            bridge.calibrate(model, [99 * x], mask=lambda batch, shape=shape: torch.ones(shape, dtype=torch.bool))
        assert model.fc.act_obs.state == before
    for mask, found in (([True], "list"), (torch.ones(2, 3), "torch.float32")):
        with pytest.raises(TypeError, match=rf"mask\(batch\) is a {found}; return a bool tensor"):
            bridge.calibrate(model, [x], mask=lambda batch, mask=mask: mask)
    assert bridge.calibrate(model, [x, x], mask=lambda batch: None) == 2


class Pooled(nn.Module):
    """A pooler's input has as many features as there are tokens, or sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.pooler = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pooler(self.tokens(x)[:, 0])


@pytest.mark.parametrize("sequences", [3, 4, 12])
def test_a_mask_is_of_tokens_and_never_of_features(sequences: int) -> None:
    model, x = prepared(Pooled()), torch.randn(sequences, 4, 4)
    keep = torch.ones(sequences, 4, dtype=torch.bool)
    keep[:, 2:] = False
    bridge.calibrate(model, [x], mask=lambda batch: keep)
    assert int(model.tokens.act_obs.state["count"]) == int(keep.sum()) * 4
    assert int(model.pooler.act_obs.state["count"]) == sequences * 4
    assert bridge.report(model, [x], mask=lambda batch: keep).layers[0].values in (int(keep.sum()) * 4, sequences * 4)


def test_scores_that_are_added_mask_nothing_where_all_are_zero() -> None:
    model, x = prepared(Named()), torch.randn(2, 3, 16)
    bridge.calibrate(model, [{"x": x, "attention_mask": torch.zeros(2, 3)}])
    assert int(model.fc.act_obs.state["count"]) == x.numel()
    bridge.calibrate(model, [{"x": x, "attention_mask": torch.zeros(2, 3, dtype=torch.long)}])  # nothing but padding
    assert int(model.fc.act_obs.state["count"]) == x.numel()


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, decoder_inputs_embeds: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x), self.decoder(decoder_inputs_embeds)


def test_a_decoder_of_the_encoders_length_loses_no_token() -> None:
    x, keep, other = torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])
    found = []
    for masks in ({}, {"decoder_attention_mask": other}):
        for y in (x, x[:, :2]):
            model = prepared(EncoderDecoder())
            bridge.calibrate(model, [{"x": x, "decoder_inputs_embeds": y, "attention_mask": keep, **masks}])
            found.append([int(layer.act_obs.state["count"]) // 4 for layer in model.children()])
    assert found == [[6, 6], [3, 4], [4, 4], [3, 4]]


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_labels_are_a_second_sequence_for_an_encoder_decoder_alone(encoder_decoder: bool) -> None:
    """The batches of a training loop have them; a decoder alone, or a tagger, must not record its padding for that."""
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]])
    model = prepared(Named())
    model.config = types.SimpleNamespace(is_encoder_decoder=encoder_decoder)
    bridge.calibrate(model, [{"x": torch.ones(2, 3, 16), "attention_mask": keep, "labels": torch.ones_like(keep)}])
    assert int(model.fc.act_obs.state["count"]) == 16 * (6 if encoder_decoder else 3)


def test_a_mask_is_dropped_when_a_batch_fails() -> None:
    model = prepared(Named())
    with pytest.raises(RuntimeError):
        bridge.calibrate(model, [{"x": torch.ones(2, 3, 5), "attention_mask": torch.ones(2, 3)}])
    assert model.fc.act_obs.mask is None


def test_calibration_stops_after_max_batches_and_takes_no_more_from_the_iterator() -> None:
    model, data = prepared(two_layers()), iter(batches(5))
    assert bridge.calibrate(model, data, max_batches=2) == 2
    assert len(list(data)) == 3
    assert model[0].act_obs.state["count"].item() == 2 * 8 * 16


def test_calibration_goes_on_where_it_stopped() -> None:
    data = batches(6)
    once, twice = copy.deepcopy(two := two_layers()), two
    calibrated(once, data=data)
    prepared(twice)
    for part in data.split(2):
        bridge.calibrate(twice, part)
    x = batches()
    assert torch.equal(bridge.convert_(twice)(x), bridge.convert_(once)(x))


def test_calibration_keeps_no_graph() -> None:
    model = prepared(two_layers())
    bridge.calibrate(model, batches())
    assert not any(b.requires_grad for b in model.buffers())
    model(batches()).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("mode", [None, "max-autotune"])
def test_a_model_compiled_before_the_observers_go_in_records_and_converts_the_same(mode: str | None) -> None:
    plain = two_layers()
    model = torch.compile(copy.deepcopy(plain), mode=mode, fullgraph=True)
    data = batches(3)
    with torch.no_grad():
        model(data[0])
    seen: list[str] = []
    bridge.prepare_(model, INT8, lambda module, name: not seen.append(name))
    assert seen == ["0", "2"]  # not _orig_mod.0
    bridge.calibrate(model, data[:1])
    with torch.compiler.set_stance("fail_on_recompile"):
        bridge.calibrate(model, data[1:])
    calibrated(plain, data=data)
    # What the second layer sees comes from a float product, which may be compiled to another kernel.
    for name, value in plain[0].act_obs.state.items():
        assert torch.equal(model.get_submodule("0").act_obs.state[name], value)
    assert model.get_submodule("2").act_obs.state["count"].item() == 3 * 8 * 32
    model._orig_mod.load_state_dict(plain.state_dict(), strict=True)
    bridge.convert_(model)
    bridge.convert_(plain)
    with torch.no_grad():
        assert torch.equal(model(data[0]), plain(data[0]))


# --- the gate at conversion ------------------------------------------------------------------------


def with_first_compiled(model: nn.Sequential) -> nn.Sequential:
    model[0] = torch.compile(model[0], backend="eager")
    return model


@pytest.mark.parametrize("before", [True, False], ids=["before", "while prepared"])
def test_a_layer_compiled_by_itself_is_swapped_with_what_its_wrapper_calls(before: bool) -> None:
    model, data = two_layers(), batches()
    weight = weakref.ref(model[0].weight)
    expected = bridge.convert_(calibrated(copy.deepcopy(model), data=data))(data[0])
    model = calibrated(with_first_compiled(model) if before else model, data=data)
    model = bridge.convert_(model if before else with_first_compiled(model))
    assert type(model[0]._orig_mod) is bridge.QuantizedLinear
    assert torch.equal(model(data[0]), expected)
    again = torch.compile(model[0], backend="eager")
    assert torch.equal(again(data[0]), model[0](data[0]))
    gc.collect()
    assert weight() is None
    model[0]._orig_mod.weight_codes.zero_()
    assert not torch.equal(model(data[0]), expected)


def test_a_model_that_is_one_compiled_layer_is_converted_in_its_wrapper() -> None:
    model, data = torch.compile(nn.Linear(16, 8).eval(), backend="eager"), batches()
    bridge.convert_(calibrated(model, data=data))
    assert torch.equal(model(data[0]), model._orig_mod(data[0]))


def test_a_model_made_in_inference_mode_is_converted_reported_and_loaded_in_it() -> None:
    data = batches()
    with torch.inference_mode():
        model = two_layers()
    calibrated(model, data=data)
    bridge.report(model, data[:1])
    y = bridge.convert_(model)(data[0])
    with torch.inference_mode():
        empty = bridge.QuantizedLinear(16, 32, model[0].act_spec, model[0].weight_spec)
        empty.load_state_dict(model[0].state_dict())
        copied = copy.deepcopy(model)
        copied.load_state_dict(model.state_dict())
        assert torch.equal(copied(data[0]), y)
    empty.load_state_dict(model[0].state_dict())
    assert torch.equal(empty(data[0]), model[0](data[0]))


def test_where_a_warning_is_an_error_nothing_was_changed() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GRU(16, 8)).eval()
    half = prepared(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    half[0](batches()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="1 module left in float"):
            prepared(model)
        with pytest.raises(UserWarning, match="1 layer left in float"):
            bridge.convert_(half, on_unfit="float")
    assert kinds(model) == ["Linear", "GRU"]
    assert kinds(half) == ["ObservedLinear", "ObservedLinear"]


def weight_is_a_buffer(layer: nn.Linear) -> None:
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)


def bias_is_a_tensor(layer: nn.Linear) -> None:
    bias = layer.bias.detach()
    del layer.bias
    layer.bias = bias


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (weight_is_a_buffer, "weight"),
        (bias_is_a_tensor, "bias"),
        (lambda layer: setattr(layer, "weight", None), "weight"),
        (lambda layer: delattr(layer, "weight"), "weight"),
    ],
)
def test_a_layer_whose_weight_or_bias_is_no_parameter_stays_in_float(
    change: Callable[[nn.Linear], None], name: str
) -> None:
    model = two_layers()
    change(model[2])
    with pytest.warns(UserWarning, match=rf"2: its {name} is no parameter; register it as torch\.nn\.Parameter"):
        prepared(model)
    assert kinds(model) == ["ObservedLinear", "ReLU", "Linear"]


def test_the_default_device_does_not_matter_for_a_model_that_is_elsewhere() -> None:
    model, data = two_layers(), batches()
    expected = bridge.convert_(calibrated(copy.deepcopy(model), data=data))(data[0])
    with torch.device("meta"):
        prepared(model)
    bridge.calibrate(model, data)
    assert torch.equal(bridge.convert_(model)(data[0]), expected)


class Branches(nn.Module):
    """Two of its three layers never run."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(16, 8)
        self.experts = nn.ModuleList([nn.Linear(16, 8), nn.Linear(16, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_layers_that_never_ran_are_named_all_at_once_and_the_model_is_as_it_was() -> None:
    model = calibrated(Branches())
    before = dict(model.named_modules())
    with pytest.raises(CalibrationError, match="2 layers cannot be converted") as caught:
        bridge.convert_(model)
    assert "\n  experts.0: nothing was seen" in str(caught.value)
    assert "\n  experts.1: nothing was seen" in str(caught.value)
    assert "used" not in str(caught.value)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(after[name] is module for name, module in before.items())


@pytest.mark.parametrize(("bad", "kind"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
def test_nan_and_inf_in_activations_are_named_with_a_remedy(bad: float, kind: str) -> None:
    data = batches()
    data[1, 0, 0] = bad
    model = calibrated(two_layers(), data=data)
    with pytest.raises(CalibrationError, match=rf"0: {kind} was seen.*remove such values.*a mask, or .* SkipNonfinite"):
        bridge.convert_(model)
    assert kinds(model)[0] == "ObservedLinear"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_in_a_weight_are_named_with_a_remedy(bad: float) -> None:
    model = two_layers()
    with torch.no_grad():
        model[2].weight[0, 0] = bad
    calibrated(model)
    with pytest.raises(CalibrationError, match=r"1 layer .*\n  2: weight or bias has NaN or Inf; mend it, or leave"):
        bridge.convert_(model)


def test_an_input_of_zeros_is_named_and_a_weight_of_zeros_is_exact() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1.0)  # behind the ReLU nothing is left
    x = batches()
    with pytest.raises(CalibrationError, match=r"1 layer cannot.*\n  2: only zeros were seen.*calibrate with data"):
        bridge.convert_(calibrated(model, data=x))
    with torch.no_grad():
        model[0].bias.fill_(0.5)
    model[2].act_obs.reset((32,))
    expected = model(x[0])
    assert compute_error(expected, bridge.convert_(model)(x[0])) > 40


def test_min_rows_is_what_each_layer_must_have_seen() -> None:
    model = calibrated(two_layers(), data=batches(1, 2))
    with pytest.raises(CalibrationError, match=r"\n  0: ran on 2 rows, at least 3 needed; calibrate with more"):
        bridge.convert_(model, min_rows=3)
    with pytest.raises(CalibrationError, match=r"\n  0: ran on 2 rows, at least 3 needed; calibrate with more"):
        bridge.report(model, batches(), min_rows=3)
    bridge.convert_(model, min_rows=2)


def test_unfit_layers_are_left_in_float_where_the_user_says_so_and_are_listed() -> None:
    model = Branches().eval()
    plain = list(model.experts)
    calibrated(model)
    left = r"2 layers left in float:\n  experts\.0: nothing.*\n  experts\.1: "
    data, rows = batches(), model.used.rows
    with pytest.warns(UserWarning, match=left) as told:
        report = bridge.report(model, data, on_unfit="float")
    assert (told[0].filename, [layer.name for layer in report.layers]) == (__file__, ["used"])
    assert model.used.rows == rows
    assert [expert.act_obs.fault() is not None for expert in model.experts] == [True, True]
    with pytest.warns(UserWarning, match=left):
        bridge.convert_(model, on_unfit="float")
    assert isinstance(model.used, QuantizedLinear)
    assert all(a is b for a, b in zip(model.experts, plain, strict=True))


def test_what_the_rules_of_a_config_leave_in_float_need_have_seen_nothing() -> None:
    model = calibrated(Branches())
    data, rest = batches(), {"experts.1": None}
    with pytest.raises(
        CalibrationError, match=r"1 layer cannot be .*\(a rule, .*leaves them in float\):\n  experts\.0: "
    ):
        bridge.convert_(model, config=StaticQuantConfig(torch.int8, rules=rest))
    config = StaticQuantConfig(torch.int8, rules={"experts.0": None, **rest})
    assert [layer.name for layer in bridge.report(model, data, config=config).layers] == ["used"]
    bridge.convert_(model, config=config)
    assert isinstance(model.used, QuantizedLinear)
    assert [type(expert) for expert in model.experts] == [nn.Linear, nn.Linear]


def test_a_model_without_one_fit_layer_is_refused_also_where_floats_are_allowed() -> None:
    model = prepared(two_layers())
    with pytest.raises(CalibrationError, match="2 layers cannot be converted"):
        bridge.convert_(model, on_unfit="float")
    assert kinds(model) == ["ObservedLinear", "ReLU", "ObservedLinear"]


def test_a_layer_converted_in_inference_mode_is_an_ordinary_module_outside_of_it() -> None:
    model, x = calibrated(two_layers()), batches()
    with torch.inference_mode():
        bridge.convert_(model)
    expected = model(x)
    model.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert torch.equal(model(x), expected)


def test_a_different_mask_for_each_batch_does_not_recompile() -> None:
    model = prepared(torch.compile(Named(), fullgraph=True))
    keeps = torch.rand(3, 2, 5) < 0.5
    data = [{"x": torch.randn(2, 5, 16), "attention_mask": keep.long()} for keep in keeps]
    bridge.calibrate(model, data[:1])
    with torch.compiler.set_stance("fail_on_recompile"):
        bridge.calibrate(model, data[1:])
    kept = torch.cat([batch["x"][keep] for batch, keep in zip(data, keeps, strict=True)])
    assert model.fc.act_obs.state["count"].item() == kept.numel()
    assert largest(model) == kept.max()


# --- models of all kinds ---------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer under two names, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a
        self.tied = nn.Linear(16, 16)
        self.tied.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.b(self.a(x)))


def test_a_layer_used_twice_stays_one_layer_and_tied_weights_stay_tied_until_conversion() -> None:
    model = prepared(Shared())
    assert model.a is model.b
    assert model.a.weight is model.tied.weight
    x = batches()
    bridge.calibrate(model, x)
    assert model.a.act_obs.state["count"].item() == 2 * x.numel()
    bridge.convert_(model)
    assert model.a is model.b
    assert isinstance(model.a, QuantizedLinear)
    assert isinstance(model.tied, QuantizedLinear)
    assert torch.equal(model.tied.weight_codes, model.a.weight_codes)
    assert model(x).shape == x.shape


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


def test_the_projection_inside_multihead_attention_is_left_alone() -> None:
    model = Attention().eval()
    x = batches()
    expected = model(x)
    with pytest.warns(UserWarning, match=r"1 module left in float:\n  attention: .*MultiheadAttention multiplies its"):
        prepared(model)
    bridge.calibrate(model, x)
    bridge.convert_(model)
    assert type(model.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert isinstance(model.fc, QuantizedLinear)
    assert compute_error(expected, model(x)) > SQNR[torch.int8]


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_subclass_that_computes_something_else_is_left_alone() -> None:
    with pytest.warns(UserWarning, match=r"1 module left in float:\n  0: Scaled has a forward of its own"):
        model = prepared(nn.Sequential(Scaled(16, 16), nn.Linear(16, 8)))
    assert kinds(model) == ["Scaled", "ObservedLinear"]


def tensor_form() -> nn.Linear:
    model = calibrated(nn.Sequential(nn.Linear(16, 16)), dataclasses.replace(INT8, form="tensor"))
    return bridge.convert_(model)[0]


def weight_alone() -> nn.Linear:
    layer = tensor_form()
    layer.weight = nn.Parameter(layer.weight.original_weight_tensor)
    return layer


def by_torchao() -> nn.Linear:
    model = nn.Sequential(nn.Linear(16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao_quantize_(model, Int8WeightOnlyConfig())
    return model[0]


@pytest.mark.parametrize("make", [tensor_form, weight_alone, by_torchao])
def test_a_layer_with_a_quantized_weight_stays_what_it_is(make: Callable[[], nn.Linear]) -> None:
    layer, x = make(), torch.randn(5, 16)
    expected = layer(x)

    def insert(model: nn.Module, config: StaticQuantConfig) -> None:
        bridge.insert_observers_(model, *(bridge.ObserverModule(s) for s in (config.activation, config.weight)))

    def step(model: nn.Module, config: StaticQuantConfig) -> None:
        torchao_quantize_(model, dataclasses.replace(config, step="prepare"))

    for prepare in (bridge.prepare_, insert, step):
        model = nn.Sequential(layer, nn.Linear(16, 8)).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepare(model, INT8)
        told = [str(w.message) for w in caught if "left in float" in str(w.message)]
        assert ["0: its weight is a" in each and "already" in each for each in told] == (
            [True] if make is by_torchao and prepare is bridge.prepare_ else []
        )
        assert model[0] is layer
        assert isinstance(model[1], ObservedLinear)
    assert torch.equal(layer(x), expected)
    observers = (bridge.ObserverModule(spec) for spec in (INT8.activation, INT8.weight))
    with pytest.raises(ValueError, match=f"is a {type(layer.weight).__name__} already; give the float layer"):
        ObservedLinear.from_float(layer, *observers)


def test_the_filter_chooses_by_name() -> None:
    model = nn.ModuleDict({"encoder": two_layers(), "head": nn.Linear(8, 2)})
    seen: list[str] = []
    bridge.prepare_(model, INT8, lambda module, name: bool(seen.append(name)) or name.startswith("encoder."))
    assert seen == ["encoder.0", "encoder.2", "head"]
    assert kinds(model["encoder"]) == ["ObservedLinear", "ReLU", "ObservedLinear"]
    assert type(model["head"]) is nn.Linear


class Aliased(nn.Module):
    """One layer by two names, as wrappers of Hugging Face have it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(16, 16)), nn.Linear(16, 4)
        self.body = self.backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def not_backbone(module: nn.Module, name: str) -> bool:
    return not name.startswith("backbone")


@pytest.mark.parametrize("step", ["convert_", "quantize_", "reread_", "report", "insert_observers_"])
def test_a_layer_with_two_names_gets_one_answer_at_every_step(step: str) -> None:
    model, data, rules = Aliased().eval(), torch.randn(2, 4, 16), {"body.0": None}
    observers = [bridge.ObserverModule(spec) for spec in (INT8.activation, INT8.weight)]
    if step != "insert_observers_":
        bridge.prepare_(model, INT8)
        bridge.calibrate(model, data)
    before = [type(module) for module in model.modules()]
    ruled = StaticQuantConfig(torch.int8, rules=rules)
    calls = {
        "convert_": lambda: bridge.convert_(model, ruled),
        "quantize_": lambda: bridge.quantize_(model, INT8, not_backbone),
        "reread_": lambda: bridge.reread_(model, ruled),
        "report": lambda: bridge.report(model, data, config=ruled),
        "insert_observers_": lambda: bridge.insert_observers_(model, *observers, not_backbone),
    }
    with pytest.raises(ValueError, match=r"'(body|backbone)\.0' and '(body|backbone)\.0' are one (layer|module), "):
        calls[step]()
    assert [type(module) for module in model.modules()] == before


def test_a_layer_with_two_names_gets_one_answer() -> None:
    float8 = StaticQuantConfig(torch.float8_e4m3fn)
    for rules in ({"backbone.*": None}, {"body.0": None}, {"backbone.0": float8, "body.0": None}):
        model = Aliased().eval()
        with pytest.raises(
            ValueError, match=r"'backbone\.0' and 'body\.0' are one layer, .* let both names say the same"
        ):
            bridge.prepare_(model, StaticQuantConfig(torch.int8, rules=rules))
        assert type(model.body[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"'body\.0' and 'backbone\.0' are one module, which the filter picks as the"):
        bridge.prepare_(model, INT8, not_backbone)
    bridge.prepare_(model, StaticQuantConfig(torch.int8, rules={"b*.0": None}))
    assert (type(model.body[0]), type(model.head)) == (nn.Linear, ObservedLinear)
    assert type(bridge.prepare_(Aliased().eval(), INT8).body[0]) is ObservedLinear


class Gained(nn.Linear):
    """Has a parameter that its parent uses."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        self.gain = nn.Parameter(torch.ones(n))


def test_a_subclass_with_parameters_of_its_own_is_left_alone() -> None:
    with pytest.warns(UserWarning, match="0: Gained has gain of its own, which a quantized layer would not have"):
        model = prepared(nn.Sequential(Gained(16, 16), nn.Linear(16, 8)))
    assert kinds(model) == ["Gained", "ObservedLinear"]


def test_the_reason_is_told_where_nothing_can_be_quantized() -> None:
    for layer, reason in ((nn.LSTM(4, 4), "LSTM has weight_ih_l0 of its own"), (nn.LazyLinear(4), "has no weight yet")):
        with pytest.raises(
            ValueError, match=rf"(?s)no module of Sequential is one of .* must stay in float:.*{reason}"
        ):
            bridge.prepare_(nn.Sequential(layer).eval(), INT8)


def test_preparing_twice_adds_the_layers_that_are_still_float() -> None:
    model = two_layers()
    bridge.prepare_(model, INT8, lambda module, name: name == "0")
    first = model[0]
    bridge.prepare_(model, StaticQuantConfig(torch.uint8))
    assert model[0] is first
    assert [model[i].act_obs.spec.dtype for i in (0, 2)] == [torch.int8, torch.uint8]


# --- refusals --------------------------------------------------------------------------------------


def no_batches() -> Iterator[Tensor]:
    yield from ()


def quantize(model: nn.Module, filter_fn: object) -> None:
    bridge.quantize_(model, StaticQuantConfig(torch.int8, step="prepare"), filter_fn, device="cpu")


def insert(model: nn.Module, filter_fn: object = None) -> None:
    act, weight = (bridge.ObserverModule(fsq.QuantSpec(torch.int8, fsq.PerTensor())) for _ in range(2))
    bridge.insert_observers_(model, act, weight, filter_fn)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()), {"input": batches()}),
            TypeError,
            r"batches is one dict; give an iterable of batches: \[batch\]",
            id="calibrate(one mapping)",
        ),
        pytest.param(
            lambda: bridge.report(prepared(two_layers()), {"input": batches()}),
            TypeError,
            r"batches is one dict; give an iterable of batches: \[batch\]",
            id="report(one mapping)",
        ),
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()), batches(), max_batches=2.5),
            ValueError,
            r"max_batches=2\.5; give an int, at least 1",
            id="calibrate(max_batches=2.5)",
        ),
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()), batches(), until_stable="a"),
            ValueError,
            "until_stable='a'; it is a share between 0 and 1",
            id="calibrate(until_stable='a')",
        ),
        pytest.param(
            lambda: StaticQuantConfig(torch.int8, rules=None),
            TypeError,
            "rules=None; give a dict of pattern or module class to config or None",
            id="StaticQuantConfig(rules=None)",
        ),
        pytest.param(
            lambda: bridge.prepare_(nn.Sequential(nn.ReLU()), INT8),
            ValueError,
            "no module of Sequential is one of torch.nn.Linear, .*; look at the filter and the rules",
            id="prepare_(no linear layer)",
        ),
        pytest.param(
            lambda: bridge.prepare_(two_layers(), INT8, lambda module, name: False),
            ValueError,
            "no module of Sequential is one of torch.nn.Linear, .*; look at the filter and the rules",
            id="prepare_(filter takes none)",
        ),
        pytest.param(
            lambda: bridge.prepare_(nn.Linear(16, 8), INT8),
            ValueError,
            r"the model is itself one of torch.nn.Linear, .* and cannot be replaced in place; wrap it: nn.Seq",
            id="prepare_(Linear)",
        ),
        pytest.param(
            lambda: bridge.prepare_(
                two_layers(), dataclasses.replace(INT8, weight=fsq.QuantSpec(torch.int8, fsq.PerGroup(16)))
            ),
            ValueError,
            r"^2: PerGroup\(group_size=16\) gives several scales .* use PerAxis\(0\)",
            id="prepare_(groups in the second layer)",
        ),
        pytest.param(
            lambda: bridge.prepare_(two_layers(), "uint8"),
            TypeError,
            r"config is 'uint8'; give a StaticQuantConfig, such as bridge\.PRESETS\['uint8'\]",
            id="prepare_('uint8')",
        ),
        pytest.param(
            lambda: bridge.prepare_(two_layers(), None),
            TypeError,
            "config is None; give a StaticQuantConfig",
            id="prepare_(None)",
        ),
        pytest.param(
            lambda: bridge.prepare_("model", INT8),
            TypeError,
            r"model is a str; give a torch\.nn\.Module",
            id="prepare_(str)",
        ),
        pytest.param(
            lambda: bridge.reread_(calibrated(two_layers()), torch.int8),
            TypeError,
            "config is torch.int8; give a StaticQuantConfig",
            id="reread_(dtype)",
        ),
        pytest.param(
            lambda: bridge.convert_(calibrated(two_layers()), config="int4"),
            TypeError,
            r"config is 'int4'; .*PRESETS\['int8'\]",
            id="convert_('int4')",
        ),
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()), 3),
            TypeError,
            "batches is a int; give an iterable of batches, such as a DataLoader",
            id="calibrate(3)",
        ),
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()), batches(), mask=torch.ones(8)),
            TypeError,
            "mask is a Tensor; give a function from a batch to a bool tensor",
            id="calibrate(mask=Tensor)",
        ),
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()), no_batches(), checkpoint="no such folder/c.safetensors"),
            FileNotFoundError,
            "checkpoint='no such folder/c.safetensors': there is no folder .*no such folder; make it first",
            id="calibrate(checkpoint in no folder)",
        ),
        pytest.param(
            lambda: bridge.calibrate(two_layers(), batches()),
            ValueError,
            r"Sequential has no observers; call prepare_\(model, config\) first",
            id="calibrate(float model)",
        ),
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()), no_batches()),
            ValueError,
            r"no batches to calibrate with; give at least one \(an iterator is used up once\)",
            id="calibrate(empty)",
        ),
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()), batches(), max_batches=0),
            ValueError,
            "max_batches=0; give an int, at least 1",
            id="calibrate(max_batches=0)",
        ),
        pytest.param(
            lambda: bridge.convert_(two_layers()),
            ValueError,
            "no module of Sequential is a prepared layer",
            id="convert_(float model)",
        ),
        pytest.param(
            lambda: bridge.quantize_(two_layers(), INT8),
            ValueError,
            "no module of Sequential is a prepared layer to replace, and nothing was changed; prepare_ makes",
            id="quantize_(convert float model)",
        ),
        pytest.param(
            lambda: bridge.convert_(prepared(two_layers()), min_rows=0),
            ValueError,
            "min_rows=0; give an int, at least 1",
            id="convert_(min_rows=0)",
        ),
        pytest.param(
            lambda: bridge.convert_(calibrated(two_layers()), on_unfit="skip"),
            ValueError,
            "on_unfit='skip'; use 'refuse' or 'float'",
            id="convert_(on_unfit='skip')",
        ),
        pytest.param(
            lambda: bridge.calibrate(prepared(two_layers()).train(), batches()),
            ValueError,
            r"training mode.*dropout.*call model\.eval\(\) first",
            id="calibrate(training mode)",
        ),
        pytest.param(
            lambda: bridge.convert_(calibrated(two_layers()), config=StaticQuantConfig(torch.uint8)),
            ValueError,
            r"^2 layers.*\n  0: the config quantizes the activations to torch.uint8, .* for torch.int8; use the dtype",
            id="convert_(config of another dtype)",
        ),
        pytest.param(
            lambda: bridge.prepare_(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 8))), INT8),
            ValueError,
            "^0: .*parametri.*remove_parametrizations",
            id="prepare_(parametrized weight)",
        ),
        pytest.param(
            lambda: bridge.quantize_(nn.Linear(16, 8), StaticQuantConfig(torch.int8, step="prepare")),
            ValueError,
            "the model is itself one of torch.nn.Linear, .* and cannot be replaced in place; wrap it",
            id="quantize_(Linear)",
        ),
        pytest.param(
            lambda: StaticQuantConfig(torch.float32),
            TypeError,
            "torch.float32 is not a quantized dtype; use one of",
            id="StaticQuantConfig(float32)",
        ),
        pytest.param(
            lambda: StaticQuantConfig(torch.int8, step="calibrate"),
            ValueError,
            "step='calibrate'; use one of 'prepare', 'convert'",
            id="StaticQuantConfig(step='calibrate')",
        ),
        pytest.param(
            lambda: StaticQuantConfig(torch.int8, form="parameter"),
            ValueError,
            "form='parameter'; use one of 'module', 'tensor'",
            id="StaticQuantConfig(form='parameter')",
        ),
        pytest.param(
            lambda: StaticQuantConfig(torch.int8, weight=torch.int8),
            TypeError,
            "weight=torch.int8 is not a QuantSpec",
            id="StaticQuantConfig(weight=torch.int8)",
        ),
        pytest.param(
            lambda: StaticQuantConfig(torch.int8, form="tensor", reference=True),
            ValueError,
            "form='tensor' with reference=True: .*; use form='module'",
            id="StaticQuantConfig(form='tensor', reference=True)",
        ),
        *(
            pytest.param(
                lambda call=call: call([two_layers()], None),
                TypeError,
                r"model is a list; give a torch\.nn\.Module",
                id=f"{call.__name__}(a list)",
            )
            for call in (quantize, insert)
        ),
        *(
            pytest.param(
                lambda call=call: call(two_layers(), 3),
                TypeError,
                "filter_fn is a int; give a function from a module and its name to a bool",
                id=f"{call.__name__}(filter_fn=3)",
            )
            for call in (quantize, insert)
        ),
    ],
)
def test_a_refusal_says_value_rule_and_remedy(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_layers_of_a_compiled_model_have_the_names_of_the_model_wherever_they_are_told() -> None:
    model, seen = torch.compile(two_layers()), []
    insert(model, lambda module, name: not seen.append(name))
    assert seen == ["0", "2"]
    model._orig_mod[2].register_forward_hook(print)
    with pytest.raises(ValueError, match=r"^2: the layer has hooks"):
        bridge.unprepare_(model)


@pytest.mark.parametrize(
    "register",
    [
        "forward_hook",
        "forward_pre_hook",
        "full_backward_hook",
        "state_dict_pre_hook",
        "state_dict_post_hook",
        "load_state_dict_pre_hook",
        "load_state_dict_post_hook",
    ],
)
def test_a_hook_of_any_kind_that_would_be_lost_is_told_of(register: str) -> None:
    model = two_layers()
    getattr(model[0], f"register_{register}")(lambda *_: None)
    with pytest.raises(ValueError, match=r"^0: the layer has hooks, which would be lost"):
        bridge.prepare_(model, INT8)
    assert kinds(model) == ["Linear", "ReLU", "Linear"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "removal"),
    [
        *(("parametrizations", name) for name in ("weight_norm", "spectral_norm", "orthogonal")),
        *((name, f"remove_{name}") for name in ("weight_norm", "spectral_norm")),
        ("prune", "prune.remove"),
    ],
)
def test_a_layer_whose_norm_was_removed_is_as_any_other(name: str, removal: str) -> None:
    """torch leaves a hook of some on it, for states that are loaded."""
    model, x, utils = two_layers(), torch.randn(4, 16), nn.utils
    if name == "parametrizations":
        getattr(utils.parametrizations, removal)(model[0])
        with pytest.raises(ValueError, match=r"call torch\.nn\.utils\.parametrize\.remove_parametrizations first"):
            bridge.prepare_(model, INT8)
        utils.parametrize.remove_parametrizations(model[0], "weight")
    else:
        _ = prune.l1_unstructured(model[0], "weight", 5) if name == "prune" else getattr(utils, name)(model[0])
        with pytest.warns(UserWarning, match=rf"^1 module left in float:\n  0: .* torch\.nn\.utils\.{removal} first"):
            model = bridge.unprepare_(bridge.prepare_(model, INT8))
        _ = prune.remove(model[0], "weight") if name == "prune" else getattr(utils, removal)(model[0])
    model.eval()
    with torch.no_grad():
        exact = model(x)
    bridge.prepare_(model, INT8)
    bridge.calibrate(model, [x])
    assert (bridge.convert_(model)(x) - exact).std() < 0.05 * exact.std()


@pytest.mark.parametrize("step", [bridge.prepare_, bridge.quantize_])
def test_a_warning_points_at_the_call_of_the_user(step: Callable[..., object]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)).eval()
    with pytest.warns(UserWarning, match="1 module left in float") as caught:
        step(model, StaticQuantConfig(torch.int8, step="prepare"))
    assert [warning.filename for warning in caught] == [__file__]


def test_a_refused_preparation_changes_nothing() -> None:
    model = two_layers()
    before = list(model)
    with pytest.raises(ValueError, match=r"^2: "):
        bridge.prepare_(model, dataclasses.replace(INT8, weight=fsq.QuantSpec(torch.int8, fsq.PerGroup(16))))
    assert all(a is b for a, b in zip(model, before, strict=True))


# --- torchao's quantize_ ---------------------------------------------------------------------------


@pytest.mark.parametrize("quantize_", [torchao_quantize_, bridge.quantize_], ids=["torchao", "bridge"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantize_takes_both_steps_with_the_bits_of_the_short_way(
    dtype: torch.dtype, quantize_: Callable[..., None]
) -> None:
    model, data = two_layers(), batches()
    short = bridge.convert_(calibrated(copy.deepcopy(model), StaticQuantConfig(dtype), data))
    quantize_(model, StaticQuantConfig(dtype, step="prepare"))
    assert kinds(model) == ["ObservedLinear", "ReLU", "ObservedLinear"]
    for batch in data:
        model(batch)
    quantize_(model, StaticQuantConfig(dtype), lambda module, name: isinstance(module, ObservedLinear))
    assert kinds(model) == ["QuantizedLinear", "ReLU", "QuantizedLinear"]
    assert torch.equal(model(data), short(data))


def test_the_default_filter_of_torchao_leaves_observed_layers_as_they_are() -> None:
    """It takes every torch.nn.Linear, and an ObservedLinear is one."""
    model = calibrated(two_layers())
    before = list(model)
    torchao_quantize_(model, StaticQuantConfig(torch.uint8, step="prepare"))
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_quantize_of_the_bridge_names_what_saw_nothing_and_changes_nothing() -> None:
    model = calibrated(Branches())
    with pytest.raises(CalibrationError, match=r"(?s)2 layers .*experts\.0: nothing.*experts\.1: nothing"):
        bridge.quantize_(model, INT8)
    assert isinstance(model.used, ObservedLinear)
    bridge.quantize_(model, INT8, lambda module, name: name == "used")
    assert isinstance(model.used, QuantizedLinear)
    assert all(isinstance(expert, ObservedLinear) for expert in model.experts)


def test_a_config_is_reusable_and_its_reference_form_is_the_reference_path() -> None:
    config = StaticQuantConfig(torch.uint8, reference=True)
    x = batches()
    for _ in range(2):
        model = calibrated(two_layers(), config, x)
        bridge.convert_(model, config=config)
        assert [layer.reference for layer in model if isinstance(layer, QuantizedLinear)] == [True, True]
    assert hash(config) == hash(StaticQuantConfig(torch.uint8, reference=True))
    assert config == StaticQuantConfig(torch.uint8, reference=True)


# --- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_cuda_model_keeps_its_output_through_the_short_way_and_max_autotune(dtype: torch.dtype) -> None:
    model = two_layers().cuda()
    x = batches(1, 256).cuda()[0]
    expected = model(x)
    bridge.convert_(calibrated(model, StaticQuantConfig(dtype), x[None]))
    assert {b.device.type for b in model.buffers()} == {"cuda"}
    compiled = torch.compile(model, mode="max-autotune")
    with torch.no_grad():
        for forward in (model, compiled):
            assert compute_error(expected, forward(x)) > SQNR[dtype]


def test_activations_and_weights_of_two_dtypes() -> None:
    config = StaticQuantConfig(torch.uint8, weight=fsq.QuantSpec(torch.int4, fsq.PerAxis(0)))
    for convert in (lambda m: bridge.convert_(m, config=config), lambda m: bridge.quantize_(m, config)):
        model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        bridge.prepare_(model, config)
        bridge.calibrate(model, torch.randn(2, 16, 8))
        convert(model)
        assert model[0].act_spec.dtype is torch.uint8
        assert model[0].weight_spec.dtype is torch.int4
