"""Where the loss of a quantized model comes from, layer by layer: measured before it is converted."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import os
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import functional_sq as fsq
from bridge import picture
from bridge.arguments import check_counts, check_function, check_module
from bridge.batches import call, check_batches, check_fitted, mask_of
from bridge.checks import check_config, check_memory, check_rules, observed_layers, quantized_by, unfit
from bridge.config import StaticQuantConfig
from bridge.inductor import capture, uncompiled
from bridge.observed import weight_of
from bridge.observer import ObserverModule, fit_mask, qparams_of, weight_qparams
from bridge.quantized import Quantized
from bridge.steps import quantized_layer
from bridge.swapping import choose_paths, module_names
from functional_sq.files import replacing
from functional_sq.formats import REAL_DTYPES
from functional_sq.observers.histogram import histogram_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerReport", "Report", "report"]

Rank = Literal["quantize", "float"]

_PICTURES = (".png", ".svg", ".pdf")
_SUFFIXES = (".json", ".csv", *_PICTURES)


@dataclass(frozen=True)
class LayerReport:
    """What quantization does to one layer. Decibels are signal-to-noise ratios; None: not known.

    Attributes:
        name: the layer's name in the model.
        calls: how often it ran in all batches together; what is measured sums over them. 0: it never
            ran, and what is measured is None.
        values: number of input values that were measured; those that the mask leaves out are not.
        output_sqnr: dB, the layer's output for its float input: its own loss alone.
        input_sqnr: dB, the quantized input.
        predicted_input_sqnr: dB, the same as the recorded state alone predicts it. None without a
            histogram: no other state holds the power of the signal.
        clipping: share, 0 to 1, of the input's squared error that comes from values that saturate.
        rounding: the rest of it; both are 0 where there is no error.
        saturated: share, 0 to 1, of the input's values that saturate.
        weight_sqnr: dB, the quantized weight.
        model_sqnr: dB, the model's output with this layer alone quantized (`rank="quantize"`) or with
            all others quantized (`rank="float"`); None without a ranking.
        milliseconds: time of the quantized layer, all its calls in one forward pass; median over the
            batches in which it ran.
        time_share: the same as a share, 0 to 1, of that forward pass.
        path: how the quantized layer multiplies, as its `repr` says it: `"int8 product, by brgemm from 2 rows on"`.
        hands_on: once compiled, the layers that get codes from this one in place of floats, after the
            activation: `"gelu encoder.1.fc2"`; empty where it makes floats.
        recorded: the histogram of the recorded state, if it has one.

    Example: see `report`.
    """

    name: str
    calls: int
    values: int
    output_sqnr: float | None
    input_sqnr: float | None
    predicted_input_sqnr: float | None
    clipping: float | None
    rounding: float | None
    saturated: float | None
    weight_sqnr: float
    model_sqnr: float | None
    milliseconds: float | None
    time_share: float | None
    path: str
    hands_on: str
    recorded: picture.Recorded | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Report:
    """What `report` found. Prints as a table, worst layer first.

    Attributes:
        layers: one LayerReport for each observed layer, worst first. Worst by `rank`: `"quantize"`,
            the layer that alone does the most to the model's output; `"float"`, the one that helps
            most when it stays in float; None, the one with the most loss in its own output. Layers
            that never ran come last.
        model_sqnr: dB, the output of the model with all layers quantized.
        milliseconds: a forward pass of that model; median over batches.
        batches: how many batches were run.
        rank: as given to `report`.

    Example: see `report`.
    """

    layers: tuple[LayerReport, ...]
    model_sqnr: float
    milliseconds: float
    batches: int
    rank: Rank | None

    def __str__(self) -> str:
        return _table(self)

    def to_json(self) -> str:
        """Return the report as JSON: an object with `layers`, a list, and what is of the whole model.

        What is not known is null. The numbers that JSON lacks are the strings "inf", "-inf" and "nan",
        which `float()` reads.
        """
        whole = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"layers": self._rows()}
        return json.dumps(_valid(whole), indent=2, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """Return the layers as CSV, a row each, worst first.

        What is not known is empty; `inf`, `-inf` and `nan` are written so. `float()` reads each number back exactly.
        """
        text = io.StringIO()
        columns = [f.name for f in dataclasses.fields(LayerReport) if f.name != "recorded"]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows())
        return text.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file: `.json`, `.csv`, or a picture, `.png`, `.svg` or `.pdf`.

        A new file is written beside `path` and renamed, so nobody reads half of one.

        Raises:
            ValueError: another suffix.
            ImportError: a picture, and matplotlib is not installed.
        """
        suffix = _suffix(path, _SUFFIXES)
        if suffix in _PICTURES:
            self.plot(path)
            return
        with replacing(path) as file:
            file.write((self.to_json() if suffix == ".json" else self.to_csv()).encode())

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw a bar for each layer: signal-to-noise ratios, and the shares of the input's error.

        Args:
            path: a `.png`, `.svg` or `.pdf` to write; None: the figure is only returned.

        Returns:
            the matplotlib figure, which pyplot knows nothing of.

        Raises:
            ValueError: another suffix.
            ImportError: matplotlib is not installed.
        """
        return _drawn(path, lambda: picture.layers(self))

    def plot_layer(self, name: str, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the recorded histogram of a layer's input, and the chosen range on it.

        The density is counts by input unit, so that bins of any width are comparable. Where the input
        has several scales, their histograms are summed, and the range drawn is the widest.

        Args:
            name: the name of one of `layers`.
            path: as `plot`.

        Returns:
            as `plot`.

        Raises:
            ValueError: no layer is called so, its state has no histogram, or another suffix.
            ImportError: matplotlib is not installed.
        """
        found = [layer for layer in self.layers if layer.name == name]
        if not found:
            known = ", ".join(repr(layer.name) for layer in self.layers[:5])
            more = f" and {len(self.layers) - 5} more" if len(self.layers) > 5 else ""
            raise ValueError(f"no layer of the report is called {name!r}; use one of {known}{more}")
        recorded = found[0].recorded
        if recorded is None:
            raise ValueError(
                f"{name}: the recorded state has no histogram; prepare with "
                f"QuantSpec(..., observer=fsq.Histogram()) and calibrate again"
            )
        return _drawn(path, lambda: picture.histogram(found[0], recorded))

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer) if f.name != "recorded"}
            for layer in self.layers
        ]


