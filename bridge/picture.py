"""Pictures of a report: the only file that imports matplotlib, and only when something is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import functional_sq as fsq
from functional_sq.observers.histogram import histogram_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bridge.report import LayerReport, Report

__all__ = ["Recorded", "histogram", "layers", "recorded", "short"]

_OWN, _MODEL, _CLIPPING, _ROUNDING = "#4c72b0", "#8c8c8c", "#c44e52", "#dd9f4b"
_COLUMNS = 160
"""Bars across a histogram; narrower ones are joined."""


@dataclass(frozen=True)
class Recorded:
    """A recorded histogram and the range that was chosen; input units.

    Attributes:
        edges: n + 1 ascending edges of bins, within what was seen.
        counts: n, values in each bin.
        low, high: the smallest and the largest value that has a code; the widest of all scales.
        step: the smallest scale.
        scales: how many there are.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    low: float
    high: float
    step: float
    scales: int


def recorded(spec: fsq.QuantSpec, state: fsq.State, qp: fsq.QParams) -> Recorded | None:
    """Return the histogram of a state beside the range of `qp`, or None if it has none.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from bridge.picture import recorded
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Histogram((0, 2), 0))
        >>> state = fsq.observe(spec, fsq.init(spec, (3,)), torch.tensor([-0.5, 0.0, 3.0]))
        >>> found = recorded(spec, state, fsq.calc_qparams(spec, state))
        >>> found.edges, found.counts
        ((-0.5, 1.0, 2.0, 3.0), (2, 0, 1))
    """
    bins = histogram_of(spec.observer)
    if bins is None:
        return None
    counts = state["histogram"].reshape(-1, bins.bins).sum(0).cpu()
    least, most = state["min"].min().double().cpu(), state["max"].max().double().cpu()
    edges = bins.edges()
    # The end bins hold what is beyond them, too.
    edges[0], edges[-1] = -math.inf, math.inf
    edges = edges.clamp(least, most)
    wide = edges.diff() > 0
    # What lies in a bin without width, such as the only value of a constant, goes with its neighbour.
    owner = (wide.cumsum(0) - 1).clamp(min=0)
    joined = torch.zeros(max(1, int(wide.sum())), dtype=torch.int64).scatter_add(0, owner, counts)
    ends = torch.cat([edges[:-1][wide], most[None]]) if bool(wide.any()) else torch.stack([least, most])
    scale, zero_point = (t.double() for t in qp)
    qmin, qmax = spec.bounds
    return Recorded(
        edges=tuple(ends.tolist()),
        counts=tuple(joined.tolist()),
        low=float(((qmin - zero_point) * scale).min()),
        high=float(((qmax - zero_point) * scale).max()),
        step=float(scale.min()),
        scales=scale.numel(),
    )


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, which is not installed; pip install 'functional-sq[report]', "
            "or save the report as .json or .csv"
        ) from error
    # Not pyplot: it keeps every figure in a global list, and may want a display.
    return Figure(figsize=(width, height), layout="constrained")


def layers(report: Report) -> Figure:
    """Draw a row for each layer: signal-to-noise ratios, and what its input's error is made of."""
    names = [layer.name for layer in report.layers]
    rows = range(len(names))
    # Small enough to be no wider than a page, tall enough for every name.
    figure = _figure(11, 1.6 + 0.22 * max(len(names), 3))
    ranked = report.rank is not None
    axes = figure.subplots(1, 3 if ranked else 2, sharey=True, squeeze=False)[0]
    title = {"quantize": "this layer alone quantized", "float": "this layer alone in float"}
    own, error = axes[-2], axes[-1]
    for axis in axes[:-1]:
        axis.set_xlabel("SQNR, dB", fontsize=8)
    if report.rank is not None:
        _bars(axes[0], rows, [layer.model_sqnr for layer in report.layers], _MODEL)
        axes[0].set_title(f"model's output,\n{title[report.rank]}", fontsize=9)
        if math.isfinite(report.model_sqnr):
            axes[0].axvline(report.model_sqnr, color="black", linewidth=1, linestyle="--")
            axes[0].set_xlabel(f"SQNR, dB (dashed: all quantized, {report.model_sqnr:.1f})", fontsize=8)
    _bars(own, rows, [layer.output_sqnr for layer in report.layers], _OWN)
    own.set_title("layer's output,\nits own loss", fontsize=9)

    clipping = [(layer.clipping or 0.0) * 100 for layer in report.layers]
    rounding = [(layer.rounding or 0.0) * 100 for layer in report.layers]
    error.barh(rows, clipping, color=_CLIPPING, height=0.75, label="clipping")
    error.barh(rows, rounding, left=clipping, color=_ROUNDING, height=0.75, label="rounding")
    error.set_xlim(0, 100)
    error.set_xlabel("share, %", fontsize=8)
    # The legend stands in the title's second line: inside, it would hide bars.
    error.set_title("input's squared error\n", fontsize=9)
    error.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1, frameon=False)

    axes[0].set_yticks(rows, [short(name) for name in names], fontsize=7)
    axes[0].set_ylim(len(names) - 0.4, -0.6)  # worst at the top
    for axis in axes:
        axis.tick_params(axis="x", labelsize=8)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="x", linewidth=0.4, alpha=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure


