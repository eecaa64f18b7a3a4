"""Backends: the law that each obeys, wrong ones that it finds, and who asks them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import functional_sq as fsq
from functional_sq import backends, brgemm, onednn, onednn_conv, triton_conv, triton_mm
from functional_sq.operands import Operands
from functional_sq.requantize import ACTIVATIONS, apply_epilogue
from functional_sq.testing import (
    check_convolution_backend,
    check_product_backend,
    convolution_is_exact,
    product_is_exact,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import bridge
    from bridge import StaticQuantConfig

UINT8, INT8 = (
    fsq.QuantSpec(dtype, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC) for dtype in (torch.uint8, torch.int8)
)


def windows_of(x: Tensor, w: Tensor, stride: Any, padding: Any, *rest: Any) -> Tensor:
    """Convolve in two dimensions or three; a weight may have the last one alone."""
    pairs = [*zip(padding[::2], padding[1::2], strict=True)]
    x = F.pad(x, [side for pair in reversed(pairs) for side in pair])
    w = w.reshape(*w.shape[:2], *(1,) * (x.ndim - w.ndim), *w.shape[2:])
    return (F.conv2d if x.ndim == 4 else F.conv3d)(x, w, None, stride, 0, *rest)


class Int64:
    """What a user might write: sums in int64, by functions of torch."""

    NAME = "int64"
    CODES = torch.uint8

    def supports(self, codes: Tensor, zero_point: Tensor | None) -> bool:
        return codes.dtype is torch.int8 and zero_point is None

    def requantizes(self, spec: fsq.QuantSpec, scale: Tensor, activation: str) -> bool:
        return scale.numel() == 1 and scale.dtype is torch.float32 and spec.bounds in ((0, 255), (-128, 127))

    def key(self, device: str) -> tuple[object, ...]:
        return ()

    def rows(self, codes: Tensor, zero_point: Tensor | None) -> range:
        return range(2, sys.maxsize)

    def sum(self, q: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
        return ((q.double() - zero_point) @ codes.double().t()).long()  # exact below 2**53

    def then(self, y: Tensor, activation: str, to_scale: Tensor | None, to_zero_point: Tensor | None) -> Tensor:
        if to_scale is None:
            return y
        spec = UINT8 if self.CODES is torch.uint8 else INT8
        return fsq.requantize(y, fsq.Requantization(spec, fsq.QParams(to_scale, to_zero_point), activation))

    def bracket(self, of: Operands) -> Tensor:
        return self.sum(of.q, of.zero_point, of.codes)

    def product(
        self,
        operands: Operands,
        activation: str = "none",
        to_scale: Tensor | None = None,
        to_zero_point: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        y = apply_epilogue(self.bracket(operands), operands.scale, operands.bias, dtype)
        return self.then(y, activation, to_scale, to_zero_point)

    def plus(self, residual: Tensor, operands: Operands) -> Tensor:
        total = self.bracket(operands).reshape(residual.shape)
        return apply_epilogue(total, operands.scale, operands.bias, residual.dtype, residual)

    def windows(self, *_: object) -> range:
        return range(2, sys.maxsize)

    def sums(self, q: Tensor, zero_point: Tensor, codes: Tensor, *how: Any) -> Tensor:
        return windows_of(q.double() - zero_point, codes.double(), *how).long()

    def convolve(
        self,
        operands: Operands,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        activation: str = "none",
        to_scale: Tensor | None = None,
        to_zero_point: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        residual: Tensor | None = None,
    ) -> Tensor:
        q, zero_point, codes, of_weight, scale, _, bias, *_ = operands
        zero_point = torch.zeros(1, dtype=torch.int32) if zero_point is None else zero_point
        if of_weight is not None:
            codes = codes.short() - of_weight.reshape(-1, *(1,) * (codes.ndim - 1))
        total = self.sums(q, zero_point, codes, stride, padding, dilation, groups)
        along = (-1, *(1 for _ in stride))
        of_output = scale.reshape(along), None if bias is None else bias.reshape(along)
        y = apply_epilogue(total, *of_output, dtype, residual)
        if residual is not None:
            return y.relu() if activation == "relu" else y
        return self.then(y, activation, to_scale, to_zero_point)


class Signed(Int64):
    """Takes int8, an offset in place of the zero point, and asymmetric weights."""

    CODES = torch.int8

    def supports(self, codes: Tensor, zero_point: Tensor | None) -> bool:
        return codes.dtype is torch.int8

    def bracket(self, of: Operands) -> Tensor:
        total = (of.q.double() @ of.codes.double().t()).long() - of.offset
        zero_point = of.weight_zero_point
        return total if zero_point is None else total - zero_point * of.q.long().sum(1, keepdim=True)


# --- the law ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not brgemm.AVAILABLE, reason="this machine has no VNNI, or no compiler")
def test_brgemm_obeys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for windows that it is never asked for on this CPU, as it is slower there."""
    asked = brgemm.windows
    monkeypatch.setattr(brgemm, "windows", lambda *of: asked(*of) or range(1, sys.maxsize))
    check_product_backend(brgemm)
    check_convolution_backend(brgemm)


@pytest.mark.skipif(not onednn.AVAILABLE, reason="this machine has no oneDNN, or no VNNI")
def test_onednn_obeys() -> None:
    check_product_backend(onednn)
    check_convolution_backend(onednn_conv)


