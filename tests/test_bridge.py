"""The bridge's modules: observers, observed layers and layers that multiply codes."""

from __future__ import annotations

import copy
import dataclasses
import io
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bridge
import functional_sq as fsq
from functional_sq import MappingType, QParams, QuantSpec, backends, brgemm, onednn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import torchao.dtypes
    from torchao.quantization import granularity as ao_granularity
    from torchao.quantization.observer import AffineQuantizedMinMaxObserver as TorchaoObserver
    from torchao.quantization.quant_primitives import MappingType as TorchaoMappingType
    from torchao.quantization.quant_primitives import ZeroPointDomain

    from bridge import (
        AffineQuantizedMinMaxObserver,
        CalibrationError,
        ObservedLinear,
        ObserverModule,
        QuantizedLinear,
        StaticQuantConfig,
        insert_observers_,
    )
    from bridge.buffers import Buffers
    from bridge.linear_activation_quantized import LinearActivationQuantizedTensor

SCHEMES = {
    "uint8": StaticQuantConfig(torch.uint8),
    "int8": StaticQuantConfig(torch.int8),
    "float8_e4m3fn": StaticQuantConfig(torch.float8_e4m3fn),
    "float8_e5m2": StaticQuantConfig(torch.float8_e5m2),
}
REALS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((20,), (3, 20), (2, 3, 20), (2, 1, 3, 20), (0, 20), (1, 20), (2, 0, 20))

PER_TENSOR = fsq.PerTensor()
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def raw(x: Tensor) -> Tensor:
    """View a tensor as bytes: float8 has no equality on every device."""
    return x.detach().contiguous().view(torch.uint8) if x.ndim else x.detach()


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that two state dicts have the same names, dtypes, shapes and bits."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype is b[name].dtype, name
        assert torch.equal(raw(value), raw(b[name])), name


@pytest.mark.parametrize(
    "other", [{}, {"a": torch.ones(1, dtype=torch.float64)}, {"a": torch.zeros(1)}, {"b": torch.ones(1)}]
)
def test_assert_same_state_fails_on_what_differs(other: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError):
        assert_same_state({"a": torch.ones(1)}, other)


# --- observers -------------------------------------------------------------------------------------


def observer(granularity: fsq.Granularity = PER_TENSOR, dtype: torch.dtype = torch.uint8) -> ObserverModule:
    return ObserverModule(QuantSpec(dtype, granularity, mapping=MappingType.ASYMMETRIC))


TARGETS = [
    *((dtype, mapping) for dtype in (torch.int8, torch.int4) for mapping in TorchaoMappingType),
    (torch.uint8, TorchaoMappingType.SYMMETRIC),
    (torch.uint8, TorchaoMappingType.ASYMMETRIC),
    (torch.float8_e4m3fn, TorchaoMappingType.SYMMETRIC),
]


AO_GRANULARITIES = [
    ao_granularity.PerTensor(),
    ao_granularity.PerAxis(0),
    ao_granularity.PerAxis(1),
    ao_granularity.PerGroup(4),
    ao_granularity.PerRow(),
]


@pytest.mark.parametrize("granularity", AO_GRANULARITIES, ids=str)
@pytest.mark.parametrize(("dtype", "mapping"), TARGETS)
def test_qparams_have_the_bits_of_the_torchao_observer(
    dtype: torch.dtype, mapping: TorchaoMappingType, granularity: ao_granularity.Granularity
) -> None:
    """torchao's own granularities and mappings are taken as they are."""
    given = {"eps": 2.0**-20, "scale_dtype": torch.float32, "zero_point_dtype": torch.int32}
    ours = AffineQuantizedMinMaxObserver(mapping, dtype, granularity=granularity, **given)
    theirs = TorchaoObserver(mapping, dtype, granularity=granularity, **given)
    for x in torch.randn(3, 6, 8):
        assert ours(x) is x
        theirs(x)
    for a, b in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        assert a.dtype is b.dtype
        assert torch.equal(a, b.reshape(a.shape))


def of_two(reference: bool = False) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8, reference=reference))
    bridge.calibrate(model, torch.randn(2, 16, 8))
    return bridge.convert_(model)


def test_an_ensemble_runs_as_torchs_own_recipe_says() -> None:
    """On a copy without data, and on empty layers, whose scales are all alike."""
    models, x = [of_two() for _ in range(2)], torch.randn(5, 8)
    held = torch.func.stack_module_state(models)
    specs = models[0][0].act_spec, models[0][0].weight_spec
    empty = nn.Sequential(bridge.QuantizedLinear(8, 16, *specs), nn.ReLU(), bridge.QuantizedLinear(16, 4, *specs))
    for base in (copy.deepcopy(models[0]).to("meta"), empty.eval()):
        y = torch.vmap(lambda p, b, base=base: torch.func.functional_call(base, (p, b), (x,)))(*held)
        torch.testing.assert_close(y, torch.stack([model(x) for model in models]), rtol=0, atol=1e-6)


def test_without_a_product_a_layer_says_so_where_the_reference_is_switched_off() -> None:
    spec = fsq.QuantSpec(torch.int16, fsq.PerTensor())
    layer = bridge.QuantizedLinear(8, 4, spec, spec, reference=True)
    layer.reference = False
    with pytest.raises(ValueError, match=r"codes of torch\.int16 and torch\.int16 .* no product; set reference=True"):
        layer(torch.randn(2, 8))


