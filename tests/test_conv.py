"""Convolution on codes: integers exact against int64 numpy, and the layers that hold them.

The roundings behind an exact sum, and so `bound`, are those of tests/test_linear.py.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from test_linear import (
    ARRAYS,
    BY,
    FLOAT8S,
    array,
    assert_within,
    bound,
    codes,
    epilogue,
    float8_codes,
    needs_bfloat16,
    needs_brgemm,
    needs_onednn,
    qparams,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map

import functional_sq as fsq
from functional_sq import FoldedWeight, MappingType, QParams, QuantSpec, brgemm, onednn, onednn_conv
from functional_sq.formats import REAL_DTYPES
from functional_sq.operands import Operands
from functional_sq.windows import laid_out

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import bridge
    from bridge import (
        ObservedConv1d,
        ObservedConv2d,
        ObservedConv3d,
        ObservedLinear,
        ObserverModule,
        QuantizedConv2d,
        QuantizedLinear,
        StaticQuantConfig,
    )
    from bridge.kinds import observed_type
    from bridge.quantized import QUANTIZED, Quantized

ASYMMETRIC, SYMMETRIC = MappingType.ASYMMETRIC, MappingType.SYMMETRIC
CONVS = (F.conv1d, F.conv2d, F.conv3d)


# --- the cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """The shapes of a convolution and how its windows lie; `pads` is `padding` spelled out."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    pads: tuple[tuple[int, int], ...] = ()

    def settings(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups")}

    def each(self, value: object) -> tuple[int, ...]:
        return (value,) * (len(self.weight) - 2) if isinstance(value, int) else tuple(value)

    def convolve(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Convolve real zeros around `x`, by the oracle."""
        y = oracle.convolve(
            x if x.ndim == w.ndim else x[None],
            w,
            stride=self.each(self.stride),
            padding=self.pads or tuple((p, p) for p in self.each(self.padding)),
            dilation=self.each(self.dilation),
            groups=self.groups,
        )
        return y if x.ndim == w.ndim else y[0]

    @property
    def is_wrong_by_onednn(self) -> bool:
        outputs = self.weight[0] // self.groups
        return onednn.AMX and self.groups > 1 and outputs > 32 and outputs % 32 > 0


GEOMETRIES = {
    "1d": Geometry((2, 5, 11), (4, 5, 3)),
    "1d-padded": Geometry((2, 5, 11), (4, 5, 3), padding=2),
    "1d-strided": Geometry((2, 5, 12), (4, 5, 4), stride=3, padding=1),
    "1d-same-even": Geometry((2, 5, 11), (4, 5, 4), padding="same", pads=((1, 2),)),
    "1d-one-channel": Geometry((2, 1, 11), (1, 1, 3), padding=(1,)),
    "1d-groups": Geometry((2, 6, 11), (4, 3, 3), groups=2, padding=1, dilation=2),
    "1d-unbatched": Geometry((5, 11), (4, 5, 3), padding=1),
    "2d": Geometry((2, 5, 7, 6), (4, 5, 3, 3)),
    "2d-pointwise": Geometry((2, 5, 7, 6), (4, 5, 1, 1)),
    "2d-pointwise-strided": Geometry((2, 5, 7, 6), (4, 5, 1, 1), stride=2),
    "2d-padded": Geometry((2, 5, 7, 6), (4, 5, 3, 3), padding=1),
    "2d-valid": Geometry((2, 5, 7, 6), (4, 5, 3, 2), padding="valid", pads=((0, 0), (0, 0))),
    "2d-uneven": Geometry((2, 5, 7, 9), (4, 5, 3, 2), stride=(2, 1), padding=(0, 3), dilation=(1, 3)),
    "2d-same": Geometry((2, 5, 7, 6), (4, 5, 3, 3), padding="same", dilation=2, pads=((2, 2), (2, 2))),
    "2d-same-even": Geometry((2, 5, 7, 6), (4, 5, 2, 4), padding="same", pads=((0, 1), (1, 2))),
    "2d-one-channel": Geometry((2, 1, 7, 6), (3, 1, 3, 3), padding=1),
    "2d-to-one-position": Geometry((2, 5, 3, 3), (4, 5, 3, 3)),
    "2d-groups": Geometry((2, 6, 7, 6), (4, 3, 3, 3), groups=2, padding=1, stride=2),
    "2d-depthwise": Geometry((2, 6, 7, 6), (6, 1, 3, 3), groups=6, padding=1),
    "2d-depthwise-twice": Geometry((2, 3, 7, 6), (6, 1, 3, 3), groups=3, padding="same", pads=((1, 1), (1, 1))),
    "2d-depthwise-same-even": Geometry((2, 3, 7, 6), (3, 1, 2, 2), groups=3, padding="same", pads=((0, 1), (0, 1))),
    "2d-depthwise-many": Geometry((2, 2, 5, 4), (66, 1, 3, 2), groups=2),
    "2d-unbatched": Geometry((5, 7, 6), (4, 5, 3, 3), padding=1),
    "2d-no-images": Geometry((0, 5, 7, 6), (4, 5, 3, 3), padding=1),
    "3d": Geometry((2, 3, 5, 4, 6), (4, 3, 3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 2), dilation=(1, 1, 3)),
    "3d-groups": Geometry((2, 4, 4, 3, 5), (6, 2, 2, 3, 3), groups=2, padding=1, stride=2),
    "3d-unbatched-same": Geometry((2, 3, 4, 3), (3, 2, 2, 3, 1), padding="same", pads=((0, 1), (1, 1), (0, 0))),
}

PER_TENSOR, PER_CHANNEL = fsq.PerTensor(), fsq.PerAxis(0)
FORMATS = {
    "uint8-uint8": (
        QuantSpec(torch.uint8, PER_TENSOR, mapping=ASYMMETRIC),
        QuantSpec(torch.uint8, PER_CHANNEL, mapping=ASYMMETRIC),
    ),
    "uint8-int8": (QuantSpec(torch.uint8, PER_TENSOR, mapping=ASYMMETRIC), QuantSpec(torch.int8, PER_CHANNEL)),
    "int8-int8": (QuantSpec(torch.int8, PER_TENSOR, mapping=ASYMMETRIC), QuantSpec(torch.int8, PER_CHANNEL)),
    "int8-tensor": (QuantSpec(torch.int8, PER_TENSOR), QuantSpec(torch.int8, PER_TENSOR)),
    "int8-asymmetric": (QuantSpec(torch.int8, PER_TENSOR), QuantSpec(torch.int8, PER_CHANNEL, mapping=ASYMMETRIC)),
    "uint4-int4": (QuantSpec(torch.uint4, PER_TENSOR, mapping=ASYMMETRIC), QuantSpec(torch.int4, PER_CHANNEL)),
    "uint8-uint3": (QuantSpec(torch.uint8, PER_TENSOR), QuantSpec(torch.uint3, PER_CHANNEL)),
}


@dataclass(frozen=True)
class Case:
    """Codes and qparams on both sides, a bias, and a geometry."""

    geometry: Geometry
    act: QuantSpec
    q: Tensor
    qp: QParams
    weight: QuantSpec
    w: Tensor
    w_qp: QParams
    bias: Tensor | None

    def folded(self) -> FoldedWeight:
        return fsq.fold(self.weight, self.w, self.w_qp)

    def conv(self, dtype: torch.dtype = torch.float32, q: Tensor | None = None) -> Tensor:
        q = self.q if q is None else q
        return fsq.conv(self.act, q, self.qp, self.folded(), self.bias, **self.geometry.settings(), dtype=dtype)

    def kept(
        self,
        dtype: torch.dtype = torch.float32,
        q: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Convolve as a layer does that keeps its weight: with the epilogue computed before."""
        folded, q = self.folded(), self.q if q is None else q
        known = fsq.epilogue(self.act, self.qp, folded, dtype=torch.promote_types(dtype, torch.float32))
        settings = self.geometry.settings()
        return fsq.conv(self.act, q, self.qp, folded, self.bias, **settings, dtype=dtype, epilogue=known, **more)

    def to(self, device: str) -> Case:
        moved = {"q": self.q.to(device), "w": self.w.to(device), "bias": self.bias.to(device)}
        pairs = {name: QParams(*(t.to(device) for t in getattr(self, name))) for name in ("qp", "w_qp")}
        return dataclasses.replace(self, **moved, **pairs)

    def total(self) -> np.ndarray:
        """Return the exact sum: int64 in numpy."""
        x, z_x, w, z_w = (array(t).astype(np.int64) for t in (self.q, self.qp.zero_point, self.w, self.w_qp.zero_point))
        return self.geometry.convolve(x - z_x.reshape(()), w - z_w)

    def along(self, values: np.ndarray) -> np.ndarray:
        """Give one number for each output channel the shape that it has beside the result."""
        return values.reshape(-1, *(1,) * (len(self.geometry.weight) - 2))

    def scale(self, wide: np.dtype) -> np.ndarray:
        return array(self.qp.scale).reshape(()).astype(wide) * self.along(array(self.w_qp.scale)).astype(wide)

    def bias_array(self) -> np.ndarray | None:
        return None if self.bias is None else self.along(array(self.bias))


def draw(
    geometry: Geometry,
    act: QuantSpec,
    weight: QuantSpec,
    *,
    seed: int = 0,
    bias: bool = True,
    fill: tuple[str, str] = ("all", "all"),
) -> Case:
    rng = np.random.default_rng(seed)

    def operand(spec: QuantSpec, shape: tuple[int, ...], fill: str) -> tuple[Tensor, QParams]:
        if spec.dtype in FLOAT8S:
            qp = qparams(rng, spec, shape, "all")
            return float8_codes(rng, spec.dtype, shape), QParams(qp.scale, torch.zeros_like(qp.zero_point))
        return codes(rng, spec, shape, fill), qparams(rng, spec, shape, fill)

    q, qp = operand(act, geometry.shape, fill[0])
    w, w_qp = operand(weight, geometry.weight, fill[1])
    b = torch.from_numpy(rng.standard_normal(geometry.weight[0]).astype(np.float32)) if bias else None
    return Case(geometry, act, q, qp, weight, w, w_qp, b)


# --- the core --------------------------------------------------------------------------------------


def assert_exact(y: Tensor, case: Case) -> None:
    """Assert the bits of int64 numpy with the float operations in their order, and the bound of the truth."""
    kind = ARRAYS[y.dtype]
    wide = np.dtype(np.float64 if y.dtype is torch.float64 else np.float32)
    total, bias = case.total(), case.bias_array()
    np.testing.assert_array_equal(array(y), epilogue(total, case.scale(wide), bias, kind))
    exact = total * case.scale(np.dtype(np.float64))
    assert_within(array(y), exact, bias, bound(exact, bias, kind))


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_sum_is_exact_and_then_rounded_as_numpy_rounds(name: str, formats: str) -> None:
    for bias, dtype in ((True, torch.float32), (False, torch.float32), *((True, d) for d in REAL_DTYPES[1:])):
        case = draw(GEOMETRIES[name], *FORMATS[formats], bias=bias)
        y = case.conv(dtype)
        assert y.dtype is dtype
        assert y.is_contiguous()
        assert_exact(y, case)


def last(x: Tensor) -> Tensor:
    """Return images with their channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


@pytest.mark.parametrize(
    "name", ["2d-padded", "2d-uneven", "2d-same-even", "2d-groups", "2d-depthwise", "3d", "3d-groups"]
)
def test_an_image_with_its_channels_last_gives_the_same_bits_in_that_order(name: str) -> None:
    for formats in FORMATS.values():
        case = draw(GEOMETRIES[name], *formats)
        y = case.conv(q=last(case.q))
        assert y.stride() == last(y).stride()
        assert_exact(y, case)
        # A view that is neither, of a larger tensor.
        assert torch.equal(case.conv(q=torch.cat([case.q, case.q], -1)[..., : case.q.shape[-1]]), y)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: nn.Conv2d(8, 8, 3), (6, 7)),
        (lambda: nn.Conv2d(8, 8, 1), (6, 7)),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), (6, 7)),
        (lambda: nn.ConvTranspose2d(8, 8, 3, stride=2), (6, 7)),
        (lambda: nn.Conv3d(8, 8, 1, groups=8), (3, 2, 4)),
    ],
    ids=["3x3", "1x1", "depthwise", "transposed", "depthwise 3d"],
)
def test_one_image_lies_as_its_input_does_eager_and_compiled(
    make: Callable[[], nn.Module], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = last(torch.randn(1, 8, *size))
    model = bridge.prepare_(nn.Sequential(make()).eval(), StaticQuantConfig(dtype))
    bridge.calibrate(model, [x])
    bridge.convert_(model)
    with torch.no_grad():
        for y in (model(x), torch.compile(model, backend="aot_eager")(x)):
            assert y.stride() == y.movedim(1, -1).contiguous().movedim(-1, 1).stride()


@pytest.mark.parametrize("scheme", ["int8", "float8_e4m3fn"])
def test_codes_take_the_memory_format_of_a_module_that_changes_its_dtype_too(scheme: str) -> None:
    layer = quantized(SCHEMES[scheme], nn.Conv2d(6, 4, 3))
    before = layer.weight_codes
    layer.to(dtype=torch.bfloat16, memory_format=torch.channels_last)
    assert layer.weight_codes.dtype is before.dtype
    assert layer.weight_codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.weight_codes.float(), before.float())


@pytest.mark.parametrize(
    ("channels", "groups", "kernel"),
    [(57, 1, 3), (64, 1, 3), (12, 4, 9), (58, 2, 3), (7282, 2, 3), (3670, 1, 3), (14564, 1, 3)],
    ids=lambda v: str(v),
)
@pytest.mark.parametrize("fill", [("high", "high"), ("low", "high"), ("low", "low")], ids=str)
def test_codes_at_the_ends_are_exact_for_any_length_of_a_window(
    channels: int, groups: int, kernel: int, fill: tuple[str, str]
) -> None:
    """On both sides of 258 * 255**2 (float32), 33025 * 255**2 (int32) and 131071 * 128**2 (bare int8 codes)."""
    geometry = Geometry(
        (1, channels, kernel, kernel), (groups, channels // groups, kernel, kernel), groups=groups, padding=kernel // 2
    )
    for formats in ("uint8-uint8", "int8-int8"):
        act, weight = FORMATS[formats]
        case = draw(geometry, act, weight, fill=fill, bias=False)
        assert_exact(case.conv(torch.float64), case)


def test_a_wrong_padding_a_wrong_zero_point_and_a_shifted_window_are_seen() -> None:
    """The oracle tells apart what a convolution on codes gets wrong first."""
    case = draw(GEOMETRIES["2d-padded"], *FORMATS["uint8-uint8"])
    assert_exact(case.conv(), case)
    # Zeros for codes, where the zero point is not 0: what F.pad alone would give.
    padded = dataclasses.replace(case, q=F.pad(case.q, (1, 1, 1, 1)), geometry=GEOMETRIES["2d"])
    one_off = dataclasses.replace(case, qp=QParams(case.qp.scale, case.qp.zero_point + 1))
    shifted = dataclasses.replace(case, q=case.q.roll(1, -1))
    for wrong in (padded, one_off, shifted):
        with pytest.raises(AssertionError):
            assert_exact(wrong.conv(), case)


@pytest.mark.parametrize("dtype", FLOAT8S, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_float8_is_within_the_bound_of_a_float32_sum(name: str, dtype: torch.dtype) -> None:
    case = draw(GEOMETRIES[name], QuantSpec(dtype, PER_TENSOR), QuantSpec(dtype, PER_CHANNEL))
    assert_float8(case.conv(), case, 2.0**-24)


@needs_bfloat16
@pytest.mark.parametrize(
    ("act", "weight"),
    [*((d, d) for d in FLOAT8S), *itertools.permutations((torch.float8_e4m3fn, torch.float8_e5m2))],
)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_float8_by_brgemm_is_within_the_bound_of_a_float32_sum(
    name: str, act: torch.dtype, weight: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []
    convolve = brgemm.convolve
    monkeypatch.setattr(brgemm, "convolve", lambda *of, **to: found.append(convolve(*of, **to)) or found[-1])
    geometry = GEOMETRIES[name]
    case = draw(geometry, QuantSpec(act, PER_TENSOR), QuantSpec(weight, PER_CHANNEL))
    y = case.kept()
    assert_float8(y, case, 2.0**-24)
    assert y.is_contiguous()
    taken = geometry.groups == 1
    assert len(found) == taken
    if taken:
        residual = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        added = case.kept(torch.bfloat16, residual=residual.bfloat16(), relu=True)
        assert torch.equal(added, (y + residual.bfloat16()).relu().bfloat16())
        then = fsq.Requantization(QuantSpec(torch.float8_e4m3fn, PER_TENSOR), case.qp, "relu6")
        codes, expected = case.kept(then=then), fsq.requantize(y, then)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def assert_float8(y: Tensor, case: Case, unit: float) -> None:
    """Assert the bound of a sum of K exact products in any order: `K u` of the magnitudes (Higham 2002, 4.4)."""
    q, w = (array(t).astype(np.float64) for t in (case.q, case.w))
    scale, bias = case.scale(np.dtype(np.float64)), case.bias_array()
    exact = case.geometry.convolve(q, w) * scale
    magnitude = case.geometry.convolve(np.abs(q), np.abs(w)) * scale
    k = math.prod(case.geometry.weight[1:])
    assert_within(array(y), exact, bias, 1.01 * k * unit * magnitude + bound(exact, bias, ARRAYS[y.dtype]))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_unfold_gives_back_what_fold_took_and_a_known_epilogue_changes_no_bit(name: str) -> None:
    for formats in FORMATS.values():
        case = draw(GEOMETRIES[name], *formats)
        folded = case.folded()
        q, qp = fsq.unfold(case.weight, folded)
        for a, b in ((q, case.w), *zip(qp, case.w_qp, strict=True)):
            assert a.dtype is b.dtype
            assert torch.equal(a, b)
        known = fsq.epilogue(case.act, case.qp, folded)
        y = fsq.conv(case.act, case.q, case.qp, folded, case.bias, **case.geometry.settings(), epilogue=known)
        assert torch.equal(y, case.conv())


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch._int_mm has no batching rule
@pytest.mark.parametrize("name", ["1d-padded", "2d-same-even", "2d-groups", "3d"])
@pytest.mark.parametrize("formats", ["uint8-uint8", "int8-int8"])
def test_vmap_is_the_loop(name: str, formats: str) -> None:
    """Over experts: each has codes, qparams and weights of its own."""
    cases = [draw(GEOMETRIES[name], *FORMATS[formats], seed=seed) for seed in range(3)]
    assert_vmap_is_the_loop(fsq.conv, cases, [case.conv() for case in cases])


def assert_vmap_is_the_loop(conv: Callable[..., Tensor], cases: Sequence[Case], loop: Sequence[Tensor]) -> None:
    def one(q: Tensor, qp: QParams, weight: FoldedWeight, bias: Tensor) -> Tensor:
        return conv(cases[0].act, q, qp, weight, bias, **cases[0].geometry.settings())

    def stack(values: list[tuple]) -> list[Tensor | None]:
        return [None if v[0] is None else torch.stack(v) for v in zip(*values, strict=True)]

    arguments = (
        torch.stack([case.q for case in cases]),
        QParams(*stack([case.qp for case in cases])),
        FoldedWeight(*stack([case.folded() for case in cases])),
        torch.stack([case.bias for case in cases]),
    )
    in_dims = tree_map(lambda value: None if value is None else 0, arguments)
    assert torch.equal(torch.vmap(one, in_dims)(*arguments), torch.stack(loop))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_reference_has_the_bits_of_torch_on_dequantized_operands(name: str, dtype: torch.dtype) -> None:
    geometry = GEOMETRIES[name]
    case = draw(geometry, *FORMATS["uint8-uint8"])
    x = fsq.dequantize(case.act, case.q, case.qp, dtype=dtype)
    w = fsq.dequantize(case.weight, case.w, case.w_qp, dtype=dtype)
    bias = case.bias.to(dtype)
    ours = fsq.conv_reference(case.act, case.q, case.qp, w, bias, **geometry.settings())
    sides = [side for pair in reversed(geometry.pads) for side in pair]
    settings = geometry.settings() | ({"padding": 0} if sides else {})
    theirs = CONVS[w.ndim - 3](F.pad(x, sides) if any(sides) else x, w, bias, **settings)
    assert ours.dtype is dtype
    assert torch.equal(ours, theirs)


# --- a weight that is kept: oneDNN -----------------------------------------------------------------


@pytest.fixture
def calls(multiply_by: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results that oneDNN gave, which is asked for small convolutions too."""
    multiply_by("oneDNN")
    monkeypatch.setattr(onednn_conv, "WORTH", 0)
    found: list[Tensor] = []
    convolve = onednn_conv.convolve

    def recorded(*operands: object, dtype: torch.dtype) -> Tensor:
        found.append(convolve(*operands, dtype=dtype))
        return found[-1]

    monkeypatch.setattr(onednn_conv, "convolve", recorded)
    return found


SYMMETRIC_WEIGHT = ("uint8-int8", "int8-int8", "int8-tensor", "uint4-int4")
FILLS = [("all", "all"), ("high", "low"), ("low", "low"), ("high", "high"), ("ends", "ends"), ("all", "high")]
UNFIT = {
    "elements-in-no-window": Geometry((5, 5, 8, 8), (130, 5, 3, 3), stride=(1, 2), dilation=(1, 3)),
    "one-window-and-a-step": Geometry((1, 3, 7, 7), (7, 3, 1, 7), stride=(1, 2)),
    "windows-in-the-padding": Geometry((1, 3, 7, 7), (12, 1, 2, 3), padding=(2, 1), groups=3),
    "all-windows-but-one-in-the-padding": Geometry((5, 64, 1, 1), (4, 64, 1, 1), stride=(1, 2), padding=(0, 2)),
    "image-in-no-window": Geometry((2, 4, 1, 1), (8, 4, 1, 1), stride=(3, 2), padding=(2, 3)),
    "image-below-a-window": Geometry((2, 48, 3, 6), (3, 48, 3, 3), stride=(1, 3), padding=(2, 1), dilation=(1, 3)),
    "one-output-channel": Geometry((1, 32, 14, 56), (1, 32, 3, 3), padding=(1, 0), dilation=(1, 2)),
    "groups-of-17": Geometry((1, 4, 28, 28), (34, 2, 5, 3), stride=(2, 1), padding=(2, 2), groups=2),
    "even-kernel": Geometry((1, 24, 8, 16), (64, 24, 2, 1), padding=(1, 0)),
    "pointwise-with-padding": Geometry((2, 8, 5, 5), (8, 8, 1, 1), padding=1),
}


@needs_onednn
@pytest.mark.parametrize("fill", FILLS, ids=str)
@pytest.mark.parametrize("name", [*GEOMETRIES, *UNFIT])
def test_onednn_has_the_integers_and_roundings_of_numpy(calls: list[Tensor], name: str, fill: tuple[str, str]) -> None:
    """Also for the shapes that it computes wrongly as they are."""
    geometry = (GEOMETRIES | UNFIT)[name]
    for formats in SYMMETRIC_WEIGHT:
        case = draw(geometry, *FORMATS[formats], fill=fill)
        y = case.kept()
        assert y.is_contiguous()
        assert_exact(y, case)
        without = dataclasses.replace(case, bias=None)
        assert_exact(without.kept(torch.bfloat16), without)
    taken = geometry.shape[0] > 0 and len(geometry.weight) < 5 and not geometry.is_wrong_by_onednn
    assert len(calls) == (2 * len(SYMMETRIC_WEIGHT) if taken else 0)


@needs_onednn
@pytest.mark.parametrize("zero_point", [0, 1, 100, 128, 254, 255])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((1, 256, 5, 5), (8, 256, 3, 3), padding=1),
        Geometry((2, 2048, 3, 3), (5, 2048, 1, 1)),
        Geometry((1, 1030, 4, 4), (4, 515, 2, 2), groups=2),
        Geometry((1, 1321, 5, 6), (2, 1321, 5, 5)),  # K = 33025
        Geometry((1, 33025, 2), (3, 33025, 1)),
    ],
    ids=lambda geometry: str(geometry.weight),
)
def test_sums_above_the_integers_of_float32_are_exact_by_onednn(
    calls: list[Tensor], geometry: Geometry, zero_point: int
) -> None:
    act, weight = FORMATS["uint8-int8"]
    for fill in FILLS:
        case = draw(geometry, act, weight, fill=fill, bias=False)
        qp = QParams(case.qp.scale, torch.full_like(case.qp.zero_point, zero_point))
        case = dataclasses.replace(case, qp=qp)
        assert_exact(case.kept(), case)
    assert len(calls) == len(FILLS)


