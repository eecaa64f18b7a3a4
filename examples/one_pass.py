"""One calibration pass, every range rule afterwards: all-MiniLM-L6-v2 calibrated once.

    pip install -c constraints.txt -e '.[examples]' && python examples/one_pass.py

The encoder's inputs are recorded once, as histograms, and saved to one file. Then each rule reads that
file, for uint8, int8 and float8: no second pass over the data. The table says how close the sentence
embeddings of other passages stay to float32: mean cosine, and the share of each passage's ten nearest
neighbours that is kept. `--quick` does a small part of all of it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import minilm
import torch
import transformers

import bridge
import functional_sq as fsq
from functional_sq import serialize

RULES = (fsq.MinMax(), fsq.Percentile(99.99), fsq.Percentile(99.9), fsq.Mse(), fsq.Entropy())
ASYMMETRIC, SYMMETRIC = fsq.MappingType.ASYMMETRIC, fsq.MappingType.SYMMETRIC
FORMATS = {"uint8": (torch.uint8, ASYMMETRIC), "int8 sym.": (torch.int8, SYMMETRIC)}
FORMATS["float8"] = (torch.float8_e4m3fn, SYMMETRIC)


def record(model: torch.nn.Module, tokenizer: Any, texts: list[str], path: Path) -> None:
    """Run the passages through the model once; save what every encoder layer saw."""
    spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=ASYMMETRIC, observer=fsq.Histogram())
    config = bridge.StaticQuantConfig(torch.uint8, activation=spec)
    observed = copy.deepcopy(model)
    bridge.prepare_(observed, config, lambda module, name: name.startswith("encoder."))
    bridge.calibrate(observed, minilm.batches(tokenizer, texts, 32, "cpu"))
    layers = ((name, m) for name, m in observed.named_modules() if isinstance(m, bridge.ObservedLinear))
    serialize.save(path, {name: (spec, m.act_obs.state) for name, m in layers})


def quantized(
    model: torch.nn.Module,
    calibration: dict[str, Any],
    dtype: torch.dtype,
    mapping: fsq.MappingType,
    rule: fsq.Observer,
) -> torch.nn.Module:
    """Quantize the layers of the calibration, each with the range that `rule` reads from its state."""
    model = copy.deepcopy(model)
    for name, (recorded, state) in calibration.items():
        spec = dataclasses.replace(recorded, dtype=dtype, mapping=mapping, observer=rule)
        weight = fsq.QuantSpec(dtype, fsq.PerAxis(0), mapping=mapping)
        parent, _, child = name.rpartition(".")
        layer = bridge.QuantizedLinear.from_float(
            model.get_submodule(name), spec, fsq.calc_qparams(spec, state), weight
        )
        setattr(model.get_submodule(parent), child, layer)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer passages, uint8 alone")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    tokenizer, model = minilm.load()
    every = minilm.passages(96 if args.quick else 768)
    texts, held_out = every[::3], [text for i, text in enumerate(every) if i % 3]
    formats = {"uint8": FORMATS["uint8"]} if args.quick else FORMATS
    reference = minilm.embed(model, tokenizer, held_out, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "minilm.safetensors")
        record(model, tokenizer, texts, path)
        calibration = serialize.load(path)
        print(f"{len(calibration)} layers recorded once on {len(texts)} passages: {path.stat().st_size / 1e6:.1f} MB\n")
    print(f"{'':20}" + "".join(f"{name:>22}" for name in formats))
    print(f"{'':20}" + f"{'cosine':>12}{'near-10':>10}" * len(formats))
    for rule in RULES:
        row = ""
        for dtype, mapping in formats.values():
            m = quantized(model, calibration, dtype, mapping, rule)
            cosine, overlap = minilm.quality(minilm.embed(m, tokenizer, held_out, "cpu"), reference)
            row += f"{cosine:12.4f}{overlap:10.3f}"
        print(f"{rule!s:20}{row}")


if __name__ == "__main__":
    main()