def test_under_autocast_a_result_has_its_inputs_dtype_by_every_path() -> None:
    x = torch.randn(5, 8)
    for reference in (False, True):
        model = of_two(reference)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), torch.autocast("cpu", enabled=False)(model)(x))
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).eval()
    config = bridge.StaticQuantConfig(torch.int8, form="tensor", rules={"0": None})
    bridge.calibrate(bridge.prepare_(model, config), torch.randn(2, 16, 8))
    bridge.convert_(model)
    with torch.autocast("cpu", torch.bfloat16):  # which a float layer before it rounds to
        y = model(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0, atol=0.05)


def test_float8_runs_on_meta() -> None:
    spec = fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
    layer = bridge.QuantizedLinear(8, 4, spec, spec, device="meta")
    assert layer(torch.empty(3, 8, device="meta")).shape == (3, 4)


def test_an_unknown_torchao_granularity_is_refused_with_a_remedy() -> None:
    @dataclass(frozen=True)
    class PerMoon:
        __module__ = "torchao.quantization.granularity"

    with pytest.raises(TypeError, match=r"PerMoon.* has no twin in functional_sq; use one of"):
        AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8, granularity=PerMoon())


GIVEN = {"quant_min": -127, "quant_max": 127, "eps": 2.0**-20, "scale_dtype": torch.float32}


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("granularity", [*AO_GRANULARITIES, ao_granularity.PerGroup(8)], ids=str)
def test_the_attributes_of_the_torchao_observer(granularity: ao_granularity.Granularity, keepdim: bool) -> None:
    args = TorchaoMappingType.SYMMETRIC, torch.int8, granularity
    ours, theirs = (
        kind.with_args(*args, **{**GIVEN, "eps": 1.0}).with_args(**GIVEN)(keepdim=keepdim, zero_point_dtype=torch.int32)
        for kind in (AffineQuantizedMinMaxObserver, TorchaoObserver)
    )
    names = "target_dtype", "scale_dtype", "zero_point_dtype", "quant_min", "quant_max", "eps", "keepdim"
    for name in (*names, "preserve_zero", "zero_point_domain"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert (ours.mapping_type.name, str(ours.granularity)) == (theirs.mapping_type.name, str(theirs.granularity))
    for name in ("min_val", "max_val"):
        assert not hasattr(theirs, name)
        with pytest.raises(AttributeError, match=f"{name}: nothing was seen; run data through the observer"):
            getattr(ours, name)
    for x in torch.randn(3, 6, 8):
        ours(x)
        theirs(x)
    for name in ("min_val", "max_val"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(a, b.reshape(a.shape))
        # Of groups, torchao's has the rank of its split view; one scale for the tensor fits any rank here.
        assert a.shape == b.shape or (keepdim and isinstance(ours.granularity, (fsq.PerGroup, fsq.PerTensor)))
    with pytest.raises(AttributeError):
        ours.eps = 1.0


def test_an_empty_tensor_shows_nothing() -> None:
    for kind in (AffineQuantizedMinMaxObserver, TorchaoObserver):
        made = kind(TorchaoMappingType.SYMMETRIC, torch.int8, ao_granularity.PerTensor())
        made(torch.empty(0, 8))
        assert not hasattr(made, "min_val")


def test_an_axis_that_is_kept_may_have_one_element() -> None:
    for granularity in (ao_granularity.PerAxis(0), ao_granularity.PerRow()):
        ours, theirs = (
            kind(TorchaoMappingType.SYMMETRIC, torch.int8, granularity)
            for kind in (AffineQuantizedMinMaxObserver, TorchaoObserver)
        )
        x = torch.randn(1, 8)
        ours(x), theirs(x)
        assert ours.min_val.shape == theirs.min_val.shape == (1,)


@pytest.mark.filterwarnings("ignore:zero_point_domain=:DeprecationWarning")  # torchao 0.18
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_no_zero_point_where_the_domain_has_none(dtype: torch.dtype) -> None:
    ours, theirs = (
        kind(TorchaoMappingType.SYMMETRIC, dtype, ao_granularity.PerTensor(), zero_point_domain=ZeroPointDomain.NONE)
        for kind in (AffineQuantizedMinMaxObserver, TorchaoObserver)
    )
    x = torch.randn(5, 8)
    ours(x)
    theirs(x)
    scale, zero_point = ours.calculate_qparams()
    assert zero_point is theirs.calculate_qparams()[1] is None
    assert torch.equal(scale, theirs.calculate_qparams()[0].reshape(1))
    layers = []
    for domain in ZeroPointDomain.INT, ZeroPointDomain.NONE:
        observers = (
            AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, dtype, fsq.PerTensor(), zero_point_domain=domain)
            for _ in range(2)
        )
        torch.manual_seed(0)
        layer = ObservedLinear.from_float(nn.Linear(8, 4), *observers)
        layer(x)
        layers.append(QuantizedLinear.from_observed(layer))
    assert_same_state(*(layer.state_dict() for layer in layers))


@pytest.mark.parametrize("granularity", [fsq.PerTensor(), fsq.PerAxis(0), fsq.PerGroup(4)], ids=str)
def test_statistics_are_in_the_state_dict_and_load_back_into_an_observer_that_saw_nothing(
    granularity: fsq.Granularity,
) -> None:
    seen = observer(granularity)
    seen(torch.randn(4, 8))
    assert seen.state_dict().keys() == {"min", "max", "count"}
    fresh = observer(granularity)
    fresh.load_state_dict(seen.state_dict(), strict=True)
    assert_same_state(fresh.state_dict(), seen.state_dict())
    fresh(torch.randn(4, 8))
    assert int(fresh.state["count"].sum()) == 64
    assert int(seen.state["count"].sum()) == 32


def test_a_per_tensor_observer_takes_any_rank_and_batch_size() -> None:
    record = observer()
    batches = [torch.randn(shape) for shape in ((2, 3, 8), (8,), (5, 8), (0, 8), (1, 1, 1, 8))]
    for x in batches:
        record(x)
    every = torch.cat([x.flatten() for x in batches])
    assert record.state["min"].item() == every.min()
    assert record.state["max"].item() == every.max()
    assert record.state["count"].item() == every.numel()


def test_an_observer_takes_its_shape_from_the_first_tensor() -> None:
    record = observer(fsq.PerAxis(-1))
    assert record.state == {}
    assert record.fault() == "nothing was seen; calibrate with data that reaches it"
    record(torch.randn(2, 3, 8))
    assert record.state["min"].shape == (1, 1, 8)
    record(torch.randn(5, 8))  # another rank: the last axis is what counts
    assert record.state["count"].unique().tolist() == [11]


def test_a_mask_leaves_positions_out_and_one_of_another_shape_is_not_used() -> None:
    record = observer()
    x = torch.tensor([[[1.0], [99.0]], [[-1.0], [-99.0]]])
    record.mask = torch.tensor([[True, False], [True, False]])
    record(x)
    assert [record.state[name].item() for name in ("min", "max", "count")] == [-1.0, 1.0, 2]
    record(torch.full((3, 1), 7.0))
    assert record.state["max"].item() == 7.0


def test_copies_of_an_observer_are_independent() -> None:
    record = observer()
    record(torch.ones(3))
    other = copy.deepcopy(record)
    other(torch.full((3,), 5.0))
    assert record.state["max"].item() == 1.0
    assert other.state["max"].item() == 5.0


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, nn.Module.double])
def test_statistics_stay_float32_when_the_model_changes_its_dtype(convert: Callable[[nn.Module], nn.Module]) -> None:
    record = observer()
    record(torch.tensor([1.0 + 2**-20]))
    before = {name: value.clone() for name, value in record.state.items()}
    assert_same_state(convert(nn.Sequential(record))[0].state, before)
    # As `to(dtype, device)` does at once.
    assert {v.device.type for v in record.to("meta", torch.bfloat16).state.values()} == {"meta"}
    assert record.state["min"].dtype is torch.float32


