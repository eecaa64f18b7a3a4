"""Time a quantized linear layer beside the bare int8 product, float layers and torchao's, in one process.

    python examples/benchmarks/linear.py

Each row is one shape, tokens x K x N. The floor is a compiled pass that makes codes of the input, and
`torch._int_mm` of codes that are there already; a packed weight goes below it. All columns of a row are timed
in turn; a cell is the median and its ratio to the floor. Below the table oneDNN names the kernels of one call.
`OMP_NUM_THREADS=1` makes it quieter on a machine that is shared.
`--quick` takes small shapes and little time.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import bridge
import functional_sq as fsq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import torchao
    import torchao.dtypes

Calls = dict[str, Callable[[], object]]


def medians(calls: Calls, seconds: float) -> dict[str, float]:
    """Time the calls in turn; return medians in ms."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or min(map(len, times.values())) < 5:
        for name, call in calls.items():
            call()  # Not timed: the first one after another column's finds that one's data in the caches.
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def quantized(linear: torch.nn.Linear, x: torch.Tensor, dtype: torch.dtype) -> bridge.QuantizedLinear:
    model = torch.nn.Sequential(copy.deepcopy(linear)).eval()
    bridge.prepare_(model, bridge.StaticQuantConfig(dtype))
    bridge.calibrate(model, [x])
    return bridge.convert_(model)[0]


def torchao_linear(layer: bridge.QuantizedLinear, linear: torch.nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the layer as torchao's tutorial multiplied it; 0.17 was the last that could."""
    make = torchao.dtypes.to_affine_quantized_intx_static
    zero_point = fsq.unfold(layer.weight_spec, layer.folded)[1].zero_point
    scale, block = layer.weight_scale.flatten(), (1, layer.in_features)
    weight = make(linear.weight, scale, zero_point.flatten(), block, layer.weight_spec.dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        q = make(x, layer.act_scale, layer.act_zero_point, x.shape, layer.act_spec.dtype)
        return F.linear(q, weight, linear.bias)

    return forward


def columns(rows: int, k: int, n: int) -> Calls:
    torch.compiler.reset()
    linear, x = torch.nn.Linear(k, n).eval(), torch.randn(rows, k)
    ours, asymmetric = quantized(linear, x, torch.int8), quantized(linear, x, torch.uint8)
    quantize = torch.compile(partial(fsq.quantize, ours.act_spec))
    codes = quantize(x, ours.act_qparams)
    # What torch._int_mm takes on every device: two rows.
    operands = (torch.cat([codes, codes])[: max(rows, 2)], ours.weight_codes.t())
    bf16 = copy.deepcopy(linear).bfloat16()
    calls: Calls = {
        "quantize": partial(quantize, x, ours.act_qparams),
        "product": partial(torch._int_mm, *operands),
        "int8, eager": partial(ours, x),
        "int8": partial(torch.compile(ours), x),
        "uint8": partial(torch.compile(asymmetric), x),
        "float32": partial(torch.compile(linear), x),
        "bfloat16": partial(torch.compile(bf16), x.bfloat16()),
    }
    if hasattr(torchao.dtypes, "to_affine_quantized_intx_static"):
        calls["torchao"] = partial(torch.compile(torchao_linear(asymmetric, linear)), x)
    return calls


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, little time")
    args = parser.parse_args()
    small = [(1, 384, 384), (32, 384, 384), (128, 384, 384)]
    large = [(32, 1024, 1024), (1, 1024, 4096), (1024, 1024, 4096), (4096, 384, 1536), (4096, 1536, 384)]
    shapes, seconds = (small[:2], 0.1) if args.quick else (small + large, 6.0)
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}, torchao {torchao.__version__}")
    print("compiled where not said; medians in ms, and as multiples of quantize + product\n")
    for i, (rows, k, n) in enumerate(shapes):
        calls = columns(rows, k, n)
        if i == 0:
            print(f"{'':16}" + "".join(f"{name:>17}" for name in calls))
        found = medians(calls, seconds)
        floor = found["quantize"] + found["product"]
        cells = "".join(f"{ms:9.3f} ({ms / floor:4.2f}x)" for ms in found.values())
        print(f"{f'{rows}x{k}x{n}':16}{cells}", flush=True)

    print(f"\n{quantized(torch.nn.Linear(k, n), torch.randn(rows, k), torch.int8)}", flush=True)
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        for name in ("product", "int8, eager", "int8", "uint8"):
            print(f"\n{name}, {rows}x{k}x{n}:", flush=True)
            calls[name]()


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