def test_the_kernels_of_triton_obey_where_they_are_interpreted() -> None:
    """On any machine: what each program computes, not how a GPU runs them together."""
    triton = pytest.importorskip("triton", reason="the CPU builds of torch come without Triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} takes numpy before 2.4")
    program = str(Path(__file__).with_name("interpreted.py"))
    run = subprocess.run(
        [sys.executable, program], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.stdout == "right\n", run.stderr


OF_PRODUCT = {"residual", "weight_zero_point", "row_sum", "to_scale", "to_zero_point"}
PADDED = {"zero_point", "zeros"}
INT32 = ("offset", "zero_point", "weight_zero_point", "row_sum", "to_zero_point")


def for_a_gpu(
    kernel: str, codes: str, left_out: set[str], tile: triton_mm.Tile, q: str | None = None, **constants: Any
) -> str:
    """Return the assembly of a kernel for an H100, on any machine: operands are loaded ahead, and fit twice on it."""
    pytest.importorskip("triton", reason="the CPU builds of torch come without Triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from functional_sq import triton_kernel

    function = getattr(triton_kernel, kernel)
    made = "to_scale" not in left_out
    height, width, depth, stages = tile
    constants |= {"HEIGHT": height, "WIDTH": width, "DEPTH": depth, "ACTIVATION": "gelu" if made else "none"}
    constants["ROWS"] = triton_conv._ROWS
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    constants |= dict.fromkeys(left_out & {*function.arg_names})
    types = {"scale": "*fp32", "to_scale": "*fp32", "bias": "*bf16", "residual": "*bf16"} | dict.fromkeys(INT32, "*i32")
    types |= {"from_scale": "*fp32", "q": q or codes, "codes": codes, "zeros": codes}
    types["y"] = codes if made else "*i32" if "scale" in left_out else "*bf16"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    even = [i for i, name in enumerate(signature) if signature[name][0] == "*" or name in ("n", "k")]
    options = {"num_warps": 4, "num_stages": stages, "enable_fp_fusion": True}  # Triton 3.9 warns of its default
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in even})
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    if q is None and kernel != "convolve_alone":
        # Fewer stages are held at once where operands of a few rows are read to registers.
        held = stages if height > 16 else stages - 1
        summed = "weight_zero_point" not in left_out and signature.get("row_sum") != "*i32"
        ones = 0 if not summed else 16 if constants.get("TOGETHER", 1) == 1 else width
        assert compiled.metadata.shared == (held * (height + width) + ones) * depth
    assert compiled.metadata.shared <= 98 * 1024
    assembly: str = compiled.asm["ptx"]
    return assembly


def loads_ahead(assembly: str) -> set[int]:
    """Return how many bytes a thread loads at once."""
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", assembly)
    assert len(sizes) == assembly.count("cp.async.c") - assembly.count("cp.async.commit")
    return {int(size, 16) for size in sizes}


@pytest.mark.parametrize(
    ("tile", "codes", "left_out"),
    [
        *((tile, "*i8", OF_PRODUCT) for tile in (*triton_mm._MANY, triton_mm._FEW, triton_mm._FEW_WIDE)),
        *((tile, "*fp8e4nv", {*OF_PRODUCT, "offset"}) for tile in (triton_mm._FEW_FLOAT8, triton_mm._SOME_FLOAT8)),
        (triton_mm._MANY[0], "*i8", {*OF_PRODUCT, "scale", "offset", "bias"}),
        (triton_mm._MANY[0], "*i8", {"residual", "weight_zero_point", "row_sum"}),
        (triton_mm._MANY[0], "*i8", {"weight_zero_point", "row_sum", "to_scale", "to_zero_point"}),
        (triton_mm._MANY[0], "*i8", {"residual", "to_scale", "to_zero_point"}),
    ],
    ids=lambda value: f"without {' '.join(sorted(value))}" if isinstance(value, set) else str(value),
)
def test_the_product_of_triton_compiles_for_a_gpu(tile: triton_mm.Tile, codes: str, left_out: set[str]) -> None:
    assert loads_ahead(for_a_gpu("multiply", codes, left_out, tile, WHOLE=True, IMPRECISE=tile[2])) == {16}