def test_the_largest_window_that_stays_in_int32_is_the_last_that_onednn_takes() -> None:
    for k in (33025, 33026):
        codes = torch.zeros(2, k, 1, dtype=torch.int8)
        assert onednn_conv.supports(codes, None) == (onednn.AVAILABLE and k == 33025)
    assert onednn_conv.supports(codes[:, :8], torch.ones(2, 1, 1, dtype=torch.int32)) == onednn.AVAILABLE
    assert not onednn_conv.supports(codes[:, :8, 0], None)
    assert not onednn_conv.supports(codes[:, :8, None, None], None)
    assert not onednn_conv.supports(codes[:, :8].to("meta"), None)


@pytest.mark.parametrize(
    ("formats", "dtype", "channels"),
    [("uint8-uint8", torch.float32, 115), ("int8-asymmetric", torch.float32, 115), ("int8-int8", torch.float64, 5)],
)
def test_what_onednn_does_not_take_is_convolved_as_before(
    calls: list[Tensor], formats: str, dtype: torch.dtype, channels: int
) -> None:
    """An asymmetric weight with K = 1035, and float64."""
    geometry = Geometry((2, channels, 4, 3), (6, channels, 3, 3), padding=1)
    case = draw(geometry, *FORMATS[formats])
    assert_exact(case.kept(dtype), case)
    assert not calls


