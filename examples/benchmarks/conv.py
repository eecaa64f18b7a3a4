"""Time a quantized convolution beside oneDNN's bare int8 one and float layers, in one process.

    python examples/benchmarks/conv.py

Each row is one layer of ResNet-50, MobileNetV2 or Wav2Vec2 and a batch, images `channels_last`. The floor is a
compiled pass that makes codes of the input, and oneDNN's int8 convolution alone, of codes that are there already
and a weight that is packed already. The column uint8 has asymmetric weights: tiles of `functional_sq.brgemm`, with
groups two convolutions by oneDNN; a depthwise one is a loop, and no call of oneDNN.
Then transposed ones and some in three dimensions, as multiples of float32, and blocks of two networks, batch norms in
them, as multiples of their bare convolutions; `apart` hands no codes on.
All columns of a row are timed in turn; a cell is the median and its ratio to the floor. Below the table oneDNN
names the kernels of one call, for a layer without groups and a depthwise one. `OMP_NUM_THREADS=1` makes it
quieter on a machine that is shared. `--quick` takes small layers and little time.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from linear import Calls, calibrated, cpu, keep_memory, quantized, show_kernels, table
from torch import nn

import bridge
import functional_sq as fsq

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Layer(NamedTuple):
    """A convolution as its model calls it; behind a ReLU its input has no negative values."""

    name: str
    batch: int
    size: tuple[int, ...]
    conv: nn.Module
    relu: bool = True

    def input(self) -> torch.Tensor:
        x = torch.randn(self.batch, self.conv.in_channels, *self.size)
        x = x.relu() if self.relu else x
        return x.contiguous(memory_format=LAST[x.ndim]) if x.ndim in LAST else x


def layers(batches: Sequence[int], *, small: bool) -> list[Layer]:
    def depthwise(channels: int, stride: int = 1) -> nn.Conv2d:
        return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels)

    kinds = [
        (56, nn.Conv2d(64, 64, 3, 1, 1), True),
        (14, depthwise(384), True),
        (49, nn.Conv1d(512, 512, 3, 2), True),
    ]
    if not small:
        kinds += [
            (224, nn.Conv2d(3, 64, 7, 2, 3), False),
            (56, nn.Conv2d(64, 256, 1), True),
            (56, nn.Conv2d(256, 64, 1), True),
            (56, nn.Conv2d(128, 128, 3, 2, 1), True),
            (14, nn.Conv2d(256, 256, 3, 1, 1), True),
            (7, nn.Conv2d(512, 512, 3, 1, 1), True),
            (224, nn.Conv2d(3, 32, 3, 2, 1), False),
            (112, depthwise(32), True),
            (112, depthwise(96, 2), True),
            (56, depthwise(144), True),
            (7, depthwise(960), True),
            (14, nn.Conv2d(576, 96, 1), True),
            (799, nn.Conv1d(512, 512, 3, 2), True),
            (49, nn.Conv1d(768, 768, 128, padding=64, groups=16), True),
        ]
    made = []
    for batch in batches:
        for size, conv, relu in kinds:
            made.append(layer_of(batch, size, conv, relu))
    return made


def layer_of(batch: int, size: int, conv: nn.Module, relu: bool = True) -> Layer:
    kernel, groups = "x".join(map(str, conv.kernel_size)), f" /{conv.groups}" if conv.groups > 1 else ""
    name = f"{batch} {conv.in_channels}>{conv.out_channels}{groups} {kernel} s{conv.stride[0]} at {size}"
    return Layer(name, batch, (size,) * len(conv.kernel_size), conv.eval(), relu)


def bare(layer: nn.Module, codes: torch.Tensor) -> partial[torch.Tensor]:
    """Return oneDNN's convolution of codes, a weight packed for their shape and zero point."""
    q = (codes ^ -128).view(torch.uint8)
    z, n = int(layer.act_zero_point) + 128, layer.out_channels
    settings = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
    packed = torch.ops.onednn.qconv_prepack(layer.weight_codes, torch.ones(n), 1.0, z, *settings, list(q.shape))
    zeros = torch.zeros(n, dtype=torch.int32)
    operands = (q, 1.0, z, packed, layer.product_scale, zeros, layer.bias, *settings)
    return partial(torch.ops.onednn.qconv_pointwise.default, *operands, 1.0, 0, torch.float32, "none", [], "")


def columns(layer: Layer) -> Calls:
    x = layer.input()
    calls = compared(layer.conv, x)
    ours = calls["int8, eager"].func
    quantize = torch.compile(partial(fsq.quantize, ours.act_spec))
    codes = quantize(x, ours.act_qparams)
    return {"quantize": partial(quantize, x, ours.act_qparams), "convolution": bare(ours, codes), **calls}


def compared(conv: nn.Module, x: torch.Tensor) -> Calls:
    torch.compiler.reset()
    ours, asymmetric = quantized(conv, x, torch.int8), quantized(conv, x, torch.uint8)
    last = {"memory_format": LAST[x.ndim]} if x.ndim in LAST else {}
    conv = copy.deepcopy(conv).to(**last) if last else conv
    bf16 = copy.deepcopy(conv).bfloat16()
    return {
        "int8, eager": partial(ours, x),
        "int8": partial(torch.compile(ours), x),
        "uint8": partial(torch.compile(asymmetric), x),
        "float32": partial(torch.compile(conv), x),
        "bfloat16": partial(torch.compile(bf16), x.bfloat16()),
    }


