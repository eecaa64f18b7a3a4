"""Time a quantized linear layer beside the bare int8 product, float layers and torchao's, in one process.

    python examples/benchmarks/linear.py

Each row is one shape, tokens x K x N. The floor is a compiled pass that makes codes of the input, and
`torch._int_mm` of codes that are there already; a packed weight goes below it. All columns of a row are timed
in turn; a cell is the median and its ratio to the floor. Below the table oneDNN names the kernels of one call.
Of torchao, 0.16 has AffineQuantizedTensor, 0.18 the Int8Tensor of Int8StaticActivationInt8WeightConfig and a PT2E
that runs on torch 2.13 (X86InductorQuantizer, min/max, frozen); a column stands where the installed one has it.
Memory that is freed stays with the process, see `keep_memory`.
`OMP_NUM_THREADS=1` makes it quieter on a machine that is shared.
`--quick` takes small shapes and little time.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import bridge
import functional_sq as fsq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import torchao
    import torchao.dtypes

Calls = dict[str, Callable[[], object]]

PEERS = ("torchao affine", "torchao static", "PT2E x86")
HAS_AFFINE = hasattr(torchao.dtypes, "to_affine_quantized_intx_static")
# In 0.16 the config is symmetric only, and PT2E names an operator's overload that torch 2.13 has not.
HAS_STATIC = tuple(map(int, torchao.__version__.split(".")[:2])) >= (0, 18)


KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31)}


def keep_memory() -> None:
    """Start this program again, with a malloc that keeps what is freed; for all columns alike.

    glibc gives large results back to the system or not, by how a process's heap lies: one gets 18 000 to 28 000 new
    pages in each call of an int8 MiniLM with 32 x 128 tokens, and takes 30 % longer; another that does the same, none.
    """
    if sys.platform == "linux" and not KEPT.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | KEPT)


@contextmanager
def printed() -> Iterator[list[str]]:
    """Collect the lines that compiled code prints."""
    lines: list[str] = []
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            lines += file.read().splitlines()


def show_kernels(call: Callable[[], object]) -> None:
    """Print what oneDNN says of its kernels in a call, without the time that each takes."""
    with printed() as lines, torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        call()
    ran = Counter(line.rpartition(",")[0] for line in lines if ",exec," in line)
    for line, count in ran.items():
        print(f"{count} x {line}" if count > 1 else line)


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


def normal(k: int, n: int) -> torch.nn.Linear:
    """Return a layer with normal weights, as trained ones are; torch's own are uniform."""
    linear = torch.nn.Linear(k, n).eval()
    torch.nn.init.normal_(linear.weight, std=k**-0.5)
    return linear


def quantized(layer: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Any:
    return calibrated(torch.nn.Sequential(copy.deepcopy(layer)).eval(), x, dtype)[0]


def calibrated(model: torch.nn.Module, x: torch.Tensor, dtype: torch.dtype) -> Any:
    bridge.prepare_(model, bridge.StaticQuantConfig(dtype))
    bridge.calibrate(model, [x])
    return bridge.convert_(model)


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


def torchao_static(layer: bridge.QuantizedLinear, linear: torch.nn.Linear, rank: int) -> torch.nn.Linear:
    """Return the layer as torchao's newest config has it, with the same range, for inputs of this rank."""
    config = torchao.quantization.Int8StaticActivationInt8WeightConfig(
        layer.act_scale.reshape([1] * rank),
        layer.act_zero_point.reshape([1] * rank).to(torch.int8),
        granularity=[torchao.quantization.PerTensor(), torchao.quantization.PerRow()],
        act_mapping_type=torchao.quantization.MappingType.ASYMMETRIC,
        set_inductor_config=False,  # It would stay set for every other column.
    )
    linear = copy.deepcopy(linear)
    torchao.quantization.quantize_(linear, config)
    return linear


# What torchao's config sets where it may, and freezing besides.
STATIC_SETTINGS = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
    "freezing": True,
}


@torch.no_grad()
def pt2e(model: torch.nn.Module, batches: Sequence[dict[str, torch.Tensor]], *, histogram: bool = False) -> Any:
    """Return the model by PT2E for x86, to be compiled with freezing; a first axis of any size.

    Its default is a histogram; else the ranges are min/max, as everyone's here.
    """
    # Imported where it is used: it adds a pass to every compilation after it.
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.observer import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    axes = {name: {0: torch.export.Dim.AUTO} for name in batches[0]}
    exported = torch.export.export(model, (), dict(batches[0]), dynamic_shapes=axes).module()
    config = x86.get_default_x86_inductor_quantization_config()
    if not histogram:
        eps = torch.finfo(torch.float32).eps
        activation = replace(config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=eps))
        config = replace(config, input_activation=activation)
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    for batch in batches:
        prepared(**batch)
    return convert_pt2e(prepared)


