"""Code shaped as torchao's static-quantization tutorial, with names from `bridge`.

A user of the tutorial has written an observed linear layer, two ways to quantize it and the handlers
that `quantize_` calls; only the imports change. The model is compiled before the observers go in.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bridge
from bridge import (
    AffineQuantizedMinMaxObserver,
    AffineQuantizedTensor,
    AOBaseConfig,
    Float8Layout,
    Float8MMConfig,
    MappingType,
    PerAxis,
    PerTensor,
    StaticQuantConfig,
    compute_error,
    insert_observers_,
    quantize_,
    register_quantize_module_handler,
    to_affine_quantized_floatx_static,
    to_affine_quantized_intx_static,
    to_linear_activation_quantized,
)
from bridge.torchao import torchao_quantize_

SCHEMES = {torch.uint8: MappingType.ASYMMETRIC, torch.float8_e4m3fn: MappingType.SYMMETRIC}
ROWS = 128  # enough rows that the float8 figure, 25.7 dB in expectation, stays above 25


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96, bias=False)
        self.second = nn.Linear(96, 32, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def observer(dtype: torch.dtype, granularity: PerTensor | PerAxis) -> AffineQuantizedMinMaxObserver:
    return AffineQuantizedMinMaxObserver(
        SCHEMES[dtype],
        dtype,
        granularity=granularity,
        eps=torch.finfo(torch.float32).eps,
        scale_dtype=torch.float32,
        zero_point_dtype=torch.float32,
    )


# What a user wrote.


class UsersObserved(nn.Linear):
    def __init__(self, linear: nn.Linear, act_obs: nn.Module, weight_obs: nn.Module) -> None:
        super().__init__(linear.in_features, linear.out_features, False, dtype=linear.weight.dtype)
        self.weight, self.bias = linear.weight, linear.bias
        self.act_obs, self.weight_obs = act_obs, weight_obs

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act_obs(x), self.weight_obs(self.weight), self.bias)


def to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, block: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype is torch.uint8:
        return to_affine_quantized_intx_static(x, scale, zero_point, block, dtype)
    layout = Float8Layout(mm_config=Float8MMConfig(use_fast_accum=True))
    return to_affine_quantized_floatx_static(x, scale, block, dtype, layout)


class UsersQuantized(nn.Module):
    def __init__(self, observed: UsersObserved, dtype: torch.dtype) -> None:
        super().__init__()
        self.act_scale, self.act_zero_point = observed.act_obs.calculate_qparams()
        self.dtype, self.bias = dtype, observed.bias
        scale, zero_point = observed.weight_obs.calculate_qparams()
        self.qweight = to_codes(observed.weight, scale, zero_point, (1, observed.in_features), dtype)

    def forward(self, x: Tensor) -> Tensor:
        qx = to_codes(x, self.act_scale, self.act_zero_point, x.shape, self.dtype)
        return F.linear(qx, self.qweight, self.bias)


def users_linear(observed: UsersObserved, dtype: torch.dtype) -> nn.Linear:
    """The other form: the module stays, its weight quantizes its input. The lambda holds tensors."""
    scale, zero_point = observed.weight_obs.calculate_qparams()
    act_scale, act_zero_point = observed.act_obs.calculate_qparams()
    weight = to_codes(observed.weight, scale, zero_point, (1, observed.in_features), dtype)
    linear = nn.Linear(observed.in_features, observed.out_features, False, dtype=observed.weight.dtype)
    linear.bias = observed.bias
    linear.weight = nn.Parameter(
        to_linear_activation_quantized(weight, lambda x: to_codes(x, act_scale, act_zero_point, x.shape, dtype)),
        requires_grad=False,
    )
    return linear


@dataclass
class UsersConfig(AOBaseConfig):
    dtype: torch.dtype
    make: Callable[[UsersObserved, torch.dtype], nn.Module]


@register_quantize_module_handler(UsersConfig)
def apply_users_config(module: UsersObserved, config: UsersConfig) -> nn.Module:
    return config.make(module, config.dtype)


# The run of the tutorial.


# Each dtype in each form, and each of both in each mode: what a mode does depends on no pair of them.
@pytest.mark.parametrize(
    ("make", "dtype", "mode"),
    [
        (UsersQuantized, torch.uint8, "max-autotune"),
        (UsersQuantized, torch.float8_e4m3fn, "default"),
        (users_linear, torch.uint8, "default"),
        (users_linear, torch.float8_e4m3fn, "max-autotune"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(getattr(value, "__name__", value)),
)
@torch.no_grad()
def test_what_a_user_wrote_runs_compiled_before_and_after(
    make: Callable[..., nn.Module], dtype: torch.dtype, mode: str
) -> None:
    plain = Pair().eval().to(torch.bfloat16)
    model = torch.compile(plain, mode=mode)
    x = torch.randn(ROWS, 64, dtype=torch.bfloat16)
    expected = model(x).clone()
    for name in ("first", "second"):
        act_obs, weight_obs = observer(dtype, PerTensor()), observer(dtype, PerAxis(axis=0))
        setattr(plain, name, UsersObserved(getattr(plain, name), act_obs, weight_obs))
    for _ in range(3):
        assert torch.equal(model(x), expected)
    for apply in (torchao_quantize_, quantize_):
        quantized = copy.deepcopy(model)
        apply(quantized, UsersConfig(dtype, make), lambda m, name: isinstance(m, UsersObserved))
        assert compute_error(expected.float(), quantized(x).float()) > 25
        assert compute_error(quantized._orig_mod(x).float(), quantized(x).float()) > 35


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
@pytest.mark.parametrize("dtype", SCHEMES, ids=str)
@torch.no_grad()
def test_the_bridges_own_layers_take_the_place_of_the_users(dtype: torch.dtype, mode: str) -> None:
    model = torch.compile(Pair().eval().to(torch.bfloat16), mode=mode)
    x = torch.randn(ROWS, 64, dtype=torch.bfloat16)
    expected = model(x).clone()
    insert_observers_(model, observer(dtype, PerTensor()), observer(dtype, PerAxis(axis=0)))
    for _ in range(3):
        model(x)
    results = {}
    for form in ("module", "tensor"):
        quantized = copy.deepcopy(model)
        quantize_(quantized, StaticQuantConfig(dtype, form=form), lambda m, name: isinstance(m, bridge.ObservedLinear))
        results[form] = quantized._orig_mod(x)
        assert compute_error(expected.float(), quantized(x).float()) > 25
        name = str(dtype).removeprefix("torch.")
        shown = repr(quantized)
        assert shown.count(f"weight={name}") == 2, shown
        assert shown.count(f"activation={name}") == 2, shown
        if form == "module":
            assert shown.count("QuantizedLinear(") == 2
            assert quantized.first.act_scale.shape == (1,)
            assert isinstance(quantized.first.qweight, AffineQuantizedTensor)
            assert quantized.first.qweight.dtype is torch.bfloat16
        else:
            assert type(quantized.first) is nn.Linear
    assert torch.equal(results["module"], results["tensor"])


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint4, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_the_tensor_form_is_saved_loaded_moved_and_copied(dtype: torch.dtype, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 8, bias=bias))
    x = torch.randn(4, 3, 16)
    for step in ("prepare", "convert"):
        quantize_(model, StaticQuantConfig(dtype, step=step, form="tensor"))
        expected = model(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = nn.Sequential(nn.Linear(16, 8, bias=bias))
    fresh.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(fresh(x), expected)
    for copied in (copy.deepcopy(model), saved(model)):
        assert torch.equal(copied(x), expected)
        assert repr(copied) == repr(model)
        copied[0].out_features = 9
        assert "out_features=9" in repr(copied)
        assert "out_features=8" in repr(model)
    assert torch.equal(model.to("cpu")(x), expected)
    model.bfloat16()
    assert model(x.bfloat16()).dtype is torch.bfloat16
    assert model[0].weight.quant_kwargs["scale"].dtype is torch.float32
