"""Compare all-MiniLM-L6-v2 quantized by this project and by its peers: time, embeddings, kernels.

    python examples/benchmarks/minilm.py                   # with the peers that are installed
    python examples/benchmarks/minilm.py --environments    # makes an environment for each that is not
    python examples/benchmarks/minilm.py --quick           # a small part: one layer of six, int8, installed peers

Every row takes the same weights, is calibrated on the same 256 passages and timed on the same 128 tokens; what
is timed is also what embeds the 512 passages that are compared with float32 (mean cosine, and how many of each
passage's ten nearest neighbours stay). Ranges are min/max except where said. torchao's rows have the very ranges
of ours; PT2E and ONNX Runtime calibrate by themselves, and padding tokens count there. A part of the table is one
process, whose rows are timed in turn, with float32 and our int8 among them; speedups are against its own float32.
All keep the memory that they free, see `keep_memory` of linear.py.
Below the table: each row's numerics, and the products that ran, as counted by oneDNN or ONNX Runtime in one call.

`--environments FOLDER` keeps the environments there. They are made with `python -m venv` and pip.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from linear import (
    HAS_AFFINE,
    HAS_STATIC,
    STATIC_SETTINGS,
    keep_memory,
    medians,
    printed,
    pt2e,
    torchao_linear,
    torchao_static,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
import transformers
from minilm import batches, cpu, embed, load, passages, products, quality, quantized

import bridge

ROOT = Path(__file__).parents[2]
Model = Callable[..., Any]


@dataclass
class Subject:
    """What every row is made from."""

    tokenizer: Any
    model: torch.nn.Module
    texts: list[str]

    @cached_property
    def int8(self) -> torch.nn.Module:
        return quantized(self.model, torch.int8, self.tokenizer, self.texts, "cpu")

    @cached_property
    def uint8(self) -> torch.nn.Module:
        return quantized(self.model, torch.uint8, self.tokenizer, self.texts, "cpu")

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        return [dict(batch) for batch in batches(self.tokenizer, self.texts, 32, "cpu")]

    def replaced(self, ours: torch.nn.Module, make: Callable[..., torch.nn.Module]) -> torch.nn.Module:
        """Return the float model with `make(layer, linear)` for each layer that is quantized in `ours`."""
        model = copy.deepcopy(self.model)
        for name, layer in ours.named_modules():
            if isinstance(layer, bridge.QuantizedLinear):
                model.set_submodule(name, make(layer, model.get_submodule(name)))
        return model


class Called(torch.nn.Module):
    """A function as a module."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


class Autocast(torch.nn.Module):
    """A model under bfloat16 autocast, which is how PT2E's products are mixed with bfloat16."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**batch)


class Positional(torch.nn.Module):
    """A model that takes the values of a batch in order and returns a tuple, as the ONNX exporter wants it."""

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.model(**dict(zip(self.names, values, strict=True))).to_tuple()


class OnnxRuntime:
    """The model in ONNX Runtime, quantized as it documents for transformers: fused, shapes inferred, then QDQ.

    The encoder's 36 products are quantized, as everywhere in this table. Their outputs are not: `quantize_static`
    would round each to 8 bits before its bias is added, and the mean cosine falls to 0.94.
    """

    def __init__(self, subject: Subject) -> None:
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        class Passages(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                self.rest = iter(subject.calibration())

            def get_next(self) -> dict[str, Any] | None:
                batch = next(self.rest, None)
                return None if batch is None else {name: value.numpy() for name, value in batch.items()}

        self.folder = tempfile.TemporaryDirectory()
        exported, fused, ready, self.path = (f"{self.folder.name}/{i}.onnx" for i in range(4))
        sample = subject.calibration()[0]
        # A copy: the exporter sets modes. Eager: the fused attention is exported with a guard against NaN, which
        # takes a third of the whole time.
        model = copy.deepcopy(subject.model)
        model.set_attn_implementation("eager")
        torch.onnx.export(
            Positional(model, list(sample)).eval(),
            tuple(sample.values()),
            exported,
            input_names=list(sample),
            output_names=["last_hidden_state", "pooler_output"],
            dynamic_axes={name: {0: "batch"} for name in sample},
            dynamo=False,  # The other exporter needs one package more.
        )
        options = FusionOptions("bert")
        options.enable_attention = False  # A fused attention would hide three products of each layer.
        config = model.config
        optimizer.optimize_model(
            exported, "bert", config.num_attention_heads, config.hidden_size, optimization_options=options
        ).save_model_to_file(fused)
        quant_pre_process(fused, ready, skip_optimization=True)
        graph = onnx.load(ready).graph
        constants = {tensor.name for tensor in graph.initializer}
        quantization.quantize_static(
            ready,
            self.path,
            Passages(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            nodes_to_quantize=[n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] in constants],
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
        self.session = self.open()

    def open(self, profile: str = "") -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        return onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])

    def __call__(self, **batch: torch.Tensor) -> Any:
        states, _ = self.session.run(None, {name: value.numpy() for name, value in batch.items()})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(states))

    def kernels(self, batch: dict[str, torch.Tensor]) -> str:
        session = self.open(f"{self.folder.name}/profile")
        session.run(None, {name: value.numpy() for name, value in batch.items()})
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = Counter(e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time"))
        return counts(Counter({name: count for name, count in ran.items() if "MatMul" in name or "Quant" in name}))


def affine(subject: Subject) -> torch.nn.Module:
    return subject.replaced(subject.uint8, lambda layer, linear: Called(torchao_linear(layer, linear)))


@dataclass(frozen=True)
class Row:
    """One row: its numerics, what makes its model, and Inductor's settings where it is compiled."""

    numerics: str
    make: Callable[[Subject], Model]
    settings: dict[str, bool] | None = None