def test_an_observer_made_in_inference_mode_goes_on_outside_of_it() -> None:
    record = observer(fsq.PerAxis(0))
    with torch.inference_mode():
        record(torch.ones(2, 3))
    record(torch.full((2, 3), 2.0))
    with torch.inference_mode():
        record(torch.full((2, 3), 3.0))
    assert record.state["max"].flatten().tolist() == [3.0, 3.0]
    assert record.state["count"].flatten().tolist() == [9, 9]


def test_calculate_qparams_refuses_what_is_unfit_with_reason_and_remedy() -> None:
    for data, message in (
        (torch.ones(0), "nothing was seen.*calibrate with"),
        (torch.tensor([float("nan")]), "NaN was seen.*remove such values"),
        (torch.tensor([float("inf"), 1.0]), "Inf was seen.*remove such values"),
    ):
        record = observer()
        record(data)
        with pytest.raises(CalibrationError, match=message):
            record.calculate_qparams()


def test_buffers_of_a_plain_module_follow_the_dtype_and_those_of_buffers_do_not() -> None:
    for cls, expected in ((nn.Module, torch.bfloat16), (Buffers, torch.float32)):
        module = cls()
        module.register_buffer("scale", torch.ones(1))
        module.register_buffer("absent", None)
        assert module.bfloat16().scale.dtype is expected


# --- observed layers -------------------------------------------------------------------------------


def observed(config: StaticQuantConfig, linear: nn.Linear) -> ObservedLinear:
    return ObservedLinear.from_float(linear, ObserverModule(config.activation), ObserverModule(config.weight))


@every_scheme
@pytest.mark.parametrize("bias", [True, False])
def test_an_observed_layer_shares_the_parameters_and_the_bits_of_the_float_layer(scheme: str, bias: bool) -> None:
    linear = nn.Linear(20, 12, bias).eval()
    layer = observed(SCHEMES[scheme], linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.training is linear.training
    x = torch.randn(3, 5, 20)
    assert torch.equal(layer(x), linear(x))
    assert layer.act_obs.state["max"].item() == x.max()
    assert {n for n, _ in layer.named_parameters()} == {n for n, _ in linear.named_parameters()}


def test_an_observed_layer_loads_the_float_checkpoint_and_keeps_what_it_saw() -> None:
    linear = nn.Linear(20, 12)
    layer = observed(SCHEMES["int8"], nn.Linear(20, 12))
    layer(torch.ones(1, 20))
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.weight, linear.weight)
    assert layer.act_obs.state["count"].item() == 20