@needs_onednn
@pytest.mark.parametrize("fill", FILLS, ids=str)
@pytest.mark.parametrize("name", [*GEOMETRIES, *UNFIT])
def test_an_asymmetric_weight_by_onednn_has_the_integers_and_roundings_of_numpy(
    calls: list[Tensor], name: str, fill: tuple[str, str]
) -> None:
    geometry = (GEOMETRIES | UNFIT)[name]
    taken = geometry.shape[0] > 0 and len(geometry.weight) < 5 and not geometry.is_wrong_by_onednn
    # Windows that do not overlap are rows already.
    extents = [
        gap * (size - 1) + 1 for size, gap in zip(geometry.weight[2:], geometry.each(geometry.dilation), strict=True)
    ]
    overlap = any(step < n for step, n in zip(geometry.each(geometry.stride), extents, strict=True))
    taken = taken and (overlap or geometry.groups > 1)
    for formats in ("uint8-uint8", "int8-asymmetric"):
        case = draw(geometry, *FORMATS[formats], fill=fill)
        for dtype in (torch.float32, torch.bfloat16):
            calls.clear()
            y = case.kept(dtype)
            assert y.is_contiguous()
            assert_exact(y, case)
            assert len(calls) == taken


@needs_brgemm
@pytest.mark.parametrize("fill", FILLS, ids=str)
@pytest.mark.parametrize("name", [*GEOMETRIES, *UNFIT])
def test_brgemm_has_the_integers_and_roundings_of_numpy(
    name: str, fill: tuple[str, str], multiply_by: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_by("brgemm")
    geometry = (GEOMETRIES | UNFIT)[name]
    found: list[Tensor] = []
    convolve = brgemm.convolve
    monkeypatch.setattr(brgemm, "convolve", lambda *of, **to: found.append(convolve(*of, **to)) or found[-1])
    for formats in (*SYMMETRIC_WEIGHT, "uint8-uint8", "int8-asymmetric"):
        case = draw(geometry, *FORMATS[formats], fill=fill)
        for dtype in (torch.float32, torch.bfloat16):
            found.clear()
            y = case.kept(dtype)
            assert y.is_contiguous()
            assert_exact(y, case)
            taken = onednn.AMX or geometry.groups == 1 or len(geometry.weight) == 5
            assert len(found) == (taken and geometry.shape[0] > 0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.usefixtures("kernels_of_torch")
def test_an_asymmetric_weight_is_compiled_to_its_convolutions(
    groups: int, dynamic: bool, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By brgemm to one, with AMX in groups too, where the number of windows is known; of oneDNN to two."""
    monkeypatch.setattr(onednn_conv, "WORTH", 0)
    layer = quantized(SCHEMES["uint8"], nn.Conv2d(6, 6, 3, padding=1, groups=groups))
    x = torch.randn(2, 6, 9, 8)
    with torch.inference_mode():
        y, (source,) = run_and_get_code(torch.compile(layer, fullgraph=True, dynamic=dynamic), x)
        assert torch.equal(y, layer(x))
    inside = packing == "brgemm" and (groups == 1 or (onednn.AMX and not dynamic))
    assert source.count("functional_sq.onednn_conv_sums.default(") == (0 if inside else 2)
    assert source.count("functional_sq.brgemm_convolution.default(") == inside
    by = f"by {'brgemm' if packing == 'brgemm' and groups == 1 else 'oneDNN'} from 1 windows on)"
    if packing == "brgemm" and groups > 1 and onednn.AMX:
        weight = layer.weight_codes, layer.weight_zero_point
        most = brgemm.windows(*weight, (1, 1), (1, 1), groups)[-1]
        by = f"by brgemm from 1 to {most} windows, by oneDNN from {most + 1} windows on)"
    assert repr(layer).endswith(f"int8 product, {by}")


@needs_brgemm
@pytest.mark.usefixtures("kernels_of_torch")
def test_windows_for_which_brgemm_is_asked_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes alone: not where windows are copied in short pieces, unless no other takes an asymmetric weight."""
    monkeypatch.setattr(onednn, "AMX", False)
    zero_point = torch.empty(64, 1, 1, 1)
    for shape, dilation, groups, symmetric, asymmetric in (
        ((64, 3, 3, 3, 3), 2, 1, True, True),
        ((64, 3, 3, 3, 3), 1, 4, True, True),
        ((64, 16, 3, 3), 1, 1, True, True),
        ((64, 16, 3, 3), 2, 1, False, True),
        ((64, 3, 7, 7), 1, 1, False, True),
        ((64, 3, 16, 16), 1, 1, True, True),
        ((64, 16, 1, 1), 1, 1, True, True),
        ((64, 16, 3, 3), 1, 4, False, False),
    ):
        for of_weight, taken in ((None, symmetric), (zero_point, asymmetric)):
            windows = brgemm.windows(torch.empty(shape), of_weight, (1, 1), (dilation, dilation), groups)
            assert windows == range(1, sys.maxsize) if taken else not windows
    x = torch.randn(1, 6, 9, 8)
    layer = quantized(SYMMETRIC_INT8, nn.Conv2d(6, 6, (3, 6), padding=1))
    with torch.inference_mode():
        y, (source,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
        assert torch.equal(y, layer(x))
    assert source.count("functional_sq.brgemm_convolution.default(") == 1
    assert repr(layer).endswith("by brgemm from 1 windows on)")


@needs_brgemm
@pytest.mark.usefixtures("kernels_of_torch")
def test_windows_for_which_brgemm_is_asked_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes alone: while copies of windows take less than the call of another that makes none."""
    monkeypatch.setattr(onednn, "AMX", True)
    ones = (1, 1)
    for shape, stride, dilation, few, many in (
        ((64, 64, 3, 3), ones, ones, 3136, 25088),
        ((512, 512, 3, 3), ones, ones, 392, 3136),
        ((64, 3, 7, 7), (2, 2), ones, 3136, 12544),
        ((16, 16, 3, 3), ones, (1, 2), 4096, 32768),
        ((64, 32, 1, 1), (2, 1), ones, 3136, 100352),
    ):
        windows = brgemm.windows(torch.empty(shape), None, stride, dilation, 1)
        assert few in windows
        assert many not in windows
        assert brgemm.windows(torch.empty(shape), torch.empty(shape[0], 1, 1, 1), stride, dilation, 1)[-1] > 2**60
        assert 8 * few not in brgemm.windows(torch.empty(shape), None, stride, dilation, 8)
    assert brgemm.windows(torch.empty(64, 32, 1, 1), None, ones, ones, 1)[-1] > 2**60
    assert brgemm.windows(torch.empty(80, 8, 3, 3), None, ones, ones, 2)[-1] > 2**60  # of which oneDNN is wrong
    # Of volumes no other takes any; a loop takes those of each channel alone by few elements.
    for kernel, any_number in (((3, 3, 3), True), ((1, 3, 3), False)):
        alone = brgemm.windows(torch.empty(96, 1, *kernel), None, (1,) * 3, (1,) * 3, 96)
        assert (alone[-1] > 2**60) == any_number
    layer = quantized(SYMMETRIC_INT8, nn.Conv2d(6, 6, 3, padding=1))
    most = brgemm.windows(layer.weight_codes, None, ones, ones, 1)[-1]
    shown = f"by brgemm from 1 to {most} windows, by oneDNN from {most + 1} windows on)"
    assert repr(layer).endswith(shown)
    with torch.inference_mode():
        for height, operator in ((most, "brgemm_convolution"), (most + 1, "onednn_conv")):
            x = torch.randn(1, 6, height, 1)
            y, (source,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
            assert torch.equal(y, layer(x))
            assert source.count(f"functional_sq.{operator}.default(") == 1


@needs_brgemm
@pytest.mark.parametrize("outputs", [72, 64])
def test_brgemm_writes_large_results_of_groups_whose_columns_begin_no_line(outputs: int) -> None:
    """16 to 32 MB; the channels of all groups together are whole lines of memory."""
    q = torch.randint(0, 256, (1, 4, 190, 190), dtype=torch.uint8)
    w = torch.randint(-128, 128, (2 * outputs, 2, 1, 2), dtype=torch.int8)
    z, half = torch.tensor([9], dtype=torch.int32), torch.full((2 * outputs,), 0.5)
    y = brgemm.convolve(Operands(q, z, w, None, half, None, None), (1, 1), (0,) * 4, (1, 1), 2)
    assert 2**24 < y.nbytes < 2**25
    assert torch.equal(y, F.conv2d(q.double() - 9, w.double(), groups=2).float() / 2)


@needs_brgemm
def test_what_the_compiler_expects_of_convolutions_by_brgemm_is_what_they_do() -> None:
    op, of_reals = (getattr(torch.ops.functional_sq, f"brgemm_convolution{of}").default for of in ("", "_of_reals"))
    assert brgemm.is_built()
    to = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)
    for groups, (space, kernel), padding, then in itertools.product(
        (1, 2),
        (((5, 7), (3, 2)), ((1, 7), (2,)), ((3, 5, 7), (2, 3, 2))),
        ([0, 0, 0, 0], [2, 1, 0, 3]),
        ((None, None), to),
    ):
        q = torch.randint(0, 256, (2, 4, *space), dtype=torch.uint8)
        if len(kernel) == 1:
            padding = [0, 0, *padding[2:]]
        elif len(kernel) == 3:
            padding = [1, 2, *padding]
        w = torch.randint(-128, 128, (6, 4 // groups, *kernel), dtype=torch.int8)
        known = q, torch.tensor([3], dtype=torch.int32), w, None, torch.rand(6), None
        missing = [1] * (len(space) - 2)
        how = [*missing, 1 if len(kernel) == 1 else 2, 1], padding, [*missing, 1, 2], groups, "none", *then
        y = op(*known, None, *how, torch.bfloat16)
        if then[0] is None:
            x = torch.randn(2, 4, *space)
            images_last = last(x.to(torch.bfloat16))
            in_order = torch.ops.functional_sq.brgemm_in_order.default
            torch.library.opcheck(in_order, (images_last,), test_utils=("test_schema", "test_faketensor"))
            for image, in_last in itertools.product((x, last(x)) if len(kernel) > 1 else (x[:, :, 0],), (False, True)):
                made = image, torch.rand(1), torch.int8, *known[1:], *how[:4], in_last
                torch.library.opcheck(of_reals, made, test_utils=("test_schema", "test_faketensor"))
        residual = torch.randn(y.shape).to(y.dtype) if then[0] is None else None
        given = (*known, residual, *how, torch.bfloat16)
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
        if brgemm.HAS_BFLOAT16:
            codes = (float8_codes(np.random.default_rng(0), torch.float8_e4m3fn, each.shape) for each in (q, w))
            of_floats = next(codes), None, next(codes), *given[3:]
            torch.library.opcheck(op, of_floats, test_utils="test_faketensor")


@needs_onednn
@pytest.mark.parametrize("fill", [*itertools.product(["low", "high"], repeat=2)], ids=str)
@pytest.mark.parametrize("zero_point", [0, 255])
@pytest.mark.parametrize(("k", "dtype"), [(514, torch.float32), (515, torch.int32), (5000, torch.int32)])
def test_sums_of_an_asymmetric_weight_are_exact_at_the_border(
    calls: list[Tensor], k: int, dtype: torch.dtype, zero_point: int, fill: tuple[str, str]
) -> None:
    """514 * 255 * 128 is the last below 2**24; one code is another, so that the sum has its lowest bits."""
    case = draw(Geometry((1, 2 * k, 2), (6, k, 1), groups=2), *FORMATS["uint8-uint8"], fill=fill, bias=False)
    case.q[0, 0] ^= 1
    case.w[:, 1] ^= 1
    case = dataclasses.replace(case, qp=QParams(case.qp.scale, torch.full_like(case.qp.zero_point, zero_point)))
    assert_exact(case.kept(), case)
    assert len(calls) == 1
    assert onednn_conv._sums_dtype(case.folded().codes, True) is dtype


@needs_onednn
@pytest.mark.usefixtures("calls")
def test_what_sums_windows_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, pack = [], onednn_conv._prepack

    def recorded(*given: Any) -> Any:
        packed.append(pack(*given))
        return packed[-1]

    monkeypatch.setattr(onednn_conv, "_prepack", recorded)
    layer = quantized(SCHEMES["uint8"], nn.Conv2d(6, 6, 3, groups=2))
    other = quantized(SCHEMES["uint8"], nn.Conv2d(6, 6, 3, groups=2))
    for _ in range(3):
        for each, size in ((layer, 9), (other, 12)):
            each(torch.randn(1, 6, size, size))
    assert len(packed) == 4


TAPS = [
    pytest.param("uint8", nn.Conv1d(6, 6, 4, 2, 3, 2, groups=6), (3, 6, 11), False, True, id="1d"),
    pytest.param(
        "uint8", nn.Conv2d(6, 6, (3, 5), (2, 1), (0, 2), (1, 2), groups=6), (2, 6, 9, 11), True, True, id="2d"
    ),
    pytest.param(
        "uint8", nn.Conv2d(6, 6, 3, padding="same", groups=6, bias=False), (6, 9, 8), False, False, id="no-batch"
    ),
    pytest.param(
        "uint8", nn.Conv2d(6, 6, 2, padding=1, padding_mode="circular", groups=6), (2, 6, 9, 8), True, False, id="round"
    ),
    pytest.param("uint8", nn.Conv3d(6, 6, 2, 2, 1, groups=6), (2, 6, 5, 4, 7), False, False, id="3d"),
    pytest.param("int8", nn.Conv3d(6, 6, (3, 1, 3), groups=6), (2, 6, 5, 4, 7), False, False, id="3d-symmetric"),
    pytest.param("uint8", nn.ConvTranspose2d(6, 6, 3, 2, 1, 1, groups=6), (2, 6, 5, 4), False, False, id="transposed"),
]
"""Layers of each channel alone; whether channels lie last in memory, and sizes are any."""


@pytest.mark.parametrize(("scheme", "float_layer", "shape", "last", "dynamic"), TAPS)
def test_each_channel_alone_is_compiled_to_one_loop(
    scheme: str,
    float_layer: nn.Module,
    shape: tuple[int, ...],
    last: bool,
    dynamic: bool,
    multiply_by: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no backend convolves."""
    multiply_by("torch")
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    layer = quantized(SCHEMES[scheme], float_layer)
    assert ", compiled to one loop" in repr(layer)
    x = 3 * torch.randn(shape)
    if last and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y, (source,) = run_and_get_code(torch.compile(layer, fullgraph=True, dynamic=dynamic), x)
        assert_same([y], [layer(x)])
    assert_one_loop(source)


@needs_brgemm
@pytest.mark.parametrize("scheme", ["int8", "uint8"])
def test_each_channel_alone_is_convolved_by_brgemm_in_few_windows(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many by oneDNN, or by a loop where the weight has zero points; in eager mode always."""
    monkeypatch.setattr(brgemm, "_ALONE", 64 * 9 * 100)
    monkeypatch.setattr(onednn_conv, "WORTH", 0)
    layer = quantized(SCHEMES[scheme], nn.Conv2d(6, 6, 3, groups=6))
    many = "by oneDNN from 101 windows on" if scheme == "int8" else "compiled to one loop"
    assert repr(layer).endswith(f", by brgemm from 1 to 100 windows, {many})")
    for width in (12, 13):
        torch.compiler.reset()
        x = torch.randn(1, 6, 12, width)
        assert layer._direct()(x) is not None
        with torch.no_grad():
            y, (source,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
            assert_same([y], [layer(x)])
        assert ("brgemm_convolution.default(" in source) == (width == 12)
        assert ("onednn_conv.default(" in source) == (width == 13 and scheme == "int8")
        if width == 13 and scheme == "uint8":
            assert_one_loop(source)


def assert_one_loop(source: str) -> None:
    calls = source[source.index("def call(") :]
    assert "torch.ops." not in calls
    assert "extern_kernels." not in calls


def test_float8_of_each_channel_alone_is_one_loop_where_a_gpu_convolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sums of at most 15 products, and those of the eager layer, are rounded to float32."""
    monkeypatch.setattr(sys.modules["functional_sq.conv"], "is_tapped", lambda spec, codes, groups: True)
    for _, float_layer, shape, last, _ in (param.values for param in TAPS[:3]):
        layer = quantized(SCHEMES["float8_e4m3fn"], copy.deepcopy(float_layer))
        x = 3 * torch.randn(shape)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            y, (source,) = run_and_get_code(torch.compile(layer, fullgraph=True), x)
            assert (y - layer(x)).abs().le((16 + 2 * 15) * 2.0**-24 * magnitudes(layer, x)).all()
        assert_one_loop(source)


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@needs_onednn
def test_the_default_dtype_changes_no_bit_of_groups_with_an_asymmetric_weight(
    default_dtype: torch.dtype, multiply_by: Callable[[str], None]
) -> None:
    multiply_by("oneDNN")
    act, of_weight = (QuantSpec(torch.int8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC) for _ in range(2))
    qp = QParams(torch.full((1,), 0.5, dtype=torch.float32), torch.tensor([3], dtype=torch.int32))
    q, w = (torch.randint(-128, 128, shape).to(torch.int8) for shape in ((4, 16, 9, 8), (16, 8, 3, 3)))
    folded = fsq.fold(of_weight, w, qp)
    y = fsq.conv(act, q, qp, folded, groups=2, epilogue=fsq.epilogue(act, qp, folded))
    assert torch.equal(y, fsq.conv(act, q, qp, folded, groups=2))
    rows, matrix = q.reshape(4, -1), fsq.fold(of_weight, torch.randint(-128, 128, (9, 16 * 72)).to(torch.int8), qp)
    y = fsq.linear(act, rows, qp, matrix, epilogue=fsq.epilogue(act, qp, matrix))
    assert torch.equal(y, fsq.linear(act, rows, qp, matrix))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("channels", "height"), [(0, 3), (4, 0)])
def test_windows_of_nothing_but_padding_are_zero(channels: int, height: int, groups: int, kept: bool) -> None:
    act = QuantSpec(torch.int8, fsq.PerTensor(), mapping=MappingType.ASYMMETRIC)
    qp, w = QParams(torch.ones(1), torch.tensor([7], dtype=torch.int32)), torch.ones(4, channels // groups, 2, 2)
    folded = fsq.fold(act, w.to(torch.int8), qp)
    q, bias = torch.ones(2, channels, height, 3, dtype=torch.int8), torch.arange(4.0)
    known = fsq.epilogue(act, qp, folded) if kept else None
    y = fsq.conv(act, q, qp, folded, bias, padding=1, groups=groups, epilogue=known)
    assert torch.equal(y, bias[:, None, None].expand(2, 4, height + 1, 4))


@needs_onednn
@pytest.mark.parametrize("outputs", [33, 48, 49, 64, 65, 112, 128])
@pytest.mark.parametrize("channels", [1, 2, 3, 17])
def test_many_outputs_of_few_channels_are_right(calls: list[Tensor], channels: int, outputs: int) -> None:
    """oneDNN 3.12 is wrong for most of these numbers where the zero point is not 0, of more than one channel by AMX."""
    geometry = Geometry((1, 3 * channels, 4, 5), (3 * outputs, channels, 2, 3), groups=3, padding=1)
    case = draw(geometry, *FORMATS["int8-int8"])
    assert_exact(case.kept(), case)
    assert len(calls) == (not geometry.is_wrong_by_onednn)


@needs_onednn
@pytest.mark.parametrize("by", ["brgemm", "oneDNN", "torch"])
@pytest.mark.parametrize(("channels", "outputs"), [(72, 80), (100, 112), (80, 64), (64, 72), (24, 72)])
def test_groups_of_many_channels_by_one_element_are_right(
    multiply_by: Callable[[str], None], by: str, channels: int, outputs: int
) -> None:
    """With AMX oneDNN 3.12 raises for the first two where the zero point is not 0."""
    multiply_by(by)
    geometry = Geometry((1, 2 * channels, 4, 5), (2 * outputs, channels, 1, 1), groups=2)
    for formats in ("int8-int8", "uint8-uint8"):
        case = draw(geometry, *FORMATS[formats])
        assert_exact(case.kept(), case)


@needs_onednn
@pytest.mark.parametrize(("kernel", "stride", "height"), [(2, 3, 26), (2, 4, 55), (3, 4, 35)])
def test_images_one_pixel_wide_are_right_each_time(calls: list[Tensor], kernel: int, stride: int, height: int) -> None:
    """With two threads, oneDNN 3.12 is wrong now and then where a stride leaves rows out of them."""
    for padding in (0, (1, 0)):
        geometry = Geometry((2, 512, height, 1), (33, 512, kernel, 1), stride=(stride, 1), padding=padding)
        case = draw(geometry, *FORMATS["int8-int8"])
        last = case.q.contiguous(memory_format=torch.channels_last)
        for _ in range(5):
            assert_exact(case.kept(), case)
            y = case.kept(q=last)
            assert_exact(y, case)
            assert y.stride() == torch.empty(y.shape, memory_format=torch.channels_last).stride()
    assert len(calls) == 20


@needs_onednn
@pytest.mark.parametrize("cut", sorted({True, onednn.AMX}))
@pytest.mark.parametrize("fill", [("high", "high"), ("high", "low"), ("all", "all")])
def test_long_windows_are_exact_cut_or_not(
    calls: list[Tensor], cut: bool, fill: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "AMX", cut)
    case = draw(Geometry((2, 600, 4, 3), (6, 600, 3, 3), padding=1), *FORMATS["int8-int8"], fill=fill)
    assert_exact(case.kept(), case)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["2d-groups", "3d-groups", "2d"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_under_autocast_codes_are_convolved_as_they_are(dtype: torch.dtype, name: str) -> None:
    case = draw(GEOMETRIES[name], QuantSpec(dtype, PER_TENSOR), QuantSpec(dtype, PER_CHANNEL))
    y = case.conv()
    for cast in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=cast):
            assert torch.equal(case.conv(), y)


def test_without_onednn_or_vnni_a_kept_weight_gives_the_same_bits(
    calls: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [draw(GEOMETRIES[name], *FORMATS["int8-int8"]) for name in ("1d", "2d-padded", "2d-depthwise")]
    expected = [case.kept() for case in cases]
    taken = len(calls)
    assert taken == (len(cases) if onednn.AVAILABLE else 0)
    monkeypatch.setattr(onednn, "AVAILABLE", False)
    for case, y in zip(cases, expected, strict=True):
        assert torch.equal(case.kept(), y)
    assert len(calls) == taken


@needs_onednn
@pytest.mark.parametrize(
    "name",
    [
        "2d-padded",
        "2d-uneven",
        "2d-same-even",
        "2d-groups",
        "2d-depthwise",
        "elements-in-no-window",
        "one-window-and-a-step",
        "windows-in-the-padding",
        "groups-of-17",
    ],
)
def test_onednn_takes_images_in_any_order_of_memory(calls: list[Tensor], name: str) -> None:
    case = draw((GEOMETRIES | UNFIT)[name], *FORMATS["int8-int8"])
    y = case.kept(q=case.q.contiguous(memory_format=torch.channels_last))
    assert y.stride(1) == 1
    assert_exact(y, case)
    assert torch.equal(case.kept(q=torch.cat([case.q, case.q], 3)[..., : case.q.shape[3]]), y)
    assert torch.equal(case.kept(q=case.q.mT.contiguous().mT), y)
    assert len(calls) == 3


def operands(name: str, batch: int | None = None) -> tuple[object, ...]:
    """Return what the operator of `onednn_conv` takes, without what comes after the sums."""
    geometry = (GEOMETRIES | UNFIT)[name]
    n, k = geometry.weight[0], geometry.weight
    q = torch.randint(0, 256, geometry.shape if batch is None else (batch, *geometry.shape[1:]), dtype=torch.uint8)
    padding = [side for p in geometry.each(geometry.padding) for side in (p, p)]
    return (
        q,
        torch.tensor([3], dtype=torch.int32),
        torch.randint(-128, 128, k, dtype=torch.int8),
        torch.rand(n),
        torch.randn(n),
        list(geometry.each(geometry.stride)),
        padding,
        list(geometry.each(geometry.dilation)),
        geometry.groups,
    )


@needs_onednn
@pytest.mark.parametrize("name", ["2d", "2d-uneven", "2d-one-channel", "2d-to-one-position", "2d-depthwise", *UNFIT])
def test_what_the_compiler_expects_of_the_operator_is_what_it_returns(name: str) -> None:
    """Shape, dtype, strides, and that nothing else is written."""
    codes = "relu", torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32), torch.float32
    floats = ("none", None, None, torch.float32), ("none", None, None, torch.bfloat16)
    for batch, then in itertools.product((None, 0, 1), (*floats, codes)):
        torch.library.opcheck(
            torch.ops.functional_sq.onednn_conv.default,
            (*operands(name, batch), *then),
            test_utils=("test_schema", "test_faketensor"),
        )


@needs_onednn
@pytest.mark.usefixtures("kernels_of_torch")
def test_windows_from_which_on_onednn_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """From shapes alone; groups always; and from the first one on where the weight is large."""
    monkeypatch.setattr(brgemm, "AVAILABLE", False)

    def least(*shapes: Any) -> int:
        return onednn_conv.windows(*shapes).start

    one, two, small, large = (1, 1), (2, 2), torch.empty(16, 16, 3, 3), torch.empty(512, 512, 3, 3)
    assert least(large, None, one, one, 1) == least(small, None, one, one, 2) == 1
    k, n = 16 * 9, 16
    m = least(small, None, one, one, 1)
    assert 6 * m * n + m * k + 4 * n * k >= onednn_conv.WORTH > 6 * (m - 1) * n + (m - 1) * k + 4 * n * k
    # Windows that do not overlap are not copied.
    m = least(small, None, (3, 3), one, 1)
    assert 6 * m * n >= onednn_conv.WORTH > 6 * (m - 1) * n
    assert least(small, None, (3, 3), two, 1) == least(small, None, one, one, 1)
    # An asymmetric weight: while no sum of uniform codes is cut, and only where windows would be copied.
    zero_point = torch.empty(16, 1, 1, 1)
    assert least(small, zero_point, one, one, 1) == least(small, None, one, one, 1)
    assert least(large, zero_point, one, one, 2) == 1
    assert least(large, zero_point, one, one, 1) == least(small, zero_point, (3, 3), one, 1) == sys.maxsize

    geometry = Geometry((1, 16, 9, 9), (16, 16, 3, 3), padding=1)
    case = draw(geometry, *FORMATS["int8-int8"])
    folded = case.folded()
    known = fsq.epilogue(case.act, case.qp, folded)

    def forward(q: Tensor) -> Tensor:
        return fsq.conv(case.act, q, case.qp, folded, case.bias, padding=1, epilogue=known)

    fewest = -(-least(small, None, one, one, 1) // 81)
    for batch, dynamic, by_onednn in ((fewest - 1, False, False), (fewest, False, True), (2, True, True)):
        torch.compiler.reset()
        q = case.q.expand(batch, 16, 9, 9).contiguous()
        y, (source,) = run_and_get_code(torch.compile(forward, fullgraph=True, dynamic=dynamic), q)
        assert ("onednn_conv" in source) == by_onednn
        assert torch.equal(y, forward(q))
        assert (folded.codes in onednn_conv._PACKED) == (batch >= fewest or dynamic)
        onednn_conv._PACKED.pop(folded.codes, None)


@needs_onednn
@pytest.mark.usefixtures("calls")
def test_a_weight_is_packed_once_again_when_it_changes_and_forgotten_with_its_codes() -> None:
    case = draw(GEOMETRIES["2d-padded"], *FORMATS["int8-int8"], bias=False)
    folded = case.folded()
    known = fsq.epilogue(case.act, case.qp, folded)
    convolve = partial(fsq.conv, case.act, case.q, case.qp, folded, padding=1)
    convolve()
    assert folded.codes not in onednn_conv._PACKED  # a weight that was not said to be kept
    y = convolve(epilogue=known)
    packed = onednn_conv._PACKED[folded.codes]
    assert torch.equal(convolve(epilogue=known), y)
    assert onednn_conv._PACKED[folded.codes] is packed
    folded.codes.zero_()
    assert not convolve(epilogue=known).any()
    held = len(onednn_conv._PACKED)
    del case, folded, convolve
    assert len(onednn_conv._PACKED) == held - 1


@needs_onednn
def test_a_layout_is_chosen_anew_for_a_shape_that_comes_twice_in_a_row() -> None:
    q, zero_point, codes, scale, bias, *geometry = operands("2d")

    def packed_for(*sizes: int) -> int:
        for n in sizes:
            given = Operands(q[:, :, :n].contiguous(), zero_point, codes, None, scale, torch.empty(0), bias)
            onednn_conv.convolve(given, *geometry)
        return onednn_conv._PACKED[codes].form[0][2]

    assert packed_for(7) == packed_for(4, 7, 4, 7) == packed_for(4, 5, 4, 5) == 7
    assert packed_for(5) == 5
    assert packed_for(4, 4) == 4


@needs_onednn
@pytest.mark.usefixtures("calls")
def test_a_weight_packed_in_inference_mode_serves_outside_of_it_and_one_made_in_it_too() -> None:
    case = draw(GEOMETRIES["2d-padded"], *FORMATS["int8-int8"])
    folded = case.folded()
    known = fsq.epilogue(case.act, case.qp, folded)
    convolve = partial(fsq.conv, case.act, case.q, case.qp, folded, case.bias, padding=1, epilogue=known)
    with torch.inference_mode():
        y = case.kept()
        assert torch.equal(convolve(), y)
    assert torch.equal(convolve(), y)
    assert_exact(y, case)


@needs_onednn
@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("name", ["1d-padded", "2d-same-even", "2d-groups"])
@pytest.mark.parametrize("formats", ["int8-int8", "uint8-uint8"])
def test_vmap_over_kept_weights_is_the_loop(name: str, formats: str) -> None:
    cases = [draw(GEOMETRIES[name], *FORMATS[formats], seed=seed) for seed in range(3)]
    act, settings, folded = cases[0].act, cases[0].geometry.settings(), [case.folded() for case in cases]
    known = [fsq.epilogue(case.act, case.qp, weight) for case, weight in zip(cases, folded, strict=True)]
    images, zero_points, codes, scales, biases = (
        torch.stack(parts)
        for parts in (
            [case.q for case in cases],
            [case.qp.zero_point for case in cases],
            [weight.codes for weight in folded],
            [each.scale for each in known],
            [case.bias for case in cases],
        )
    )

    def one(q: Tensor, zero_point: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        weight = folded[0]._replace(codes=codes)
        qp, epilogue = QParams(cases[0].qp.scale, zero_point), fsq.Epilogue(scale, known[0].offset)
        return fsq.conv(act, q, qp, weight, bias, **settings, epilogue=epilogue)

    together = torch.vmap(one)(images, zero_points, codes, scales, biases)
    expected = [one(*each) for each in zip(images, zero_points, codes, scales, biases, strict=True)]
    assert torch.equal(together, torch.stack(expected))
    if folded[0].zero_point is None:
        assert torch.equal(together, torch.stack([case.conv() for case in cases]))
    # One image, one bias and one scale for all.
    shared = torch.vmap(one, (None, None, 0, None, None))(images[0], zero_points[0], codes, scales[0], biases[0])
    expected = [one(images[0], zero_points[0], each, scales[0], biases[0]) for each in codes]
    assert torch.equal(shared, torch.stack(expected))


@pytest.mark.usefixtures("calls")
def test_a_bias_that_is_learned_has_its_gradient() -> None:
    case = draw(GEOMETRIES["2d-padded"], *FORMATS["int8-int8"], bias=False)
    folded, bias = case.folded(), torch.zeros(4, requires_grad=True)
    known = fsq.epilogue(case.act, case.qp, folded)
    fsq.conv(case.act, case.q, case.qp, folded, bias, padding=1, epilogue=known).sum().backward()
    assert bias.grad.tolist() == [2.0 * 7 * 6] * 4


@needs_onednn
@pytest.mark.usefixtures("kernels_of_torch")
def test_compiled_convolves_kept_weights_by_onednn_in_one_compilation_and_exported_by_torch_alone(
    multiply_by: Callable[[str], None],
) -> None:
    multiply_by("oneDNN")
    names = ("2d", "2d-valid", "2d-same", "2d-depthwise")
    model = Every([quantized(SYMMETRIC_INT8, LAYERS[name]()) for name in names])
    for last in (False, True):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("inductor")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for i, batch in enumerate((5, 2, 17, 3)):
            x = torch.randn(batch, 6, 9, 8)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            torch._dynamo.mark_dynamic(x, 0)
            with torch.no_grad():
                if i == 0:
                    _, (source,) = run_and_get_code(compiled, x)
                    assert source.count("functional_sq.onednn_conv.default(") == len(names)
                assert_same(compiled(x), model(x))
        assert counter.frame_count == 1

    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "functional_sq" in str(node.target)]
    for ours, theirs in zip(exported.module()(x), model(x), strict=True):
        assert torch.equal(ours, theirs)


@needs_onednn
@pytest.mark.usefixtures("calls", "kernels_of_torch")
def test_what_is_packed_at_the_first_call_is_not_saved_copied_or_left_behind() -> None:
    for name in ("1d", "2d", "2d-depthwise"):
        layer, other = (quantized(SYMMETRIC_INT8, LAYERS[name]()) for _ in range(2))
        x, before = images(layer), {key: value.clone() for key, value in layer.state_dict().items()}
        y = layer(x)
        assert layer.weight_codes in onednn_conv._PACKED
        assert layer.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
        compiled, copied = torch.compile(layer, fullgraph=True), copy.deepcopy(layer)
        assert copied.weight_codes not in onednn_conv._PACKED
        with torch.no_grad():
            assert torch.equal(compiled(x), y)
            for assign in (False, True):
                copied.load_state_dict(before)
                assert torch.equal(copied(x), y)
                copied.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
                assert torch.equal(copied(x), other(x))
            layer.load_state_dict(other.state_dict())
            assert torch.equal(compiled(x), other(x))
        assert not torch.equal(other(x), y)


def test_the_repr_says_which_convolution_is_made_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brgemm, "AVAILABLE", False)
    by = ", by oneDNN from " if onednn.AVAILABLE else ""
    shown = repr(quantized(SYMMETRIC_INT8, LAYERS["2d"]()))
    assert f"int8 product{by}" in shown
    assert (" windows on" in shown) == onednn.AVAILABLE
    assert ("from 1 windows on" in repr(quantized(SYMMETRIC_INT8, LAYERS["2d-depthwise"]()))) == onednn.AVAILABLE
    asymmetric = quantized(SCHEMES["uint8"], LAYERS["2d"]())
    weight = asymmetric.weight_codes, asymmetric.weight_zero_point
    least = onednn_conv.windows(*weight, (1, 1), (1, 1), 1).start
    assert (f"from {least} windows on" in repr(asymmetric)) == onednn.AVAILABLE
    for layer in (
        quantized(SCHEMES["uint8"], nn.Conv2d(6, 8, 14, padding=5)),  # an asymmetric weight with K = 1176
        quantized(SYMMETRIC_INT8, LAYERS["2d"](), reference=True),
    ):
        assert "oneDNN" not in repr(layer)


# --- batch norm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_folded_batch_norm_is_the_batch_norm_within_its_roundings(rank: int, bias: bool, affine: bool) -> None:
    """Both sides in float64, so the weight and bias, rounded once to float32, are all that is rounded.

    Each folded weight is within `u = 2**-24` of itself, so the result is within `u` of the sum of
    magnitudes, the bias counted; float64 adds less than a thousandth.
    """
    layer = (nn.Linear, nn.Conv1d, nn.Conv2d)[rank](6, 4, *([3] if rank else []), bias=bias)
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[rank](4, eps=1e-3, affine=affine)
    with torch.no_grad():
        for value in (norm.running_mean, *norm.parameters()):
            value.copy_(torch.randn(4))
        norm.running_var.copy_(torch.rand(4) * 9)
    folded = copy.deepcopy(layer).double()
    weight, b = fsq.fold_batch_norm(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps
    )
    assert weight.dtype is b.dtype is torch.float32
    folded.weight, folded.bias = nn.Parameter(weight.double()), nn.Parameter(b.double())
    x = torch.randn(5, 6, *(7,) * rank, dtype=torch.float64)
    with torch.no_grad():
        error = (folded(x) - norm.double().eval()(layer.double()(x))).abs()
        folded.weight.abs_(), folded.bias.abs_()
        magnitude = folded(x.abs())
        assert (error <= 1.001 * 2**-24 * magnitude).all()
        assert (error > 2**-32 * magnitude).any()


# --- refusals of the core --------------------------------------------------------------------------

ACT, WEIGHT = FORMATS["int8-int8"]
FLOAT8 = QuantSpec(torch.float8_e4m3fn, PER_TENSOR)
INT16 = QuantSpec(torch.int16, PER_TENSOR)
ONE = QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))


def call(
    q: tuple[int, ...] = (2, 4, 9, 9),
    w: tuple[int, ...] = (6, 4, 3, 3),
    act: QuantSpec = ACT,
    weight: QuantSpec = WEIGHT,
    **settings: object,
) -> Tensor:
    def qp(spec: QuantSpec, shape: tuple[int, ...]) -> QParams:
        stats = spec.granularity.stat_shape(shape)
        return QParams(torch.ones(stats), torch.zeros(stats, dtype=torch.int32))

    folded = fsq.fold(weight, torch.zeros(w, dtype=weight.format.storage), qp(weight, w))
    return fsq.conv(act, torch.zeros(q, dtype=act.format.storage), qp(act, q), folded, **settings)


REFUSALS = [
    ("channels", lambda: call(q=(2, 5, 9, 9)), ValueError,
     r"shape \(2, 5, 9, 9\) meet .* \(6, 4, 3, 3\) in groups=1; give \(batch, 4, height, width\)"),
    ("rank", lambda: call(q=(9, 9)), ValueError, r"shape \(9, 9\) meet .*; give \(batch, 4, height, width\)"),
    ("matrix", lambda: call(q=(2, 4), w=(6, 4)), ValueError, r"weight of shape \(6, 4\); .*use linear for a matrix"),
    ("groups", lambda: call(groups=4), ValueError, "groups=4 and 6 output channels; use a divisor of 6"),
    ("no-groups", lambda: call(groups=0), ValueError, "groups=0 and 6 output channels; use a divisor of 6"),
    ("small", lambda: call(q=(2, 4, 2, 9)), ValueError, r"\(2, 4, 2, 9\) .* are smaller than a window of \(3, 3\)"),
    ("dilated", lambda: call(dilation=5), ValueError, r"in steps of \(5, 5\); pad more, or use a smaller kernel"),
    ("stride", lambda: call(stride=0), ValueError, "stride=0; give an int from 1, or 2 of them"),
    ("strides", lambda: call(stride=(1, 1, 1)), ValueError, r"stride=\(1, 1, 1\); give an int from 1, or 2 of them"),
    ("padding", lambda: call(padding=-1), ValueError, "padding=-1; give an int from 0 or 'same' or 'valid', or 2"),
    ("word", lambda: call(padding="full"), ValueError, "padding='full'; give an int from 0 or 'same' or 'valid'"),
    ("same", lambda: call(padding="same", stride=2), ValueError, "padding='same' with stride=2.*use stride=1"),
    ("dtype", lambda: call(dtype=torch.int32), TypeError, "conv to torch.int32; use one of torch.float32"),
    ("several", lambda: call(act=QuantSpec(torch.int8, fsq.PerAxis(1))), ValueError,
     r"scales of shape \(1, 4, 1, 1\), and the windows of a convolution mix them; use PerTensor\(\)"),
    ("kernel", lambda: call(weight=QuantSpec(torch.int8, fsq.PerGroup(3))), ValueError,
     r"shape \(6, 4, 3, 1\); a product of codes needs one a row: use PerAxis\(0\)"),
    ("mixed", lambda: call(weight=FLOAT8), TypeError, "torch.int8 meet a weight of torch.float8_e4m3fn; quantize both"),
    ("int16", lambda: call(act=INT16), ValueError, "16-bit codes have no integer product; use at most 8 bits"),
    ("int16-groups", lambda: call(act=INT16, w=(6, 2, 3, 3), groups=2), ValueError, "16-bit codes have no integer"),
    ("reference", lambda: fsq.conv_reference(ACT, torch.zeros(1, 3, 9, dtype=torch.int8), ONE, torch.zeros(2, 4, 3)),
     ValueError, r"give \(batch, 4, length\)"),
    ("depth", lambda: call(w=(6, 4, 3, 3, 3)), ValueError, r"give \(batch, 4, depth, height, width\)"),
    ("fold", lambda: call(w=(6, 4, 3, 3, 3, 3)), ValueError, r"convolution \(out, in / groups, \*kernel\) with one to"),
    ("check-kernel", lambda: fsq.check_product(ACT, QuantSpec(torch.int8, fsq.PerRow()), (6, 4, 3)), ValueError,
     r"PerRow\(dim=-1\) gives several scales along .* use PerAxis\(0\) or PerTensor\(\) for the weight"),
    ("check-channels", lambda: fsq.check_product(QuantSpec(torch.int8, fsq.PerAxis(1)), WEIGHT, (6, 4, 3)), ValueError,
     r"PerAxis\(axis=1\) gives the activations of a convolution several scales.*use PerTensor\(\)"),
    ("batch-norm", lambda: fsq.fold_batch_norm(torch.ones(4, 3), None, torch.ones(3), torch.ones(4), None, None, 0.1),
     ValueError, r"running_mean has shape \(3,\), and a weight of shape \(4, 3\) has 4 output channels; give one"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSALS])
def test_a_refusal_says_value_rule_and_remedy(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- the layers ------------------------------------------------------------------------------------

SYMMETRIC_INT8 = StaticQuantConfig(torch.int8)
SCHEMES = {
    "uint8": StaticQuantConfig(torch.uint8),
    "int8": SYMMETRIC_INT8,
    "float8_e4m3fn": StaticQuantConfig(torch.float8_e4m3fn),
}
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "1d": partial(nn.Conv1d, 6, 8, 3, padding=1),
    "1d-groups": partial(nn.Conv1d, 6, 8, 3, groups=2, stride=2),
    "2d": partial(nn.Conv2d, 6, 8, 3, padding=1),
    "2d-valid": partial(nn.Conv2d, 6, 8, (3, 1), padding="valid", stride=(2, 1)),
    "2d-same": partial(nn.Conv2d, 6, 8, (3, 3), padding="same", dilation=2),
    "2d-no-bias": partial(nn.Conv2d, 6, 8, 1, bias=False),
    "2d-depthwise": partial(nn.Conv2d, 6, 6, 3, groups=6, padding=1),
    "2d-reflect": partial(nn.Conv2d, 6, 8, 3, padding=(1, 2), padding_mode="reflect"),
    "2d-circular": partial(nn.Conv2d, 6, 8, 3, padding="same", padding_mode="circular"),
    "1d-replicate": partial(nn.Conv1d, 6, 8, 3, padding=2, padding_mode="replicate"),
    "3d": partial(nn.Conv3d, 6, 8, (3, 2, 3), padding=1, stride=(1, 2, 1)),
    "3d-groups": partial(nn.Conv3d, 6, 4, 3, groups=2, bias=False),
    "3d-reflect": partial(nn.Conv3d, 6, 8, (1, 3, 2), padding=(0, 1, 1), padding_mode="reflect"),
}
SPACE = (9, 8, 5)
every_layer = pytest.mark.parametrize("name", LAYERS)


def images(layer: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 6, *SPACE[: len(layer.kernel_size)], dtype=dtype)


def observed(config: StaticQuantConfig, layer: nn.Module) -> nn.Module:
    made = observed_type(layer).from_float(layer, ObserverModule(config.activation), ObserverModule(config.weight))
    made(images(layer, 16, layer.weight.dtype))
    return made


def quantized(config: StaticQuantConfig, layer: nn.Module, *, reference: bool = False) -> Quantized:
    made = observed(config, layer)
    return QUANTIZED[type(made)].from_observed(made, reference=reference)


@needs_brgemm
@pytest.mark.parametrize("scheme", ["int8", "uint8"])
@every_layer
def test_an_eager_layer_convolves_real_values_as_their_codes(name: str, scheme: str) -> None:
    """By one operator, in the layout that several give, of images that lie anyhow."""
    layer = quantized(SCHEMES[scheme], LAYERS[name]())
    found = layer._direct()
    assert found is not None
    wide = 3 * torch.randn(4, 12, *(2 * n for n in SPACE[: len(layer.kernel_size)]))
    wide.flatten()[:3] = torch.tensor([torch.inf, -torch.inf, -0.0])
    whole = wide[:2, :6].contiguous()
    formats = [last(whole), last(wide)[:, ::2]] if whole.ndim > 3 else []
    turned = whole.transpose(-1, -2).contiguous().transpose(-1, -2)
    anyhow = [whole, wide[::2, ::2], whole[:1].expand(3, *whole.shape[1:]), turned, *formats]
    reals = [x.to(dtype) for x in anyhow for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    for x in (*reals, whole[0], whole[:0], whole.double(), whole.clone().requires_grad_()):
        y = layer(x)
        assert not y.requires_grad
        assert_same([y], [layer._run(x, {})])
    if layer.groups == 1:
        assert found(whole) is not None
        assert found(whole[0]) is None
        assert torch.equal(torch.vmap(layer)(whole[:, None])[:, 0], layer(whole))
    with pytest.raises(ValueError, match=r"give \(batch, 6, "):
        layer(whole[:, :5])


@needs_brgemm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("channels", "outputs"), [(2, 1), (3, 17), (16, 16), (17, 40), (40, 33), (64, 5)])
def test_images_in_the_order_of_their_axes_give_what_those_with_channels_last_give(
    channels: int, outputs: int, dtype: torch.dtype
) -> None:
    """They are exchanged in blocks of 16 channels and 16 pixels, of which the last ones are not whole."""
    act, weight = FORMATS["uint8-uint8"]
    qp = QParams(torch.tensor([0.02]), torch.tensor([100], dtype=torch.int32))
    layer = bridge.QuantizedConv2d.from_float(nn.Conv2d(channels, outputs, 1), act, qp, weight).to(dtype)
    for batch, size in ((1, (1, 1)), (2, (3, 5)), (1, (4, 4)), (2, (7, 9)), (1, (8, 8)), (3, (5, 13)), (1, (20, 101))):
        x = torch.randn(batch, channels, *size).to(dtype)
        x.flatten()[:2] = torch.tensor([torch.inf, -torch.inf])
        y = layer(x)
        assert y.is_contiguous()
        assert torch.equal(y, layer(last(x)))
        other = torch.randn(batch, *size, outputs).to(dtype).movedim(-1, 1)
        other[:, :, 0, 0] = torch.nan
        for images in (other, other[:, :, :-1, 1:], other[:, ::2], other.double(), other[..., 0]):
            same = {"rtol": 0, "atol": 0, "equal_nan": True, "check_stride": True}
            torch.testing.assert_close(brgemm.laid_out(images, x), laid_out(images, x), **same)


@needs_brgemm
def test_an_eager_layer_refuses_images_smaller_than_its_windows() -> None:
    layer = quantized(SCHEMES["int8"], nn.Conv2d(6, 8, 3))
    for _ in range(2):
        with pytest.raises(ValueError, match="are smaller than a window"):
            layer(torch.randn(1, 6, 2, 9))


@every_layer
def test_an_observed_layer_has_the_bits_and_the_parameters_of_the_float_layer(name: str) -> None:
    layer = LAYERS[name]()
    made = observed(SCHEMES["int8"], layer)
    assert type(made) is getattr(bridge, f"Observed{type(layer).__name__}")
    assert {n: id(p) for n, p in made.named_parameters()} == {n: id(p) for n, p in layer.named_parameters()}
    x = images(layer)
    assert torch.equal(made(x), layer(x))
    assert repr(layer).partition("(")[2].rstrip(")") in repr(made)


@pytest.mark.parametrize("make", [partial(nn.Linear, 6, 8), LAYERS["1d"], LAYERS["2d-reflect"]])
def test_to_float_gives_the_very_module_back_with_the_parameters_as_they_are_now(make: Callable[[], nn.Module]) -> None:
    layer = make()
    kind = observed_type(layer)
    made = kind.from_float(layer, *(ObserverModule(QuantSpec(torch.int8, PER_TENSOR)) for _ in range(2)))
    names = [n for n, _ in made.named_modules()]
    assert names == ["", "act_obs", "weight_obs"]
    made.weight = nn.Parameter(torch.ones_like(made.weight))
    assert made.eval().to_float() is layer
    assert layer.weight is made.weight
    assert not layer.training
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for copied in (copy.deepcopy(made), torch.load(file, weights_only=False)):
        other = copied.to_float()
        assert other is not layer
        assert type(other) is type(layer)
        assert other.weight is copied.weight
        assert torch.equal(other.weight, layer.weight)
    # A layer that was constructed has no float module to give back, and makes one.
    fresh = kind(
        **{name: getattr(made, name) for name in kind.settings},
        act_obs=ObserverModule(QuantSpec(torch.int8, PER_TENSOR)),
        weight_obs=ObserverModule(QuantSpec(torch.int8, PER_TENSOR)),
    )
    assert repr(fresh.to_float()) == repr(layer)
    assert fresh.to_float().weight is fresh.weight


class Plain(nn.Conv2d):
    """A subclass that computes what its base does."""


class Standardized(nn.Conv2d):
    """A subclass whose weight is another one in its forward."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(nn.Linear, 6, 8), ObservedLinear),
        (partial(nn.Conv1d, 6, 8, 3), ObservedConv1d),
        (partial(nn.Conv2d, 6, 8, 3), ObservedConv2d),
        (partial(Plain, 6, 8, 3), ObservedConv2d),
        (partial(Standardized, 6, 8, 3), None),
        (partial(Doubled, 6, 8), None),
        (partial(nn.LazyConv2d, 8, 3), None),
        (partial(nn.LazyLinear, 8), None),
        (partial(nn.Conv3d, 6, 8, 3), ObservedConv3d),
        (partial(nn.LazyConv3d, 8, 3), None),
        (lambda: nn.MultiheadAttention(4, 2).out_proj, None),
        (lambda: observed(SCHEMES["int8"], nn.Conv2d(6, 8, 3)), None),
        (nn.ReLU, None),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_the_observed_type_takes_what_computes_as_its_torch_type(
    make: Callable[[], nn.Module], expected: type | None
) -> None:
    assert observed_type(make()) is expected


def layer_bound(layer: Quantized, x: Tensor) -> Tensor:
    """Return how far the product of codes and the reference path may lie apart: tests/test_bridge.py derives it."""
    u, info = 2.0**-24, torch.finfo(x.dtype)
    v = 0.0 if x.dtype is torch.float32 else info.eps / 2
    magnitude = magnitudes(layer, x)
    k = math.prod(layer.weight_codes.shape[1:])
    return 1.02 * ((2 * k + 11) * u + 4 * v) * magnitude + info.smallest_normal * info.eps


def magnitudes(layer: Quantized, x: Tensor) -> Tensor:
    """Return the sum of magnitudes over each window of the dequantized operands, and the bias's, in float64."""
    qp = layer.act_qparams
    q = fsq.quantize(layer.act_spec, layer._padded(x), qp)
    x_hat = fsq.dequantize(layer.act_spec, q, qp, dtype=torch.float64)
    w_hat = fsq.dequantize(layer.weight_spec, *fsq.unfold(layer.weight_spec, layer.folded), dtype=torch.float64)
    op = CONVS[w_hat.ndim - 3]
    return op(x_hat.abs(), w_hat.abs(), None if layer.bias is None else layer.bias.double().abs(), **layer._geometry)


@every_layer
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_product_of_codes_is_the_reference_path_within_its_roundings(scheme: str, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = quantized(SCHEMES[scheme], LAYERS[name](dtype=dtype))
        x = images(layer, dtype=dtype)
        fast = layer(x)
        layer.reference = True
        slow = layer(x)
        assert fast.dtype is slow.dtype is dtype
        assert fast.shape == slow.shape
        assert ((fast.double() - slow.double()).abs() <= layer_bound(layer, x)).all()


@every_layer
def test_one_image_without_a_batch_is_that_image_in_a_batch(name: str) -> None:
    layer = quantized(SCHEMES["int8"], LAYERS[name]())
    x = images(layer)
    assert torch.equal(layer(x[1]), layer(x)[1])


WEIGHTS = {
    "int4-groups": QuantSpec(torch.int4, fsq.PerGroup(3)),
    "int8-rows": QuantSpec(torch.int8, fsq.PerRow()),
    "int16": QuantSpec(torch.int16, PER_CHANNEL),
    "float8-blocks": QuantSpec(torch.float8_e4m3fn, fsq.PerBlock((4, 3, 1, 3))),
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_path_takes_any_weight_and_has_the_bits_of_a_convolution_of_fake_quantized_operands(
    weight: str, dtype: torch.dtype
) -> None:
    config = dataclasses.replace(SCHEMES["uint8"], weight=WEIGHTS[weight], reference=True)
    conv = nn.Conv2d(6, 8, 3, padding=1, dtype=dtype)
    layer = quantized(config, conv, reference=True)
    spec, w = config.weight, conv.weight.detach()
    w_qp = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, w.shape), w))
    x = images(conv, dtype=dtype)
    x_hat = fsq.fake_quantize(config.activation, x, layer.act_qparams)
    with torch.no_grad():
        assert torch.equal(layer(x), F.conv2d(x_hat, fsq.fake_quantize(spec, w, w_qp), conv.bias, padding=1))
    assert torch.equal(twin(layer, dtype)(x), layer(x))


def twin(layer: Quantized, dtype: torch.dtype | None = None) -> Quantized:
    """Return an empty layer built from what `arguments` says, through JSON, with the state of `layer`."""
    arguments = json.loads(json.dumps(layer.arguments()))
    made = type(layer)(act=layer.act_spec, weight=layer.weight_spec, dtype=dtype, **arguments)
    assert repr(made) == repr(layer)
    made.load_state_dict(layer.state_dict(), strict=True)
    return made


@every_layer
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_twin_a_copy_and_a_pickled_layer_have_the_same_bits(scheme: str, name: str) -> None:
    layer = quantized(SCHEMES[scheme], LAYERS[name]())
    x = images(layer)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (twin(layer), copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), layer(x))


def test_a_linear_layer_has_a_twin_too() -> None:
    linear = nn.Linear(6, 8, bias=False)
    spec = QuantSpec(torch.int8, PER_TENSOR)
    layer = ObservedLinear.from_float(linear, ObserverModule(spec), ObserverModule(spec))
    x = torch.randn(5, 6)
    layer(x)
    layer = QuantizedLinear.from_observed(layer)
    assert torch.equal(twin(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_codes_and_scales_keep_dtype_and_bits_when_the_model_changes_its_dtype(dtype: torch.dtype) -> None:
    layer = quantized(SCHEMES["uint8"], LAYERS["2d"]())
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer.to(dtype)
    for name, value in layer.named_buffers():
        assert value.dtype is before[name].dtype
        assert torch.equal(value, before[name])
    assert layer.bias.dtype is layer(images(layer, dtype=dtype)).dtype is dtype


def test_a_model_with_its_channels_last_keeps_the_order_and_the_bits() -> None:
    layer = quantized(SCHEMES["uint8"], LAYERS["2d"]())
    x = images(layer)
    y = layer(x)
    assert y.is_contiguous()
    moved = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    z = moved(x.contiguous(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(z, y)
    made = quantized(SCHEMES["uint8"], LAYERS["2d"]().to(memory_format=torch.channels_last))
    assert made.weight_codes.is_contiguous()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_float_copy_of_the_weight_remains(scheme: str) -> None:
    """One byte an element, and 20 a channel at most: scale, zero point, sum, epilogue; twice 8: the input's pair."""
    conv = nn.Conv2d(6, 64, 3)
    layer = quantized(SCHEMES[scheme], conv)
    held = sum(b.untyped_storage().nbytes() for b in layer.buffers())
    assert conv.weight.nbytes / 4 < held <= conv.weight.nbytes / 4 + 20 * 64 + 16
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_the_weight_as_a_tensor_stands_for_what_the_reference_path_multiplies() -> None:
    layer = quantized(SCHEMES["uint8"], LAYERS["2d"]())
    w = fsq.dequantize(layer.weight_spec, *fsq.unfold(layer.weight_spec, layer.folded))
    assert torch.equal(layer.qweight.dequantize(), w)


def test_the_repr_says_settings_formats_and_product() -> None:
    shown = repr(quantized(SCHEMES["uint8"], LAYERS["2d-same"]()))
    for part in (
        "in_channels=6, out_channels=8, kernel_size=(3, 3)",
        "padding='same', dilation=(2, 2)",
        "bias=True",
        "activation=uint8 asymmetric PerTensor()",
        "weight=uint8 asymmetric PerAxis",
        "int8 product",
    ):
        assert part in shown


# --- compiled --------------------------------------------------------------------------------------


class Every(nn.Module):
    """Layers of each kind, so that what is slow (compiling, exporting) happens once."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def windows(rank: int) -> Every:
    names = (("1d", "1d-replicate"), ("2d", "2d-valid", "2d-reflect"), ("3d", "3d-reflect"))[rank - 1]
    return Every([quantized(SCHEMES[scheme], LAYERS[name]()) for scheme in ("int8", "uint8") for name in names])


def directs() -> Every:
    cases = (("int8", "2d-depthwise"), ("uint8", "2d-depthwise"), ("float8_e4m3fn", "2d"))
    return Every([quantized(SCHEMES[scheme], LAYERS[name]()) for scheme, name in cases])


@pytest.mark.parametrize(("scheme", "by_onednn"), [("int8", False), ("uint8", True), ("float8_e4m3fn", False)])
@pytest.mark.usefixtures("kernels_of_torch")
def test_images_of_any_number_and_size_are_compiled(
    scheme: str, by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where groups, or float8, are convolved as floats."""
    monkeypatch.setattr(onednn, "AVAILABLE", onednn.AVAILABLE and by_onednn)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 6, (1, 3), 1, (0, 1), groups=6)).eval()
    bridge.prepare_(layers, SCHEMES[scheme])
    bridge.calibrate(layers, [torch.randn(2, 3, 16, 12)])
    bridge.convert_(layers)
    for layer in (layers[0], layers[2]):
        layer.hand_on = False
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layers, backend=counter, dynamic=True)
    with torch.no_grad():
        for size in ((2, 3, 16, 12), (3, 3, 20, 18), (5, 3, 9, 40)):
            x = torch.randn(size)
            assert_same([compiled(x)], [layers(x)])
        assert counter.frame_count <= 2
        for shape in ((0, 3, 16, 12), (0, 3, 8, 8)):
            assert compiled(torch.randn(shape)).shape == layers(torch.randn(shape)).shape


def assert_same(ours: list[Tensor], theirs: list[Tensor], *, of_any_stride: Sequence[int] = ()) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.dtype is b.dtype
        assert a.stride() == b.stride() or i in of_any_stride
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "rank", "channels_last"),
    [
        pytest.param(partial(windows, 1), 1, False, id="1d"),
        pytest.param(partial(windows, 2), 2, False, id="2d"),
        pytest.param(partial(windows, 2), 2, True, id="2d-channels-last"),
        pytest.param(partial(windows, 3), 3, False, id="3d"),
        pytest.param(partial(windows, 3), 3, True, id="3d-channels-last"),
        pytest.param(directs, 2, False, id="directs"),
        pytest.param(directs, 2, True, id="directs-channels-last"),
    ],
)
def test_compiled_has_the_bits_of_eager_in_one_compilation_for_any_batch(
    make: Callable[[], Every], rank: int, channels_last: bool
) -> None:
    model, counter = make(), CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    # Compiled, torch before 2.13 reflects images with their channels last into such with them first.
    old = channels_last and torch.__version__ < "2.13"
    reflecting = [i for i, layer in enumerate(model.layers) if old and layer.padding_mode == "reflect"]
    for batch in (5, 2, 17, 16, 3):
        x = torch.randn(batch, 6, *SPACE[:rank])
        x = last(x) if channels_last else x
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert_same(compiled(x), model(x), of_any_stride=reflecting)
    assert counter.frame_count == 1


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_compiled_has_the_bits_of_eager_in_one_compilation_for_any_image(last: bool) -> None:
    """Inductor of torch 2.13 fails where a strided convolution of such images ends in a view; `conv` ends in none."""
    layers = [
        quantized(SCHEMES[scheme], nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=groups))
        for scheme, groups in (("int8", 1), ("uint8", 6))
    ]
    model, counter = Every(layers), CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch, height, width in ((2, 9, 8), (3, 12, 17), (4, 20, 20)):
        x = torch.randn(batch, 6, height, width)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        for axis in (0, 2, 3):
            torch._dynamo.mark_dynamic(x, axis)
        with torch.no_grad():
            assert_same(compiled(x), model(x))
    assert counter.frame_count == 1