def report(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Tensor | None] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    rank: Rank | None = "quantize",
    config: StaticQuantConfig | None = None,
    min_rows: int = 1,
    on_unfit: Literal["refuse", "float"] = "refuse",
) -> Report:
    """Measure what quantization will cost, layer by layer; change nothing.

    Each batch runs through the float model, where every layer's quantized twin gets the float input
    beside it, then through the model with all twins in place, and for a ranking once more for each
    layer: layers + 2 forward passes a batch. The model runs in evaluation mode and eagerly, also where
    it is compiled, and as often as it draws random numbers it draws the same. Sums are in float64.

    When the call is over, or has raised, the model's records, parameters, buffers, modes and hooks are
    as they were. Meanwhile its layers compute other things, so no other thread may use it.

    With the first batch the quantized model is captured as `torch.compile` does it, to see which layers
    hand codes on.

    Times are those of this eager run, of twins without the float layers beside them; on CUDA the
    device is waited for before and after each layer, so they compare layers and are no benchmark.

    Args:
        model: a calibrated model that is not converted yet.
        batches: as `calibrate` takes them; a few that were not calibrated with show what is lost on
            unseen data.
        mask: as for `calibrate`; what it leaves out does not count, in the inputs and outputs of layers
            and in that of the model, where their leading axes are the mask's.
        output: from what the model returns to the tensor of real values that is compared. Default:
            the tensor, or the first one of a tuple, list, mapping or dataclass.
        rank: `"quantize"`: measure the model with each layer alone quantized; `"float"`: with each
            alone left in float; None: neither, for two forward passes a batch.
        config, min_rows, on_unfit: as `convert_` takes them; a layer that they leave in float is in no row, and
            stays float.

    Raises:
        CalibrationError: layers are unfit, each with its reason; all layers are, for `"float"`.
        ValueError: the model has no observed layer, there are no batches, `rank` or `on_unfit` is another value,
            the config is of another dtype, `mask` gives positions that no layer's input has, or the compared
            output changes its shape.
        TypeError: what is compared is no tensor of real values; `mask` gives no bool tensor.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
        >>> _ = bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        >>> _ = bridge.calibrate(model, torch.randn(3, 16, 8))
        >>> found = bridge.report(model, torch.randn(3, 16, 8))
        >>> sorted(layer.name for layer in found.layers), found.batches
        (['0', '2'], 3)
        >>> found.model_sqnr < min(layer.model_sqnr for layer in found.layers)
        True
    """
    if rank not in ("quantize", "float", None):
        raise ValueError(f"rank={rank!r}; use one of 'quantize', 'float', None")
    check_module(model)
    if config is not None:
        check_config(config)
    check_batches(batches)
    check_function("mask", mask, "a batch to a bool tensor")
    check_function("output", output, "what the model returns to the tensor to compare")
    check_counts(min_rows=min_rows)
    layers = _layers(model, config, min_rows, on_unfit)
    choose_paths(model)
    whole = _Whole(model, layers, output or _first_tensor, rank)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _stand_in(model, layers):
        for batch in batches:
            if not whole.seconds:
                whole.capture(batch)
            keep = mask_of(model, batch, mask)
            whole.add(batch, keep)
            if mask is not None:
                check_fitted(keep, any(layer.masked for layer in layers))
    if not whole.seconds:
        raise ValueError("there were no batches to report on; give at least one (an iterator is used up once)")
    return whole.result()


