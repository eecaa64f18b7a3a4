"""Time calibration against the bare float forward: all-MiniLM-L6-v2, eager and compiled, in one process.

    pip install -c constraints.txt -e '.[examples]' && python examples/benchmarks/calibrate.py

Each row is one batch: of the float model, and through `bridge.calibrate` on a prepared copy with 36
observers. All rows are timed in turn; a cell is the median in ms and its ratio to the float forward of
the same kind. The floor of what observing adds is one read pass over the 36 inputs. `--quick` takes one
short batch and little time.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from minilm import batches, cpu, load, medians, passages

import bridge
import functional_sq as fsq

OBSERVERS = {"min/max": fsq.MinMax(), "histogram": fsq.Histogram()}


def observed_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers that get observers."""
    return [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("encoder.")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short batch, little time")
    args = parser.parse_args()
    size, seconds = (2, 1.0) if args.quick else (32, 60.0)
    tokenizer, model = load()
    batch = dict(next(batches(tokenizer, passages(size), size, "cpu")))
    whole = {name: value for name, value in batch.items() if name != "attention_mask"}

    def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
        with torch.inference_mode():
            model(**batch)

    print(f"{cpu()}, {torch.get_num_threads()} threads, torch {torch.__version__}; batch {size} of 128 tokens, ms\n")
    print(f"{'':34}{'no mask':>18}{'padding mask':>18}")
    read: list[torch.Tensor] = []
    for kind, wrap in (("eager", lambda m: m), ("compiled", torch.compile)):
        models = {"float": wrap(model)}
        for name, observer in OBSERVERS.items():
            spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=observer)
            prepared = copy.deepcopy(model)
            bridge.prepare_(
                prepared, bridge.StaticQuantConfig(torch.int8, activation=spec), lambda m, n: n.startswith("encoder.")
            )
            models[name] = wrap(prepared)
        if not read:
            hooks = [m.register_forward_pre_hook(lambda m, a: read.append(a[0])) for m in observed_layers(model)]
            forward(model, whole)
            for hook in hooks:
                hook.remove()
        calls: dict[str, Callable[[], object]] = {}
        for column, data in (("no mask", whole), ("padding mask", batch)):
            for name, m in models.items():
                call = partial(forward, m, data) if name == "float" else partial(bridge.calibrate, m, [data])
                calls[f"{name}, {column}"] = call
        calls["floor"] = lambda: [x.sum() for x in read]
        found = medians(calls, "cpu", seconds)
        for name in models:
            cells = [found[f"{name}, {c}"] for c in ("no mask", "padding mask")]
            ratios = [found[f"{name}, {c}"] / found[f"float, {c}"] for c in ("no mask", "padding mask")]
            label = f"{kind}, {name if name == 'float' else f'calibrate, {name}'}"
            print(f"{label:34}" + "".join(f"{c:10.1f} ({r:4.2f}x)" for c, r in zip(cells, ratios, strict=True)))
        print(f"{kind + ', one read pass of the inputs':34}{found['floor']:10.1f}")


if __name__ == "__main__":
    main()