def test_exported_has_the_bits_of_eager_for_any_batch() -> None:
    model, x = Every([windows(2), directs()]), torch.randn(4, 6, 9, 8)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=15)}}
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False).module()
    for batch in (x, x[:3]):
        for ours, theirs in zip(exported(batch), model(batch), strict=True):
            assert_same(ours, theirs)


# --- a model ---------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    ).eval()


def signal_to_noise(y: Tensor, expected: Tensor) -> float:
    return 10 * math.log10(expected.square().mean() / (y - expected).square().mean())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
def test_a_small_net_reaches_the_signal_to_noise_that_its_scales_allow(dtype: torch.dtype) -> None:
    """A rounding error is uniform over a step: its power is `step**2 / 12`, that of an operand relative to
    its own power. The two operands of a layer, and layer after layer, add theirs: errors are independent,
    and ReLU halves signal and noise alike. A tenth (0.4 dB) is left for chance.
    """
    model, config = net(), StaticQuantConfig(dtype)
    x = torch.randn(16, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
    prepared = bridge.prepare_(copy.deepcopy(model), config)
    assert [type(m) for m in prepared if hasattr(m, "act_obs")] == [ObservedConv2d] * 3 + [ObservedLinear]
    prepared.load_state_dict(model.state_dict(), strict=False)
    bridge.calibrate(prepared, [x])
    converted = bridge.convert_(prepared)
    assert [type(m) for m in converted if isinstance(m, Quantized)] == [QuantizedConv2d] * 3 + [QuantizedLinear]

    noise, z = 0.0, x
    for layer, quantized_layer in zip(model, converted, strict=True):
        if isinstance(quantized_layer, Quantized):
            for scale, operand in ((quantized_layer.act_scale, z), (quantized_layer.weight_scale, layer.weight)):
                noise += float(scale.square().mean() / 12 / operand.detach().square().mean())
        with torch.no_grad():
            z = layer(z)
    assert signal_to_noise(converted(x), expected) >= -10 * math.log10(1.1 * noise)
    # The bound is no formality: one scale of 32 that is a fifth off does not reach it.
    converted[2].product_scale[0] *= 1.2
    assert signal_to_noise(converted(x), expected) < -10 * math.log10(1.1 * noise)


def test_a_prepared_net_gives_its_float_layers_back() -> None:
    model = net()
    layers = list(model)
    prepared = bridge.prepare_(model, StaticQuantConfig(torch.int8))
    given = [m.to_float() if hasattr(m, "act_obs") else m for m in prepared]
    assert all(a is b for a, b in zip(given, layers, strict=True))


def test_quantize_takes_convolutions_in_both_steps() -> None:
    one, two = net(), net()
    two.load_state_dict(one.state_dict())
    x = torch.randn(4, 3, 16, 16)
    bridge.quantize_(one, StaticQuantConfig(torch.int8, step="prepare"))
    bridge.prepare_(two, StaticQuantConfig(torch.int8))
    for model in (one, two):
        bridge.calibrate(model, [x])
    bridge.quantize_(one, StaticQuantConfig(torch.int8))
    bridge.convert_(two)
    assert torch.equal(one(x), two(x))


PER_CHANNEL_ACT = QuantSpec(torch.int8, fsq.PerAxis(1))
KERNEL_ROWS = QuantSpec(torch.int8, fsq.PerRow())


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(6, 8, 3))