# What is measured of a layer.


@dataclass
class _Ratio:
    """A signal-to-noise ratio that is summed up."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, other: Tensor, keep: Tensor | None = None) -> None:
        difference = _kept(exact.double() - other.double(), keep)
        self.signal += _square(_kept(exact, keep))
        self.noise += _square(difference)

    @property
    def db(self) -> float:
        return _db(self.signal, self.noise)


def _db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else ratio - math.inf  # a NaN stays one


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x[keep]


class _Layer:
    """An observed layer, its quantized twin, and what was measured of the two.

    `forward` stands in for the observed layer's own while a report is made.
    """

    def __init__(self, name: str, observed: Any, config: StaticQuantConfig | None) -> None:
        self.name = name
        self.observed = observed
        # Bound before `forward` stands in for it.
        self.exact: Callable[..., Any] = observed.forward
        self.spec: fsq.QuantSpec = observed.act_obs.spec
        self.qp: fsq.QParams = qparams_of(observed.act_obs)
        try:
            self.twin = quantized_layer(config, observed)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{name}: {error}") from error
        self.form = "float"
        self.keep: Tensor | None = None
        self.masked = False
        self.calls = 0
        self.values = 0
        self.saturated = 0
        self.output = _Ratio()
        self.signal = self.clipping = self.rounding = 0.0
        self.ran = False
        self.spent = 0.0
        self.seconds: list[float] = []
        self.shares: list[float] = []
        self.alone = _Ratio()
        self.hands_on = ""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.form == "captured":
            return self.twin(*args, **kwargs)
        if self.form == "quantized":
            device = _device((*args, *kwargs.values()))
            _wait(device)
            start = time.perf_counter()
            y = self.twin(*args, **kwargs)
            _wait(device)
            self.spent += time.perf_counter() - start
            return y
        # The observers are silent, so this records nothing.
        y = self.exact(*args, **kwargs)
        if self.form == "measure":
            x = args[0] if args else kwargs["input"]
            self.calls += 1
            self.ran = True
            positions = self.observed.positions
            x = positions(x.detach())
            keep = fit_mask(self.keep, x.shape[:-1])
            self.masked |= keep is not None
            if x.numel():
                exact, other = positions(y), positions(self.twin(*args, **kwargs))
                # A stride leaves fewer positions than the input has.
                self.output.add(exact, other, fit_mask(self.keep, exact.shape[:-1]))
                self._measure(x, keep)
        return y

    def _measure(self, x: Tensor, keep: Tensor | None) -> None:
        error = _kept((x.double() - fsq.fake_quantize(self.spec, x, self.qp).double()).square_(), keep)
        beyond = _kept(fsq.saturates(self.spec, x, self.qp), keep)
        self.values += error.numel()
        self.saturated += int(beyond.sum())
        self.signal += _square(_kept(x, keep))
        self.clipping += float(error[beyond].sum())
        self.rounding += float(error[~beyond].sum())

    def result(self, rank: Rank | None) -> LayerReport:
        error = self.clipping + self.rounding
        weight, spec = weight_of(self.observed).detach(), self.observed.weight_obs.spec
        of_weight = _Ratio()
        of_weight.add(weight, fsq.fake_quantize(spec, weight, weight_qparams(spec, weight)))
        state = self.observed.act_obs.state
        predicted = None
        if histogram_of(self.spec.observer):
            signal, noise, _ = fsq.expected_error(self.spec, state, self.qp)
            predicted = _db(float(signal.sum()), float(noise.sum()))
        seen = self.values > 0
        return LayerReport(
            name=self.name,
            calls=self.calls,
            values=self.values,
            output_sqnr=self.output.db if seen else None,
            input_sqnr=_db(self.signal, error) if seen else None,
            predicted_input_sqnr=predicted,
            clipping=(self.clipping / error if error else 0.0) if seen else None,
            rounding=(self.rounding / error if error else 0.0) if seen else None,
            saturated=self.saturated / self.values if seen else None,
            weight_sqnr=of_weight.db,
            model_sqnr=self.alone.db if rank and self.calls else None,
            milliseconds=statistics.median(self.seconds) * 1e3 if self.seconds else None,
            time_share=statistics.median(self.shares) if self.shares else None,
            path=self.twin.path if isinstance(self.twin, Quantized) else "product of a tensor subclass",
            hands_on=self.hands_on,
            recorded=picture.recorded(self.spec, state, self.qp),
        )


def _layers(model: nn.Module, config: StaticQuantConfig | None, min_rows: int, on_unfit: str) -> list[_Layer]:
    """Return every observed layer of `model` that `convert_` converts, with its twin; refuse what it refuses."""
    observed = observed_layers(model)
    if not observed:
        raise ValueError(
            f"{type(model).__name__} has no observed layers; call prepare_(model, config) and "
            f"calibrate(model, batches) first, and convert_(model) only after the report"
        )
    check_memory(model)
    if config is not None:
        check_rules(config, model)
    quantizes = quantized_by(config)
    chosen = {name: module for name, module in observed.items() if quantizes(module, name)}
    if not chosen:
        raise ValueError("the rules of the config leave every layer in float: there is nothing to report on")
    faults, warning = unfit(chosen, min_rows, on_unfit)
    if warning:
        warnings.warn(warning, stacklevel=3)
    return [
        _Layer(name, module, config and config.of(module, name))
        for name, module in chosen.items()
        if name not in faults
    ]


# What is measured of the whole model.


class _Whole:
    """Runs batches through a model whose layers are stood in for, and compares its outputs."""

    def __init__(
        self, model: nn.Module, layers: list[_Layer], output: Callable[[Any], Tensor], rank: Rank | None
    ) -> None:
        self.model, self.layers, self.output, self.rank = model, layers, output, rank
        self.quantized = _Ratio()
        self.seconds: list[float] = []
        devices = {p.device for p in model.parameters()}
        self.devices = sorted(d.index for d in devices if d.type == "cuda")

    def add(self, batch: Any, keep: Tensor | None) -> None:
        for layer in self.layers:
            layer.keep, layer.masked, layer.ran = keep, False, False
        exact = self.run(_copy(batch), dict.fromkeys(self.layers, "measure"))
        ran = [layer for layer in self.layers if layer.ran]

        for layer in self.layers:
            layer.spent = 0.0
        given = _copy(batch)
        _wait(exact.device)
        start = time.perf_counter()
        found = self.run(given, dict.fromkeys(self.layers, "quantized"))
        _wait(found.device)
        spent = time.perf_counter() - start
        self.seconds.append(spent)
        for layer in ran:
            layer.seconds.append(layer.spent)
            layer.shares.append(layer.spent / spent)
        self.compare(self.quantized, exact, found, keep)

        # A layer that did not run in this batch adds to its sums what all others add.
        one, others, same = ("quantized", "float", exact) if self.rank == "quantize" else ("float", "quantized", found)
        forms = dict.fromkeys(self.layers, others)
        for layer in self.layers if self.rank else ():
            other = self.run(_copy(batch), forms | {layer: one}) if layer.ran else same
            self.compare(layer.alone, exact, other, keep)

    def capture(self, batch: Any) -> None:
        """Find which layers hand codes on where the quantized model is compiled."""
        by_name = {layer.name: layer for layer in self.layers}
        for layer in self.layers:
            layer.form = "captured"
        names = module_names(self.model) | {layer.twin: layer.name for layer in self.layers}
        with torch.random.fork_rng(self.devices):
            given = _copy(batch)
            for chain in capture(lambda: call(uncompiled(self.model), given), names):
                if chain.producer in by_name:  # A part of the model may be converted already.
                    by_name[chain.producer].hands_on = chain.to

    def run(self, batch: Any, forms: Mapping[_Layer, str]) -> Tensor:
        """Run one batch with each layer in the form that is asked for; return the compared output."""
        for layer, form in forms.items():
            layer.form = form
        with torch.random.fork_rng(self.devices):
            y = self.output(call(self.model, batch))
        if not isinstance(y, Tensor) or y.dtype not in REAL_DTYPES:
            got = f"a tensor of {y.dtype}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise TypeError(f"the output to compare is {got}; give output=, from what the model returns to real values")
        # A model may return a buffer that its next forward pass writes to.
        return y.clone()

    @staticmethod
    def compare(ratio: _Ratio, exact: Tensor, other: Tensor, keep: Tensor | None) -> None:
        if exact.shape != other.shape:
            raise ValueError(
                f"the float model's output has shape {tuple(exact.shape)} and the quantized one's "
                f"{tuple(other.shape)}; give output=, to something whose shape does not depend on the data"
            )
        ratio.add(exact, other, fit_mask(keep, exact.shape))

    def result(self) -> Report:
        found = [layer.result(self.rank) for layer in self.layers]

        def badness(layer: LayerReport) -> tuple[bool, float]:
            db = layer.model_sqnr if self.rank else layer.output_sqnr
            if db is None:
                return True, 0.0
            # NaN, an output that was destroyed, is worst of all.
            return False, -math.inf if math.isnan(db) else -db if self.rank == "float" else db

        return Report(
            layers=tuple(sorted(found, key=badness)),
            model_sqnr=self.quantized.db,
            milliseconds=statistics.median(self.seconds) * 1e3,
            batches=len(self.seconds),
            rank=self.rank,
        )


@contextmanager
def _stand_in(model: nn.Module, layers: list[_Layer]) -> Iterator[None]:
    """Let each observed layer compute what its `_Layer` says, with silent observers; leave `model` as it was."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    buffers = [
        (module, dict(module._buffers), [(v, v.clone()) for v in module._buffers.values() if v is not None])
        for module in modules
    ]
    own: dict[nn.Module, Callable[..., Any]] = {layer.observed: layer.forward for layer in layers}
    own |= {module: _identity for module in modules if isinstance(module, ObserverModule)}
    # A user's own forward on an instance; the one of the class is found without.
    before = {module: vars(module)["forward"] for module in own if "forward" in vars(module)}
    try:
        for module in modules:
            # Not eval(), which a class may override to do more.
            module.training = False
        for module, forward in own.items():
            module.forward = forward
        yield
    finally:
        for module in own:
            vars(module).pop("forward", None)
        for module, forward in before.items():
            module.forward = forward
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        # A forward pass may count its calls, or fill a cache.
        for module, held, values in buffers:
            if isinstance(module._buffers, dict):  # a scripted module keeps its own
                module._buffers.clear()
                module._buffers.update(held)
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _identity(x: Tensor) -> Tensor:
    return x