FROZEN = {"freezing": True}
W8 = "asymmetric activations, symmetric weights per channel"
OURS = {
    "float32": Row("float32", lambda s: s.model),
    "int8": Row(f"int8, {W8}; float32 between", lambda s: s.int8),
    "bfloat16": Row("bfloat16", lambda s: copy.deepcopy(s.model).bfloat16()),
    "int8, bfloat16": Row("the codes and scales of int8; bfloat16 between", lambda s: copy.deepcopy(s.int8).bfloat16()),
    "uint8": Row("uint8, asymmetric both; float32 between", lambda s: s.uint8),
    "float8_e4m3fn": Row(
        "float8 both; float32 between", lambda s: quantized(s.model, torch.float8_e4m3fn, s.tokenizer, s.texts, "cpu")
    ),
}
AFFINE = {"torchao AffineQuantizedTensor": Row("uint8, asymmetric both, dequantized and multiplied in float32", affine)}
NEWEST = {
    "torchao Int8Tensor, static": Row(
        f"int8, {W8}; float32 between",
        lambda s: s.replaced(s.int8, partial(torchao_static, rank=3)),
        STATIC_SETTINGS,
    ),
    "PT2E x86": Row(
        f"uint8 and int8, {W8}; query, key and value share codes, GELU and residual are inside the products",
        lambda s: pt2e(s.model, s.calibration()),
        FROZEN,
    ),
    "PT2E x86, histogram": Row(
        "as PT2E x86, with its default observer", lambda s: pt2e(s.model, s.calibration(), histogram=True), FROZEN
    ),
    "PT2E x86, bfloat16": Row(
        "as PT2E x86, under bfloat16 autocast", lambda s: Autocast(pt2e(s.model, s.calibration())), FROZEN
    ),
}
ONNX = {"ONNX Runtime": Row(f"uint8 and int8, {W8}; float32 between", OnnxRuntime)}
ROWS = OURS | AFFINE | NEWEST | ONNX
BESIDE = ("float32", "int8")  # in every part


@dataclass(frozen=True)
class Peer:
    """Rows that need something installed. `alone`: its threads keep spinning after a call and would disturb others."""

    rows: dict[str, Row]
    install: tuple[str, ...]
    present: bool
    alone: bool = False


PEERS = (
    Peer(AFFINE, ("torchao==0.16.0",), HAS_AFFINE),
    Peer(NEWEST, ("torchao>=0.18",), HAS_STATIC),
    Peer(ONNX, ("onnx", "onnxruntime"), all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))), alone=True),
)


def kernels(call: Callable[[], object]) -> str:
    """Return how many of which products oneDNN ran in a call, and tiles of ours; float32 ones are MKL's."""
    with printed() as lines, torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        call()
    found: Counter[str] = Counter()
    for line in lines:
        fields = line.split(",")
        if fields[2:6] == ["ukernel", "exec", "cpu", "brgemm"]:
            found["tiles by brgemm"] += 1
        if fields[2:4] == ["primitive", "exec"] and fields[5] in ("matmul", "inner_product", "gemm_api"):
            types = re.findall(r"\b(?:src|wei|dst)[:_](\w+?):", fields[8])
            found[f"{fields[6] or fields[5]} {' x '.join(types[:2])} -> {types[2]}"] += 1
    return counts(found) or "none by oneDNN"


def counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.most_common())