def chain(rows: int, k: int, n: int) -> Calls:
    """Return linear, GELU, linear, beside the two bare products that it cannot go below."""
    torch.compiler.reset()
    model = torch.nn.Sequential(normal(k, n), torch.nn.GELU(), normal(n, k)).eval()
    x = torch.randn(rows, k)
    ours, asymmetric = (calibrated(copy.deepcopy(model), x, dtype) for dtype in (torch.int8, torch.uint8))
    apart = copy.deepcopy(ours)
    apart[0].hand_on = apart[2].hand_on = False
    shapes = ((rows, k), (n, k)), ((rows, n), (k, n))
    operands = [[torch.randint(-128, 128, shape, dtype=torch.int8) for shape in pair] for pair in shapes]
    return {
        "two products": lambda: [torch._int_mm(a, b.t()) for a, b in operands],
        "int8": partial(torch.compile(ours), x),
        "int8, apart": partial(torch.compile(apart), x),
        "uint8": partial(torch.compile(asymmetric), x),
        "float32": partial(torch.compile(model), x),
        "bfloat16": partial(torch.compile(copy.deepcopy(model).bfloat16()), x.bfloat16()),
    }


def columns(rows: int, k: int, n: int) -> Calls:
    torch.compiler.reset()
    linear, x = normal(k, n), torch.randn(rows, k)
    ours, asymmetric = quantized(linear, x, torch.int8), quantized(linear, x, torch.uint8)
    quantize = torch.compile(partial(fsq.quantize, ours.act_spec))
    codes = quantize(x, ours.act_qparams)
    # One row with the strides that its shape says: what torch._int_mm makes of others depends on them.
    operands = (codes.as_strided(codes.shape, (k, 1)), ours.weight_codes.t())
    float8 = quantized(linear, x, torch.float8_e4m3fn)
    bf16 = copy.deepcopy(linear).bfloat16()
    calls: Calls = {
        "quantize": partial(quantize, x, ours.act_qparams),
        "product": partial(torch._int_mm, *operands),
        "int8, eager": partial(ours, x),
        "int8": partial(torch.compile(ours), x),
        "uint8": partial(torch.compile(asymmetric), x),
        "float8": partial(torch.compile(float8), x),
        "float32, eager": partial(linear, x),
        "float32": partial(torch.compile(linear), x),
        "bfloat16": partial(torch.compile(bf16), x.bfloat16()),
    }
    if HAS_AFFINE:
        calls["torchao affine"] = partial(torch.compile(torchao_linear(asymmetric, linear)), x)
    if HAS_STATIC:
        calls["torchao static"] = partial(torch.compile(torchao_static(ours, linear, x.ndim)), x)
        calls["PT2E x86"] = partial(torch.compile(pt2e(linear, [{"input": x}])), input=x)
        for name, settings in (("torchao static", STATIC_SETTINGS), ("PT2E x86", {"freezing": True})):
            with torch._inductor.config.patch(settings):
                calls[name]()  # Compiled here.
    return calls


def table(rows: Iterable[tuple[str, Calls]], floor: Sequence[str], seconds: float) -> None:
    """Print a row for each: medians, and as multiples of the sum of the columns that are the floor."""
    for i, (row, calls) in enumerate(rows):
        if i == 0:
            print(f"{'':34}" + "".join(f"{name:>18}" for name in calls))
        found = medians(calls, seconds)
        least = sum(found[name] for name in floor)
        cells = "".join(f"{ms:9.3f} ({ms / least:5.2f}x)" for ms in found.values())
        print(f"{row:34}{cells}", flush=True)


def of_shapes(shapes: Sequence[tuple[int, int, int]], make: Callable[..., Calls]) -> Iterator[tuple[str, Calls]]:
    return (("x".join(map(str, shape)), make(*shape)) for shape in shapes)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, little time")
    args = parser.parse_args()
    keep_memory()
    small = [(1, 384, 384), (32, 384, 384), (128, 384, 384)]
    few = [(1, 1024, 4096), (1, 4096, 4096), (1, 11008, 4096), (16, 4096, 11008), (32, 1024, 1024)]  # tokens
    large = [(1024, 1024, 4096), (4096, 384, 1536), (4096, 1536, 384)]
    shapes, seconds = (small[:2], 0.1) if args.quick else (small + few + large, 6.0)
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}, torchao {torchao.__version__}")
    print("compiled where not said; medians in ms, and as multiples of quantize + product\n")
    table(of_shapes(shapes, columns), ("quantize", "product"), seconds)
    print("\nlinear, GELU, linear, as multiples of their two products; `apart` hands no codes on\n")
    chains = shapes[:1] if args.quick else [(128, 384, 1536), (512, 768, 3072), (4096, 384, 1536)]
    table(of_shapes(chains, chain), ("two products",), seconds)

    rows, k, n = shapes[-1]
    calls = columns(rows, k, n)
    print(f"\n{quantized(torch.nn.Linear(k, n), torch.randn(rows, k), torch.int8)}", flush=True)
    for name in ("product", "int8, eager", "int8", "uint8", "float8", *(n for n in PEERS if n in calls)):
        print(f"\n{name}, {rows}x{k}x{n}:")
        show_kernels(calls[name])


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