def test_the_weight_is_observed_when_the_layer_is_converted() -> None:
    linear = nn.Linear(20, 12)
    layer = observed(SCHEMES["int8"], linear)
    x = torch.randn(5, 20)
    layer(x)
    with torch.no_grad():
        linear.weight.mul_(3.0)
    again = observed(SCHEMES["int8"], linear)
    again(x)
    assert_same_state(
        QuantizedLinear.from_observed(layer).state_dict(), QuantizedLinear.from_observed(again).state_dict()
    )


def test_insert_observers_copies_both_observers_for_each_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    act = AffineQuantizedMinMaxObserver(MappingType.ASYMMETRIC, torch.uint8, granularity=fsq.PerTensor())
    weight = AffineQuantizedMinMaxObserver(MappingType.ASYMMETRIC, torch.uint8, granularity=fsq.PerAxis(0))
    insert_observers_(model, act, weight, lambda module, name: name == "2")
    assert isinstance(model[0], nn.Linear)
    assert not isinstance(model[0], ObservedLinear)
    insert_observers_(model, act, weight)
    observers = [m for m in model.modules() if isinstance(m, ObserverModule)]
    assert len({id(m) for m in (act, weight, *observers)}) == 6
    model(torch.randn(3, 8))
    assert act.state["count"].item() == 0


@pytest.mark.parametrize(
    ("filter_fn", "expected"), [(lambda m, name: True, ["0", "2.0"]), (lambda m, name: name.startswith("2"), ["2.0"])]
)
def test_a_filter_of_insert_observers_chooses_among_linear_layers(
    filter_fn: Callable[[nn.Module, str], bool], expected: list[str]
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 4)))
    insert_observers_(model, observer(), observer(), filter_fn)
    assert [name for name, m in model.named_modules() if isinstance(m, ObservedLinear)] == expected


# --- quantized layers ------------------------------------------------------------------------------


def quantized(
    config: StaticQuantConfig,
    linear: nn.Linear,
    *,
    reference: bool = False,
    data: Tensor | None = None,
) -> QuantizedLinear:
    """Return `linear`, calibrated with normal data."""
    layer = observed(config, linear)
    layer(torch.randn(64, linear.in_features, dtype=linear.weight.dtype) if data is None else data)
    return QuantizedLinear.from_observed(layer, reference=reference)


@every_scheme
@pytest.mark.parametrize("fast_accum", [False, True])
def test_the_weight_as_a_tensor_adds_as_its_layer_does(fast_accum: bool, scheme: str) -> None:
    """On a CPU both give the same bits; what the product is asked for is what reaches the device."""
    layer = quantized(SCHEMES[scheme], nn.Linear(8, 4))
    layer.fast_accum = fast_accum
    expected = fast_accum and scheme.startswith("float8")
    assert layer.qweight.use_fast_accum == expected
    weight = layer.as_linear().weight
    assert isinstance(weight, LinearActivationQuantizedTensor)
    assert weight.original_weight_tensor.use_fast_accum == expected


def empty_like(layer: QuantizedLinear, dtype: torch.dtype | None = None) -> QuantizedLinear:
    return QuantizedLinear(
        layer.in_features,
        layer.out_features,
        layer.act_spec,
        layer.weight_spec,
        bias=layer.bias is not None,
        reference=layer.reference,
        dtype=dtype,
    )


