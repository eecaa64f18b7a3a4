"""Transposed convolution on codes: integers exact against a scatter in int64 numpy, and the layers that hold them.

The roundings behind an exact sum, and so `bound`, are those of tests/test_linear.py.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from test_chains import EXACT, assert_codes, difference, to
from test_conv import (
    FORMATS,
    PER_CHANNEL,
    PER_TENSOR,
    SCHEMES,
    Case,
    assert_exact,
    assert_float8,
    assert_vmap_is_the_loop,
    draw,
    last,
    quantized,
    twin,
)
from test_linear import ARRAYS, BY, FLOAT8S, array, epilogue
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import functional_sq as fsq
from functional_sq import QParams, QuantSpec, brgemm, onednn, onednn_conv
from functional_sq.conv_transpose import direct_transposed
from functional_sq.formats import REAL_DTYPES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import bridge
    from bridge import ObserverModule, StaticQuantConfig
    from bridge.kinds import observed_type

TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
SETTINGS = ("stride", "padding", "output_padding", "dilation", "groups")


# --- the cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transposed:
    """The shapes and settings; `weight` is laid out as `transpose_weight` gives it."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    output_padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    polyphase: bool = False

    def settings(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in SETTINGS}

    def convolve(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        """Convolve by the oracle, which takes the weight as torch holds it."""
        rank = w.ndim - 2
        each = {name: (v,) * rank if isinstance(v, int) else v for name, v in self.settings().items()}
        n, c, *kernel = w.shape
        theirs = (
            w.reshape(self.groups, n // self.groups, c, *kernel).swapaxes(1, 2).reshape(-1, n // self.groups, *kernel)
        )
        theirs = np.flip(theirs, range(2, w.ndim))
        y = oracle.convolve_transposed(x if x.ndim == w.ndim else x[None], theirs, **each | {"groups": self.groups})
        return y if x.ndim == w.ndim else y[0]


GEOMETRIES = {
    "1d": Transposed((2, 5, 6), (4, 5, 3)),
    "1d-strided": Transposed((2, 5, 6), (4, 5, 4), stride=2, padding=1),
    "1d-beyond-the-kernel": Transposed((2, 5, 6), (4, 5, 2), stride=4, output_padding=3),
    "1d-cropped": Transposed((2, 5, 7), (4, 5, 2), stride=3, padding=4, output_padding=1),
    "1d-dilated": Transposed((2, 4, 6), (6, 2, 3), stride=2, padding=3, output_padding=2, dilation=3, groups=2),
    "1d-cropped-before-padded": Transposed((1, 3, 1), (2, 3, 1), padding=2, output_padding=4, dilation=5),
    "1d-unbatched": Transposed((5, 6), (4, 5, 3), stride=2),
    "2d": Transposed((2, 5, 4, 3), (4, 5, 3, 3), stride=2, padding=1, output_padding=1),
    "2d-doubled": Transposed((2, 5, 4, 3), (3, 5, 2, 2), stride=2),
    "2d-pointwise": Transposed((2, 5, 4, 3), (4, 5, 1, 1), stride=(1, 2)),
    "2d-uneven": Transposed(
        (2, 5, 4, 3), (4, 5, 3, 2), stride=(3, 1), padding=(0, 1), output_padding=(2, 1), dilation=(1, 2)
    ),
    "2d-one-channel": Transposed((2, 1, 4, 3), (1, 1, 3, 3), padding=1),
    "2d-groups": Transposed((2, 6, 4, 3), (4, 3, 3, 3), stride=2, padding=1, groups=2),
    "2d-depthwise": Transposed((2, 6, 4, 3), (6, 1, 4, 4), stride=2, padding=1, groups=6),
    "2d-unbatched": Transposed((5, 4, 3), (4, 5, 3, 3), padding=2),
    "2d-no-images": Transposed((0, 5, 4, 3), (4, 5, 3, 3), stride=2),
    "3d": Transposed((2, 3, 2, 3, 2), (4, 3, 3, 2, 3), stride=(2, 1, 2), padding=(1, 0, 2), output_padding=(1, 0, 1)),
    "3d-groups": Transposed((2, 4, 2, 2, 3), (6, 2, 2, 2, 2), stride=2, groups=2, dilation=(1, 3, 1)),
}
GEOMETRIES |= {
    f"{name}-polyphase": dataclasses.replace(each, polyphase=True)
    for name, each in GEOMETRIES.items()
    if each.groups == each.dilation == 1 and each.stride != 1
}
every_geometry = pytest.mark.parametrize("name", GEOMETRIES)


def convolved(case: Case, dtype: torch.dtype = torch.float32, q: Tensor | None = None, **how: object) -> Tensor:
    """Convolve the codes of a case; with `kept=True` as a layer does that keeps its weight."""
    folded, q, settings = case.folded(), case.q if q is None else q, case.geometry.settings()
    if case.geometry.polyphase:
        folded, settings = fsq.polyphase(folded, case.geometry.stride), settings | kernel_size(folded)
    if how.pop("kept", False):
        how["epilogue"] = fsq.epilogue(case.act, case.qp, folded, dtype=torch.promote_types(dtype, torch.float32))
    return fsq.conv_transpose(case.act, q, case.qp, folded, case.bias, **settings, dtype=dtype, **how)


def kernel_size(folded: fsq.FoldedWeight) -> dict[str, object]:
    return {"kernel_size": folded.codes.shape[2:]}


# --- the core --------------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", FORMATS)
@every_geometry
def test_the_sum_is_exact_and_then_rounded_as_numpy_rounds(name: str, formats: str) -> None:
    for bias, dtype in ((True, torch.float32), (False, torch.float32), *((True, d) for d in REAL_DTYPES[1:])):
        case = draw(GEOMETRIES[name], *FORMATS[formats], bias=bias)
        y = convolved(case, dtype)
        assert y.dtype is dtype
        assert y.is_contiguous()
        assert_exact(y, case)


def test_the_oracle_tells_apart_what_a_transposed_convolution_on_codes_gets_wrong_first() -> None:
    case = draw(GEOMETRIES["2d"], *FORMATS["uint8-uint8"])
    assert_exact(convolved(case), case)
    one_off = dataclasses.replace(case, qp=QParams(case.qp.scale, case.qp.zero_point + 1))
    unturned = dataclasses.replace(case, w=case.w.flip(2, 3))
    for wrong in (one_off, unturned):
        with pytest.raises(AssertionError):
            assert_exact(convolved(wrong), case)
    # Codes 0 between neighbours, where the zero point is not 0.
    zeros = torch.zeros(2, 5, 7, 5, dtype=torch.uint8)
    zeros[:, :, ::2, ::2] = case.q
    y = fsq.conv(case.act, zeros, case.qp, case.folded(), case.bias, padding=1)
    assert not np.array_equal(array(y), array(convolved(case))[:, :, :-1, :-1])


@every_geometry
def test_images_in_any_order_of_memory_give_the_same_bits(name: str) -> None:
    case = draw(GEOMETRIES[name], *FORMATS["int8-int8"])
    y = convolved(case)
    if case.q.ndim > 3 and case.q.ndim == len(case.geometry.weight) and case.q.shape[1] > 1:
        moved = convolved(case, q=last(case.q))
        assert moved.stride() == last(y).stride() or not y.numel()
        assert torch.equal(moved, y)
    assert torch.equal(convolved(case, q=torch.cat([case.q, case.q], -1)[..., : case.q.shape[-1]]), y)


@pytest.mark.parametrize("dtype", FLOAT8S, ids=str)
@every_geometry
def test_float8_is_within_the_bound_of_a_float32_sum(name: str, dtype: torch.dtype) -> None:
    """`K u` of the magnitudes: Higham 2002, 4.4; zeros add no rounding."""
    case = draw(GEOMETRIES[name], QuantSpec(dtype, PER_TENSOR), QuantSpec(dtype, PER_CHANNEL))
    assert_float8(convolved(case), case, 2.0**-24)


@every_geometry
def test_a_backend_has_the_same_integers_and_roundings(
    name: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = {"brgemm": brgemm, "oneDNN": onednn_conv}[packing]
    convolve, calls = backend.convolve, []
    monkeypatch.setattr(backend, "convolve", lambda *given, dtype: calls.append(1) or convolve(*given, dtype=dtype))
    geometry = GEOMETRIES[name]
    for formats, fill in itertools.product(("uint8-int8", "int8-int8", "int8-tensor"), ("all", "ends")):
        case = draw(geometry, *FORMATS[formats], fill=(fill, fill))
        y = convolved(case, kept=True)
        assert y.is_contiguous()
        assert_exact(y, case)
    if len(geometry.weight) == 5:
        taken = packing == "brgemm"
    else:
        taken = geometry.groups == 1 or packing == "oneDNN" or onednn.AMX
    assert len(calls) == (6 if geometry.shape[0] and taken else 0)


@pytest.mark.parametrize("by", BY)
@every_geometry
def test_codes_for_the_next_layer_are_those_of_float64_within_the_rounding(
    name: str, by: str, multiply_by: Callable[[str], None]
) -> None:
    multiply_by(by)
    case = draw(GEOMETRIES[name], *FORMATS["int8-int8"])
    y = case.total() * case.scale(np.dtype(np.float64)) + case.bias_array()
    for activation in EXACT:
        then = to(torch.int8, float(np.abs(y).max() / 100) if y.size else 1.0, 5, activation)
        got = convolved(case, kept=True, then=then)
        assert got.is_contiguous()
        assert_codes(got, y, then)


@every_geometry
def test_the_weight_is_turned_as_torch_has_it_and_back(name: str) -> None:
    geometry = GEOMETRIES[name]
    w = torch.randn(geometry.weight)
    theirs = fsq.transpose_weight(w, geometry.groups)
    channels = geometry.shape[-len(geometry.weight) + 1]
    assert theirs.shape == (channels, geometry.weight[0] // geometry.groups, *geometry.weight[2:])
    assert torch.equal(fsq.transpose_weight(theirs, geometry.groups), w)
    assert theirs.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_geometry
def test_the_reference_has_the_bits_of_torch_on_dequantized_operands(name: str, dtype: torch.dtype) -> None:
    geometry = GEOMETRIES[name]
    case = draw(geometry, *FORMATS["uint8-uint8"])
    x = fsq.dequantize(case.act, case.q, case.qp, dtype=dtype)
    w = fsq.dequantize(case.weight, case.w, case.w_qp, dtype=dtype)
    settings = geometry.settings()
    ours = fsq.conv_transpose_reference(case.act, case.q, case.qp, w, case.bias.to(dtype), **settings)
    theirs = TRANSPOSED[w.ndim - 3](x, fsq.transpose_weight(w, geometry.groups), case.bias.to(dtype), **settings)
    assert ours.dtype is dtype
    assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch._int_mm has no batching rule
@pytest.mark.parametrize("name", ["1d-cropped", "2d", "2d-groups", "3d", "1d-cropped-polyphase", "3d-polyphase"])
@pytest.mark.parametrize("formats", ["uint8-uint8", "int8-int8"])
def test_vmap_is_the_loop(name: str, formats: str) -> None:
    geometry = GEOMETRIES[name]
    cases = [draw(geometry, *FORMATS[formats], seed=seed) for seed in range(3)]

    def conv(act: QuantSpec, q: Tensor, qp: QParams, weight: fsq.FoldedWeight, *rest: Tensor, **how: object) -> Tensor:
        if geometry.polyphase:
            weight, how = fsq.polyphase(weight, geometry.stride), how | kernel_size(weight)
        return fsq.conv_transpose(act, q, qp, weight, *rest, **how)

    assert_vmap_is_the_loop(conv, cases, [convolved(case) for case in cases])


ACT, WEIGHT = FORMATS["int8-int8"]


@settings(max_examples=50)
@given(st.data())
def test_phases_give_what_zeros_between_codes_give_in_any_geometry(data: st.DataObject) -> None:
    """By the general path, by a backend, and by one operator where there is one."""
    rank = data.draw(st.integers(1, 3))
    kernel, stride, padding, size = (
        data.draw(st.tuples(*(st.integers(*ends) for _ in range(rank)))) for ends in ((1, 5), (1, 4), (0, 4), (1, 4))
    )
    added = tuple(data.draw(st.integers(0, step - 1)) for step in stride)
    geometry = Transposed((2, 3, *size), (2, 3, *kernel), stride, padding, added)
    case = draw(geometry, *FORMATS[data.draw(st.sampled_from(["uint8-uint8", "int8-int8"]))])
    try:
        exact = convolved(case)
    except ValueError:
        reject()  # nothing is left
    phases = dataclasses.replace(case, geometry=dataclasses.replace(geometry, polyphase=True))
    for kept in (False, True):
        assert torch.equal(convolved(phases, kept=kept), exact)
    weight = fsq.polyphase(case.folded(), stride)
    operands = case.act, case.qp, weight, case.bias, fsq.epilogue(case.act, case.qp, weight)
    direct = direct_transposed(*operands, **geometry.settings(), **kernel_size(case.folded()))
    y = direct(fsq.dequantize(case.act, case.q, case.qp))
    assert y is None or torch.equal(y, exact)


@pytest.mark.parametrize("scheme", ["uint8-uint8", "int8-int8"])
@pytest.mark.parametrize("name", [name for name, each in GEOMETRIES.items() if each.polyphase])
def test_each_phase_has_every_stride_th_element_of_torchs_kernel(name: str, scheme: str) -> None:
    case = draw(GEOMETRIES[name], *FORMATS[scheme])
    geometry, folded = case.geometry, case.folded()
    rank = len(geometry.weight) - 2
    stride = (geometry.stride,) * rank if isinstance(geometry.stride, int) else geometry.stride
    phases = fsq.polyphase(folded, geometry.stride)
    codes, (_, zero_point) = fsq.unfold(case.weight, phases)
    theirs = fsq.transpose_weight(case.w.int() - case.w_qp.zero_point).numpy()
    values = (
        (codes.int() - zero_point).numpy().reshape(*stride, geometry.weight[0], geometry.weight[1], *codes.shape[2:])
    )
    for phase in itertools.product(*map(range, stride)):
        of_phase = np.flip(values[phase].swapaxes(0, 1), range(2, 2 + rank))
        wanted = theirs[(..., *(slice(first, None, step) for first, step in zip(phase, stride, strict=True)))]
        assert np.array_equal(of_phase[tuple(map(slice, wanted.shape))], wanted)
        assert np.count_nonzero(of_phase) == np.count_nonzero(wanted)
    assert torch.equal(phases.sum, phases.codes.flatten(1).sum(1, dtype=torch.int32))
    assert phases.codes.is_contiguous()


def folded_of(spec: QuantSpec, shape: tuple[int, ...], zero_point: int = 0) -> fsq.FoldedWeight:
    qp_of = qp(spec, shape)
    qp_of.zero_point.fill_(zero_point)
    return fsq.fold(spec, torch.zeros(shape, dtype=spec.format.storage), qp_of)


def qp(spec: QuantSpec, shape: tuple[int, ...]) -> QParams:
    stats = spec.granularity.stat_shape(shape)
    return QParams(torch.ones(stats), torch.zeros(stats, dtype=torch.int32))


def call(
    q: tuple[int, ...] = (2, 4, 9, 9), w: tuple[int, ...] = (6, 4, 3, 3), act: QuantSpec = ACT, **settings: object
) -> Tensor:
    folded = folded_of(WEIGHT, w)
    return fsq.conv_transpose(act, torch.zeros(q, dtype=act.format.storage), qp(act, q), folded, **settings)


REFUSALS = [
    ("channels", lambda: call(q=(2, 5, 9, 9)), ValueError,
     r"shape \(2, 5, 9, 9\) meet .* \(6, 4, 3, 3\) in groups=1; give \(batch, 4, height, width\)"),
    ("matrix", lambda: call(q=(2, 4), w=(6, 4)), ValueError, r"weight of shape \(6, 4\); .*use linear for a matrix"),
    ("groups", lambda: call(groups=4), ValueError, "groups=4 and 6 output channels; use a divisor of 6"),
    ("stride", lambda: call(stride=0), ValueError, "stride=0; give an int from 1, or 2 of them"),
    ("padding", lambda: call(padding="same"), ValueError, "padding='same'; give an int from 0, or 2 of them"),
    ("added", lambda: call(output_padding=-1), ValueError, "output_padding=-1; give an int from 0, or 2 of them"),
    ("added-more", lambda: call(stride=(2, 3), output_padding=2), ValueError,
     r"output_padding=2 with stride=\(2, 3\) and dilation=1; give less than the larger of the two"),
    ("nothing", lambda: call(padding=6), ValueError,
     r"of activations of shape \(2, 4, 9, 9\) and a kernel of \(3, 3\) padding=6 leaves nothing; "
     "give more of them, or pad less"),
    ("empty", lambda: call(q=(2, 4, 0, 9)), ValueError, r"shape \(2, 4, 0, 9\) .* leaves nothing"),
    ("dtype", lambda: call(dtype=torch.int32), TypeError, "conv to torch.int32; use one of torch.float32"),
    ("several", lambda: call(act=QuantSpec(torch.int8, fsq.PerAxis(1))), ValueError,
     r"scales of shape \(1, 4, 1, 1\), and the windows of a convolution mix them; use PerTensor\(\)"),
    ("int16", lambda: call(act=QuantSpec(torch.int16, PER_TENSOR)), ValueError, "16-bit codes have no integer product"),
    ("reference", lambda: fsq.conv_transpose_reference(
        ACT, torch.zeros(1, 3, 9, dtype=torch.int8), QParams(torch.ones(1), torch.zeros(1)), torch.zeros(2, 4, 3)),
     ValueError, r"give \(batch, 4, length\)"),
    ("weight", lambda: fsq.transpose_weight(torch.zeros(6, 4, 3), 4), ValueError,
     r"shape \(6, 4, 3\) in groups=4; .* \(in, out / groups, \*kernel\), and groups a divisor of its first axis"),
    ("polyphase-of-codes", lambda: fsq.polyphase(torch.zeros(6, 4, 3), 2), TypeError, "give the FoldedWeight"),
    ("polyphase-matrix", lambda: fsq.polyphase(folded_of(WEIGHT, (6, 4)), 2), ValueError,
     r"a weight of shape \(6, 4\) has no kernel; give \(N, C, \*kernel\)"),
    ("polyphase-stride", lambda: fsq.polyphase(folded_of(WEIGHT, (6, 4, 3)), (2, 2)), ValueError,
     r"stride=\(2, 2\); give an int from 1, or 1 of them"),
    ("polyphase-scales", lambda: fsq.polyphase(folded_of(QuantSpec(torch.int8, fsq.PerRow()), (6, 4, 3)), 2),
     ValueError, r"scales of shape \(6, 4, 1\); a product of codes needs one a row"),
    ("polyphase-zero-point", lambda: fsq.polyphase(folded_of(FORMATS["uint8-uint8"][1], (6, 4, 3), 300), 2),
     ValueError, r"zero points \[172.* are no codes, .* a kernel of \(3,\) is filled up to whole steps of \(2,\); use"),
    ("phases-groups", lambda: call(q=(2, 8, 9, 9), groups=2, kernel_size=3), ValueError,
     r"kernel_size=3 says that the weight is one of polyphase, .*, not for groups=2 and dilation=1; give the"),
    ("phases-dilation", lambda: call(dilation=2, kernel_size=3), ValueError, "groups=1 and dilation=2"),
    ("phases-kernel", lambda: call(stride=3, kernel_size=3), ValueError,
     r"shape \(6, 4, 3, 3\) is no kernel of \(3, 3\) in phases of stride=3; give what polyphase\(weight, stride\)"),
    ("phases-outputs", lambda: call(stride=2, kernel_size=6), ValueError, r"\(6, 6\) in phases of stride=2"),
    ("phases-bias", lambda: call(w=(8, 4, 3, 3), stride=2, kernel_size=6, bias=torch.zeros(8)), ValueError,
     r"bias has shape \(8,\), and the weight 2 outputs"),
    ("weight-matrix", lambda: fsq.transpose_weight(torch.zeros(6, 4)), ValueError, r"a weight of shape \(6, 4\) in"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), [pytest.param(*row[1:], id=row[0]) for row in REFUSALS])
def test_a_refusal_says_value_rule_and_remedy(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- the layers ------------------------------------------------------------------------------------

LAYERS: dict[str, Callable[..., nn.Module]] = {
    "1d": partial(nn.ConvTranspose1d, 6, 8, 4, stride=2, padding=1),
    "2d": partial(nn.ConvTranspose2d, 6, 8, 3, stride=2, padding=1, output_padding=1),
    "2d-no-bias": partial(nn.ConvTranspose2d, 6, 8, 2, stride=2, bias=False),
    "2d-uneven": partial(nn.ConvTranspose2d, 6, 4, (3, 2), stride=(2, 1), dilation=(1, 2)),
    "2d-groups": partial(nn.ConvTranspose2d, 6, 4, 3, stride=2, groups=2),
    "2d-depthwise": partial(nn.ConvTranspose2d, 6, 6, 4, stride=2, groups=6, padding=1),
    "3d": partial(nn.ConvTranspose3d, 6, 8, 2, stride=(2, 1, 2)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def images(layer: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 6, *(5, 4, 3)[: len(layer.kernel_size)], dtype=dtype)


@every_layer
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_is_close_to_the_float_layer_and_to_its_reference_path_which_has_the_bits_of_torch(
    scheme: str, name: str
) -> None:
    """Steps of half a percent of the range; sums of up to 54 products, whose errors are independent."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = LAYERS[name](dtype=dtype)
        made = quantized(SCHEMES[scheme], layer)
        assert type(made) is getattr(bridge, f"Quantized{type(layer).__name__}")
        x = images(layer, dtype=dtype)
        with torch.no_grad():
            exact = layer(x)
        y = made(x)
        made.reference = True
        slow, act, weight = made(x), made.act_spec, made.weight_spec
        assert y.dtype is slow.dtype is dtype
        assert y.shape == slow.shape == exact.shape
        assert (y.double() - exact.double()).std() < (0.06 if "float8" in scheme else 0.02) * exact.double().std()
        x_hat = fsq.dequantize(act, fsq.quantize(act, x, made.act_qparams), made.act_qparams, dtype=dtype)
        w_hat = fsq.dequantize(weight, *fsq.unfold(weight, made.folded), dtype=dtype)
        w_hat, settings = fsq.transpose_weight(w_hat, layer.groups), {name: getattr(layer, name) for name in SETTINGS}
        op = TRANSPOSED[w_hat.ndim - 3]
        with torch.no_grad():
            assert torch.equal(slow, op(x_hat, w_hat, layer.bias, **settings))
        # As tests/test_bridge.py derives it.
        u, v = 2.0**-24, 0.0 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
        bias = None if layer.bias is None else layer.bias.detach().double().abs()
        magnitude = op(x_hat.double().abs(), w_hat.double().abs(), bias, **settings)
        k = math.prod(made.weight_codes.shape[1:])
        assert ((y.double() - slow.double()).abs() <= 1.02 * ((2 * k + 11) * u + 4 * v) * magnitude + 1e-38).all()


@every_layer
def test_a_scale_for_each_output_channel_is_that_of_its_weights_in_torchs_layout(name: str) -> None:
    layer = LAYERS[name]()
    w = layer.weight.detach()
    outputs = w.shape[1]
    made = quantized(SCHEMES["int8"], layer)
    inputs = w.shape[0] // layer.groups
    for n in range(layer.out_channels):
        group, column = divmod(n, outputs)
        largest = w[group * inputs : (group + 1) * inputs, column].abs().max()
        assert torch.equal(made.weight_scale.reshape(-1)[n], largest / 127.5)
    assert made.qweight.shape == made.weight_codes.shape == (layer.out_channels, inputs, *w.shape[2:])


@every_layer
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_twin_and_a_copy_have_the_same_bits_and_an_image_is_one_of_a_batch(scheme: str, name: str) -> None:
    layer = quantized(SCHEMES[scheme], LAYERS[name]())
    x = images(layer)
    for other in (twin(layer), copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
    assert torch.equal(layer(x[1]), layer(x)[1])


def test_phases_are_those_of_the_weight_that_was_loaded_moved_or_cast_and_are_not_saved() -> None:
    layers = [quantized(SCHEMES["uint8"], LAYERS["2d"]()) for _ in range(2)]
    (first, second), x = layers, images(LAYERS["2d"]())
    for layer in layers:
        phases = fsq.polyphase(layer.folded, 2)
        assert all(map(torch.equal, layer.multiplied, phases))
    assert not [name for name in first.state_dict() if "phase" in name]
    second.load_state_dict(first.state_dict())
    assert all(map(torch.equal, first.multiplied, second.multiplied))
    assert torch.equal(first(x), second(x))
    moved = copy.deepcopy(first).to(torch.bfloat16).to("meta").to_empty(device="cpu")
    moved.load_state_dict(first.state_dict())
    assert all(map(torch.equal, first.multiplied, moved.multiplied))
    for name in ("2d-groups", "2d-uneven"):
        layer = quantized(SCHEMES["uint8"], LAYERS[name]())
        assert all(map(torch.equal, layer.multiplied, layer.folded))


@every_layer
def test_an_observed_layer_has_the_bits_and_the_parameters_of_the_float_layer_and_gives_it_back(name: str) -> None:
    layer = LAYERS[name]()
    made = observed_type(layer).from_float(layer, *(ObserverModule(spec) for spec in (ACT, WEIGHT)))
    assert {n: id(p) for n, p in made.named_parameters()} == {n: id(p) for n, p in layer.named_parameters()}
    x = images(layer)
    assert torch.equal(made(x), layer(x))
    assert made.rows == x.numel() // 6
    assert made.to_float() is layer
    assert repr(copy.deepcopy(made).to_float()) == repr(layer)
    fresh = type(made)(
        **{name: getattr(made, name) for name in made.settings},
        bias=made.bias is not None,
        act_obs=ObserverModule(ACT),
        weight_obs=ObserverModule(WEIGHT),
    )
    assert repr(fresh.to_float()) == repr(layer)


@pytest.mark.parametrize("name", ["1d", "2d", "2d-groups", "3d"])
@pytest.mark.parametrize("whole", [True, False])
def test_an_output_size_is_what_torch_makes_of_it(name: str, whole: bool) -> None:
    layer = LAYERS[name](stride=3, output_padding=0)
    made = observed_type(layer).from_float(layer, *(ObserverModule(spec) for spec in (ACT, WEIGHT)))
    x = images(layer)
    size = [n + 2 for n in layer(x).shape[2:]]
    given = [2, layer.out_channels, *size] if whole else size
    exact = layer(x, given)
    assert torch.equal(made(x, given), exact)
    assert torch.equal(made(input=x, output_size=given), exact)
    made = quantized(SCHEMES["int8"], layer)
    y = made(x, output_size=given)
    assert y.shape == exact.shape == (2, layer.out_channels, *size)
    more = copy.deepcopy(made)
    more._geometry = {**made._geometry, "output_padding": 2}
    assert torch.equal(y, more(x))
    assert torch.equal(made(x, made(x).shape), made(x))
    if name == "2d":
        with torch.no_grad():
            assert torch.equal(torch.compile(made, fullgraph=True)(x, given), y)
    made.reference = more.reference = True
    assert torch.equal(made(x, given), more(x))
    with pytest.raises(ValueError, match="valid sizes range"):
        made(x, [n + 3 for n in size])


class Resized(nn.ConvTranspose2d):
    """A subclass that reads another size out of what it is given."""

    def _output_padding(self, *args: object, **kwargs: object) -> list[int]:
        return [0, 0]


def test_the_observed_type_takes_what_computes_as_its_torch_type() -> None:
    for name in ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"):
        assert observed_type(getattr(nn, name)(6, 8, 3)) is getattr(bridge, f"Observed{name}")
    assert observed_type(Resized(6, 8, 3)) is None


def test_the_repr_says_which_is_made_by_onednn_and_how_it_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brgemm, "AVAILABLE", False)
    layer = quantized(SCHEMES["int8"], LAYERS["2d"]())
    shown = repr(layer)
    assert (
        "stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=1, padding_mode='zeros', output_padding=(1, 1)" in shown
    )
    # A window gives a position of each phase, so it moves by one.
    least = onednn_conv.windows(layer.multiplied.codes, None, (1, 1), (1, 1), 1).start
    assert (f", by oneDNN from {least} windows on" in shown) == onednn.AVAILABLE
    assert ("from 1 windows" in repr(quantized(SCHEMES["int8"], LAYERS["2d-groups"]()))) == onednn.AVAILABLE
    for other in (
        quantized(SCHEMES["int8"], LAYERS["3d"]()),
        quantized(SCHEMES["uint8"], nn.ConvTranspose2d(6, 8, 14)),
        quantized(SCHEMES["int8"], LAYERS["2d"](), reference=True),
    ):
        assert "oneDNN" not in repr(other)


def test_a_weight_of_any_granularity_by_the_reference_path_and_a_wrong_one_refused() -> None:
    rows = QuantSpec(torch.int8, fsq.PerRow())
    layer = nn.ConvTranspose2d(6, 8, 3, stride=2)
    config = dataclasses.replace(SCHEMES["int8"], weight=rows, reference=True)
    made = quantized(config, layer, reference=True)
    w = fsq.transpose_weight(layer.weight.detach())
    qp = fsq.calc_qparams(rows, fsq.observe(rows, fsq.init(rows, w.shape), w))
    w_hat = fsq.transpose_weight(fsq.fake_quantize(rows, w, qp))
    x = images(layer)
    x_hat = fsq.fake_quantize(made.act_spec, x, made.act_qparams)
    with torch.no_grad():
        assert torch.equal(made(x), F.conv_transpose2d(x_hat, w_hat, layer.bias, stride=2))
    # An axis of 6 input channels is cut by 3, in groups of 8 output channels it is not: the layout says which.
    for granularity, message in (
        (fsq.PerRow(), r"^0: PerRow\(dim=-1\) gives several scales along .*; use PerAxis\(0\)"),
        (fsq.PerAxis(1), r"^0: PerAxis\(axis=1\) gives several scales along"),
    ):
        weight = QuantSpec(torch.int8, granularity)
        with pytest.raises(ValueError, match=message):
            bridge.prepare_(nn.Sequential(layer), StaticQuantConfig(torch.int8, weight=weight))


@pytest.mark.usefixtures("packing")
def test_compiled_has_the_bits_of_eager_in_one_compilation_for_any_batch() -> None:
    two = (("int8", "2d"), ("uint8", "2d-no-bias"), ("int8", "2d-groups"))
    for rank, pairs in enumerate(((("int8", "1d"),), two, (("uint8", "3d"),)), 1):
        layers = [quantized(SCHEMES[scheme], LAYERS[name]()) for scheme, name in pairs]
        for channels_last in (False, True) if rank == 2 else (False,):
            torch.compiler.reset()
            counter = CompileCounterWithBackend("inductor")
            compiled = torch.compile(lambda x, all=layers: [f(x) for f in all], fullgraph=True, backend=counter)
            for batch in (5, 2, 3):
                x = images(layers[0], batch)
                x = last(x) if channels_last else x
                torch._dynamo.mark_dynamic(x, 0)
                with torch.no_grad():
                    for ours, layer in zip(compiled(x), layers, strict=True):
                        y = layer(x)
                        assert ours.stride() == y.stride()
                        assert torch.equal(ours, y)
            assert counter.frame_count == 1


def test_exported_has_the_bits_of_eager() -> None:
    layer = quantized(SCHEMES["int8"], LAYERS["2d"]())
    x = images(layer, 4)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"input": {0: torch.export.Dim("b", min=2, max=9)}})
    assert not [node for node in exported.graph.nodes if "functional_sq" in str(node.target)]
    for batch in (x, x[:3]):
        assert torch.equal(exported.module()(batch), layer(batch))


# --- models ----------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Down and up again, with what was seen on the way down beside; odd sizes come back by `output_size`."""

    def __init__(self, conv: type[nn.Module] = nn.Conv2d, up: type[nn.Module] = nn.ConvTranspose2d) -> None:
        super().__init__()
        self.first, self.down = conv(2, 8, 3, padding=1), conv(8, 16, 3, stride=2, padding=1)
        self.inner = conv(16, 16, 3, padding=1)
        self.up, self.last = up(16, 8, 2, stride=2), conv(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = F.relu(self.inner(F.relu(self.down(x))))
        up = self.up(y) if x.shape[-1] % 2 == 0 else self.up(y, output_size=x.shape[2:])
        return self.last(torch.cat([x, up], 1))


UNETS = {
    "2d": (UNet, (3, 2, 8, 8)),
    "2d-odd": (partial(UNet, up=partial(nn.ConvTranspose2d, padding=1)), (3, 2, 7, 7)),
    "3d": (partial(UNet, nn.Conv3d, nn.ConvTranspose3d), (2, 2, 6, 4, 6)),
    "1d": (partial(UNet, nn.Conv1d, nn.ConvTranspose1d), (3, 2, 16)),
}


@pytest.mark.parametrize("name", UNETS)
def test_a_small_unet_from_float_to_a_file_and_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, shape = UNETS[name]
    model, x = build().eval(), torch.randn(shape)
    with torch.no_grad():
        exact = model(x)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    with torch.no_grad():
        assert torch.equal(model(x), exact)
    bridge.calibrate(model, [x])
    found = bridge.report(model, [x])
    by_name = {layer.name: layer for layer in found.layers}
    assert by_name.keys() == {"first", "down", "inner", "up", "last"}
    assert by_name["inner"].hands_on == ("" if "odd" in name else "relu up")
    assert all(layer.output_sqnr > 35 for layer in found.layers)
    bridge.convert_(model)
    assert model.up.path == by_name["up"].path
    assert type(model.up) is getattr(bridge, f"QuantizedConvTranspose{len(shape) - 2}d")
    y = model(x)
    assert 10 * math.log10(exact.square().mean() / (y - exact).square().mean()) > 30
    bridge.save(model, tmp_path / "m")
    loaded, copied, again = bridge.load(tmp_path / "m", build), copy.deepcopy(model), copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    for other in (loaded, copied, again):
        assert torch.equal(other(x), y)

    def other() -> nn.Module:
        changed = build()
        changed.up.output_padding = (1,) * (len(shape) - 2)
        return changed

    with pytest.raises(ValueError, match=r"up: output_padding=\(1.*in the file \(0"):
        bridge.load(tmp_path / "m", other)


def test_reread_quantizes_the_weight_in_its_layout_and_unprepare_gives_the_layers_back() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(6, 8, 3, groups=2)).eval()
    before, x = model[0], torch.randn(2, 6, 4, 4)
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x])
    other = copy.deepcopy(model)
    bridge.reread_(model, StaticQuantConfig(torch.uint8))
    assert model[0].weight_obs.state["max"].shape == (8, 1, 1, 1)
    bridge.convert_(model)
    assert model[0].weight_codes.shape == (8, 3, 3, 3)
    assert torch.equal(quantized_anew(before, x)(x), model(x))
    assert type(bridge.unprepare_(other)[0]) is nn.ConvTranspose2d


def quantized_anew(layer: nn.Module, x: Tensor) -> nn.Module:
    model = bridge.prepare_(nn.Sequential(layer), StaticQuantConfig(torch.uint8))
    bridge.calibrate(model.eval(), [x])
    return bridge.convert_(model)


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.usefixtures("kernels_of_torch")
def test_transposed_convolutions_hand_on_and_take(by: str, rank: int, multiply_by: Callable[[str], None]) -> None:
    multiply_by(by)
    torch.manual_seed(0)
    conv, up = (nn.Conv2d, nn.ConvTranspose2d) if rank == 2 else (nn.Conv3d, nn.ConvTranspose3d)
    model = nn.Sequential(conv(4, 8, 3, padding=1), nn.ReLU(), up(8, 6, 4, 2, 1), nn.SiLU(), conv(6, 4, 1)).eval()
    x = torch.randn(2, 4, *(5, 4, 3)[:rank])
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, [x])
    bridge.convert_(model)
    assert list(map(str, bridge.chains(model, x))) == ["0 -> relu 2", "2 -> silu 4"]
    assert difference(model, x) < 0.02
    assert difference(model, last(x)) < 0.02
    if by != "torch" and rank == 2:
        torch.compiler.reset()
        with torch.inference_mode():
            _, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        name = {"brgemm": "brgemm_convolution", "oneDNN": "onednn_conv"}[by]
        assert source.count(f"functional_sq.{name}.default(") == 3


# --- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("formats", ["uint8-uint8", "int8-int8"])
@every_geometry
def test_cuda_has_the_integers_and_roundings_of_numpy(name: str, formats: str) -> None:
    case = draw(GEOMETRIES[name], *FORMATS[formats])
    y = convolved(case.to("cuda")).cpu()
    np.testing.assert_array_equal(
        array(y), epilogue(case.total(), case.scale(np.dtype(np.float32)), case.bias_array(), ARRAYS[torch.float32])
    )


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOAT8S, ids=str)
@pytest.mark.parametrize("name", ["2d", "2d-groups", "3d"])
def test_cuda_float8_is_within_the_bound_of_the_tensor_core_sum(name: str, dtype: torch.dtype) -> None:
    """An addition errs by less than 2**-13 of the largest magnitude in its sum: tests/test_linear.py says why."""
    case = draw(GEOMETRIES[name], QuantSpec(dtype, PER_TENSOR), QuantSpec(dtype, PER_CHANNEL))
    assert_float8(convolved(case.to("cuda")).cpu(), case, 2.0**-13)