def measure(names: list[str], quick: bool) -> dict[str, Any]:
    """Return the figures of these rows, timed in turn in this process; as JSON can hold them."""
    tokenizer, model = load()
    if quick:
        del model.encoder.layer[1:]
    every = passages(96 if quick else 768)
    subject = Subject(tokenizer, model, every[::3])
    held_out = [text for i, text in enumerate(every) if i % 3]
    models = {name: ROWS[name].make(subject) for name in names}
    figures: dict[str, dict[str, Any]] = {name: {"ms": {}, "kernels": {}} for name in names}
    alone: dict[str, float] = {}
    # All models are of one class, whose code holds what was compiled for each.
    torch._dynamo.config.recompile_limit = 8 + len(names)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for size in [32] if quick else [1, 32]:
        batch = dict(next(batches(tokenizer, held_out, size, "cpu")))
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        torch.compiler.reset()
        calls: dict[str, Callable[[], object]] = {}
        with torch.inference_mode():
            for name, plain in models.items():
                run = torch.compile(plain) if isinstance(plain, torch.nn.Module) else plain
                calls[name] = partial(run, **batch)
                with torch._inductor.config.patch(ROWS[name].settings or {}):
                    calls[name]()  # Compiled here.
                ran = kernels(calls[name]) if run is not plain else plain.kernels(batch)
                figures[name]["kernels"][str(size)] = ran
                if size == 32:
                    figures[name]["embeddings"] = embed(run, tokenizer, held_out, "cpu")
            for name, ms in medians(calls, 1.0 if quick else 60.0).items():
                figures[name]["ms"][str(size)] = ms
            floor = {"int8": products(subject.int8, size * batch["input_ids"].shape[1], "cpu")["int8"]}
            alone[str(size)] = medians(floor, 0.2 if quick else 5.0)["int8"]
    reference = figures["float32"]["embeddings"]
    for figure in figures.values():
        figure["cosine"], figure["nearest"] = quality(figure.pop("embeddings"), reference)
    packages = ("torch", "torchao", "onnxruntime")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    return {"versions": versions, "rows": figures, "products alone": alone}


def environment(folder: Path, peer: Peer) -> str:
    """Make an environment with the peer and return its interpreter."""
    home = folder / re.sub(r"\W+", "-", " ".join(peer.install))
    python = str(home / "bin" / "python")
    names = tuple(re.split(r"\W", requirement)[0] for requirement in peer.install)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / f"{home.name}.txt"
    constraints.write_text("\n".join(line for line in lines if not line.startswith(names)))
    print(f"installing {' '.join(peer.install)} in {home}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints), "-e", f"{ROOT}[examples]"]
    subprocess.run([*pip, *peer.install], check=True)
    return python


def elsewhere(python: str, names: list[str], quick: bool) -> dict[str, Any]:
    """Return what `measure` returns in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [python, __file__, "--rows", *names, "--json", str(file)]
        subprocess.run([*command, "--quick"] if quick else command, check=True)
        return json.loads(file.read_text())


def show(parts: list[dict[str, Any]]) -> None:
    sizes = list(parts[0]["rows"]["float32"]["ms"])
    print(f"{'':32}{'cosine':>9}{'nearest-10':>12}" + "".join(f"{f'batch {s}':>12}{'speedup':>9}" for s in sizes))
    for part in parts:
        print("; ".join(f"{name} {version}" for name, version in part["versions"].items()))
        floats = part["rows"]["float32"]["ms"]
        cells = {name: (f"{row['cosine']:9.4f}{row['nearest']:12.3f}", row["ms"]) for name, row in part["rows"].items()}
        cells["int8 products alone"] = (" " * 21, part["products alone"])
        for name, (left, ms) in cells.items():
            print(f"  {name:30}{left}" + "".join(f"{ms[s]:12.1f}{floats[s] / ms[s]:8.2f}x" for s in sizes))
    print()
    first = {name: row for part in reversed(parts) for name, row in part["rows"].items()}
    for name in (name for name in ROWS if name in first):
        print(f"{name}: {ROWS[name].numerics}")
        for size, ran in first[name]["kernels"].items():
            print(f"    batch {size}: {ran}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part: one layer of six, batch 32, int8 of ours")
    parser.add_argument("--environments", nargs="?", const="", metavar="FOLDER", help="make what is missing, there")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="these rows alone, to --json")
    parser.add_argument("--json", type=Path, help="write figures here instead of a table")
    args = parser.parse_args()
    keep_memory()
    transformers.utils.logging.disable_progress_bar()
    if args.rows:
        args.json.write_text(json.dumps(measure(args.rows, args.quick)))
        return

    here = [name for peer in PEERS if peer.present and not peer.alone for name in peer.rows]
    parts = [measure([*(BESIDE if args.quick else OURS), *here], args.quick)]
    missing = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.environments or temporary).absolute()
        folder.mkdir(exist_ok=True)
        for peer in PEERS:
            if peer.present and not peer.alone:
                continue
            if not peer.present and args.environments is None:
                missing.append(peer)
                continue
            python = sys.executable if peer.present else environment(folder, peer)
            parts.append(elsewhere(python, [*BESIDE, *peer.rows], args.quick))
    layers = "one layer" if args.quick else "6 layers"
    print(f"{cpu()}, {torch.get_num_threads()} threads; {layers}, 128 tokens, medians in ms\n")
    show(parts)
    for peer in missing:
        wanted = " ".join(f"'{requirement}'" for requirement in peer.install)
        print(f"\nnot installed: {', '.join(peer.rows)}: pip install {wanted}, or --environments")


if __name__ == "__main__":
    main()