def converted(config: StaticQuantConfig) -> nn.Module:
    model = bridge.prepare_(conv_net(), StaticQuantConfig(torch.int8))
    bridge.calibrate(model.eval(), torch.randn(2, 2, 6, 9, 9))
    return bridge.convert_(model, config=config)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: converted(StaticQuantConfig(torch.int8, form="tensor")),
            ValueError,
            "^0: form='tensor' is for linear layers, and this is a ObservedConv2d; use form='module', or leave",
            id="convert_(form=tensor)",
        ),
        pytest.param(
            lambda: bridge.prepare_(conv_net(), StaticQuantConfig(torch.int8, weight=KERNEL_ROWS)),
            ValueError,
            r"^0: PerRow\(dim=-1\) gives several scales along .*; use PerAxis\(0\) .*, or the reference path",
            id="prepare_(weight per row)",
        ),
        pytest.param(
            lambda: bridge.prepare_(conv_net(), StaticQuantConfig(torch.int8, activation=PER_CHANNEL_ACT)),
            ValueError,
            r"^0: PerAxis\(axis=1\) gives the activations of a convolution several scales.*use PerTensor\(\)",
            id="prepare_(activations per channel)",
        ),
        pytest.param(
            lambda: bridge.prepare_(
                conv_net(), StaticQuantConfig(torch.int8, activation=PER_CHANNEL_ACT, reference=True)
            ),
            ValueError,
            r"^0: PerAxis\(axis=1\) gives the input of a convolution several scales.*any batch and image; use",
            id="prepare_(activations per channel, reference)",
        ),
        pytest.param(
            lambda: ObservedConv2d.from_float(nn.Conv1d(6, 8, 3), *map(ObserverModule, (ACT, WEIGHT))),
            TypeError,
            r"ObservedConv2d.from_float got a Conv1d; give a torch.nn.Conv2d",
            id="ObservedConv2d.from_float(Conv1d)",
        ),
        pytest.param(
            lambda: QuantizedConv2d.from_observed(nn.Conv2d(6, 8, 3)),
            TypeError,
            "from_observed got a Conv2d; give a bridge.ObservedConv2d",
            id="from_observed(Conv2d)",
        ),
        pytest.param(
            lambda: QuantizedConv2d(6, 8, 3, act=ACT, weight=KERNEL_ROWS),
            ValueError,
            r"PerRow\(dim=-1\) gives several scales",
            id="QuantizedConv2d(weight per row)",
        ),
        pytest.param(
            lambda: bridge.prepare_(nn.Sequential(nn.ReLU()), StaticQuantConfig(torch.int8)),
            ValueError,
            "no module of Sequential is one of torch.nn.Linear, .*, torch.nn.ConvTranspose3d to replace",
            id="prepare_(no layer)",
        ),
        pytest.param(
            lambda: bridge.prepare_(nn.Conv2d(6, 8, 3), StaticQuantConfig(torch.int8)),
            ValueError,
            "the model is itself one of .*, torch.nn.Conv2d, .* and cannot be replaced in place; wrap it",
            id="prepare_(Conv2d)",
        ),
    ],
)
def test_a_layer_is_refused_with_value_rule_and_remedy(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


# --- residuals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["1d", "1d-unbatched", "2d-padded", "2d-pointwise", "2d-groups", "3d"])
@pytest.mark.parametrize("by", BY)
def test_a_residual_is_added_before_the_one_rounding_and_a_relu_after(
    name: str, dtype: torch.dtype, by: str, multiply_by: Callable[[str], None]
) -> None:
    multiply_by(by)
    wide = torch.promote_types(dtype, torch.float32)
    for formats in ("uint8-uint8", "int8-tensor"):
        case = draw(GEOMETRIES[name], *FORMATS[formats])
        plain = case.kept(wide)
        residual = (plain.abs().mean() * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))).to(dtype)
        before = residual.clone()
        right = (plain + residual.to(wide)).to(dtype)
        assert torch.equal(case.kept(dtype, residual=residual), right)
        assert torch.equal(case.kept(dtype, residual=residual, relu=True), right.relu())
        assert torch.equal(case.kept(dtype, relu=True), case.kept(dtype).relu())
        assert torch.equal(residual, before)
        qp = QParams(plain.abs().max().float().reshape(1) / 100, case.qp.zero_point.reshape(1))
        then = fsq.Requantization(case.act, qp)
        assert torch.equal(case.kept(dtype, residual=residual, then=then), fsq.requantize(right, then))
        assert torch.equal(case.kept(dtype, relu=True, then=then), fsq.requantize(case.kept(dtype).relu(), then))