@pytest.mark.parametrize(
    ("tile", "channels", "codes", "left_out", "together"),
    [
        *((triton_conv._TILES[0], channels, "*i8", OF_PRODUCT, 1) for channels in (128, 64, 32)),
        *((triton_conv._TILES[-1], channels, "*i8", OF_PRODUCT, 1) for channels in (144, 48, 24)),
        *((tile, 128, "*i8", {"residual", "to_scale", "to_zero_point"}, 1) for tile in triton_conv._TILES[:3]),
        *((tile, 32, "*i8", {"to_scale", "to_zero_point"}, 8) for tile in triton_conv._TILES[1::2]),
        (triton_conv._TILES[-2], 32, "*i8", {"weight_zero_point"}, 1),
        *((triton_conv._TILES[1], channels, "*fp8e4nv", {*OF_PRODUCT, "offset"}, 1) for channels in (128, 48)),
    ],
    ids=lambda value: f"without {' '.join(sorted(value))}" if isinstance(value, set) else str(value),
)
def test_the_convolution_of_triton_compiles_for_a_gpu(
    tile: triton_mm.Tile, channels: int, codes: str, left_out: set[str], together: int
) -> None:
    tile = triton_conv._in_steps(tile, channels)
    constants = {"UNIT": math.gcd(channels, 16), "WHOLE": channels % tile[2] == 0, "TOGETHER": together}
    constants |= {"TAPS_IN_ROW": 3, "STEPS": -(-channels // tile[2]), "EACH": channels // together}
    constants |= {"ZEROS": codes != "*i8", "PIXEL": None}
    left_out = left_out | {"from_scale", *PADDED}
    assembly = for_a_gpu("convolve", codes, left_out, tile, **constants, IMPRECISE=32)
    # A thread of 64 x 32 codes and less has fewer to load.
    assert loads_ahead(assembly) <= {math.gcd(channels, 16), 8}
    assert "wgmma" in assembly


@pytest.mark.parametrize("channels", [128, 48])
@pytest.mark.parametrize("tile", triton_conv._TILES[1:3], ids=str)
def test_the_convolution_of_padded_codes_compiles_for_a_gpu(tile: triton_mm.Tile, channels: int) -> None:
    """Where there is no pixel as much is loaded at once."""
    tile = triton_conv._in_steps(tile, channels)
    constants = {"UNIT": 16, "WHOLE": channels % tile[2] == 0, "TOGETHER": 1, "TAPS_IN_ROW": 3}
    constants |= {"STEPS": -(-channels // tile[2]), "EACH": channels, "ZEROS": True, "PIXEL": None}
    assembly = for_a_gpu("convolve", "*i8", {*OF_PRODUCT, "from_scale"}, tile, **constants, IMPRECISE=32)
    assert loads_ahead(assembly) == {16}
    assert "wgmma" in assembly


@pytest.mark.parametrize("codes", ["*i8", "*fp8e4nv"])
@pytest.mark.parametrize("tile", triton_conv._OF_FLOATS, ids=str)
def test_the_convolution_of_floats_compiles_for_a_gpu(tile: triton_mm.Tile, codes: str) -> None:
    """What is quantized goes from registers to the tensor cores."""
    _, width, depth, _ = tile
    constants = {"UNIT": 16, "WHOLE": True, "TOGETHER": 1, "taps": 1, "TAPS_IN_ROW": 1, "STEPS": 4, "ZEROS": False}
    constants |= {"EACH": 4 * depth, "PIXEL": None}
    left_out = {"weight_zero_point", "residual", "zeros"} | ({"offset"} if codes != "*i8" else set())
    assembly = for_a_gpu("convolve", codes, left_out, tile, **constants, IMPRECISE=depth, q="*bf16")
    assert loads_ahead(assembly) == {16}
    assert re.search(rf"wgmma\.mma_async\S+m64n{width}k32\S+ \{{[^}}]*\}}, \{{%r", assembly)


@pytest.mark.parametrize("left_out", [OF_PRODUCT, {*OF_PRODUCT, "offset"}, {"residual"}], ids=len)
@pytest.mark.parametrize(("kernel", "pixel", "bytes_at_once"), [(7, 4, 4), (3, 4, 4), (3, 16, 16)])
def test_the_convolution_of_rows_compiles_for_a_gpu(
    kernel: int, pixel: int, bytes_at_once: int, left_out: set[str]
) -> None:
    """A thread loads a pixel at once, if that is there."""
    channels, codes = kernel * pixel, "*fp8e4nv" if "offset" in left_out else "*i8"
    tile = triton_conv._in_steps(triton_conv._TILES[1], channels)
    constants = {"UNIT": math.gcd(channels, 16), "WHOLE": channels % tile[2] == 0, "TOGETHER": 1, "EACH": pixel}
    constants |= {"TAPS_IN_ROW": 1, "STEPS": -(-channels // tile[2]), "ZEROS": True, "PIXEL": pixel}
    left_out = left_out | {"from_scale", *PADDED}
    assembly = for_a_gpu("convolve", codes, left_out, tile, **constants, IMPRECISE=32)
    assert loads_ahead(assembly) == {bytes_at_once}
    assert "wgmma" in assembly


@pytest.mark.parametrize(("codes", "dots"), [("*i8", True), ("*i8", False), ("*fp8e4nv", False)])
@pytest.mark.parametrize("taps", [9, 25])
def test_the_convolution_of_channels_alone_compiles_for_a_gpu(codes: str, dots: bool, taps: int) -> None:
    """A thread loads 16 bytes at once, and adds products of int8 by fours."""
    height, width = triton_conv._ALONE if dots else triton_conv._ALONE_FLOAT8
    tile = height, width, 0, 1
    constants = {"UNIT": 16, "TAPS": taps, "TAPS_IN_ROW": math.isqrt(taps), "DOTS": dots}
    left_out = {"weight_zero_point", "residual"} | ({"offset", "zero_point"} if codes != "*i8" else set())
    assembly = for_a_gpu("convolve_alone", codes, left_out, tile, **constants)
    assert assembly.count("ld.global.v4") >= taps
    assert assembly.count("dp4a") == (height * width // 128 * -(-taps // 4) if dots else 0)


@pytest.mark.cuda
def test_triton_obeys() -> None:
    check_product_backend(triton_mm, device="cuda", max_examples=60)


@pytest.mark.cuda
def test_triton_obeys_as_a_convolution() -> None:
    check_convolution_backend(triton_conv, device="cuda", max_examples=60)


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("channels", "groups", "outputs", "size"),
    [
        *((channels, 1, 200, size) for channels, size in ((32, 7), (64, 30), (96, 15), (128, 56), (512, 7))),
        *((channels, 1, 40, 30) for channels in (24, 48, 144)),
        *((channels, 1, 70, size) for channels, size in ((3, 15), (20, 30))),
        (4, 32, 6, 30),
        *((1, groups, 1, size) for groups, size in ((48, 30), (37, 15), (144, 14))),
        (48, 2, 40, 15),
        (16, 4, 150, 15),
    ],
)
def test_triton_convolves_exactly_with_every_tile_and_step(channels: int, groups: int, outputs: int, size: int) -> None:
    geometry = {"kernel": (3, 3), "stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 2), "groups": groups}
    layer = {"images": 3, "size": (size, size + 3), "channels": channels, "outputs": outputs, **geometry}
    settings = {"zero_point": 3, "fill": "all", "seed": 0, "bias": torch.bfloat16, "device": "cuda"}
    for asymmetric in (False, True):
        rest = {"dtype": torch.bfloat16, "activation": "relu", "asymmetric": asymmetric, "residual": not asymmetric}
        convolution_is_exact(triton_conv, **layer, **rest, **settings)


@pytest.mark.cuda
@pytest.mark.parametrize("zero_point", [3, 128])
@pytest.mark.parametrize(("channels", "groups", "kernel"), [(3, 1, 7), (1, 1, 12), (16, 1, 3), (3, 2, 5)])
def test_triton_convolves_exactly_by_rows_of_the_kernel(
    channels: int, groups: int, kernel: int, zero_point: int
) -> None:
    geometry = {"kernel": (3, kernel), "stride": (2, 2), "padding": (1, 2, 3, 1), "dilation": (1, 1), "groups": groups}
    settings = {"zero_point": zero_point, "fill": "all", "seed": 0, "bias": torch.bfloat16, "device": "cuda"}
    for outputs in (24, 70):
        layer = {"images": 3, "size": (20, 33), "channels": channels, "outputs": outputs, **geometry}
        for asymmetric in (False, True):
            rest = {"dtype": torch.bfloat16, "activation": "relu", "asymmetric": asymmetric}
            convolution_is_exact(triton_conv, **layer, **rest, **settings)


@pytest.mark.cuda
@pytest.mark.parametrize("outputs", [20, 64, 128])
@pytest.mark.parametrize("channels", [8, 64, 144, 256])
def test_triton_quantizes_what_it_convolves(channels: int, outputs: int) -> None:
    """Padded with zeros, past the end of rows and columns, and with the sums of an asymmetric weight."""
    geometry = {"kernel": (1, 1), "stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 1), "groups": 1}
    layer = {"images": 3, "size": (30, 33), "channels": channels, "outputs": outputs, **geometry}
    settings = {"zero_point": 100, "fill": "ends", "bias": torch.bfloat16, "device": "cuda", "activation": "relu"}
    for seed, real in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        for asymmetric in (False, True):
            rest = {"dtype": real, "asymmetric": asymmetric, "residual": asymmetric, "real": real, "seed": seed}
            convolution_is_exact(triton_conv, **layer, **settings, **rest)


@pytest.mark.cuda
def test_triton_makes_and_takes_float8() -> None:
    """Codes that the kernel makes of what it loads, and of its result: those of `quantize`."""
    spec = fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
    zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    one, qp, to = (fsq.QParams(torch.tensor([s], device="cuda"), zero) for s in (1.0, 0.013, 0.7))
    x = torch.randn(2, 64, 20, 20, device="cuda").contiguous(memory_format=torch.channels_last)
    x[0, 0] *= 100
    q = fsq.quantize(spec, x, qp)
    weight = fsq.fold(spec, torch.randn(48, 64, 1, 1, device="cuda").to(torch.float8_e4m3fn), one)
    given = spec, q, qp, weight, None
    known = fsq.epilogue(spec, qp, weight)
    bound = 2.0**-12 * F.conv2d(q.double().abs() * 0.013, weight.codes.double().abs())
    y = fsq.conv(*given, epilogue=known)
    assert ((fsq.conv(*given, epilogue=known, x=x) - y).abs() <= bound).all()
    residual = torch.randn_like(y)
    added = fsq.conv(*given, epilogue=known, residual=residual, relu=True)
    assert torch.equal(added, (y + residual).relu())
    codes = fsq.conv(*given, epilogue=known, then=fsq.Requantization(spec, to, "relu"))
    right = fsq.quantize(spec, y.relu(), to)
    assert torch.equal(codes.float(), right.float())


@pytest.mark.cuda
def test_triton_keeps_a_nan_of_float8_in_the_windows_that_it_is_in() -> None:
    """Not in those where it lies beyond a row of the kernel, within what a step loads."""
    q, w = torch.randn(1, 3, 5, 16), torch.randn(8, 3, 3, 3)
    q[0, 1, 2, 7] = torch.nan
    q, w = (t.to(torch.float8_e4m3fn) for t in (q, w))
    spec, zero = fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor()), torch.zeros(1, dtype=torch.int32)
    one = fsq.QParams(torch.ones(1).cuda(), zero.cuda())
    weight = fsq.fold(spec, w.cuda(), one)
    for stride in (1, 2):
        y = fsq.conv(spec, q.cuda(), one, weight, padding=1, stride=stride, epilogue=fsq.epilogue(spec, one, weight))
        right = F.conv2d(q.double(), w.double(), padding=1, stride=stride)
        assert torch.equal(y.cpu().isnan(), right.isnan())


@pytest.mark.cuda
def test_triton_convolves_in_compiled_code_whatever_the_codes_and_groups() -> None:
    """Neither windows nor floats are written; inputs lie on the grid of the codes."""
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        for channels, groups in ((32, 1), (32, 2), (32, 8), (3, 1), (20, 1)):
            model = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1, groups=groups)).eval()
            bridge.prepare_(model, StaticQuantConfig(dtype))
            x = torch.randn(2, channels, 12, 12)
            bridge.calibrate(model, x[None])
            bridge.convert_(model).cuda()
            layer = model[0]
            x = fsq.fake_quantize(layer.act_spec, x.cuda(), layer.act_qparams)
            with torch.no_grad():
                y, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
                assert source.count("convolve_") >= 2
                assert "float64" not in source
                torch.testing.assert_close(y, model(x), rtol=0, atol=2.0**-20 * float(y.abs().max()))


class Block(nn.Module):
    """As a ResNet's, with a layer of channels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(64, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.c, self.norm, self.of_a = nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.b(F.relu_(self.of_a(self.a(x)))))
        return F.relu(self.norm(self.c(y)) + x)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_triton_runs_a_block_in_three_kernels(dtype: torch.dtype) -> None:
    """Nothing but constants and copies of weights is computed beside them. Codes may differ by one, which is a step."""
    model = Block().eval()
    for norm in (model.norm, model.of_a):
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 64, 12, 12).contiguous(memory_format=torch.channels_last)
    bridge.prepare_(model, StaticQuantConfig(dtype))
    bridge.calibrate(model, x[None])
    bridge.convert_(model).cuda()
    with torch.no_grad():
        y, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x.cuda())
        eager = model(x.cuda())
    assert (y - eager).abs().max() < (0.1 if dtype.is_floating_point else 0.02) * eager.abs().max()
    calls = re.findall(r"^    +(\w+)\.run\((.*)\)$", source, re.MULTILINE)
    convolutions = [name for name, _ in calls if name.startswith("convolve")]
    assert len(convolutions) == 3
    # One is of both norms, one of the zero points that are shifted.
    assert sum(name.startswith("triton_for") for name, _ in calls) == (2 if dtype is torch.uint8 else 1)
    # The results of the others are not as large as an image.
    numbers = [
        int(number) for name, rest in calls if name not in convolutions for number in re.findall(r" (\d+),", rest)
    ]
    assert max(numbers, default=0) < 4 * 12 * 12 * 32


@pytest.mark.cuda
@pytest.mark.parametrize("k", [144, 512])
@pytest.mark.parametrize(
    ("rows", "n"), [(3, 40), (16, 17_000), (17, 40), (511, 2050), (1000, 2050), (2050, 2050)], ids=str
)
def test_triton_is_exact_with_every_tile(rows: int, n: int, k: int) -> None:
    """Past the end of rows, columns and K alike; K = 144 ends within a tile."""
    settings = {"zero_point": 3, "fill": "all", "seed": 0, "bias": torch.bfloat16, "residual": True, "device": "cuda"}
    for asymmetric in (False, True):
        sizes = {"rows": rows, "k": k, "n": n, "asymmetric": asymmetric}
        product_is_exact(triton_mm, **sizes, dtype=torch.bfloat16, activation="gelu", **settings)


@pytest.mark.cuda
def test_triton_multiplies_in_compiled_code_for_any_number_of_rows() -> None:
    """Inputs lie on the grid of the codes: Triton's division changes none. ReLU bends nothing, so all is the same."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    bridge.prepare_(model, StaticQuantConfig(torch.int8))
    bridge.calibrate(model, torch.randn(1, 100, 64))
    bridge.convert_(model).cuda()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    spec, qp = model[0].act_spec, model[0].act_qparams
    for rows in (2, 16, 17, 300, 3000):
        q = torch.randint(-120, 120, (rows, 64), dtype=torch.int8, device="cuda")
        x = fsq.dequantize(spec, q, qp)
        with torch.no_grad():
            if rows == 2:
                y, (source,) = run_and_get_code(compiled, x)
                assert source.count("multiply_") >= 2
                assert "_int_mm" not in source
            else:
                with torch.compiler.set_stance("fail_on_recompile"):
                    y = compiled(x)
            assert torch.equal(y, model(x))


@pytest.mark.parametrize("right", [Int64(), Signed()], ids=["uint8", "int8"])
def test_one_of_torch_alone_obeys(right: Int64) -> None:
    check_product_backend(right, max_examples=50)
    check_convolution_backend(right, max_examples=50)


class NoZeroPoint(Int64):
    def sum(self, q: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
        return super().sum(q, torch.zeros_like(zero_point), codes)


class FloatSum(Int64):
    """Right up to 2**24."""

    def sum(self, q: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
        return ((q.float() - zero_point) @ codes.float().t()).long()


class Int16Pairs(Int64):
    """As VNNI's forerunner: two products added in 16 bits, which saturates."""

    def sum(self, q: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
        products = F.pad(q.long().unsqueeze(1) * codes.long(), (0, q.shape[1] % 2))
        pairs = products.unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(-1) - zero_point.long() * codes.long().sum(-1)


class BiasFirst(Int64):
    def product(self, operands: Operands, *then: Any, **to: Any) -> Tensor:
        scale, bias = operands.scale, operands.bias
        rest = None if bias is None else bias / scale
        y = apply_epilogue(self.bracket(operands), torch.ones_like(scale), rest, torch.float32) * scale
        return self.then(y, *then) if then else y.to(to["dtype"])


class RoundsTwice(Int64):
    def plus(self, residual: Tensor, operands: Operands) -> Tensor:
        return self.product(operands, dtype=residual.dtype) + residual


class WritesToTheResidual(Int64):
    def plus(self, residual: Tensor, operands: Operands) -> Tensor:
        return residual.copy_(super().plus(residual, operands))


class AnotherDtype(Int64):
    def product(self, *operands: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return super().product(*operands)


class Truncates(Int64):
    def then(self, y: Tensor, activation: str, to_scale: Tensor | None, to_zero_point: Tensor | None) -> Tensor:
        if to_scale is None:
            return y
        return ((ACTIVATIONS[activation](y) / to_scale).trunc() + to_zero_point).clamp(0, 255).to(torch.uint8)


class ZeroPointOfInt8(Int64):
    def then(self, y: Tensor, activation: str, to_scale: Tensor | None, to_zero_point: Tensor | None) -> Tensor:
        return super().then(y, activation, to_scale, None if to_zero_point is None else to_zero_point.clamp(max=127))


class Changed(Int64):
    """What wrong ones do to the operands, or to a result."""

    def before(self, operands: Operands, dtype: torch.dtype) -> Operands:
        return operands

    def after(self, y: Tensor, operands: Operands) -> Tensor:
        return y

    def product(self, operands: Operands, *then: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.after(super().product(self.before(operands, dtype), *then, dtype=dtype), operands)

    def plus(self, residual: Tensor, operands: Operands) -> Tensor:
        return self.after(super().plus(residual, self.before(operands, residual.dtype)), operands)

    def convolve(self, operands: Operands, *given: Any, dtype: torch.dtype = torch.float32, **rest: Any) -> Tensor:
        return self.after(super().convolve(self.before(operands, dtype), *given, dtype=dtype, **rest), operands)


class WritesToTheCodes(Changed):
    def after(self, y: Tensor, operands: Operands) -> Tensor:
        operands.q.zero_()
        return y


class RoundsTheBias(Changed):
    def before(self, operands: Operands, dtype: torch.dtype) -> Operands:
        return operands._replace(bias=None if operands.bias is None else operands.bias.to(dtype))


class KeepsTheFirstScale(Changed):
    """Beside the packed weight, until that changes."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], Operands] = {}

    def before(self, operands: Operands, dtype: torch.dtype) -> Operands:
        key = id(operands.codes), operands.codes._version
        scale = self.kept.setdefault(key, operands._replace(scale=operands.scale.clone())).scale
        return operands._replace(scale=scale)


class OneMemoryForResults(Changed):
    def __init__(self) -> None:
        self.kept: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def after(self, y: Tensor, operands: Operands) -> Tensor:
        return self.kept.setdefault((y.dtype, y.shape), torch.empty_like(y)).copy_(y)


class Int32Sums(Int64):
    def sum(self, *given: Tensor) -> Tensor:
        return super().sum(*given).to(torch.int32)


class ResidualOfRowsAlone(Int64):
    def plus(self, residual: Tensor, operands: Operands) -> Tensor:
        return super().plus(residual.as_strided(residual.shape[-2:], (residual.shape[-1], 1)), operands)


class SupportsFloats(Int64):
    def supports(self, codes: Tensor, zero_point: Tensor | None) -> bool:
        return zero_point is None


class ReadsTheWeightWhenAsked(Int64):
    def supports(self, codes: Tensor, zero_point: Tensor | None) -> bool:
        return super().supports(codes, zero_point) and bool((codes >= -128).all())


class NoActivation(Int64):
    def then(self, y: Tensor, activation: str, *to: Any) -> Tensor:
        return super().then(y, "none", *to)


class ReadsWithoutStrides(Int64):
    def product(self, operands: Operands, *then: Any, **to: Any) -> Tensor:
        bias = operands.bias
        if bias is not None:
            operands = operands._replace(bias=bias.as_strided(bias.shape, (1,)))
        return super().product(operands, *then, **to)


class KeepsTheFirstWeight(Int64):
    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def once(self, codes: Tensor) -> Tensor:
        if id(codes) not in self.kept:
            self.kept[id(codes)] = codes, codes.clone()
        return self.kept[id(codes)][1]

    def sum(self, q: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
        return super().sum(q, zero_point, self.once(codes))

    def sums(self, q: Tensor, zero_point: Tensor, codes: Tensor, *rest: Any) -> Tensor:
        return super().sums(q, zero_point, self.once(codes), *rest)


class FewRows(Int64):
    def sum(self, q: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
        total = super().sum(q, zero_point, codes)
        total[64:] = 0
        return total


class ManyRows(Int64):
    def sum(self, q: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
        total = super().sum(q, zero_point, codes)
        total[512:] = 0
        return total


class BiasInBfloat16(Int64):
    """Where it is in the other 16 bits."""

    def product(self, operands: Operands, *then: Any, **to: Any) -> Tensor:
        bias = operands.bias
        if bias is not None and bias.dtype is torch.float16:
            operands = operands._replace(bias=bias.view(torch.bfloat16))
        return super().product(operands, *then, **to)


class ZeroIsNotAtTheEnd(Int64):
    def then(self, y: Tensor, activation: str, to_scale: Tensor | None, to_zero_point: Tensor | None) -> Tensor:
        inner = None if to_zero_point is None else to_zero_point.clamp(1, 254)
        return super().then(y, activation, to_scale, inner)


class AnyScale(Int64):
    def requantizes(self, spec: fsq.QuantSpec, scale: Tensor, activation: str) -> bool:
        return super().requantizes(spec, scale.float(), activation)


class DenseZeroPoints(Signed):
    def bracket(self, of: Operands) -> Tensor:
        dense = of.weight_zero_point
        if dense is not None and dense.stride() == (0,):
            dense = torch.cat([dense[:1], dense.new_zeros(len(dense) - 1)])
        return super().bracket(of._replace(weight_zero_point=dense))


class ResidualWithABatch(Int64):
    def plus(self, residual: Tensor, operands: Operands) -> Tensor:
        assert residual.ndim == 3
        return super().plus(residual, operands)


class ResidualWithChannelsLast(Int64):
    def convolve(self, operands: Operands, *given: Any, residual: Tensor | None = None, **to: Any) -> Tensor:
        if residual is not None:
            batch, channels, *size = residual.shape
            dense = residual if residual.is_contiguous() else residual.movedim(1, -1).contiguous()
            residual = dense.reshape(batch, *size, channels).movedim(-1, 1)
        return super().convolve(operands, *given, residual=residual, **to)


class OneForAnother(Int64):
    """The two differ by less than 0.21."""

    def then(self, y: Tensor, activation: str, *to: Any) -> Tensor:
        return super().then(y, "silu" if activation == "gelu" else activation, *to)


class ReadsTheOffset(Int64):
    """Which is that of int8 codes, whatever the backend takes."""

    def bracket(self, of: Operands) -> Tensor:
        return (of.q.double() @ of.codes.double().t()).long() - of.offset

    def convolve(self, operands: Operands, *given: Any, **to: Any) -> Tensor:
        total = operands.codes.long().flatten(1).sum(1)
        bias = -operands.offset * operands.scale + (0 if operands.bias is None else operands.bias)
        bias = bias + operands.zero_point * total * operands.scale
        return super().convolve(operands._replace(bias=bias), *given, **to)


class CountsRows(Int64):
    def rows(self, codes: Tensor, zero_point: Tensor | None) -> int:
        return 2


class NoOffset(Signed):
    def bracket(self, of: Operands) -> Tensor:
        return super().bracket(of._replace(offset=torch.zeros_like(of.offset)))


class SymmetricAlone(Signed):
    def bracket(self, of: Operands) -> Tensor:
        return super().bracket(of._replace(weight_zero_point=None))


class SymmetricWindows(Signed):
    def convolve(self, operands: Operands, *given: Any, **to: Any) -> Tensor:
        return super().convolve(operands._replace(weight_zero_point=None), *given, **to)


class OneZeroPointForAll(Signed):
    def convolve(self, operands: Operands, *given: Any, **to: Any) -> Tensor:
        if operands.weight_zero_point is not None:
            first = operands.weight_zero_point[:1].expand_as(operands.weight_zero_point)
            operands = operands._replace(weight_zero_point=first)
        return super().convolve(operands, *given, **to)


class CodesOfAnotherDtype(Int64):
    def then(self, y: Tensor, *then: Any) -> Tensor:
        codes = super().then(y, *then)
        return codes if then[1] is None else (codes ^ 128).view(torch.int8)


class MakesCodesOfAnyBits(Int64):
    def requantizes(self, spec: fsq.QuantSpec, scale: Tensor, activation: str) -> bool:
        return True


class ReadsChannelsFirst(Int64):
    def sums(self, q: Tensor, *rest: Any) -> Tensor:
        channels, height, width = q.shape[1:]
        first = q.as_strided(q.shape, (channels * height * width, height * width, width, 1))
        return super().sums(first, *rest)


class FewGroups(Int64):
    def sums(self, *given: Any) -> Tensor:
        total = super().sums(*given)
        each = total.shape[1] // given[-1]
        total[:, 8 * each :] = 0
        return total


class Narrow(Int64):
    def sums(self, *given: Any) -> Tensor:
        total = super().sums(*given)
        total[..., 24:] = 0
        return total


class PadsWithCodesOfZero(Int64):
    def sums(self, q: Tensor, zero_point: Tensor, codes: Tensor, stride: Any, padding: Any, *rest: Any) -> Tensor:
        top, bottom, left, right = padding
        around = F.pad(q, (left, right, top, bottom))
        return super().sums(around, zero_point, codes, stride, (0, 0, 0, 0), *rest)


class PadsAlike(Int64):
    def sums(self, q: Tensor, zero_point: Tensor, codes: Tensor, stride: Any, padding: Any, *rest: Any) -> Tensor:
        top, bottom, left, right = padding
        around = (top + bottom) // 2, (top + bottom + 1) // 2, (left + right) // 2, (left + right + 1) // 2
        return super().sums(q, zero_point, codes, stride, around, *rest)


class NoDilation(Int64):
    def sums(self, *given: Any) -> Tensor:
        return super().sums(*given[:-2], (1, 1), given[-1])


class FloatSums(Int64):
    """Right up to 2**24."""

    def sums(self, q: Tensor, zero_point: Tensor, codes: Tensor, *how: Any) -> Tensor:
        return windows_of(q.float() - zero_point, codes.float(), *how).long()


class OneScaleAGroup(Int64):
    def convolve(self, operands: Operands, *given: Any, **to: Any) -> Tensor:
        scale, groups = operands.scale, given[3]
        first = scale.reshape(groups, -1)[:, :1].expand(-1, len(scale) // groups).reshape(-1)
        return super().convolve(operands._replace(scale=first), *given, **to)


class NoResidual(Int64):
    def convolve(self, *given: Any, residual: Tensor | None = None, **to: Any) -> Tensor:
        return super().convolve(*given, residual=None if residual is None else torch.zeros_like(residual), **to)


class RoundsBeforeTheResidual(Int64):
    def convolve(self, *given: Any, residual: Tensor | None = None, **to: Any) -> Tensor:
        if residual is None:
            return super().convolve(*given, **to)
        y = super().convolve(*given[:5], **to) + residual
        return y.relu() if "relu" in given else y


class ReluBeforeTheResidual(Int64):
    def convolve(self, *given: Any, residual: Tensor | None = None, **to: Any) -> Tensor:
        y = super().convolve(*given, residual=residual, **to)
        return super().convolve(*given[:5], **to).relu() + residual if residual is not None and "relu" in given else y


class ReadsFloats(Int64):
    """Codes anew, rounded by `round`, limited or not."""

    limits: tuple[int, int] = (0, 255)

    def round(self, steps: Tensor) -> Tensor:
        return steps.round()

    def read(self, operands: Operands) -> Operands:
        if operands.x is None:
            return operands
        codes = self.round(operands.x.float() / operands.x_scale) + operands.zero_point
        codes = codes.clamp(*self.limits).to(torch.int32).to(torch.uint8)
        return operands._replace(q=torch.empty_like(operands.q).copy_(codes))

    def bracket(self, of: Operands) -> Tensor:
        return super().bracket(self.read(of))

    def convolve(self, operands: Operands, *given: Any, **to: Any) -> Tensor:
        return super().convolve(self.read(operands), *given, **to)


class TruncatesFloats(ReadsFloats):
    def round(self, steps: Tensor) -> Tensor:
        return steps.trunc()


class WrapsFloats(ReadsFloats):
    limits = (-1000, 1000)


@pytest.mark.usefixtures("as_found")
def test_a_backend_may_read_floats() -> None:
    check_convolution_backend(ReadsFloats(), max_examples=60)
    check_product_backend(ReadsFloats(), max_examples=60)


@pytest.mark.usefixtures("as_found")
@pytest.mark.parametrize(
    ("check", "law", "wrong"),
    [
        *(
            (check_product_backend, product_is_exact, wrong)
            for wrong in (
                NoZeroPoint,
                FloatSum,
                Int16Pairs,
                BiasFirst,
                RoundsTwice,
                WritesToTheResidual,
                AnotherDtype,
                Truncates,
                ZeroPointOfInt8,
                WritesToTheCodes,
                RoundsTheBias,
                KeepsTheFirstScale,
                OneMemoryForResults,
                SupportsFloats,
                ReadsTheWeightWhenAsked,
                NoActivation,
                ReadsWithoutStrides,
                KeepsTheFirstWeight,
                FewRows,
                ManyRows,
                BiasInBfloat16,
                ZeroIsNotAtTheEnd,
                AnyScale,
                DenseZeroPoints,
                ResidualWithABatch,
                OneForAnother,
                NoOffset,
                SymmetricAlone,
                ReadsTheOffset,
                CountsRows,
                CodesOfAnotherDtype,
                MakesCodesOfAnyBits,
                Int32Sums,
                ResidualOfRowsAlone,
                TruncatesFloats,
                WrapsFloats,
            )
        ),
        *(
            (check_convolution_backend, convolution_is_exact, wrong)
            for wrong in (
                PadsWithCodesOfZero,
                PadsAlike,
                NoDilation,
                ReadsTheOffset,
                FloatSums,
                OneScaleAGroup,
                Truncates,
                KeepsTheFirstScale,
                NoActivation,
                KeepsTheFirstWeight,
                ReadsChannelsFirst,
                FewGroups,
                Narrow,
                SymmetricWindows,
                OneZeroPointForAll,
                NoResidual,
                ResidualWithChannelsLast,
                RoundsBeforeTheResidual,
                ReluBeforeTheResidual,
                TruncatesFloats,
                WrapsFloats,
            )
        ),
    ],
)
def test_a_wrong_backend_is_found_with_the_call_that_shows_it(
    check: Callable[..., None], law: Callable[..., None], wrong: type[Int64]
) -> None:
    with pytest.raises(AssertionError, match=rf"^{law.__name__}\(") as e:
        check(wrong())
    text = str(e.value)
    call = text[: text.index("\n)\n") + 2].replace(f"backend={next(iter(text.split('backend=')[1].splitlines()))}", "")
    arguments = eval(f"dict{call.removeprefix(law.__name__)}", {"torch": torch})
    with pytest.raises(AssertionError):
        law(wrong(), **arguments)
    law(Signed() if issubclass(wrong, Signed) else Int64(), **arguments)


@pytest.mark.parametrize(
    ("check", "wrong", "smallest"),
    [
        (check_product_backend, Truncates, {"rows": 1, "k": 1, "n": 1, "zero_point": 0, "residual": False}),
        (check_product_backend, FewRows, {"rows": 65, "n": 1, "bias": None}),
        (check_convolution_backend, FewGroups, {"images": 1, "channels": 1, "outputs": 1, "groups": 9, "kernel": (1,)}),
    ],
)
def test_the_call_that_is_shown_is_the_smallest(
    check: Callable[..., None], wrong: type[Int64], smallest: dict[str, object]
) -> None:
    with pytest.raises(AssertionError) as e:
        check(wrong())
    for name, value in smallest.items():
        assert f"\n    {name}={value},\n" in str(e.value)


def test_a_backend_that_is_never_asked_is_not_passed() -> None:
    class Nothing(Int64):
        def supports(self, codes: Tensor, zero_point: Tensor | None) -> bool:
            return False

    class NoWindows(Int64):
        def windows(self, *of: Any) -> range:
            return range(0)

    never = {check_product_backend: [Nothing], check_convolution_backend: [Nothing, NoWindows]}
    for check, backend in ((check, each) for check, wrong in never.items() for each in wrong):
        with pytest.raises(AssertionError, match="is asked for none of the weights that were drawn"):
            check(backend())


def test_what_is_no_backend_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(TypeError, match="has no CODES, NAME, key, plus, product, requantizes, rows, supports; give an"):
        check_product_backend(object())
    with pytest.raises(TypeError, match="has no CODES, NAME, convolve, key, requantizes, supports, windows; give"):
        check_convolution_backend(object())
    for key in (None, lambda device: [1]):
        backend = Int64()
        backend.key = key
        for check in (check_product_backend, check_convolution_backend):
            with pytest.raises(TypeError, match="key is no function that returns a tuple; give what its answers"):
                check(backend)


# --- who asks --------------------------------------------------------------------------------------


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Int64:
    made = Int64()
    monkeypatch.setattr(backends, "PRODUCTS", [made, *backends.PRODUCTS])
    monkeypatch.setattr(backends, "CONVOLUTIONS", [made, *backends.CONVOLUTIONS])
    return made


def calibrated(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.int8) -> nn.Module:
    bridge.prepare_(model.eval(), StaticQuantConfig(dtype))
    bridge.calibrate(model, [x])
    return bridge.convert_(model)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), (5, 16), "rows"),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 4, 3)),
        (2, 4, 9),
        "windows",
    ),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1)),
        (2, 4, 7, 6),
        "windows",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_first_backend_that_supports_a_layer_computes_it(
    name: str, ours: Int64, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape, unit = MODELS[name]
    x = torch.randn(shape)
    model = calibrated(make(), x)
    with torch.inference_mode():
        y = model(x)
        compiled = torch.compile(model, fullgraph=True)(x)
    assert f"by int64 from 2 {unit} on" in repr(model[0])
    monkeypatch.setattr(backends, "PRODUCTS", [])
    monkeypatch.setattr(backends, "CONVOLUTIONS", [])
    with torch.inference_mode():
        assert torch.equal(model(x), y)
    # A code of the chain may differ by one.
    assert (compiled - y).abs().max() <= 0.02 * y.abs().max()
    assert repr(model[0]).count(" from ") == 0


def test_it_convolves_each_channel_alone_where_ours_would_be_a_loop(ours: Int64) -> None:
    x = torch.randn(2, 6, 8, 7)
    model = calibrated(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6)), x)
    assert "by int64 from 2 windows on" in repr(model[0])
    assert "one loop" not in repr(model[0])
    with torch.inference_mode():
        y, (source,) = run_and_get_code(torch.compile(model, fullgraph=True), x)
        assert torch.equal(y, model(x))
    assert "int64_t" in source


def test_it_is_asked_for_layers_that_it_supports_and_rows_that_it_wants(ours: Int64) -> None:
    codes = torch.zeros(3, 8, dtype=torch.int8)
    assert backends.product_for(2, codes, None) is ours
    assert backends.product_for(1, codes, None) is not ours
    assert backends.product_for(2, codes, torch.ones(3, dtype=torch.int32)) is not ours
    assert backends.convolution_for(2, codes[..., None], None, (1,), (1,), 1) is ours


def test_one_that_is_never_the_faster_one_is_not_asked_for_a_number_that_is_not_known(
    ours: Int64, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "windows", lambda *_: range(0))
    monkeypatch.setattr(ours, "convolve", None)
    x = torch.randn(2, 4, 7, 6)
    model = calibrated(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2)), x)
    with torch.inference_mode():
        y = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        assert torch.equal(compiled(x), y)


def test_compiled_code_is_its_own(ours: Int64, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 16)
    model = calibrated(nn.Sequential(nn.Linear(16, 8)), x)
    with_it = backends.fingerprint("cpu")
    with torch.inference_mode():
        _, (source,) = run_and_get_code(torch.compile(model), x)
    assert "int64_t" in source
    assert "_int_mm" not in source
    assert "onednn" not in source
    assert "brgemm" not in source
    monkeypatch.setattr(backends, "PRODUCTS", backends.PRODUCTS[1:])
    assert backends.fingerprint("cpu") != with_it


def test_activations_are_those_that_a_backend_is_asked_for() -> None:
    assert sorted(ACTIVATIONS) == ["gelu", "gelu_tanh", "hardswish", "none", "relu", "relu6", "silu", "tanh"]
    for name in ACTIVATIONS:
        assert onednn.requantizes(UINT8, torch.ones(1), name)
