"""bridge.aqt: codes and real values in bits, products within derived bounds, every operation, every refusal.

Oracles. `numpy` (tests/oracle.py) is always there. `torchao` is the original class, in the releases
that have it; `test_the_original_is_an_oracle_where_it_exists` says which, so that it cannot drop out
unseen. What the original computed for F.linear, `F.linear(x.dequantize(), w.dequantize())`, is an
oracle everywhere, and beside the original it is compared with it.
"""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import ml_dtypes
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import functional_sq as fsq
from bridge import aqt, wrapper
from bridge.aqt import (
    AffineQuantizedTensor,
    Float8Layout,
    Float8MMConfig,
    PlainLayout,
    to_affine_quantized_floatx_static,
    to_affine_quantized_intx_static,
)
from bridge.linear_activation_quantized import (
    LinearActivationQuantizedTensor,
    static_activation,
    to_linear_activation_quantized,
)

with warnings.catch_warnings():
    # On import torchao 0.16 warns of its own moved modules; a run of the tests turns warnings into errors.
    warnings.simplefilter("ignore")
    torchao = importlib.import_module("torchao")
    original = importlib.import_module("torchao.dtypes")
    from torchao.float8.inference import Float8MMConfig as TorchaoMMConfig
    from torchao.quantization.observer import AffineQuantizedMinMaxObserver
    from torchao.quantization.quant_primitives import MappingType, ZeroPointDomain
    from torchao.quantization.utils import compute_error

HAS_ORIGINAL = hasattr(original, "to_affine_quantized_intx_static")
FLOAT8 = torch.float8_e4m3fn
U = 2.0**-24  # half a step of float32 below 1


# Helpers.


def quantized(
    x: Tensor,
    block_size: tuple[int, ...],
    dtype: torch.dtype = torch.uint8,
    *,
    scale_shape: tuple[int, ...] = (-1,),
    **bounds: int,
) -> AffineQuantizedTensor:
    """Quantize `x` with scales and zero points that vary from block to block and let some values saturate."""
    scale, zero_point = parameters(x, block_size, dtype)
    scale = scale.reshape(scale_shape)
    if dtype.is_floating_point:
        return to_affine_quantized_floatx_static(x, scale, block_size, dtype)
    return to_affine_quantized_intx_static(x, scale, zero_point.reshape(scale_shape), block_size, dtype, **bounds)