def product_bound(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """Return how far the product of codes and the reference path may lie apart, in float64.

    With `u = 2**-24` and `v` the unit roundoff of a narrower output dtype (else 0), and S the sum of
    magnitudes `sum |x^| |w^|`: a dequantized operand carries `u + v`, a product `u`, and a sum of K
    products and the bias, in any order, K additions of `u` each, so the reference is within
    `((K + 3) u + 2 v) (S + |b|)` and its last rounding `v |y|` of the truth; the integer path is
    within `5 u |E| + (3 u + v) |y|` (tests/test_linear.py), for float8 with `K u S` of the sum on top.
    `|E| <= S` and `|y| <= S + |b|` give the sum of all, second orders in the 1.02.
    """
    q = fsq.quantize(layer.act_spec, x, QParams(layer.act_scale, layer.act_zero_point))
    x_hat = fsq.dequantize(layer.act_spec, q, QParams(layer.act_scale, layer.act_zero_point), dtype=torch.float64)
    w_hat = fsq.dequantize(layer.weight_spec, *fsq.unfold(layer.weight_spec, layer.folded), dtype=torch.float64)
    u, info = 2.0**-24, torch.finfo(x.dtype)
    v = 0.0 if x.dtype is torch.float32 else info.eps / 2
    magnitude = F.linear(x_hat.abs(), w_hat.abs(), None if layer.bias is None else layer.bias.double().abs())
    k = layer.in_features
    return 1.02 * ((2 * k + 11) * u + 4 * v) * magnitude + info.smallest_normal * info.eps


@pytest.mark.usefixtures("by")
@every_scheme
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_the_product_of_codes_is_the_reference_path_within_its_roundings(
    scheme: str, bias: bool, dtype: torch.dtype
) -> None:
    layer = quantized(SCHEMES[scheme], nn.Linear(20, 12, bias, dtype=dtype))
    for shape in SHAPES:
        x = torch.randn(shape, dtype=dtype)
        layer.reference = False
        y = layer(x)
        layer.reference = True
        slow = layer(x)
        assert y.dtype is slow.dtype is dtype
        assert y.shape == slow.shape == (*shape[:-1], 12)
        assert ((y.double() - slow.double()).abs() <= product_bound(layer, x)).all()


REFERENCES = SCHEMES | {
    str(weight): dataclasses.replace(SCHEMES["uint8"], weight=weight, reference=True)
    for weight in (
        QuantSpec(torch.int4, fsq.PerGroup(5)),
        QuantSpec(torch.int16, fsq.PerAxis(0)),
        QuantSpec(torch.float8_e4m3fn, fsq.PerBlock((4, 10))),
    )
}


@pytest.mark.parametrize("config", REFERENCES.values(), ids=REFERENCES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", REALS, ids=str)
def test_the_reference_path_has_the_bits_of_linear_on_dequantized_operands(
    config: StaticQuantConfig, bias: bool, dtype: torch.dtype
) -> None:
    linear = nn.Linear(20, 12, bias, dtype=dtype)
    layer = quantized(config, linear, reference=True)
    loaded = empty_like(layer, dtype)
    loaded.load_state_dict(layer.state_dict(), strict=True)
    w_qp = fsq.calc_qparams(config.weight, fsq.observe(config.weight, fsq.init(config.weight, (12, 20)), linear.weight))
    for shape in SHAPES:
        x = torch.randn(shape, dtype=dtype)
        x_hat = fsq.fake_quantize(config.activation, x, QParams(layer.act_scale, layer.act_zero_point))
        expected = F.linear(x_hat, fsq.fake_quantize(config.weight, linear.weight, w_qp), linear.bias)
        assert torch.equal(layer(x), expected)
        assert torch.equal(loaded(x), expected)


@pytest.mark.skipif(
    not hasattr(torchao.dtypes, "to_affine_quantized_intx_static"),
    reason="this torchao has no integer AffineQuantizedTensor (0.17 was the last)",
)
@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("scheme", ["uint8", "int8"])
def test_the_reference_path_has_the_bits_of_torchao_affine_quantized_tensor(scheme: str, dtype: torch.dtype) -> None:
    config, linear = SCHEMES[scheme], nn.Linear(20, 12, dtype=dtype)
    layer = quantized(config, linear, reference=True)
    make = torchao.dtypes.to_affine_quantized_intx_static
    zero_point = fsq.unfold(layer.weight_spec, layer.folded)[1].zero_point
    w = make(linear.weight.detach(), layer.weight_scale.flatten(), zero_point.flatten(), (1, 20), config.weight.dtype)
    for shape in ((3, 20), (2, 3, 20)):
        x = torch.randn(shape, dtype=dtype)
        q = make(x, layer.act_scale, layer.act_zero_point, shape, config.activation.dtype)
        assert torch.equal(layer(x), F.linear(q, w, linear.bias.detach()))


class Every(nn.Module):
    """One layer of each scheme, so that what is slow (compiling, exporting) happens once."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        made = [quantized(config, nn.Linear(20, 12, i % 2 == 0, dtype=dtype)) for i, config in enumerate(CONFIGS)]
        self.layers = nn.ModuleList(made)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


CONFIGS = tuple(SCHEMES.values())


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for scheme, a, b in zip(SCHEMES, ours, theirs, strict=True):
        assert a.dtype is b.dtype, scheme
        assert torch.equal(a, b), scheme


@pytest.fixture(params=REALS, ids=str)
def every(request: pytest.FixtureRequest) -> Every:
    return Every(request.param)


@pytest.fixture(params=["brgemm", "oneDNN", "torch"])
def by(request: pytest.FixtureRequest, multiply_by: Callable[[str], None]) -> None:
    """Each way in which a CPU multiplies."""
    multiply_by(request.param)


def sample(model: Every, rows: int = 3) -> Tensor:
    return torch.randn(2, rows, 20, dtype=model.layers[0].bias.dtype)


def test_a_state_dict_loads_strictly_into_a_layer_that_was_only_constructed(every: Every) -> None:
    x = sample(every)
    fresh = nn.ModuleList([empty_like(layer, x.dtype) for layer in every.layers])
    assert_same_state(fresh.state_dict() | every.layers.state_dict(), every.layers.state_dict())
    fresh.load_state_dict(every.layers.state_dict(), strict=True)
    assert_same([layer(x) for layer in fresh], every(x))


def test_a_state_dict_survives_torch_save_with_weights_only(every: Every) -> None:
    file = io.BytesIO()
    torch.save(every.state_dict(), file)
    file.seek(0)
    assert_same_state(torch.load(file, weights_only=True), every.state_dict())


def test_a_state_dict_survives_safetensors(every: Every, tmp_path: Path) -> None:
    save_file(every.state_dict(), tmp_path / "model.safetensors")
    assert_same_state(load_file(tmp_path / "model.safetensors"), every.state_dict())


def test_a_copy_and_a_pickled_module_have_the_same_bits(every: Every) -> None:
    x = sample(every)
    file = io.BytesIO()
    torch.save(every, file)
    file.seek(0)
    for other in (copy.deepcopy(every), torch.load(file, weights_only=False)):
        assert_same(other(x), every(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_codes_and_scales_keep_dtype_and_bits_when_the_model_changes_its_dtype(dtype: torch.dtype) -> None:
    model = Every()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.to(dtype)
    assert_same_state(dict(model.named_buffers()), before)
    assert model.layers[0].bias.dtype is dtype
    assert {y.dtype for y in model(sample(model))} == {dtype}


def test_a_module_moves_to_another_device_with_its_dtypes() -> None:
    model = Every()
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    model.to("meta")
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}
    assert {name: value.dtype for name, value in model.state_dict().items()} == dtypes


def test_what_is_packed_at_the_first_call_is_not_saved_copied_or_left_behind(packing: str) -> None:
    layer, x = quantized(SCHEMES["int8"], nn.Linear(20, 12)), torch.randn(3, 20)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    y = layer(x)
    assert (layer.weight_codes in onednn._PACKED) == (packing == "oneDNN")
    assert_same_state(layer.state_dict(), before)
    assert not [name for name, value in vars(layer).items() if isinstance(value, Tensor)]

    other = quantized(SCHEMES["int8"], nn.Linear(20, 12))
    twin = copy.deepcopy(layer)
    assert twin.weight_codes not in onednn._PACKED
    file = io.BytesIO()
    torch.save(layer, file)
    for assign in (False, True):
        twin.load_state_dict(layer.state_dict())
        assert torch.equal(twin(x), y)
        twin.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert torch.equal(twin(x), other(x))
        assert torch.equal(layer(x), y)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)
    layer.to("meta")
    assert layer(x.to("meta")).shape == (3, 12)


@pytest.mark.parametrize(
    ("make", "shape", "lists", "finds", "wrong"),
    [
        (lambda: nn.Linear(20, 12), (2, 3, 20), "PRODUCTS", "product_of_reals", "the last axes must be equal"),
        (
            lambda: nn.Conv2d(20, 12, (3, 1), padding=(1, 0)),
            (2, 20, 4, 3),
            "CONVOLUTIONS",
            "convolution_of_reals",
            r"give \(batch, 20, height, width\)",
        ),
        (
            lambda: nn.ConvTranspose2d(20, 12, 3, 2),
            (2, 20, 4, 3),
            "CONVOLUTIONS",
            "convolution_of_reals",
            r"give \(batch, 20, height, width\)",
        ),
    ],
    ids=["linear", "conv", "transposed"],
)
def test_what_an_eager_layer_found_of_its_operands_holds_for_them_alone(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    lists: str,
    finds: str,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(shape)

    def static() -> nn.Module:
        model = bridge.prepare_(nn.Sequential(make()).eval(), SCHEMES["int8"])
        bridge.calibrate(model, [torch.randn(64, *shape[1:])])
        return bridge.convert_(model)[0]

    layer, other = static(), static()

    def new_state(assign: bool) -> None:
        state = {name: value.clone() for name, value in other.state_dict().items()}
        layer.load_state_dict(state | {"weight_codes": state["weight_codes"].flip(int(assign))}, assign=assign)

    changes: list[Callable[[], object]] = [
        lambda: layer.multiplied.codes.add_(1),
        lambda: layer.bias.add_(1),
        lambda: setattr(layer, "bias", nn.Parameter(torch.randn(12), requires_grad=False)),
        lambda: new_state(False),
        lambda: new_state(True),
        lambda: setattr(layer, "product_scale", 2 * layer.product_scale),
        lambda: setattr(layer, "bias", None),
        lambda: setattr(layer, "reference", True),
    ]
    before = layer(x)
    for change in changes:
        change()
        after = layer(x)
        assert torch.equal(after, copy.deepcopy(layer)(x))  # which found nothing yet
        assert not torch.equal(after, before)
        before = after
    layer = copy.deepcopy(other)
    assert not layer(x).requires_grad
    layer.bias.requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((12,), y.numel() / 12))
    with pytest.raises(ValueError, match=wrong):
        layer(torch.randn(*shape[:-3], 21, 21, 21))

    other(x)
    codes = weakref.ref(other.weight_codes)
    other.to("meta")
    assert codes() is None
    other = static()
    y = other(x)
    monkeypatch.setattr(backends, lists, [])
    monkeypatch.setattr(brgemm, finds, lambda *of: pytest.fail("a backend that is not in the list"))
    assert torch.equal(other(x), y)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.skipif(not brgemm.AVAILABLE, reason="this machine has no VNNI, or no compiler")
@pytest.mark.parametrize("scheme", ["int8", "uint8"])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(20, 12), lambda: nn.Conv2d(20, 12, 3), lambda: nn.ConvTranspose2d(20, 12, 3, 2)],
    ids=["linear", "conv", "transposed"],
)
def test_a_layer_that_was_never_called_is_traced_by_torch_jit(make: Callable[[], nn.Module], scheme: str) -> None:
    model, x = bridge.prepare_(nn.Sequential(make()).eval(), SCHEMES[scheme]), torch.randn(3, 20, 5, 20)
    bridge.calibrate(model, [x])
    bridge.convert_(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)  # which compares two calls
        assert torch.equal(traced(2 * x[:2]), model(2 * x[:2]))


@pytest.mark.usefixtures("packing")
def test_compiled_after_new_weights_were_loaded_has_their_bits() -> None:
    layer, other = (quantized(SCHEMES["int8"], nn.Linear(20, 12)) for _ in range(2))
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(3, 20)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), other(x))


@every_scheme
def test_no_float_copy_of_the_weight_remains(scheme: str) -> None:
    """One byte an element; 20 a row at most for scale, zero point, sum and epilogue; twice 8 for the input's pair."""
    linear = nn.Linear(256, 64)
    layer = quantized(SCHEMES[scheme], linear)
    held = sum(b.untyped_storage().nbytes() for b in layer.buffers())
    assert linear.weight.nbytes / 4 < held <= linear.weight.nbytes / 4 + 20 * 64 + 16
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize(
    ("scheme", "reference", "parts"),
    [
        ("uint8", False, ["activation=uint8 asymmetric PerTensor()", "weight=uint8 asymmetric", "int8 product"]),
        (
            "int8",
            False,
            [
                "activation=int8 asymmetric PerTensor()",
                "weight=int8 symmetric PerAxis",
                "int8 product, by brgemm from 1 rows on)" if brgemm.AVAILABLE else "int8 product",
            ],
        ),
        ("float8_e4m3fn", False, ["activation=float8_e4m3fn symmetric", "float8_e4m3fn product"]),
        ("uint8", True, ["bias=True", "dequantized product"]),
    ],
)
def test_the_repr_says_formats_and_product(scheme: str, reference: bool, parts: list[str]) -> None:
    shown = repr(quantized(SCHEMES[scheme], nn.Linear(20, 12), reference=reference))
    assert [part for part in parts if part not in shown] == []
    assert "in_features=20, out_features=12" in shown


def test_no_gradient_flows_and_none_is_kept() -> None:
    layer = quantized(SCHEMES["int8"], nn.Linear(20, 12))
    y = layer(torch.randn(3, 20, requires_grad=True))
    assert not y.requires_grad


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_exported_has_the_bits_of_eager(dynamic: bool) -> None:
    model, x = Every(), torch.randn(4, 20)
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}} if dynamic else None
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False).module()
    assert_same(exported(x), model(x))
    if dynamic:
        assert_same(exported(x[:3]), model(x[:3]))


