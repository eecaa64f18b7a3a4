"""Time observers: ours, eager and compiled, beside torchao's and PyTorch's, in one process.

    python examples/benchmarks/observers.py

Each row is one task on one tensor: observe a batch, or choose qparams from what was recorded. All
columns of a row are timed in turn; a cell is the median and its ratio to the floor, one pass that
reads the tensor (`x.sum()`). `--quick` takes small tensors and little time.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from functools import partial

import torch
from linear import Calls, cpu, medians

import functional_sq as fsq

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao 0.16 warns of its own moved modules
    import torchao
    from torch.ao.quantization import HistogramObserver
    from torchao.quantization.granularity import PerAxis, PerTensor
    from torchao.quantization.observer import AffineQuantizedMinMaxObserver, AffineQuantizedMSEObserver
    from torchao.quantization.quant_primitives import MappingType


def torchao_observer(kind: type, granularity: object, x: torch.Tensor) -> Callable[[], object]:
    observer = kind(MappingType.ASYMMETRIC, torch.uint8, granularity=granularity, eps=2.0**-23)
    return partial(observer, x)


def tasks(shape: tuple[int, int]) -> dict[str, Calls]:
    x = torch.randn(shape)
    table: dict[str, Calls] = {}
    for name, ours, theirs in (
        ("per tensor", fsq.PerTensor(), PerTensor()),
        ("per last axis", fsq.PerAxis(-1), PerAxis(1)),
    ):
        spec = fsq.QuantSpec(torch.uint8, ours, mapping=fsq.MappingType.ASYMMETRIC)
        observe, state = partial(fsq.observe, spec), fsq.init(spec, shape)
        table[f"min/max, {name}"] = {
            "floor": x.sum,
            "eager": partial(observe, state, x),
            "compiled": partial(torch.compile(observe), state, x),
            "torchao": torchao_observer(AffineQuantizedMinMaxObserver, theirs, x),
        }
    spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=fsq.Histogram())
    observe, state = partial(fsq.observe, spec), fsq.init(spec, shape)
    histogram = HistogramObserver(dtype=torch.quint8)
    table["histogram, per tensor"] = {
        "floor": x.sum,
        "eager": partial(observe, state, x),
        "compiled": partial(torch.compile(observe), state, x),
        "pytorch": partial(histogram, x),
    }
    seen = observe(state, x)
    histogram(x)
    for rule in (fsq.Percentile(99.99), fsq.Mse(), fsq.Entropy()):
        ruled = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=rule)
        calls: Calls = {"floor": x.sum, "eager": partial(fsq.calc_qparams, ruled, seen)}
        if isinstance(rule, fsq.Mse):
            # torchao's searches at each observe; what it searched before is lost.
            calls["torchao"] = torchao_observer(AffineQuantizedMSEObserver, PerTensor(), x)
            calls["pytorch"] = histogram.calculate_qparams
        table[f"qparams, {type(rule).__name__}"] = calls
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small tensor, little time")
    args = parser.parse_args()
    shapes, seconds = ([(64, 64)], 0.1) if args.quick else ([(4096, 1024), (256, 256)], 3.0)
    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}, torchao {torchao.__version__}")
    print("medians in ms, and as multiples of one read pass\n")
    columns = ("floor", "eager", "compiled", "torchao", "pytorch")
    print(f"{'':40}" + "".join(f"{c:>20}" for c in columns))
    for shape in shapes:
        for name, calls in tasks(shape).items():
            found = medians(calls, seconds)
            cells = [f"{found[c]:9.3f} ({found[c] / found['floor']:7.1f}x)" if c in found else "" for c in columns]
            print(f"{name + f', {shape[0]}x{shape[1]}':40}" + "".join(f"{c:>20}" for c in cells))


if __name__ == "__main__":
    main()