def _bars(axis: Any, rows: range, values: list[float | None], color: str) -> None:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    axis.barh(rows, [v if v is not None and math.isfinite(v) else 0.0 for v in values], color=color, height=0.75)
    axis.set_xlim(min([0.0, *finite]), max([1.0, *finite]) * 1.14)
    for row, value in zip(rows, values, strict=True):
        text = "never ran" if value is None else f"{value:.1f}"
        x = value if value is not None and math.isfinite(value) else 0.0
        axis.annotate(text, (max(x, 0.0), row), (2, 0), textcoords="offset points", va="center", fontsize=6)


def histogram(layer: LayerReport, found: Recorded) -> Figure:
    """Draw the density of a layer's recorded input on an axis that shows both the steps and the outliers."""
    figure = _figure(8, 3.8)
    axis = figure.subplots()
    # Linear near 0 and logarithmic beyond, so that the ends of the data and of the range are in one picture.
    width = 8 * found.step
    edges, density = _density(found, width)
    axis.stairs(density, edges, fill=True, color=_OWN)
    axis.set_xscale("asinh", linear_width=width)
    axis.set_yscale("log")
    seen = [d for d in density if d > 0]
    axis.set_ylim(min(seen) / 3, max(seen) * 3)
    least, most = min(edges[0], found.low), max(edges[-1], found.high)
    margin = 0.04 * (math.asinh(most / width) - math.asinh(least / width))
    left, right = (width * math.sinh(math.asinh(end / width) + m) for end, m in ((least, -margin), (most, margin)))
    axis.axvspan(left, found.low, color=_CLIPPING, alpha=0.15, linewidth=0, label="beyond the range")
    axis.axvspan(found.high, right, color=_CLIPPING, alpha=0.15, linewidth=0)
    which = "range" if found.scales == 1 else f"widest range of {found.scales} scales"
    for end, label in ((found.low, f"{which}: {found.low:.4g} to {found.high:.4g}"), (found.high, None)):
        axis.axvline(end, color=_CLIPPING, linewidth=1.2, label=label)
    axis.set_xlim(left, right)
    ticks = _ticks(left, right, width)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_title(f"{short(layer.name, 80)}\n", fontsize=10)
    axis.legend(fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), borderaxespad=0.1, frameon=False)
    axis.set_xlabel(f"input (linear near 0, logarithmic from about ±{width:.2g})", fontsize=8)
    axis.set_ylabel("density, 1 / input unit", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(linewidth=0.4, alpha=0.6)
    axis.set_axisbelow(True)
    return figure


def _ticks(left: float, right: float, width: float) -> list[float]:
    """Return 0 and round numbers that are far enough apart on an asinh axis to be read; powers of ten first."""
    decades = range(math.floor(math.log10(width)) - 1, math.ceil(math.log10(max(-left, right))) + 1)
    wanted = [0.0, *(sign * digit * 10.0**e for digit in (1, 5, 2) for e in reversed(decades) for sign in (1, -1))]
    place = {tick: math.asinh(tick / width) for tick in wanted}
    least = 0.07 * (math.asinh(right / width) - math.asinh(left / width))
    kept: list[float] = []
    for tick in wanted:
        if left <= tick <= right and all(abs(place[tick] - place[other]) >= least for other in kept):
            kept.append(tick)
    return sorted(kept)


def _density(found: Recorded, width: float) -> tuple[list[float], list[float]]:
    """Return edges and density of bars that are visibly wide on an asinh axis, linear within `width`.

    The recorded bins near 0 are too narrow to be seen, and a value or none in each would be noise.
    """
    edges, total = found.edges, sum(found.counts)
    if edges[0] == edges[-1]:
        # A constant: a bar of one step.
        half = found.step / 2
        return [edges[0] - half, edges[-1] + half], [1 / found.step]
    least = (math.asinh(edges[-1] / width) - math.asinh(edges[0] / width)) / _COLUMNS
    kept, density, held = [edges[0]], [], 0
    for edge, count in zip(edges[1:], found.counts, strict=True):
        held += count
        if math.asinh(edge / width) - math.asinh(kept[-1] / width) >= least or edge == edges[-1]:
            density.append(held / total / (edge - kept[-1]))
            kept.append(edge)
            held = 0
    return kept, density


def short(name: str, width: int = 44) -> str:
    """Shorten a dotted name in its middle: whole parts are left out, numbers last.

    Example:
        >>> from bridge.picture import short
        >>> short("model.decoder.layers.11.attention.out_proj", 32)
        'model.….11.attention.out_proj'
    """
    parts = name.split(".")
    while len(".".join(parts)) > width:
        # What tells layers apart is at either end, and the number of the layer.
        inner = [i for i in range(1, len(parts) - 1) if not parts[i].isdigit() and parts[i] != "…"]
        if not inner:
            text = ".".join(parts)
            tail = (width - 1) * 2 // 3
            return f"{text[: width - 1 - tail]}…{text[-tail:]}"
        parts[min(inner, key=lambda i: abs(2 * i - len(parts) + 1))] = "…"
        parts = [part for i, part in enumerate(parts) if part != "…" or parts[i - 1] != "…"]
    return ".".join(parts)