@pytest.mark.parametrize("by", BY)
def test_a_residual_of_any_stride_with_a_gradient_and_under_vmap(by: str, multiply_by: Callable[[str], None]) -> None:
    multiply_by(by)
    case = draw(GEOMETRIES["2d-padded"], *FORMATS["int8-int8"])
    plain = case.kept()
    residual = torch.randn(plain.shape[::-1]).permute(3, 2, 1, 0)
    assert torch.equal(case.kept(residual=residual), plain + residual)
    learned = residual.clone().requires_grad_()
    y = case.kept(residual=learned, relu=True)
    y.sum().backward()
    assert torch.equal(learned.grad, (y > 0).to(torch.float32))
    both = torch.stack([residual, -residual])
    y = torch.vmap(lambda each: case.kept(residual=each))(both)
    assert torch.equal(y, torch.stack([plain + each for each in both]))


@pytest.mark.parametrize("formats", ["uint8-int8", "int8-tensor", "float8"])
@pytest.mark.usefixtures("packing", "kernels_of_torch")
def test_floats_beside_their_codes_change_nothing(formats: str) -> None:
    """A backend may read them; none on a CPU does, eager or compiled."""
    act, weight = FORMATS.get(formats, (QuantSpec(torch.float8_e4m3fn, PER_TENSOR),) * 2)
    case = draw(GEOMETRIES["2d-pointwise"], act, weight)
    x = fsq.dequantize(case.act, case.q, case.qp).requires_grad_()
    right = case.kept()
    assert torch.equal(case.kept(x=x), right)
    assert torch.equal(torch.compile(case.kept, fullgraph=True)(x=x), right)


