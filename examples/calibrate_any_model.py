"""From a model that you did not write to a quantized one, with nothing silent: all-MiniLM-L6-v2.

    pip install -c constraints.txt -e '.[examples]' && python examples/calibrate_any_model.py

1. prepare_: every linear layer but the pooler gets observers. The names of parameters stay.
2. calibrate: batches of padded passages; the padding is left out. It is interrupted after some batches,
   as a machine may be, and goes on from its file to the same bits; it stops when no range moves.
3. report: which layer costs what, as a table, as JSON, and as two pictures.
4. reread_: the same record by rules that clip; the best of them is converted.
5. save; a fresh process loads the file without calibrating and gives the same bits.

Everything it writes is in `--folder`, a new temporary folder unless you name one. `--quick` does a small
part of all of it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from minilm import batches, load, passages

import bridge
import functional_sq as fsq

CONFIG = bridge.StaticQuantConfig(
    torch.int8,
    # A histogram, so that any rule can read the record later, and the report can predict from it.
    activation=fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=fsq.Histogram()),
    rules={"pooler.*": None},
)


def float_model() -> torch.nn.Module:
    """Build the float model; what a fresh process needs beside the file."""
    return load()[1]


def interrupted(stream: list[Any], after: int) -> Iterator[Any]:
    """Yield some batches and then be interrupted."""
    yield from stream[:after]
    raise KeyboardInterrupt


def sqnr(model: torch.nn.Module, exact: torch.nn.Module, batch: Any) -> float:
    with torch.inference_mode():
        keep = batch["attention_mask"] != 0
        y, reference = (m(**batch).last_hidden_state[keep] for m in (model, exact))
    return bridge.compute_error(reference, y).item()


def check_fresh_process(folder: Path) -> None:
    """Load the model and say whether its output has the bits that were saved beside it."""
    model = bridge.load(folder / "model.safetensors", float_model)
    known = torch.load(folder / "expected.pt")
    with torch.inference_mode():
        same = torch.equal(model(**known["batch"]).last_hidden_state, known["output"])
    print(f"fresh process: loaded without calibration, output {'equal in bits' if same else 'DIFFERS'}")
    sys.exit(not same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part: fewer passages, no ranking")
    parser.add_argument("--folder", type=Path, help="where files go; a new temporary folder otherwise")
    parser.add_argument("--load", action="store_true", help="the last step alone, on a folder that is there")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if args.load:
        check_fresh_process(args.folder)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="functional_sq-"))
    folder.mkdir(parents=True, exist_ok=True)
    count, size = (48, 8) if args.quick else (768, 16)
    tokenizer, exact = load()
    every = [dict(batch) for batch in batches(tokenizer, passages(count), size, "cpu")]
    held_out, stream = every[::6], [batch for i, batch in enumerate(every) if i % 6]

    model = bridge.prepare_(copy.deepcopy(exact), CONFIG)
    model.load_state_dict(exact.state_dict(), strict=True)  # the float checkpoint still fits

    record = folder / "calibration.safetensors"
    record.unlink(missing_ok=True)
    half = len(stream) // 2
    try:
        bridge.calibrate(model, interrupted(stream, half), checkpoint=record)
    except KeyboardInterrupt:
        print(f"interrupted after {half} of {len(stream)} batches; {record.name} holds them")
    model = bridge.prepare_(copy.deepcopy(exact), CONFIG)  # what a new process would do
    tolerance, window = (0.9, 1) if args.quick else (0.02, 8)
    done = bridge.calibrate(model, stream, checkpoint=record, until_stable=tolerance, window=window)
    print(f"calibrated on {done} batches: then no range had moved by more than {tolerance:.0%} in {window}\n")

    report = bridge.report(model, held_out[:1] if args.quick else held_out[:2], rank=None if args.quick else "quantize")
    print(report)
    worst = report.layers[0].name
    report.save(folder / "report.json")
    report.save(folder / "layers.png")
    report.plot_layer(worst, folder / "worst.png")
    print(f"\nreport.json, layers.png and worst.png ({worst}) are in {folder}\n")

    batch = held_out[-1]
    found = {}
    for rule in (fsq.MinMax(), fsq.Percentile(99.99), fsq.Mse()):
        activation = dataclasses.replace(CONFIG.activation, observer=rule)
        read = bridge.reread_(copy.deepcopy(model), dataclasses.replace(CONFIG, activation=activation))
        found[rule] = bridge.convert_(read, min_rows=100)
        print(f"{rule}: output {sqnr(found[rule], exact, batch):.1f} dB")
    model = max(found.values(), key=lambda m: sqnr(m, exact, batch))

    path = folder / "model.safetensors"
    bridge.save(model, path)
    with torch.inference_mode():
        torch.save({"batch": batch, "output": model(**batch).last_hidden_state}, folder / "expected.pt")
    floats = sum(p.numel() * p.element_size() for p in exact.parameters())
    print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, the float parameters {floats / 1e6:.0f} MB")
    subprocess.run([sys.executable, __file__, "--load", "--folder", str(folder)], check=True)


if __name__ == "__main__":
    main()