def others(batches: Sequence[int], *, small: bool) -> Iterator[tuple[str, Calls]]:
    """Transposed: a generator's, a decoder's, a segmentation's and a vocoder's; then those of volumes."""
    kinds: list[tuple[int, nn.Module]] = [(16, nn.ConvTranspose2d(256, 128, 4, 2, 1)), (8, nn.Conv3d(64, 64, 3, 1, 1))]
    if not small:
        kinds = [
            kinds[0],
            (28, nn.ConvTranspose2d(128, 64, 2, 2)),
            (28, nn.ConvTranspose2d(64, 64, 3, 2, 1, 1)),
            (100, nn.ConvTranspose1d(512, 256, 16, 8, 4)),
            (16, nn.Conv3d(64, 64, 3, 1, 1)),
            (32, nn.Conv3d(1, 16, 3, 1, 1)),
            (16, nn.ConvTranspose3d(64, 32, 2, 2)),
        ]
    for batch in batches:
        for size, conv in kinds:
            layer = layer_of(batch, size, conv)
            yield layer.name, compared(conv, layer.input())


def blocks(batches: Sequence[int], *, small: bool) -> Iterator[tuple[str, nn.Sequential, torch.Tensor]]:
    """MobileNetV2's, which widens, and ResNet-50's, which narrows; both without the residual around them."""

    def layer(conv: nn.Conv2d, *behind: nn.Module) -> tuple[nn.Module, ...]:
        norm = nn.BatchNorm2d(conv.out_channels)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        return conv, norm, *behind

    for batch in batches:
        for name, outer, inner, groups, act in [
            ("inverted residual 24, 144", 24, 144, 144, nn.ReLU6),
            *([] if small else [("bottleneck 256, 64", 256, 64, 1, nn.ReLU)]),
        ]:
            block = nn.Sequential(
                *layer(nn.Conv2d(outer, inner, 1, bias=False), act()),
                *layer(nn.Conv2d(inner, inner, 3, padding=1, groups=groups, bias=False), act()),
                *layer(nn.Conv2d(inner, outer, 1, bias=False)),
            )
            x = torch.randn(batch, outer, 56, 56).relu().contiguous(memory_format=torch.channels_last)
            yield f"{batch} {name} at 56", block.eval().to(memory_format=torch.channels_last), x


def block_columns(block: nn.Sequential, x: torch.Tensor) -> Calls:
    torch.compiler.reset()
    ours, asymmetric = (calibrated(copy.deepcopy(block), x, dtype) for dtype in (torch.int8, torch.uint8))
    apart, floor, y = copy.deepcopy(ours), [], x
    for layer, alone in zip(ours, apart, strict=True):
        if isinstance(layer, bridge.QuantizedConv2d):
            floor.append(bare(layer, fsq.quantize(layer.act_spec, y, layer.act_qparams)))
            alone.hand_on = False
        y = layer(y)
    bf16 = copy.deepcopy(block).bfloat16()
    return {
        "convolutions": lambda: [convolve() for convolve in floor],
        "int8": partial(torch.compile(ours), x),
        "int8, apart": partial(torch.compile(apart), x),
        "uint8": partial(torch.compile(asymmetric), x),
        "float32": partial(torch.compile(block), x),
        "bfloat16": partial(torch.compile(bf16), x.bfloat16()),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small layers, little time")
    args = parser.parse_args()
    keep_memory()
    torch._dynamo.config.recompile_limit = 64  # what is shown at the end is compiled again, all of it as one function
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    rows, seconds = (layers([1], small=True), 0.1) if args.quick else (layers([1, 8], small=False), 4.0)
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("compiled where not said; medians in ms, and as multiples of quantize + convolution\n")
    modules: list[nn.Module] = []
    shown: dict[str, Calls] = {}  # one without groups, one with

    def calls() -> Iterator[tuple[str, Calls]]:
        for layer in rows:
            calls = columns(layer)
            if len(shown) < 2:
                shown[layer.name] = {name: call for name, call in calls.items() if name != "quantize"}
                modules.append(calls["int8, eager"].func)
            yield layer.name, calls

    table(calls(), ("quantize", "convolution"), seconds)
    print("\ntransposed and in three dimensions, as multiples of float32\n")
    table(others([1] if args.quick else [1, 8], small=args.quick), ("float32",), seconds)
    print("\nblocks, as multiples of their convolutions; `apart` hands no codes on\n")
    made = blocks([1] if args.quick else [1, 8], small=args.quick)
    table(((name, block_columns(block, x)) for name, block, x in made), ("convolutions",), seconds)
    print("", *modules, sep="\n", flush=True)
    for layer_name, named in shown.items():
        for name, call in named.items():
            print(f"\n{name}, {layer_name}:")
            show_kernels(call)


if __name__ == "__main__":
    main()
