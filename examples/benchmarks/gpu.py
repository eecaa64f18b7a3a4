"""Time quantized layers on a CUDA GPU beside the bare products and bfloat16, in one process.

    python examples/benchmarks/gpu.py

Each row is one shape of a bfloat16 model: rows x K x N of a square one and of transformers with 7 and 70 billion
weights; images, channels, size, outputs and kernel of a ResNet's convolutions, and groups of a ResNeXt's and a
MobileNet's; and networks of timm, if that is installed. `product` is `torch._int_mm`, `float8 product`
`torch._scaled_mm` to bfloat16, of codes that are there already; `int8`, `uint8`, `float8` and `float8 fast` are a
compiled layer, the quantization of its input included; torchao's columns are those of `linear.py`. Calls are recorded
in CUDA graphs, over as many weights, or images, as do not fit into the cache, and replayed in turn: no column waits for
Python. A model of several layers is run as `torch.compile` alone runs it too. A cell is the median, and how many times
as fast as bfloat16 it is. Below are the kernels that ran. `--quick` takes small shapes. Without a GPU there is nothing
to time.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from linear import HAS_AFFINE, HAS_STATIC, STATIC_SETTINGS, calibrated, normal, torchao, torchao_linear, torchao_static
from torch import Tensor, nn

import functional_sq as fsq

Calls = dict[str, list[Callable[[], object]]]

DTYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "float8": torch.float8_e4m3fn,
    "float8 fast": torch.float8_e4m3fn,
}


def on_gpu(k: int, n: int) -> nn.Linear:
    with torch.device("cuda"):
        return normal(k, n).to(torch.bfloat16)


def layers(linears: Sequence[nn.Linear], x: Tensor, name: str) -> list[Any]:
    made = [calibrated(nn.Sequential(copy.deepcopy(linear)).eval(), x[:64], DTYPES[name])[0] for linear in linears]
    for layer in made:
        layer.fast_accum = name == "float8 fast"
    return made


def compiled(made: Sequence[nn.Module], x: Tensor) -> list[Callable[[], object]]:
    """Return a call of each; they are one layer with several weights, so they are compiled once."""
    forward = torch.compile(type(made[0]).forward, dynamic=False)
    return [partial(forward, layer, x) for layer in made]


def beyond_the_cache(size: int) -> range:
    """Return a range of as many copies, of so many bytes each, as do not fit into the cache."""
    return range(min(16, -(-(2**28) // size)))


def columns(rows: int, k: int, n: int) -> Calls:
    torch.compiler.reset()
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    linears = [on_gpu(k, n) for _ in beyond_the_cache(k * n)]
    ours = {name: layers(linears, x, name) for name in DTYPES}
    q, q8 = (fsq.quantize(ours[name][0].act_spec, x, ours[name][0].act_qparams) for name in ("int8", "float8"))
    q = torch.cat([q, q.new_zeros(max(rows, 17) - rows, k)])  # what torch._int_mm takes
    one = torch.ones((), device="cuda")
    float8 = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    calls: Calls = {
        "bfloat16": compiled(linears, x),
        "product": [partial(torch._int_mm, q, layer.weight_codes.t()) for layer in ours["int8"]],
        "float8 product": [partial(float8, q8, layer.weight_codes.t()) for layer in ours["float8"]],
        **{name: compiled(made, x) for name, made in ours.items()},
    }
    if HAS_AFFINE:
        torchao_layers = [torchao_linear(*pair) for pair in zip(ours["int8"], linears, strict=True)]
        calls["torchao affine"] = [partial(torch.compile(each, dynamic=False), x) for each in torchao_layers[:1]]
    if HAS_STATIC:
        static = [torchao_static(*pair, x.ndim) for pair in zip(ours["int8"], linears, strict=True)]
        # Not frozen: each weight would be a constant of code of its own.
        settings = torch._inductor.config.patch(STATIC_SETTINGS | {"freezing": False})
        calls["torchao static"] = [settings(call) for call in compiled(static, x)]
    return calls


def chain(rows: int, k: int, n: int) -> Calls:
    """Return linear, GELU, linear."""
    torch.compiler.reset()
    x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
    models = [nn.Sequential(on_gpu(k, n), nn.GELU(), on_gpu(n, k)).eval() for _ in beyond_the_cache(2 * k * n)]
    calls: Calls = {"bfloat16": [partial(torch.compile(model, dynamic=False), x) for model in models]}
    for name, dtype in DTYPES.items():
        calls[name] = []
        for model in models:
            quantized = calibrated(copy.deepcopy(model), x[:64], dtype)
            for layer in (quantized[0], quantized[2]):
                layer.fast_accum = name == "float8 fast"
            calls[name].append(partial(torch.compile(quantized, dynamic=False), x))
    return calls


def of_images(model: nn.Module, *shape: int) -> Calls:
    """Return calls of a model of convolutions, and of it quantized, with all channels last."""
    torch.compiler.reset()
    last = {"dtype": torch.bfloat16, "device": "cuda", "memory_format": torch.channels_last}
    xs = [torch.randn(shape).to(**last) for _ in beyond_the_cache(2 * math.prod(shape))]
    model = nn.Sequential(model).eval().to(**last)
    models = {"bfloat16": model}
    for name in ("int8", "uint8", "float8"):
        models[name] = calibrated(copy.deepcopy(model), xs[0], DTYPES[name]).to(**last)
    runs = {name: torch.compile(each, dynamic=False) for name, each in models.items()}
    return {name: [partial(run, x) for x in xs] for name, run in runs.items()}


def convolution(images: int, channels: int, size: int, outputs: int, kernel: int, groups: int = 1) -> Calls:
    conv = nn.Conv2d(channels, outputs, kernel, padding=kernel // 2, groups=groups)
    return of_images(conv, images, channels, size, size)


class Bottleneck(nn.Sequential):
    """A ResNet's block: three convolutions with batch norms and ReLUs, beside which its input is added."""

    def __init__(self, channels: int) -> None:
        widths = ((4 * channels, channels, 1), (channels, channels, 3), (channels, 4 * channels, 1))
        parts = [(nn.Conv2d(c, n, k, padding=k // 2, bias=False), nn.BatchNorm2d(n), nn.ReLU()) for c, n, k in widths]
        super().__init__(*itertools.chain(*parts))

    def forward(self, x: Tensor) -> Tensor:
        *body, relu = self
        y = x
        for layer in body:
            y = layer(y)
        return relu(y + x)


def bottleneck(images: int, channels: int, size: int) -> Calls:
    return of_images(Bottleneck(channels), images, 4 * channels, size, size)


def network(name: str, images: int) -> Calls:
    import timm

    return of_images(timm.create_model(name, pretrained=False), images, 3, 224, 224)


def recorded(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is compiled or chosen at a first call is not recorded
        for call in calls:
            call()
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def medians(calls: Calls, repeats: int) -> dict[str, float]:
    """Return the median of a call, in us."""
    graphs = {}
    for name, each in calls.items():
        try:
            graphs[name] = recorded(each)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(repeats + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if i >= 2:
                times[name].append(start.elapsed_time(end) * 1e3 / len(calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def table(title: str, shapes: Sequence[tuple[Any, ...]], make: Callable[..., Calls], repeats: int) -> Calls:
    print(f"\n{title}\n")
    for i, shape in enumerate(shapes):
        calls = make(*shape)
        found = medians(calls, repeats)
        if i == 0:
            print(f"{'':18}" + "".join(f"{name:>18}" for name in found))
        cells = "".join(f"{us:10.1f} ({found['bfloat16'] / us:4.2f}x)" for us in found.values())
        print(f"{'x'.join(map(str, shape)):18}{cells}", flush=True)
    return calls


@torch.no_grad()
def whole(rows: int, width: int, depth: int) -> None:
    """Time a model, where Python starts the kernels and where a graph does."""
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
    for mode in ("default", "reduce-overhead"):
        found = {}
        for name in ("bfloat16", "int8", "float8"):
            torch.compiler.reset()
            model = nn.Sequential(*(on_gpu(width, width) for _ in range(depth))).eval()
            if name != "bfloat16":
                model = calibrated(model, x, DTYPES[name])
            run = torch.compile(model, mode=mode)
            for _ in range(4):
                run(x)
            torch.cuda.synchronize()
            times = []
            for _ in range(30):
                start = time.perf_counter()
                run(x)
                torch.cuda.synchronize()
                times.append((time.perf_counter() - start) * 1e6 / depth)
            found[name] = statistics.median(times)
        cells = ", ".join(f"{name} {us:.1f} ({found['bfloat16'] / us:.2f}x)" for name, us in found.items())
        print(f"{depth} layers of {width} x {width}, {rows} rows, mode={mode!r}: us a layer: {cells}", flush=True)


def kernels(calls: Calls) -> None:
    activity = torch.profiler.ProfilerActivity.CUDA
    for name, each in calls.items():
        with torch.profiler.profile(activities=[activity]) as seen:
            each[0]()
            torch.cuda.synchronize()
        ran = [event for event in seen.key_averages() if event.device_time_total]
        print(f"{name}: {'; '.join(f'{event.key[:100]} {event.device_time_total:.1f}' for event in ran)}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, few repeats")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("this machine has no CUDA device: nothing to time")
        return
    few = [(rows, k, n) for k, n in ((4096, 4096), (11008, 4096), (8192, 28672)) for rows in (1, 16)]
    many = [(4096, 4096, 4096), (4096, 4096, 11008), (4096, 11008, 4096), (4096, 8192, 8192), (4096, 8192, 28672)]
    many = [(8192, 8192, 8192), *many, (4096, 28672, 8192), (256, 4096, 4096), (1024, 4096, 4096)]
    chains = [(4096, 4096, 11008), (16, 4096, 11008)]
    convolutions = [
        (32, 3, 224, 32, 3),
        (32, 64, 56, 64, 3),
        (32, 128, 28, 128, 3),
        (32, 256, 14, 256, 3),
        (32, 512, 7, 512, 3),
    ]
    convolutions += [(32, 256, 56, 64, 1), (32, 64, 56, 256, 1), (32, 128, 56, 128, 3, 32), (32, 144, 56, 144, 3, 144)]
    blocks = [(32, 64, 56), (32, 256, 14)]
    networks = [("resnet50", 32), ("mobilenetv2_100", 32)]
    if args.quick:
        few, many, chains = few[:1], [(256, 512, 512)], [(256, 512, 1024)]
        convolutions, blocks, networks = [(2, 32, 8, 32, 3)], [(2, 32, 8)], [("mobilenetv2_100", 2)]
    repeats = 3 if args.quick else 10
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, torchao {torchao.__version__}")
    title = "medians in us, and how many times as fast as bfloat16"
    table(f"a token or few: {title}", few, columns, repeats)
    last = table(f"many rows: {title}", many, columns, repeats)
    chained = table(f"linear, GELU, linear: {title}", chains, chain, repeats)
    table(f"convolution, channels last: {title}", convolutions, convolution, repeats)
    block = table(f"a ResNet's block, 1x1, 3x3, 1x1: {title}", blocks, bottleneck, repeats)
    if importlib.util.find_spec("timm") is None:
        print("\ntimm is not installed: no networks of images")
    else:
        table(f"networks of timm, all of their layers quantized: {title}", networks, network, repeats)
    print()
    for rows in (1, 16):
        whole(rows, 512 if args.quick else 4096, 8)
    print("\nkernels of one call, us of each, which a profiler makes longer:")
    kernels(last)
    print("\nof linear, GELU, linear:")
    kernels(chained)
    print("\nof a ResNet's block:")
    kernels(block)


if __name__ == "__main__":
    main()