# --- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_cuda_has_the_integers_and_roundings_of_numpy(name: str, formats: str) -> None:
    """Eager: each float operation is a kernel of its own, so nothing is fused and the bits are numpy's."""
    case = draw(GEOMETRIES[name], *FORMATS[formats])
    y = case.to("cuda").conv().cpu()
    np.testing.assert_array_equal(
        array(y), epilogue(case.total(), case.scale(np.dtype(np.float32)), case.bias_array(), ARRAYS[torch.float32])
    )


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["2d-padded", "2d-groups"])
def test_cuda_groups_and_windows_of_a_real_size_are_exact(name: str) -> None:
    """Where cuDNN has Winograd and the FFT to choose from."""
    groups = GEOMETRIES[name].groups
    geometry = Geometry((4, 64, 20, 20), (64, 64 // groups, 3, 3), padding=1, groups=groups)
    case = draw(geometry, *FORMATS["uint8-uint8"])
    assert_exact(case.to("cuda").conv().cpu(), case)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOAT8S, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_cuda_float8_is_within_the_bound_of_the_tensor_core_sum(name: str, dtype: torch.dtype) -> None:
    """An addition errs by less than 2**-13 of the largest magnitude in its sum: tests/test_linear.py says why."""
    case = draw(GEOMETRIES[name], QuantSpec(dtype, PER_TENSOR), QuantSpec(dtype, PER_CHANNEL))
    assert_float8(case.to("cuda").conv().cpu(), case, 2.0**-13)


@pytest.mark.cuda
def test_cuda_compiled_is_the_cpu_product_within_the_roundings() -> None:
    """Both sums of integers are exact and each epilogue is within `5 u |E| + 3 u |y|`, fused or not.

    The data lie on the grid of the codes, where Triton's division (2 ulp) changes no code.
    """
    for scheme, name in (("uint8", "2d"), *((scheme, "2d-depthwise") for scheme in SCHEMES)):
        layer = quantized(SCHEMES[scheme], LAYERS[name]())
        x = fsq.fake_quantize(layer.act_spec, images(layer), layer.act_qparams)
        on_cuda = torch.compile(copy.deepcopy(layer).cuda(), fullgraph=True)
        with torch.no_grad():
            y, (source,) = run_and_get_code(on_cuda, x.cuda())
            error = (y.cpu().double() - layer(x).double()).abs()
        assert ("convolve_alone_" in source) == (name == "2d-depthwise")
        # Of float8 both sums of 9 products are rounded too.
        assert (error <= (16 + 2 * 9 * ("float8" in scheme)) * 2.0**-24 * magnitudes(layer, x)).all()


# --- calibration of convolutions --------------------------------------------------------------------


class Speech(nn.Module):
    """Convolves tokens along time, as speech encoders do: (batch, tokens, channels) in, the mask beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))


def test_padding_is_left_out_of_the_tokens_of_a_convolution() -> None:
    keep = torch.zeros(2, 6)  # as many tokens as channels: the axes cannot be told apart by their sizes
    keep[0, :4] = keep[1, :1] = 1
    x = torch.where(keep[..., None] == 1, 1.0, 99.0).expand(2, 6, 6).contiguous()
    model = bridge.prepare_(Speech().eval(), StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [{"x": x, "attention_mask": keep}])
    assert float(model.conv.act_obs.state["max"]) == 1.0
    assert int(model.conv.act_obs.state["count"]) == 5 * 6
    assert model.conv.rows == 5
    found = bridge.report(model, [{"x": x, "attention_mask": keep}], rank=None).layers[0]
    assert (found.values, found.saturated) == (5 * 6, 0.0)
    with pytest.raises(bridge.CalibrationError, match="conv: ran on 5 rows, at least 6 needed"):
        bridge.convert_(model, min_rows=6)