@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("mode", [None, "max-autotune"])
def test_compiled_has_the_bits_of_eager(mode: str | None) -> None:
    model, x = Every(), torch.randn(2, 3, 20)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        assert_same(compiled(x), model(x))


@pytest.mark.usefixtures("by")
def test_a_compiled_chain_has_the_bits_of_eager_for_one_token() -> None:
    """A second layer's codes are then a view whose stride Inductor chooses: see tests/test_linear.py."""
    config = SCHEMES["int8"]
    model = nn.Sequential(*(quantized(config, nn.Linear(64, 64)) for _ in range(2)))
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))


# --- refusals --------------------------------------------------------------------------------------

PER_TOKEN = QuantSpec(torch.int8, fsq.PerToken())
GROUPS = QuantSpec(torch.int8, fsq.PerGroup(4))
SYMMETRIC = MappingType.SYMMETRIC


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: observed(dataclasses.replace(SCHEMES["int8"], activation=PER_TOKEN), nn.Linear(8, 4)),
            ValueError,
            r"PerToken\(\) gives each token a scale of its own, and a static scale must fit any batch; "
            r"use PerTensor\(\)",
            id="ObservedLinear(per token)",
        ),
        pytest.param(
            lambda: observed(dataclasses.replace(SCHEMES["int8"], weight=GROUPS), nn.Linear(6, 4)),
            ValueError,
            r"PerGroup\(group_size=4\) does not divide axis 1 of shape \(4, 6\); use a divisor of 6",
            id="ObservedLinear(groups that do not divide)",
        ),
        pytest.param(
            lambda: ObservedLinear.from_float(nn.Linear(8, 4), nn.Identity(), observer()),
            TypeError,
            "act_obs is a Identity; give an ObserverModule",
            id="ObservedLinear.from_float(act_obs=Identity())",
        ),
        pytest.param(
            lambda: ObservedLinear(8, 4, observer(), nn.Identity()),
            TypeError,
            "weight_obs is a Identity; give an ObserverModule",
            id="ObservedLinear(weight_obs=Identity())",
        ),
        pytest.param(
            lambda: ObservedLinear.from_float(nn.Linear(8, 4), *[observer()] * 2),
            ValueError,
            r"act_obs and weight_obs are one object.*give a copy.deepcopy",
            id="ObservedLinear.from_float(observer, observer)",
        ),
        pytest.param(
            lambda: ObservedLinear(8, 4, *[observer()] * 2),
            ValueError,
            r"act_obs and weight_obs are one object.*give a copy.deepcopy",
            id="ObservedLinear(observer, observer)",
        ),
        pytest.param(
            lambda: AffineQuantizedMinMaxObserver(SYMMETRIC, torch.int8, PER_TENSOR, preserve_zero=False),
            ValueError,
            "preserve_zero=False: 0.0 always has a code; leave it out",
            id="preserve_zero=False",
        ),
        *(
            pytest.param(
                partial(AffineQuantizedMinMaxObserver, mapping, dtype, PER_TENSOR, zero_point_domain=domain),
                ValueError,
                message,
                id=f"{dtype}, {mapping}, zero_point_domain={domain}",
            )
            for mapping, dtype, domain, message in (
                (SYMMETRIC, torch.int8, ZeroPointDomain.FLOAT, "zero_point_domain=ZeroPointDomain.FLOAT: .* use Zero"),
                (SYMMETRIC, torch.int8, None, "zero_point_domain=None: .* use ZeroPointDomain.INT, or"),
                (SYMMETRIC, torch.uint8, ZeroPointDomain.NONE, "its zero point is not 0; use ZeroPointDomain.INT"),
                (MappingType.ASYMMETRIC, torch.int8, ZeroPointDomain.NONE, "its zero point is not 0; use"),
            )
        ),
        *(
            pytest.param(
                lambda input=input: quantized(SCHEMES["int8"], nn.Linear(20, 12))(input()),
                TypeError,
                f"QuantizedLinear got a {kind}",
                id=f"QuantizedLinear of a {kind}",
            )
            for kind, input in {
                "list; give a tensor": lambda: [0.0] * 20,
                r"tensor of torch\.int64; convert it": lambda: torch.ones(3, 20, dtype=torch.int64),
                "sparse_coo tensor; give a dense one": lambda: torch.ones(3, 20).to_sparse(),
                "nested tensor; give a dense one": lambda: torch.nested.nested_tensor([torch.ones(3, 20)]),
            }.items()
        ),
        pytest.param(
            lambda: QuantizedLinear(8, 4, PER_TOKEN, SCHEMES["int8"].weight),
            ValueError,
            r"PerToken\(\) gives each token a scale of its own.*use PerTensor\(\)",
            id="QuantizedLinear(per token)",
        ),
        pytest.param(
            lambda: QuantizedLinear(8, 4, SCHEMES["int8"].activation, GROUPS),
            ValueError,
            r"PerGroup\(group_size=4\) gives several scales.*use PerAxis\(0\) or PerTensor\(\)",
            id="QuantizedLinear(groups)",
        ),
        pytest.param(
            lambda: QuantizedLinear(8, 4, SCHEMES["int8"].activation, SCHEMES["float8_e5m2"].weight),
            ValueError,
            "torch.int8 and a weight of torch.float8_e5m2 have no common product; use integers or float8 for both",
            id="QuantizedLinear(int8, float8)",
        ),
        pytest.param(
            lambda: QuantizedLinear.from_observed(nn.Linear(8, 4)),
            TypeError,
            "from_observed got a Linear; give a bridge.ObservedLinear",
            id="from_observed(Linear)",
        ),
        pytest.param(
            lambda: QuantizedLinear.from_observed(observed(SCHEMES["int8"], nn.Linear(8, 4)), torch.uint8),
            ValueError,
            "target_dtype=torch.uint8, but the activations were observed for torch.int8; use the dtype",
            id="from_observed(another dtype)",
        ),
        pytest.param(
            lambda: QuantizedLinear.from_observed(observed(SCHEMES["int8"], nn.Linear(8, 4))),
            CalibrationError,
            "nothing was seen.*calibrate with",
            id="from_observed(saw nothing)",
        ),
        pytest.param(
            lambda: quantized(SCHEMES["int8"], nn.Linear(8, 4), reference=True).as_linear(),
            ValueError,
            "as_linear of a layer with reference=True: .* multiplies codes; keep the layer, or set layer.reference",
            id="as_linear(reference)",
        ),
        pytest.param(
            lambda: insert_observers_(nn.Sequential(nn.ReLU()), observer(), observer()),
            ValueError,
            "no module of Sequential is a torch.nn.Linear to replace, and nothing was changed; look at the filter",
            id="insert_observers_(no layer)",
        ),
    ],
)
def test_a_refusal_says_value_rule_and_remedy(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("scheme", "rows", "k", "n", "granularity"),
    [
        ("uint8", 1, 64, 48, fsq.PerAxis(0)),
        ("uint8", 17, 20, 12, fsq.PerTensor()),
        ("int8", 1, 20, 12, fsq.PerAxis(0)),
        ("int8", 16, 64, 48, fsq.PerTensor()),
        ("int8", 17, 64, 48, fsq.PerAxis(0)),
        ("float8_e4m3fn", 17, 64, 48, fsq.PerTensor()),
        ("float8_e4m3fn", 17, 64, 48, fsq.PerAxis(0)),
        ("float8_e4m3fn", 1, 20, 12, fsq.PerAxis(0)),
    ],
)
def test_cuda_is_the_cpu_product_within_the_roundings_eager_and_compiled(
    scheme: str, rows: int, k: int, n: int, granularity: fsq.Granularity
) -> None:
    """Integers: both sums are exact, and each epilogue is within `5 u |E| + 3 u |y|` of the truth.

    The two may fuse differently: `16 u (S + |b|)` holds for their difference. A float8 sum errs by
    `K u S` on a CPU, and by `K 2**-13 S` on a tensor core (tests/test_linear.py derives both). The
    data lie on the grid of the codes, where Triton's division (2 ulp) changes no code.
    """
    config = SCHEMES[scheme]
    config = dataclasses.replace(config, weight=dataclasses.replace(config.weight, granularity=granularity))
    layer = quantized(config, nn.Linear(k, n))
    x = fsq.fake_quantize(layer.act_spec, torch.randn(rows, k), QParams(layer.act_scale, layer.act_zero_point))
    on_cpu = layer(x).double()
    w = fsq.dequantize(layer.weight_spec, *fsq.unfold(layer.weight_spec, layer.folded), dtype=torch.float64)
    magnitude = F.linear(x.double().abs(), w.abs(), layer.bias.double().abs())
    u = 2.0**-24
    limit = (16 * u + (k * (u + 2.0**-13) if config.weight.dtype.is_floating_point else 0)) * magnitude
    on_cuda = copy.deepcopy(layer).cuda()
    compiled = torch.compile(on_cuda, fullgraph=True, mode="max-autotune")
    with torch.no_grad():
        for forward in (on_cuda, compiled):
            assert ((forward(x.cuda()).cpu().double() - on_cpu).abs() <= limit).all()