def parameters(x: Tensor, block_size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = [n // b if b else 1 for n, b in zip(x.shape, block_size, strict=True)]
    low, high = fsq.FORMATS[dtype].bounds
    width = 300.0 if dtype.is_floating_point else high - low
    scale = (torch.rand(shape) + 4) / width
    return scale, torch.randint(int(low + width * 0.4), int(low + width * 0.6) + 1, shape, dtype=torch.int32)


def to_numpy(t: Tensor) -> np.ndarray:
    if t.dtype is torch.bfloat16:
        return t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    if t.dtype is FLOAT8:
        return t.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return t.numpy()


def bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def check_bits(actual: Tensor, expected: Tensor) -> None:
    """Assert equal dtypes, shapes and bits; on values, a NaN would differ from itself and -0.0 equal 0.0."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(bits(actual), bits(expected)), f"{actual} differs from {expected}"


def check_equal(actual: AffineQuantizedTensor, expected: AffineQuantizedTensor) -> None:
    """Assert that two quantized tensors agree in everything."""
    assert type(actual) is type(expected)
    ours, theirs = actual.__tensor_flatten__(), expected.__tensor_flatten__()
    assert ours == theirs
    assert actual.shape == expected.shape
    for name in ours[0]:
        a, b = getattr(actual, name), getattr(expected, name)
        if isinstance(a, AffineQuantizedTensor):
            check_equal(a, b)
        else:
            check_bits(a, b)


def test_the_helpers_can_fail() -> None:
    with pytest.raises(AssertionError, match="differs"):
        check_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    q = quantized(torch.ones(2, 4), (1, 4))
    with pytest.raises(AssertionError, match="differs"):
        check_equal(q, q._map(lambda t: t + 1))
    with pytest.raises(AssertionError):
        check_equal(q, q.to(torch.bfloat16))


def test_the_original_is_an_oracle_where_it_exists() -> None:
    release = tuple(int(n) for n in torchao.__version__.split(".")[:2])
    assert (release < (0, 17)) == HAS_ORIGINAL, f"torchao {torchao.__version__}"


# Codes and real values.

Oracle = Callable[[Tensor, AffineQuantizedTensor], tuple[Tensor, Tensor]]


def by_numpy(x: Tensor, q: AffineQuantizedTensor) -> tuple[Tensor, Tensor]:
    format = oracle.FORMATS[str(q.target_dtype).removeprefix("torch.")]
    low, high = format.qmin, format.qmax
    scale, zero_point = q.scale.numpy(), q.qparams.zero_point.numpy()
    codes = oracle.quantize(
        to_numpy(x),
        scale,
        zero_point,
        format,
        qmin=low if q.quant_min is None else q.quant_min,
        qmax=high if q.quant_max is None else q.quant_max,
    )
    real = oracle.dequantize(codes, scale, zero_point, to_numpy(x).dtype)
    as_tensor = [torch.from_numpy(np.ascontiguousarray(a).view(np.uint8)) for a in (codes, real)]
    return as_tensor[0].view(q.int_data.dtype), as_tensor[1].view(x.dtype)


def the_original(x: Tensor, q: AffineQuantizedTensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the original warns that it is going to be removed
        if q.target_dtype.is_floating_point:
            layout = original.Float8Layout(mm_config=None)
            return original.to_affine_quantized_floatx_static(x, q.scale, q.block_size, q.target_dtype, layout)
        return original.to_affine_quantized_intx_static(
            x, q.scale, q.zero_point, q.block_size, q.target_dtype, q.quant_min, q.quant_max
        )


def by_torchao(x: Tensor, q: AffineQuantizedTensor) -> tuple[Tensor, Tensor]:
    theirs = the_original(x, q)
    exact = torch.float32 if q.target_dtype is torch.int16 else x.dtype  # it subtracts in the dtype of the result
    return theirs.tensor_impl.get_plain()[0], theirs.dequantize(exact).to(x.dtype)


ORACLES: dict[str, Oracle] = {"numpy": by_numpy} | ({"torchao": by_torchao} if HAS_ORIGINAL else {})

CODED: dict[str, dict[str, Any]] = {
    "per tensor": {"block_size": (6, 8)},
    "per tensor, scale ()": {"block_size": (6, 8), "scale_shape": ()},
    "per row": {"block_size": (1, 8)},
    "per row, scale (6, 1)": {"block_size": (1, 8), "scale_shape": (6, 1)},
    "per column": {"block_size": (6, 1)},
    "groups": {"block_size": (1, 4)},
    "blocks": {"block_size": (2, 4)},
    "int8": {"block_size": (1, 8), "dtype": torch.int8},
    "int8, -127": {"block_size": (1, 8), "dtype": torch.int8, "quant_min": -127, "quant_max": 100},
    "int16": {"block_size": (1, 8), "dtype": torch.int16},
    "uint4": {"block_size": (1, 8), "dtype": torch.uint4},
    "float8, per tensor": {"block_size": (6, 8), "dtype": FLOAT8},
    "float8, per row": {"block_size": (1, 8), "dtype": FLOAT8},
    "float8, blocks": {"block_size": (2, 4), "dtype": FLOAT8},
}


@pytest.mark.parametrize("who", ORACLES)
@pytest.mark.parametrize("case", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_real_values_are_those_of_the_oracle(dtype: torch.dtype, case: str, who: str) -> None:
    x = (torch.randn(6, 8) * 2).to(dtype)
    q = quantized(x, **CODED[case])
    codes, real = ORACLES[who](x, q)
    check_bits(q.int_data, codes)
    check_bits(q.dequantize(), real)
    assert (q.dtype, q.shape, q.block_size) == (dtype, x.shape, CODED[case]["block_size"])


def test_the_attributes_that_old_code_reads() -> None:
    q = quantized(torch.randn(6, 8), (1, 8), torch.int8, quant_min=-127)
    assert (q.quant_min, q.quant_max, q.block_size, q.device.type) == (-127, None, (1, 8), "cpu")
    assert q.scale.shape == q.zero_point.shape == (6, 1)
    codes, scale, zero_point = q.tensor_impl.get_plain()
    assert codes is q.tensor_impl.data is q.tensor_impl.int_data is q.int_data
    assert scale is q.tensor_impl.scale is q.scale
    assert zero_point is q.tensor_impl.zero_point is q.zero_point
    assert quantized(torch.randn(6, 8), (6, 8), FLOAT8).tensor_impl.get_plain()[2] is None


needs_original = pytest.mark.skipif(not HAS_ORIGINAL, reason="this torchao has no AffineQuantizedTensor")


@needs_original
@pytest.mark.filterwarnings("ignore:Models quantized with version 1:UserWarning")
@pytest.mark.parametrize("target", [torch.int8, torch.uint4, FLOAT8])
@pytest.mark.parametrize("domain", [ZeroPointDomain.INT, ZeroPointDomain.NONE])
def test_the_arguments_and_attributes_of_the_original(target: torch.dtype, domain: ZeroPointDomain) -> None:
    x, scale, zero_point = torch.randn(4, 8), torch.rand(4) + 0.01, torch.full((4,), 3, dtype=torch.int32)
    made = []
    for module in (aqt, original):
        if target is FLOAT8:
            layout = module.Float8Layout(mm_config=None)
            args = x, scale.reshape(4, 1), (1, 8), target, layout
            made.append(module.to_affine_quantized_floatx_static(*args, scale_dtype=torch.float32))
        else:
            points = zero_point if domain is ZeroPointDomain.INT else None
            args = x, scale, points, (1, 8), target, 1, 14, domain, module.PlainLayout()
            made.append(module.to_affine_quantized_intx_static(*args))
    ours, theirs = made
    assert ours.zero_point_domain is theirs.zero_point_domain
    assert repr(ours._layout) == repr(theirs._layout)
    assert (ours.tensor_impl.dtype, ours.tensor_impl.shape) == (theirs.tensor_impl.dtype, theirs.tensor_impl.shape)
    assert hasattr(ours.tensor_impl, "float8_data") == hasattr(theirs.tensor_impl, "float8_data")
    if target is FLOAT8:
        check_bits(ours.tensor_impl.float8_data, theirs.tensor_impl.float8_data)
        again = to_affine_quantized_floatx_static(x, scale, (1, 8), target, theirs._layout)
    else:
        again = to_affine_quantized_intx_static(x, scale, points, (1, 8), target, 1, 14, _layout=theirs._layout)
    check_bits(ours.tensor_impl.data, theirs.tensor_impl.get_plain()[0])
    check_bits(ours.dequantize(), theirs.dequantize())
    check_equal(again, ours)


def test_a_layout_says_how_the_product_adds() -> None:
    config = Float8MMConfig(use_fast_accum=True)
    q = to_affine_quantized_floatx_static(X, S, X.shape, FLOAT8, Float8Layout(config))
    assert q._layout == Float8Layout(config)
    assert intx()._layout == PlainLayout()


def test_no_zero_point_is_a_zero_point_of_zero() -> None:
    x, scale = torch.randn(3, 4), torch.tensor(0.02)
    without = to_affine_quantized_intx_static(x, scale, None, x.shape, torch.int8)
    zero = to_affine_quantized_intx_static(x, scale, torch.tensor(0), x.shape, torch.int8)
    check_bits(without.int_data, zero.int_data)
    check_bits(without.dequantize(), zero.dequantize())
    check_bits(F.linear(without, without), F.linear(zero, zero))


def test_a_float_zero_point_gives_the_bits_of_an_integer_one() -> None:
    x = torch.randn(6, 8).bfloat16()
    q = quantized(x, (1, 8))
    f = to_affine_quantized_intx_static(x, q.scale, q.zero_point.float(), (1, 8), torch.uint8)
    check_bits(f.int_data, q.int_data)
    check_bits(f.dequantize(), q.dequantize())
    check_bits(F.linear(f, f), F.linear(q, q))


def test_print_shows_what_is_inside() -> None:
    text = repr(quantized(torch.randn(2, 4), (1, 4), torch.int8, quant_min=-127).bfloat16())
    shown = [
        "AffineQuantizedTensor(",
        "int_data=tensor([[",
        "dtype=torch.int8)",
        ".reshape(2, 1)",
        "zero_point=tensor([",
        "target_dtype=torch.int8, quant_min=-127, block_size=(1, 4), shape=(2, 4), device=cpu, dtype=torch.bfloat16",
    ]
    assert [part for part in shown if part not in text] == []
    config = Float8Layout(Float8MMConfig(use_fast_accum=True))
    q = to_affine_quantized_floatx_static(torch.ones(2), torch.tensor(1.0), (2,), FLOAT8, config)
    assert "use_fast_accum=True" in repr(q)
    assert "zero_point=None" in repr(q)


CHOSEN: dict[str, tuple[MappingType, tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "per row": (MappingType.SYMMETRIC, (1, 8), torch.int8, {}),
    "per tensor": (MappingType.ASYMMETRIC, (6, 8), torch.uint8, {}),
    "groups": (MappingType.ASYMMETRIC, (1, 4), torch.uint4, {"quant_min": 0, "quant_max": 15}),
    "blocks": (MappingType.SYMMETRIC_NO_CLIPPING_ERR, (2, 4), torch.int8, {"eps": 1e-3}),
    "codes": (MappingType.SYMMETRIC, (1, 8), torch.int8, {"quant_min": -127, "scale_dtype": torch.float32}),
    "no zero point": (MappingType.SYMMETRIC, (1, 8), torch.int8, {"zero_point_domain": ZeroPointDomain.NONE}),
}


@needs_original
@pytest.mark.parametrize("case", CHOSEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_is_chosen_with_the_bits_of_the_original(dtype: torch.dtype, case: str) -> None:
    *chosen, options = CHOSEN[case]
    x = torch.randn(6, 8).to(dtype) * torch.logspace(-6, 1, 6).to(dtype)[:, None]
    ours, theirs = (
        module.to_affine_quantized_intx(x, *chosen, zero_point_dtype=torch.int32, **options)
        for module in (aqt, original)
    )
    assert (ours.block_size, ours.dtype) == (tuple(theirs.block_size), theirs.dtype)
    for a, b in zip(ours.tensor_impl.get_plain(), theirs.tensor_impl.get_plain(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            check_bits(a, b.reshape(a.shape))
    check_bits(ours.dequantize(), theirs.dequantize())


def test_the_scale_of_a_compiled_layers_input_is_chosen_in_its_graph() -> None:
    """As the weight of torchao's GPTQ-like tutorial, and an input of any number of rows, each with a scale."""

    def rows(x: Tensor) -> AffineQuantizedTensor:
        return aqt.to_affine_quantized_intx(x, MappingType.SYMMETRIC, (1, x.shape[-1]), torch.int8, eps=1e-5)

    linear = torch.nn.Linear(16, 8)
    linear.weight = torch.nn.Parameter(to_linear_activation_quantized(rows(linear.weight), rows))
    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        x = torch.randn(n, 16)
        check_bits(compiled(x), linear(x))
        check_bits(linear(x), F.linear(rows(x), linear.weight.original_weight_tensor, linear.bias))


# Operations that choose and move elements.

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "detach": lambda t: t.detach(),
    "clone": lambda t: t.clone(),
    "alias": torch.ops.aten.alias,
    "[2:4]": lambda t: t[2:4],
    "[::2]": lambda t: t[::2],
    "[:, 4:]": lambda t: t[:, 4:],
    "[-1]": lambda t: t[-1],
    "[3]": lambda t: t[3],
    "[4:2]": lambda t: t[4:2],
    "[[3, 0, 3]]": lambda t: t[torch.tensor([3, 0, 3])],
    "[mask]": lambda t: t[torch.arange(6) > 2],
    "[:, [1, 1]]": lambda t: t[:, torch.tensor([1, 1])],
    "narrow": lambda t: t.narrow(0, 1, 3),
    "t": lambda t: t.t(),
    "T": lambda t: t.T,
    "transpose": lambda t: t.transpose(0, 1),
    "permute": lambda t: t.permute(1, 0),
    "t.contiguous": lambda t: t.t().contiguous(),
    "view to itself": lambda t: t.view(6, 8),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("case", [c for c in CODED if "groups" not in c and "blocks" not in c])
def test_an_operation_commutes_with_dequantize(case: str, operation: str, inference: bool) -> None:
    q, op = quantized(torch.randn(6, 8), **CODED[case]), OPERATIONS[operation]
    with torch.inference_mode(inference):
        result = op(q)
    assert isinstance(result, AffineQuantizedTensor)
    assert (result.stride(), result.shape) == (result.int_data.stride(), result.int_data.shape)
    check_bits(result.int_data, op(q.int_data))
    check_bits(result.dequantize(), op(q.dequantize()))


LIKE_THE_ORIGINAL = ["detach", "clone", "[2:4]", "[[3, 0, 3]]", "[mask]", "t", "view to itself"]


@pytest.mark.parametrize("who", ["dequantized", *(["torchao"] if HAS_ORIGINAL else [])])
@pytest.mark.parametrize("operation", LIKE_THE_ORIGINAL)
@pytest.mark.parametrize("case", ["per row, scale (6, 1)", "int8"])
def test_an_operation_gives_what_the_original_gave(case: str, operation: str, who: str) -> None:
    x, op = torch.randn(6, 8), OPERATIONS[operation]
    q = quantized(x, **CODED[case])
    result = op(q)
    if who == "torchao":
        # The original transposes no scale, and so dequantizes a transposed tensor with 1-D scales only.
        flat = to_affine_quantized_intx_static(x, q.scale, q.zero_point, q.block_size, q.target_dtype)
        flat.scale, flat.zero_point = q.scale.reshape(-1), q.zero_point.reshape(-1)
        expected = op(original.to_affine_quantized_intx_static(x, flat.scale, flat.zero_point, (1, 8), q.target_dtype))
        check_bits(result.int_data, expected.tensor_impl.get_plain()[0])
        check_bits(result.dequantize(), expected.dequantize())
        assert result.block_size == tuple(expected.block_size)
    else:
        check_bits(result.dequantize(), op(q.dequantize()))


def test_a_slice_keeps_whole_blocks() -> None:
    q = quantized(torch.randn(6, 8), (2, 4))
    for where in (slice(2, 6), slice(None, -2), slice(6, 6), slice(0, 100)):
        check_bits(q[where].dequantize(), q.dequantize()[where])
        assert q[where].block_size[1] == 4
    for where in (slice(1, 5), slice(0, 3), slice(0, 4, 2), 1, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match=r"axis 0 of shape \(6, 8\) cuts blocks of 2 .*multiples of 2"):
            q[where]


def test_views_of_activations() -> None:
    x = torch.randn(2, 3, 8)
    for block_size, sizes in (
        ((2, 3, 8), [(6, 8), (48,), (2, 3, 2, 4), (-1, 4)]),
        ((1, 1, 8), [(6, 8), (-1, 8), (3, 2, 8)]),
    ):
        q = quantized(x, block_size)
        for size in sizes:
            check_bits(q.view(size).dequantize(), q.dequantize().view(size))
            check_bits(q.reshape(size).dequantize(), q.dequantize().reshape(size))
    with pytest.raises(ValueError, match="does not keep the blocks"):
        quantized(x, (1, 1, 8)).view(-1)


def test_conversions_change_the_outer_dtype_alone() -> None:
    q = quantized(torch.randn(6, 8), (1, 8))
    for converted in (q.to(torch.bfloat16), q.bfloat16(), q.to("cpu", torch.bfloat16)):
        assert converted.dtype is torch.bfloat16
        assert converted.scale.dtype is torch.float32
        check_bits(converted.int_data, q.int_data)
        check_bits(converted.dequantize(), q.dequantize(torch.bfloat16))
    assert q.to(torch.float32) is q
    assert q.cpu() is q
    away = q.to("meta")
    assert {t.device.type for t in (away, away.int_data, away.scale, away.zero_point)} == {"meta"}


# Products.


def exact(x: AffineQuantizedTensor, w: AffineQuantizedTensor, bias: Tensor | None) -> Tensor:
    """The sum over k in int64, then the float32 operations of functional_sq.linear, one numpy operation each."""
    a = x.int_data.numpy().astype(np.int64) - x.zero_point.numpy().astype(np.int64)
    b = w.int_data.numpy().astype(np.int64) - w.zero_point.numpy().astype(np.int64)
    scale = x.scale.reshape(-1, 1) if x.scale.numel() == 1 else x.scale
    y = (a @ b.T).astype(np.float32) * (scale.numpy() * w.scale.numpy().reshape(-1))
    if bias is not None:
        y = y + bias.float().numpy()
    return torch.from_numpy(y).to(x.dtype)


PRODUCTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, int]]] = {
    # shape and block of the activation, block of the weight (8, 16), dtypes
    "per tensor, per row": ((5, 16), (5, 16), (1, 16)),
    "per tensor, per tensor": ((5, 16), (5, 16), (8, 16)),
    "per token, per row": ((5, 16), (1, 16), (1, 16)),
    "rank 3": ((2, 3, 16), (2, 3, 16), (1, 16)),
    "rank 3, per token": ((2, 3, 16), (1, 1, 16), (1, 16)),
    "rank 1": ((16,), (16,), (1, 16)),
    "one row": ((1, 16), (1, 16), (1, 16)),
    "no rows": ((0, 16), (0, 16), (1, 16)),
    "no rows, per token": ((0, 16), (1, 16), (1, 16)),
}
INTEGERS = [(torch.uint8, torch.uint8), (torch.int8, torch.int8), (torch.uint8, torch.int8), (torch.uint4, torch.int4)]


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("formats", INTEGERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_is_the_exact_integer_product(
    with_bias: bool, dtype: torch.dtype, formats: tuple[torch.dtype, torch.dtype], case: str
) -> None:
    shape, block, weight_block = PRODUCTS[case]
    x = quantized(torch.randn(shape, dtype=dtype), block, formats[0])
    w = quantized(torch.randn(8, 16, dtype=dtype), weight_block, formats[1])
    bias = torch.randn(8, dtype=dtype) if with_bias else None
    y = F.linear(x, w, bias)
    assert (y.shape, y.dtype) == ((*shape[:-1], 8), dtype)
    check_bits(y, exact(x, w, bias).reshape(y.shape))


def float_product(x: AffineQuantizedTensor, w: AffineQuantizedTensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.dequantize(), w.dequantize(), bias)


@pytest.mark.parametrize("formats", [(torch.uint8, torch.uint8), (torch.int8, torch.int8), (FLOAT8, FLOAT8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_is_near_the_float_product_of_the_original(
    dtype: torch.dtype, formats: tuple[torch.dtype, torch.dtype]
) -> None:
    """The original multiplies floats; both are near the exact product `T = s_x s_w sum a_k b_k` of the codes.

    Let `S = s_x s_w sum |a_k b_k|`, u = 2**-24, and v half a step of the outer dtype (u or 2**-9).
    Ours: integers sum exactly and float8 products are exact but add in float32 in some order, K - 1
    roundings; to float32, two multiplications and the bias are 4 roundings; one to the outer dtype:
    `(K + 3) u S + u |b| + v (|T| + |b|)`. Theirs: each dequantized factor is rounded in float32 and to
    the outer dtype, twice (u + v) a product; K products and sums in float32, the bias, the outer dtype
    once for the product and once more with the bias: `(2u + 2v + K u) S + u |b| + 2 v (|T| + |b|)`. With
    |T| <= S the difference is at most `(2K + 5) u S + 5 v (S + |b|) + 2 u |b|`; 1.01 covers products of
    roundings.
    """
    k = 64
    xf, wf, bias = (torch.randn(s, dtype=dtype) for s in ((5, k), (8, k), (8,)))
    x, w = quantized(xf, (5, k), formats[0]), quantized(wf, (1, k), formats[1])
    real = [t.dequantize(torch.float32).double() for t in (x, w)]
    total = real[0].abs() @ real[1].abs().T
    v = 2.0**-9 if dtype is torch.bfloat16 else U
    bound = 1.01 * ((2 * k + 5) * U * total + 5 * v * (total + bias.double().abs()) + 2 * U * bias.double().abs())
    ours, theirs = F.linear(x, w, bias), float_product(x, w, bias)
    assert ((ours.double() - theirs.double()).abs() <= bound).all()
    if HAS_ORIGINAL:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if FLOAT8 not in formats:  # the original float8 product needs a device with float8 products
                check_bits(F.linear(the_original(xf, x), the_original(wf, w), bias), theirs)
    # Against the exact product, in float64: our part of the bound.
    exactly = real[0] @ real[1].T + bias.double()
    part = 1.01 * ((k + 3 + 2) * U * total + (U + v) * (total + 2 * bias.double().abs()))
    assert ((ours.double() - exactly).abs() <= part).all()


@needs_original
def test_the_original_multiplied_codes_of_inputs_without_the_smallest_one() -> None:
    """So the float product, which is `reference=True` here, is not bit for bit its result in this one case."""
    x, w = torch.randn(50, 64), torch.randn(8, 64)
    scales = torch.tensor(0.03), torch.rand(8) / 40 + 0.01
    for quant_min, multiplied in ((-127, True), (-128, False)):
        q = to_affine_quantized_intx_static(x, scales[0], Z - 128, x.shape, torch.int8, quant_min, 127)
        p = to_affine_quantized_intx_static(w, scales[1], torch.zeros(8), (1, 64), torch.int8)
        theirs = F.linear(
            original.to_affine_quantized_intx_static(x, scales[0], Z - 128, x.shape, torch.int8, quant_min, 127),
            original.to_affine_quantized_intx_static(w, scales[1], torch.zeros(8), (1, 64), torch.int8),
        )
        codes = (q.int_data.float() @ p.int_data.float().T) * scales[0] * scales[1]
        assert torch.equal(theirs, codes) == multiplied
        assert torch.equal(theirs, float_product(q, p, None)) != multiplied


def test_float8_codes_are_multiplied() -> None:
    """Small whole numbers have exact sums in float32: the product is exact and equals that of the codes."""
    x, w = torch.randint(-8, 9, (5, 16)).float(), torch.randint(-8, 9, (8, 16)).float()
    one = torch.tensor(0.25)
    q, p = (to_affine_quantized_floatx_static(t, one, t.shape, FLOAT8) for t in (x * 0.25, w * 0.25))
    check_bits(F.linear(q, p), (x @ w.T) / 16)


@pytest.mark.parametrize(
    ("x_block", "w_block", "formats"),
    [
        ((5, 16), (1, 4), (torch.uint8, torch.uint8)),
        ((1, 4), (1, 16), (torch.uint8, torch.uint8)),
        ((5, 1), (8, 1), (torch.uint8, torch.int8)),
        ((5, 16), (2, 16), (torch.int8, torch.int8)),
        ((5, 16), (1, 16), (torch.int16, torch.int8)),
        ((5, 16), (1, 16), (torch.int8, torch.int16)),
        ((5, 16), (1, 16), (FLOAT8, torch.int8)),
        ((5, 16), (4, 4), (FLOAT8, FLOAT8)),
    ],
    ids=str,
)
def test_what_codes_cannot_multiply_is_the_float_product(
    x_block: tuple[int, int], w_block: tuple[int, int], formats: tuple[torch.dtype, torch.dtype]
) -> None:
    x, w = quantized(torch.randn(5, 16), x_block, formats[0]), quantized(torch.randn(8, 16), w_block, formats[1])
    bias = torch.randn(8)
    check_bits(F.linear(x, w, bias), float_product(x, w, bias))


def test_a_float_input_makes_it_weight_only() -> None:
    x, w, bias = torch.randn(2, 3, 16, requires_grad=True), quantized(torch.randn(8, 16), (1, 4)), torch.randn(8)
    results = F.linear(x, w, bias), F.linear(x, w.dequantize(), bias)
    check_bits(*results)
    check_bits(*(torch.autograd.grad(y.sum(), x)[0] for y in results))


def test_mm_addmm_and_matmul_are_linear() -> None:
    x, w, bias = quantized(torch.randn(5, 16), (5, 16)), quantized(torch.randn(8, 16), (1, 16)), torch.randn(8)
    expected = F.linear(x, w)
    for y in (torch.mm(x, w.t()), x @ w.t(), torch.matmul(x, w.T), torch.ops.aten.linear(x, w)):
        check_bits(y, expected)
    check_bits(torch.addmm(bias, x, w.t()), F.linear(x, w, bias))
    check_bits(F.linear(input=x, weight=w, bias=bias), F.linear(x, w, bias))
    x3 = quantized(torch.randn(2, 3, 16), (1, 1, 16))
    check_bits(x3 @ w.t(), F.linear(x3, w))
    f = torch.randn(5, 16)
    check_bits(f @ w.t(), F.linear(f, w.dequantize()))
    with torch.inference_mode():
        for y in (torch.ops.aten.linear(x, w, bias), torch.addmm(bias, x, w.t())):
            check_bits(y, F.linear(x, w, bias))
        check_bits(x3 @ w.t(), F.linear(x3, w))


def test_the_options_of_the_float8_product() -> None:
    x, scale = torch.randn(3, 4), torch.tensor(0.01)
    for layout in (None, Float8Layout(), Float8Layout(Float8MMConfig())):
        assert not to_affine_quantized_floatx_static(x, scale, x.shape, FLOAT8, layout).use_fast_accum
    for config in (Float8MMConfig(False, True), TorchaoMMConfig(False, True)):
        fast = to_affine_quantized_floatx_static(x, scale, x.shape, FLOAT8, Float8Layout(config))
        assert all(t.use_fast_accum for t in (fast, fast[1:], fast.bfloat16(), copy.deepcopy(fast)))


def embedding(weight: Tensor) -> torch.nn.Embedding:
    layer = torch.nn.Embedding(*weight.shape)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize("case", ["per row", "groups", "int8", "per tensor", "per column", "float8, per row"])
def test_an_embedding_gives_the_real_values_of_the_rows(case: str) -> None:
    q = quantized(torch.randn(6, 8), **CODED[case])
    layer = embedding(q)
    for shape in ((), (3,), (0,), (2, 3)):
        rows = torch.randint(6, shape)
        check_bits(layer(rows), F.embedding(rows, q.dequantize()))
        with torch.inference_mode():
            check_bits(F.embedding(rows, q.bfloat16()), F.embedding(rows, q.dequantize(torch.bfloat16)))
    check_bits(torch.compile(layer, fullgraph=True, backend="aot_eager")(rows), layer(rows))


@needs_original
@pytest.mark.parametrize("case", ["per row", "groups", "int8"])
def test_an_embedding_gives_what_the_original_gave(case: str) -> None:
    x, rows = torch.randn(6, 8), torch.tensor([[5, 0, 5], [1, 2, 3]])
    q = quantized(x, **CODED[case])
    check_bits(embedding(q)(rows), embedding(the_original(x, q))(rows))


# Refusals: the call, the error, and what its message says.

X = torch.ones(4, 8)
S, Z = torch.tensor(0.1), torch.tensor(128)


def intx(x: Any = X, scale: Any = S, zero_point: Any = Z, block: Any = (4, 8), *more: Any) -> AffineQuantizedTensor:
    return to_affine_quantized_intx_static(x, scale, zero_point, block, *(more or (torch.uint8,)))


REFUSED: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "too few scales": (lambda: intx(scale=torch.ones(3), block=(1, 8)), ValueError, r"3 values.*makes 4 blocks"),
    "too many scales": (lambda: intx(scale=torch.ones(4)), ValueError, r"scale of shape \(4,\) has 4 .*makes 1 blocks"),
    "zero points": (lambda: intx(zero_point=torch.ones(2)), ValueError, r"zero_point of shape \(2,\) has 2 values"),
    "block of rank 1": (lambda: intx(block=(8,)), ValueError, r"block_size=\(8,\) has 1 axes.*has 2"),
    "block 3": (
        lambda: intx(block=(1, 3)),
        ValueError,
        r"does not divide axis 1 of shape \(4, 8\); use a divisor of 8",
    ),
    "block 0": (lambda: intx(block=(0, 8)), ValueError, "does not divide axis 0"),
    "block -1": (lambda: intx(block=(1, -1)), ValueError, "does not divide axis 1"),
    "integers": (lambda: intx(torch.ones(4, 8, dtype=torch.int64)), TypeError, "convert it to one of float32"),
    "a list": (lambda: intx([1.0]), TypeError, "got a list; give a tensor"),
    "scale 0.1": (lambda: intx(scale=0.1), TypeError, "scale got a float; give a tensor"),
    "integer scale": (lambda: intx(scale=torch.tensor(1)), TypeError, "scale got a tensor of torch.int64"),
    "zero point 0": (lambda: intx(zero_point=0), TypeError, "zero_point is a int; give a tensor"),
    "intx float8": (lambda: intx(X, S, Z, (4, 8), FLOAT8), TypeError, "use to_affine_quantized_floatx_static"),
    "intx float32": (lambda: intx(X, S, Z, (4, 8), torch.float32), TypeError, "is not a quantized dtype"),
    "quant_max 300": (lambda: intx(X, S, Z, (4, 8), torch.uint8, 0, 300), ValueError, "quant_max=300 is not a code"),
    "floatx uint8": (
        lambda: to_affine_quantized_floatx_static(X, S, (4, 8), torch.uint8),
        TypeError,
        "use to_affine_quantized_intx_static",
    ),
    "domain FLOAT": (
        lambda: intx(X, S, Z, (4, 8), torch.uint8, None, None, ZeroPointDomain.FLOAT),
        ValueError,
        "zero_point_domain=ZeroPointDomain.FLOAT: a zero point is a code here; use ZeroPointDomain.INT",
    ),
    "domain NONE": (
        lambda: intx(X, S, Z, (4, 8), torch.uint8, None, None, ZeroPointDomain.NONE),
        ValueError,
        "a zero point is given with zero_point_domain=ZeroPointDomain.NONE; give None, or use INT",
    ),
    "chosen, no zero": (
        lambda: aqt.to_affine_quantized_intx(X, MappingType.SYMMETRIC, (4, 8), torch.int8, preserve_zero=False),
        ValueError,
        "preserve_zero=False: 0.0 always has a code; leave it out",
    ),
    "chosen, domain NONE": (
        lambda: aqt.to_affine_quantized_intx(
            X, MappingType.ASYMMETRIC, (4, 8), torch.uint8, zero_point_domain=ZeroPointDomain.NONE
        ),
        ValueError,
        "its zero point is not 0; use ZeroPointDomain.INT",
    ),
    "chosen, float8": (
        lambda: aqt.to_affine_quantized_intx(X, MappingType.SYMMETRIC, (4, 8), FLOAT8),
        TypeError,
        "target_dtype=torch.float8_e4m3fn is no integer dtype",
    ),
    "chosen, a list": (
        lambda: aqt.to_affine_quantized_intx([1.0], MappingType.SYMMETRIC, (1,), torch.int8),  # type: ignore[arg-type]
        TypeError,
        "got a list; give a tensor",
    ),
    "a layout of integers": (
        lambda: intx(X, S, Z, (4, 8), torch.uint8, None, None, ZeroPointDomain.INT, Float8Layout()),
        TypeError,
        "_layout is a Float8Layout; give a PlainLayout, or None",
    ),
    "scale_dtype": (
        lambda: to_affine_quantized_floatx_static(X, S, (4, 8), FLOAT8, None, torch.bfloat16),
        TypeError,
        "scale_dtype=torch.bfloat16, but scale is torch.float32, and is kept so; give it in that dtype",
    ),
    "floatx scale 0.1": (
        lambda: to_affine_quantized_floatx_static(X, 0.1, (4, 8), FLOAT8, None, torch.float32),  # type: ignore[arg-type]
        TypeError,
        "scale got a float; give a tensor",
    ),
    "float8_data": (
        lambda: intx().tensor_impl.float8_data,
        AttributeError,
        "float8_data: the codes are torch.uint8; use int_data",
    ),
    "a layout": (
        lambda: to_affine_quantized_floatx_static(X, S, (4, 8), FLOAT8, "plain"),  # type: ignore[arg-type]
        TypeError,
        "_layout is a str; give a Float8Layout",
    ),
    "emulate": (lambda: Float8MMConfig(emulate=True), ValueError, r"emulate=True.*leave it out"),
    "pad_inner_dim": (lambda: Float8MMConfig(pad_inner_dim=True), ValueError, r"pad_inner_dim=True.*leave it out"),
    "torchao's emulate": (
        lambda: Float8Layout(TorchaoMMConfig(emulate=True)),
        ValueError,
        r"emulate=True.*leave it out",
    ),
    "torchao's pad_inner_dim": (
        lambda: Float8Layout(TorchaoMMConfig(pad_inner_dim=True)),
        ValueError,
        r"pad_inner_dim=True.*leave it out",
    ),
    "mm_config": (lambda: Float8Layout({}), TypeError, "mm_config is a dict; give a Float8MMConfig, or None"),  # type: ignore[arg-type]
    "add": (lambda: intx() + 1, NotImplementedError, r"aten.add.Tensor.*use x.dequantize\(\)"),
    "sum": (lambda: intx().sum(), NotImplementedError, r"aten.sum.default.*nothing is dequantized silently"),
    "relu": (lambda: F.relu(intx()), NotImplementedError, "aten.relu.default"),
    "to int8": (lambda: intx().to(torch.int8), TypeError, "use .* x.int_data for codes"),
    "embedding of blocks": (
        lambda: F.embedding(torch.tensor([1]), quantized(X, (2, 8))),
        ValueError,
        r"cuts blocks of 2",
    ),
    "no row": (lambda: F.embedding(torch.tensor([-1]), intx()), IndexError, "out of range"),
    "two indices": (lambda: intx()[torch.tensor([0]), torch.tensor([1])], NotImplementedError, "one index tensor"),
    "mask of rank 2": (lambda: intx()[X > 0], NotImplementedError, "one index tensor of rank 1"),
    "copy of floats": (lambda: intx().copy_(X), TypeError, "a Tensor into a AffineQuantizedTensor"),
    "copy to floats": (lambda: X.clone().copy_(intx()), TypeError, r"use .dequantize\(\)"),
    "copy int8": (lambda: intx().copy_(intx(X, S, Z, (4, 8), torch.int8)), ValueError, "not alike.*assign=True"),
    "copy per row": (lambda: intx().copy_(quantized(X, (1, 8))), ValueError, "not alike"),
    "float weight": (lambda: F.linear(intx(), torch.ones(2, 8)), NotImplementedError, "quantize the weight too"),
    "other dtype": (lambda: F.linear(intx(), intx().bfloat16()), TypeError, r"weight.to\(torch.float32\)"),
    "other K": (lambda: F.linear(intx(), intx().t()), ValueError, "the last axes must be equal"),
    "addmm beta": (lambda: torch.addmm(S, intx(), intx().t(), beta=2), NotImplementedError, "beta=2"),
    "dequantize int8": (lambda: intx().dequantize(torch.int8), TypeError, "dequantize to torch.int8"),
    "no function": (lambda: to_linear_activation_quantized(X, None), TypeError, "give a function"),  # type: ignore
    "no weight": (lambda: to_linear_activation_quantized(1, F.relu), TypeError, "give a tensor"),  # type: ignore
    "zero point float8": (
        lambda: static_activation(X, scale=S, zero_point=Z, target_dtype=FLOAT8),
        ValueError,
        "zero_point is given for torch.float8_e4m3fn",
    ),
    "activation weight": (lambda: activation_weight() + 1, NotImplementedError, "use weight.original_weight_tensor"),
    "activation copy": (lambda: activation_weight().copy_(activation_weight(1)), ValueError, "not alike"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_a_wrong_call_is_refused_with_rule_and_remedy(call: str) -> None:
    function, error, message = REFUSED[call]
    with pytest.raises(error) as caught:
        function()
    assert re.search(message, str(caught.value), flags=re.DOTALL), caught.value


# The weight that quantizes the input.


def activation_weight(quant_min: int = 0, dtype: torch.dtype = torch.float32) -> LinearActivationQuantizedTensor:
    weight = quantized(torch.randn(8, 16, dtype=dtype), (1, 16))
    return to_linear_activation_quantized(
        weight,
        static_activation,
        {"scale": torch.tensor(0.03), "zero_point": Z, "target_dtype": torch.uint8, "quant_min": quant_min},
    )


def test_linear_quantizes_its_input() -> None:
    w, x, bias = activation_weight(), torch.randn(2, 3, 16), torch.randn(8)
    q = to_affine_quantized_intx_static(x, torch.tensor(0.03), Z, x.shape, torch.uint8, 0)
    expected = F.linear(q, w.original_weight_tensor, bias)
    check_bits(F.linear(x, w, bias), expected)
    check_bits(torch.ops.aten.linear(x, w, bias), expected)
    check_bits(x[0] @ w.t(), F.linear(q[0], w.original_weight_tensor))
    check_bits(torch.addmm(bias, x[0], w.t()), expected[0])
    check_bits(F.linear(x[:0], w, bias), torch.empty(0, 3, 8))


PARTS: dict[str, Callable[[Any], Any]] = {
    "[2:4]": lambda t: t[2:4],
    "[:, 4:]": lambda t: t[:, 4:],
    "[3]": lambda t: t[3],
    "[[3, 0, 3]]": lambda t: t[torch.tensor([3, 0, 3])],
    "narrow": lambda t: t.narrow(0, 1, 3),
    "mT.mT": lambda t: t.mT.mT,
    "permute": lambda t: t.permute(1, 0).t(),
    "view to itself": lambda t: t.view(8, 16),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("inference", [False, True])
def test_a_part_of_the_activation_weight_is_that_of_its_original(inference: bool, part: str) -> None:
    """So a shard of it is taken as of any weight, as the original allows."""
    w, take = activation_weight(), PARTS[part]
    with torch.inference_mode(inference):
        taken, expected = take(w), take(w.original_weight_tensor)
    assert isinstance(taken, LinearActivationQuantizedTensor)
    check_equal(taken.original_weight_tensor, expected)
    assert (taken.shape, taken.stride()) == (expected.shape, expected.stride())
    assert taken.quant_kwargs == w.quant_kwargs
    if expected.ndim == 2:
        x = torch.randn(5, expected.shape[1])
        check_bits(F.linear(x, taken), F.linear(static_activation(x, **w.quant_kwargs), expected))


def test_what_the_activation_weight_holds_moves_with_it() -> None:
    w = activation_weight()
    assert (w.shape, w.dtype) == ((8, 16), torch.float32)
    half = w.to(torch.bfloat16)
    assert half.dtype is half.original_weight_tensor.dtype is torch.bfloat16
    check_bits(half.quant_kwargs["scale"], torch.tensor(0.03))
    away = w.to("meta")
    assert away.quant_kwargs["scale"].device.type == away.original_weight_tensor.int_data.device.type == "meta"
    assert away.quant_kwargs["target_dtype"] is torch.uint8
    assert "static_activation" in repr(w)
    assert "scale=tensor(0.0300)" in repr(w)


# Modules.


class StaticLinear(torch.nn.Module):
    """A layer as users of the original wrote it: it quantizes its input in its own forward."""

    def __init__(self, linear: torch.nn.Linear, target: torch.dtype, weight: Any, activation: Any) -> None:
        super().__init__()
        self.target = target
        self.scale, self.zero_point = activation
        self.bias = linear.bias
        block = (1, linear.in_features)
        if target.is_floating_point:
            self.weight = to_affine_quantized_floatx_static(linear.weight, weight[0], block, target, Float8Layout())
        else:
            self.weight = to_affine_quantized_intx_static(linear.weight, *weight, block, target)

    def forward(self, x: Tensor) -> Tensor:
        if self.target.is_floating_point:
            layout = Float8Layout(mm_config=None)
            q = to_affine_quantized_floatx_static(x, self.scale, x.shape, self.target, layout)
        else:
            q = to_affine_quantized_intx_static(x, self.scale, self.zero_point, x.shape, self.target)
        return F.linear(q, self.weight, self.bias)


def static_linear(target: torch.dtype = torch.uint8, dtype: torch.dtype = torch.float32) -> StaticLinear:
    linear = torch.nn.Linear(16, 8, dtype=dtype)
    weight = parameters(linear.weight * 10, (1, 16), target)
    return StaticLinear(linear, target, weight, parameters(torch.empty(1), (1,), target))


def activation_linear(dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    linear = torch.nn.Linear(16, 8, dtype=dtype)
    linear.weight = torch.nn.Parameter(activation_weight(dtype=dtype), requires_grad=False)
    return linear


def saved(value: object) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "torch.save": saved,
}


COPIED: dict[str, Callable[[], Any]] = {
    "uint8": lambda: quantized(torch.randn(8, 16), (1, 16)),
    "int8": lambda: quantized(torch.randn(8, 16), (2, 4), torch.int8, quant_min=-127).bfloat16(),
    "float8": lambda: quantized(torch.randn(8, 16), (8, 16), FLOAT8),
    "Parameter": lambda: torch.nn.Parameter(quantized(torch.randn(8, 16), (1, 16)), requires_grad=False),
    "activation": activation_weight,
    "activation Parameter": lambda: torch.nn.Parameter(activation_weight(), requires_grad=False),
}


# torch 2.13 reads no pickle of a plain float8 tensor either; torch.save it can.
@pytest.mark.parametrize(
    ("kind", "how"), [(k, h) for k in COPIED for h in COPIES if (k, h) != ("float8", "pickle")], ids=str
)
def test_a_copy_has_the_same_bits_and_its_own_memory(kind: str, how: str) -> None:
    q = COPIED[kind]()
    other = COPIES[how](q)
    check_equal(other, q)
    assert isinstance(other, torch.nn.Parameter) == isinstance(q, torch.nn.Parameter)
    inner = [t.original_weight_tensor if isinstance(t, LinearActivationQuantizedTensor) else t for t in (q, other)]
    assert inner[0].int_data.data_ptr() != inner[1].int_data.data_ptr()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["AffineQuantizedTensor", "LinearActivationQuantizedTensor"])
def test_a_state_dict_is_saved_and_loaded(kind: str, assign: bool) -> None:
    def module() -> torch.nn.Linear:
        linear = activation_linear()
        if kind == "AffineQuantizedTensor":
            linear.weight = torch.nn.Parameter(linear.weight.original_weight_tensor, requires_grad=False)
        return linear

    source, target, x = module(), module(), torch.randn(5, 16)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(saved(source.state_dict()), assign=assign)
    assert type(target.weight).__name__ == kind
    assert isinstance(target.weight, torch.nn.Parameter)
    check_equal(target.weight, source.weight)
    check_bits(target(x), source(x))


@pytest.mark.parametrize("kind", ["AffineQuantizedTensor", "LinearActivationQuantizedTensor"])
def test_a_state_is_loaded_into_layers_that_were_made_with_the_same_tensors(kind: str) -> None:
    scale, activation = torch.tensor(1.0), {"scale": torch.tensor(1.0), "zero_point": Z, "target_dtype": torch.uint8}

    def module() -> torch.nn.Linear:
        linear = torch.nn.Linear(16, 8, bias=False)
        rows = scale.expand(8), torch.zeros(1, dtype=torch.int32).expand(8)
        weight = to_affine_quantized_intx_static(linear.weight, *rows, (1, 16), torch.uint8)
        if kind != "AffineQuantizedTensor":
            weight = to_linear_activation_quantized(weight, static_activation, activation)
        linear.weight = torch.nn.Parameter(weight)
        return linear

    target, source = (torch.nn.Sequential(module(), module()) for _ in range(2))
    for layer in source:
        q = quantized(torch.randn(8, 16), (1, 16))
        if kind != "AffineQuantizedTensor":
            q = to_linear_activation_quantized(q, static_activation, activation | {"scale": torch.rand(())})
        layer.weight = torch.nn.Parameter(q)
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(target, source, strict=True):
        check_equal(ours.weight, theirs.weight)
    assert scale == activation["scale"] == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("weight", [lambda: quantized(torch.randn(8, 16), (1, 16)), activation_weight])
def test_a_state_is_loaded_into_a_fresh_float_module_and_asked_for_gradients(
    weight: Callable[[], Any], device: str
) -> None:
    source, x = torch.nn.Linear(16, 8), torch.randn(5, 16)
    source.weight = torch.nn.Parameter(weight())
    target = torch.nn.Linear(16, 8, device=device)
    target.load_state_dict(saved(source.state_dict()), assign=True)
    for module in (source, target.requires_grad_(True)):
        assert isinstance(module.weight, torch.nn.Parameter)
        assert not module.weight.requires_grad
    check_equal(target.weight, source.weight)
    check_bits(target(x), source(x))


def test_a_module_moves_and_converts() -> None:
    module = activation_linear()
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    module.to(torch.bfloat16)
    assert module.weight.dtype is module.weight.original_weight_tensor.dtype is torch.bfloat16
    assert module.weight.original_weight_tensor.scale.dtype is torch.float32
    q = static_activation(x, **module.weight.quant_kwargs)
    check_bits(module(x), F.linear(q, module.weight.original_weight_tensor, module.bias))
    module.to("meta")
    assert module.weight.original_weight_tensor.int_data.device.type == "meta"


@pytest.mark.parametrize("kind", ["AffineQuantizedTensor", "LinearActivationQuantizedTensor"])
def test_data_is_exchanged_with_what_is_inside(kind: str) -> None:
    weights = [activation_weight(quant_min, dtype) for quant_min, dtype in ((0, torch.float32), (1, torch.bfloat16))]
    if kind == "AffineQuantizedTensor":
        weights = [w.original_weight_tensor for w in weights]
    linear = torch.nn.Linear(16, 8)
    linear.weight = kept = torch.nn.Parameter(weights[0])
    linear.weight.data = torch.nn.Parameter(weights[1])
    assert linear.weight is kept
    check_equal(linear.weight, weights[1])
    linear.weight.data = linear.weight.data.float()
    check_equal(linear.weight, weights[1].float())
    for data in (torch.zeros(8, 16), intx()):
        if type(data) is not type(kept):
            with pytest.raises(TypeError, match=rf"data = a {type(data).__name__} of a {kind}"):
                linear.weight.data = data
    weights[1].data = weights[0]
    assert not isinstance(weights[1], torch.nn.Parameter)


@pytest.mark.cuda
def test_cuda() -> None:
    for module in (static_linear(dtype=torch.bfloat16), static_linear(FLOAT8, torch.bfloat16)):
        x = torch.randn(32, 16, dtype=torch.bfloat16)
        expected = module(x)
        module.weight, module.scale = module.weight.cuda(), module.scale.cuda()
        module.zero_point = module.zero_point.cuda()
        y = module.cuda()(x.cuda())
        assert y.is_cuda
        assert compute_error(expected.float(), y.cpu().float()) > 40
        check_bits(module.weight[torch.tensor([1, 0])].cpu().int_data, module.weight.cpu().int_data[[1, 0]])


# Compiled.


@pytest.fixture(autouse=True)
def _no_counts() -> None:
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager_and_multiplies_codes(dtype: torch.dtype) -> None:
    module = static_linear(dtype=dtype)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    x = torch.randn(5, 16, dtype=dtype)
    y, code = run_and_get_code(compiled, x)
    check_bits(y, module(x))
    assert "_int_mm" in code[0]
    counters = torch._dynamo.utils.counters
    for n in (7, 32, 1):
        x = torch.randn(n, 16, dtype=dtype)
        check_bits(compiled(x), module(x))
    assert counters["stats"]["unique_graphs"] <= 2, "sizes 0 and 1 are compiled apart, all others once"


def test_compiled_float8_equals_eager() -> None:
    module = static_linear(FLOAT8, torch.bfloat16)
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    check_bits(torch.compile(module, fullgraph=True)(x), module(x))


def test_the_compiled_activation_weight_equals_eager() -> None:
    module = activation_linear()
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(5, 16)
    y, code = run_and_get_code(compiled, x)
    check_bits(y, module(x))
    assert "_int_mm" in code[0]


@pytest.mark.parametrize("module", [static_linear(), static_linear(FLOAT8), activation_linear()])
def test_the_graph_has_no_breaks(module: torch.nn.Module) -> None:
    explained = torch._dynamo.explain(module)(torch.randn(5, 16))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_user_code_around_it_compiles() -> None:
    w = quantized(torch.randn(8, 16), (1, 16))

    def user(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        domain = ZeroPointDomain.INT
        q = to_affine_quantized_intx_static(x, S, Z, x.shape, torch.uint8, None, None, domain, PlainLayout())
        return q.int_data, q.view(-1, 8).dequantize(), q[1:].dequantize(torch.bfloat16), F.linear(x, w[2:4])

    x = torch.randn(5, 16)
    for actual, expected in zip(torch.compile(user, fullgraph=True, backend="aot_eager")(x), user(x), strict=True):
        check_bits(actual, expected)


@pytest.mark.parametrize("block", [(1, 16), (1, 4)], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_scales_for_each_row_of_a_batch_of_any_size(inference: bool, block: tuple[int, int]) -> None:
    w = quantized(torch.randn(8, 16), (1, 16))

    def user(x: Tensor, scale: Tensor) -> Tensor:
        return F.linear(to_affine_quantized_intx_static(x, scale, None, block, torch.int8), w)

    compiled = torch.compile(user, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5, 8):
        x, scale = torch.randn(n, 16), torch.rand(n, 16 // block[1]) / 40 + 0.01
        with torch.inference_mode(inference):
            check_bits(compiled(x, scale), user(x, scale))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


GLOBAL_SCALE = torch.tensor(0.03)


@pytest.mark.parametrize("where", ["closure", "global"])
def test_tensors_that_a_lambda_holds_become_tensors_of_the_weight(where: str) -> None:
    scale, bits = torch.tensor(0.03), torch.int8
    functions = {
        "closure": lambda x: to_affine_quantized_intx_static(x, scale, None, x.shape, bits),
        "global": lambda x: to_affine_quantized_intx_static(x, GLOBAL_SCALE, None, x.shape, bits),
    }
    module = activation_linear()
    weight = to_linear_activation_quantized(module.weight.original_weight_tensor, functions[where])
    assert list(weight.quant_kwargs.values()) == [scale]
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    compiled = torch.compile(module, fullgraph=True)
    for rows in (5, 9):
        x = torch.randn(rows, 16)
        expected = F.linear(functions[where](x), weight.original_weight_tensor, module.bias)
        check_bits(module(x), expected)
        check_bits(compiled(x), expected)


qmin, nested = torch.tensor(-100), torch.tensor(0.5)  # globals; `qmin` is also the name of an attribute


def by_keyword(x: Tensor, *, scale: Tensor, qmin: int = -3) -> Tensor:
    assert oracle.FORMATS["int8"].qmin == -128
    return to_affine_quantized_intx_static(x, scale, None, x.shape, torch.int8, qmin)


def with_a_function_inside(x: Tensor, *, scale: Tensor, qmin: int = -3) -> Tensor:
    return by_keyword(x, scale=(lambda: scale * nested)(), qmin=qmin)


@pytest.mark.parametrize(("function", "held"), [(by_keyword, []), (with_a_function_inside, ["nested"])])
def test_a_functions_own_keyword_is_not_taken_for_a_global(function: Callable[..., Tensor], held: list[str]) -> None:
    weight, x, scale = activation_weight().original_weight_tensor, torch.randn(5, 16), torch.tensor(0.03)
    for kwargs in ({"scale": scale}, {"scale": scale, "qmin": -2}):
        made = to_linear_activation_quantized(weight, function, kwargs)
        assert sorted(made.quant_kwargs) == sorted([*held, *kwargs])
        check_bits(F.linear(x, made), F.linear(function(x, **kwargs), weight))


def test_a_name_that_is_given_is_not_taken_from_where_a_function_is_defined() -> None:
    def function(x: Tensor, **given: Tensor) -> Tensor:
        return to_affine_quantized_intx_static(x, given["nested"] * nested, None, x.shape, torch.int8)

    weight, x = activation_weight().original_weight_tensor, torch.randn(5, 16)
    made = to_linear_activation_quantized(weight, function, {"nested": torch.tensor(0.06)})
    check_bits(F.linear(x, made), F.linear(function(x, nested=torch.tensor(0.06)), weight))


def test_a_closure_may_have_a_variable_that_is_assigned_later() -> None:
    weight, x = activation_weight().original_weight_tensor, torch.randn(5, 16)
    made = to_linear_activation_quantized(
        weight, lambda x: to_affine_quantized_intx_static(x, scale, None, x.shape, torch.int8)
    )
    assert made.quant_kwargs == {}
    scale = torch.tensor(0.03)
    check_bits(F.linear(x, made), F.linear(intx(x, scale, None, (5, 16), torch.int8), weight))


def test_the_keywords_of_a_partial_are_those_of_the_function() -> None:
    weight, x = activation_weight(), torch.randn(5, 16)
    kwargs = weight.quant_kwargs
    scale = kwargs.pop("scale")
    partial = functools.partial(functools.partial(static_activation, scale=scale * 2), scale=scale)
    made = to_linear_activation_quantized(weight.original_weight_tensor, partial, kwargs)
    assert made.input_quant_func is static_activation
    check_equal(saved(made), made)
    check_bits(F.linear(x, made), F.linear(x, weight))
    by_position = functools.partial(lambda scale, x: intx(x, scale, None, (5, 16), torch.int8), scale)
    made = to_linear_activation_quantized(weight.original_weight_tensor, by_position)
    check_bits(F.linear(x, made), F.linear(by_position(x), weight.original_weight_tensor))


@pytest.mark.parametrize("module", [static_linear(), static_linear(FLOAT8), activation_linear()])
def test_export(module: torch.nn.Module) -> None:
    x = torch.randn(5, 16)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(999, 16)
    y, eager = program.module()(x), module(x)
    if getattr(module, "target", None) is not FLOAT8:
        check_bits(y, eager)
    else:  # An operator of torch adds the 16 products in another order than oneDNN; the weights are at most 1/4.
        assert (y - eager).abs().max() <= 2 * 19 * U * (16 * 0.27 * x.abs().max() + 0.25)


def users_function(x: Tensor, *, scale: Tensor, version: str) -> Tensor:
    """What a user's file defines; the test edits it."""
    raise NotImplementedError


def compiled_anew(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Return what `module` computes compiled as in a new process, with the caches on disk as they are."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(module, fullgraph=True)(x)


@torch.no_grad()
def test_a_users_function_that_was_edited_is_not_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function pickles as its name, so a cache that knows it by a pickle takes one function for another."""
    module, x = activation_linear(), torch.randn(5, 16)
    kwargs = {"scale": torch.tensor(0.03), "version": uuid4().hex}  # of no graph that is in a cache on disk
    for factor in (1, 2):

        def edited(x: Tensor, *, scale: Tensor, version: str, factor: int = factor) -> Tensor:
            return to_affine_quantized_intx_static(x * factor, scale, None, x.shape, torch.int8)

        edited.__qualname__ = "users_function"
        monkeypatch.setattr(sys.modules[__name__], "users_function", edited)
        weight = to_linear_activation_quantized(activation_weight().original_weight_tensor, edited, kwargs)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        check_bits(compiled_anew(module, x), module(x))


@torch.no_grad()
def test_the_cache_knows_a_graph_by_the_code_of_both_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = activation_linear(), torch.randn(5, 16)
    found = []
    for changed in ((wrapper, "_source"), None, (wrapper, "_source"), (wrapper.backends, "fingerprint")):
        if changed is not None:
            unique = uuid4().hex
            monkeypatch.setattr(*changed, lambda *of, unique=unique: unique)
        check_bits(compiled_anew(module, x), module(x))
        found.append(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
    assert found == [0, 1, 0, 0]


# From observers to a quantized model, as the tutorial of the original does.


class Observed(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear, mapping: MappingType, target: torch.dtype) -> None:
        super().__init__()
        self.linear = linear
        block = importlib.import_module("torchao.quantization.granularity")
        options = {
            "eps": torch.finfo(torch.float32).eps,
            "scale_dtype": torch.float32,
            "zero_point_dtype": torch.float32,
        }
        self.activation = AffineQuantizedMinMaxObserver(mapping, target, granularity=block.PerTensor(), **options)
        self.weight = AffineQuantizedMinMaxObserver(mapping, target, granularity=block.PerAxis(axis=0), **options)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(x), self.weight(self.linear.weight), self.linear.bias)


def with_layer(observed: Observed, target: torch.dtype) -> torch.nn.Module:
    qparams = observed.weight.calculate_qparams(), observed.activation.calculate_qparams()
    return StaticLinear(observed.linear, target, *qparams)


def with_weight(observed: Observed, target: torch.dtype) -> torch.nn.Module:
    scale, zero_point = observed.activation.calculate_qparams()
    kwargs = {"scale": scale, "target_dtype": target}
    if not target.is_floating_point:
        kwargs["zero_point"] = zero_point
    weight = to_linear_activation_quantized(with_layer(observed, target).weight, static_activation, kwargs)
    linear = copy.deepcopy(observed.linear)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize("swap", [with_layer, with_weight])
@pytest.mark.parametrize(("target", "mapping"), [(torch.uint8, "ASYMMETRIC"), (FLOAT8, "SYMMETRIC")], ids=str)
def test_from_observers_to_a_quantized_model(
    target: torch.dtype, mapping: str, swap: Callable[[Observed, torch.dtype], torch.nn.Module]
) -> None:
    layers = [torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 32)]
    model = torch.nn.Sequential(*layers).eval().to(torch.bfloat16)
    batches = [torch.randn(16, 64, dtype=torch.bfloat16) for _ in range(4)]
    with torch.no_grad():
        expected = model(batches[0])
        observed = torch.nn.Sequential(*(Observed(layer, MappingType[mapping], target) for layer in model))
        for batch in batches:
            observed(batch)
        static = torch.nn.Sequential(*(swap(layer, target) for layer in observed))
        result = static(batches[0])
    assert (result.dtype, result.shape) == (torch.bfloat16, (16, 32))
    assert compute_error(expected.float(), result.float()) > 25