def _device(args: tuple[Any, ...]) -> torch.device | None:
    return next((arg.device for arg in args if isinstance(arg, Tensor)), None)


def _copy(batch: Any) -> Any:
    """Return a batch of its own: a forward pass may write to its inputs, or to a cache among them."""
    return copy.deepcopy(tree_map_only(Tensor, Tensor.detach, batch))


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_tensor(result: Any) -> Any:
    """Return the first tensor of what a model returned, or `result` itself where there is none."""
    parts: Iterable[Any] = ()
    if isinstance(result, Mapping):
        parts = result.values()
    elif isinstance(result, (tuple, list)):
        parts = result
    elif dataclasses.is_dataclass(result):
        parts = (getattr(result, f.name) for f in dataclasses.fields(result))
    return next((part for part in parts if isinstance(part, Tensor)), result)


# The table.

_WIDTH = 100
_LEGEND = {
    "quantize": "alone: of the model's output with this layer alone quantized, worst first;",
    "float": "without: of the model's output with all layers but this quantized, most gained first;",
    None: "worst output first;",
}


def _table(found: Report) -> str:
    ranking = {"quantize": [("alone", 9)], "float": [("without", 9)], None: []}[found.rank]
    heads = [*ranking, ("output", 8), ("weight", 8), ("input", 7), ("pred.", 7), ("clip", 7), ("sat.", 7), ("time", 7)]
    longest = max(len(layer.name) for layer in found.layers)
    width = max(len("layer"), min(_WIDTH - sum(columns for _, columns in heads), longest))
    batches = "batch" if found.batches == 1 else "batches"
    lines = [
        f"model's output {_number(found.model_sqnr)} dB; {len(found.layers)} layers, {found.batches} {batches}, "
        f"{found.milliseconds:.1f} ms a forward pass",
        "",
        f"{'layer':{width}}" + "".join(f"{head:>{columns}}" for head, columns in heads),
    ]
    for layer in found.layers:
        name = f"{picture.short(layer.name, width):{width}}"
        if layer.calls == 0:
            lines.append(f"{name}  never ran in these batches")
            continue
        numbers = [layer.model_sqnr] if ranking else []
        numbers += [layer.output_sqnr, layer.weight_sqnr, layer.input_sqnr, layer.predicted_input_sqnr]
        cells = (*map(_number, numbers), *map(_share, (layer.clipping, layer.saturated, layer.time_share)))
        lines.append(name + "".join(f"{cell:>{columns}}" for cell, (_, columns) in zip(cells, heads, strict=True)))
    paths = Counter(layer.path.partition(" from ")[0] for layer in found.layers)
    lines += ["", *(f"{count} x {path}" for path, count in paths.most_common())]
    half = _WIDTH // 2 - 2
    handing = [
        f"{picture.short(layer.name, half)} -> {picture.short(layer.hands_on, half)}"
        for layer in found.layers
        if layer.hands_on
    ]
    if handing:
        lines += ["compiled, codes are handed on, no floats between:", *sorted(handing)]
    lines += [
        "",
        f"SQNR in dB. {_LEGEND[found.rank]}",
        "output, weight, input: of the layer itself; pred.: of the input, by the recorded state alone.",
        "clip: the part of the input's squared error that is clipping; sat.: input values that saturate;",
        "time: part of a forward pass of the quantized model.",
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    percent = value * 100
    return (
        "0%" if percent == 0 else "<0.1%" if percent < 0.1 else f"{percent:.1f}%" if percent < 10 else f"{percent:.0f}%"
    )


# Files.


def _valid(value: Any) -> Any:
    """Return `value` with the floats that JSON lacks as strings."""
    if isinstance(value, dict):
        return {key: _valid(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_valid(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _suffix(path: str | os.PathLike[str], known: tuple[str, ...]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        raise ValueError(f"{os.fspath(path)!r} has the suffix {suffix!r}; use one of {', '.join(known)}")
    return suffix


def _drawn(path: str | os.PathLike[str] | None, draw: Callable[[], Figure]) -> Figure:
    """Draw a figure and write it to `path`, if there is one; a wrong suffix is refused before the work."""
    suffix = None if path is None else _suffix(path, _PICTURES)
    figure = draw()
    if path is not None and suffix is not None:
        with replacing(path) as file:
            figure.savefig(file, format=suffix[1:], dpi=150)
    return figure
