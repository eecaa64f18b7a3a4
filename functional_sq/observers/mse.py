"""Mse: the range of least squared error, computed from a histogram in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sq.formats import Float8
from functional_sq.observer import State
from functional_sq.observers.histogram import Histogram, histogram_of, search_blocks
from functional_sq.qparams import MappingType, QParams, check_qparams, from_range
from functional_sq.spec import QuantSpec, check_spec

__all__ = ["Mse", "SquaredError", "code_table", "expected_error"]

_OCTAVES = 12
"""How far below the extreme a threshold is looked for. A value of magnitude m seen once in N, if
clipped, costs m**2 / N: with N = 2**24 a threshold below m / 2**12 cannot be the best."""

_WINDOW = 20
"""Octaves below the extreme whose bins are kept apart. What is smaller is 2**-20 of the extreme:
its squared error is below 2**-40 of the extreme's square, whatever its code."""

_CHUNK = 1 << 18
"""Elements (blocks x candidates x bin edges) in memory at once, twice as many for ASYMMETRIC: 2 MiB in float64 stay in
the cache."""


@dataclass(frozen=True, repr=False)
class Mse(Histogram):
    """Use the range whose quantization error, clipping and rounding, has the least mean square.

    The error is that of the very grid which the spec makes of a range: its format, mapping, bounds,
    scale and zero point. Within a bin values are taken as uniform (within the observed extremes, and
    the extremes themselves as points), and the squared error of a uniform density has a closed form.
    In units of the scale, let k be the code value nearest to t, that is the largest or smallest one
    where t is beyond it. Then

        G(t) = integral from 0 to t of (u - k(u))**2 du = A(k) + (t - k)**3 / 3

    where A(k), the sum of d**3 / 12 over the gaps d between code values from 0 to k, is k / 12 for
    integers. A bin [a, b] with n values adds n (G(b) - G(a)) / (b - a).

    Thresholds are searched down to 2**-12 of the extreme: for the symmetric mappings one threshold
    on |x|, to 0.5 %; for ASYMMETRIC one on |x|, then both ends on a grid around it, refined twice. The
    range of everything seen is a candidate, so the result is not worse than `MinMax` as the histogram
    sees it. Memory: blocks are taken in chunks of about 2**18 (block, candidate, edge) triples, twice
    that for ASYMMETRIC, or of one block where that has more.

    Args:
        exponents: see `Histogram`.
        mantissa_bits: see `Histogram`.

    Source: the criterion is that of `torchao.quantization.AffineQuantizedMSEObserver`, which searches
    the data itself, 100 linear steps; its closed form for integers is Banner et al. 2019
    (arXiv:1810.05723), with the histogram in place of a fitted density.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.observers.mse import Mse
        >>> spec = fsq.QuantSpec(torch.int4, fsq.PerTensor(), observer=Mse())
        >>> x = torch.cat([torch.linspace(-1, 1, 999), torch.tensor([2.0])])
        >>> lo, hi = spec.observer.range(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
        >>> bool(-1 <= lo < -0.9), bool(0.9 < hi < 1.2)
        (True, True)
    """

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        edges, window = self.edges(device=state["min"].device), min(self.half, _WINDOW << self.mantissa_bits)
        search = _asymmetric if spec.mapping is MappingType.ASYMMETRIC else _symmetric
        chunk = max(1, _CHUNK // ((2 * window + 2) * 80))
        return search_blocks(state, lambda *rows: search(_Model(spec, edges, window, *rows)), chunk)


class SquaredError(NamedTuple):
    """Sums over the values that a state has counted; float64, one for each scale, input units squared.

    Attributes:
        signal: of the squares of the values themselves.
        total: of the squared differences that quantize and dequantize make.
        clipping: the part of `total` that comes from values which saturate; the rest is rounding.

    Example: see `expected_error`.
    """

    signal: Tensor
    total: Tensor
    clipping: Tensor


def expected_error(spec: QuantSpec, state: State, qp: QParams) -> SquaredError:
    """Compute from a histogram what squared error quantization with `qp` makes of the data it counted.

    The closed form that `Mse` searches with: within a bin values are taken as uniform. It is so an
    estimate, close where bins are wider than steps or the data is smooth; 10 log10(signal / total) is
    the signal-to-noise ratio in dB.

    Args:
        spec: the quantization; its observer is a Histogram, or wraps one, with the bins of `state`.
        state: what was recorded.
        qp: scale and zero point, of the shape of the statistics; need not come from `state`.

    Returns:
        three tensors of the statistics' shape. 0 where nothing was seen, NaN where NaN or Inf was.

    Raises:
        TypeError: `qp` is not a pair of tensors.
        ValueError: `state` has no histogram that the spec's observer reads, or `qp` another shape.

    Source: Banner et al. 2019 (arXiv:1810.05723), equations 3 to 5, with the histogram in place of a
    fitted density.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), quant_min=-127, observer=fsq.Histogram())
        >>> x = torch.linspace(-2, 2, 1001)
        >>> state = fsq.observe(spec, fsq.init(spec, x.shape), x)
        >>> qp = fsq.QParams(torch.tensor([1 / 127]), torch.tensor([0], dtype=torch.int32))
        >>> signal, total, clipping = fsq.expected_error(spec, state, qp)
        >>> bool(abs(total / (x - x.clamp(-1, 1)).square().sum() - 1) < 0.01), bool(0.999 < clipping / total < 1)
        (True, True)
    """
    check_spec(spec)
    bins = histogram_of(spec.observer)
    if bins is None:
        raise ValueError(f"{spec.observer} records no histogram; record with Histogram() and put it into the spec")
    spec.observer.check_state(state, exact=False)
    qp = check_qparams(qp)
    count, lo, hi = state["count"], state["min"], state["max"]
    if qp.scale.shape != count.shape:
        raise ValueError(
            f"qp has the shape {tuple(qp.scale.shape)}, and the statistics {tuple(count.shape)}; they must be equal"
        )
    edges = bins.edges(device=lo.device)
    rows = (state["histogram"].reshape(-1, bins.bins), *(t.reshape(-1) for t in (lo, hi, *qp)))
    found = []
    window, chunk = min(bins.half, _WINDOW << bins.mantissa_bits), max(1, _CHUNK // (bins.bins + 2))
    for *recorded, scale, zero_point in zip(*(torch.split(row, chunk) for row in rows), strict=True):
        model = _Model(spec, edges, window, *recorded)
        found.append(model.squared_error(QParams(scale[:, None], zero_point[:, None])))
    seen, fit = count > 0, lo.isfinite() & hi.isfinite()
    return SquaredError(
        *(
            # Sums of large terms that cancel: an error of 0 comes out as a small number of either sign.
            torch.cat(part).reshape(count.shape).clamp(min=0).masked_fill(~fit, float("nan")).masked_fill(~seen, 0.0)
            for part in zip(*found, strict=True)
        )
    )


class _Best(NamedTuple):
    """The best candidate of each block."""

    error: Tensor
    lo: Tensor
    hi: Tensor
    at: Tensor


class _Model:
    """The density that a histogram stands for, and the error of a range under it; one row a block.

    Sum over bins of density * (G(b) - G(a)) is a weighted sum of G over the edges, so the error of a
    candidate is one product of a matrix with a vector.
    """

    def __init__(self, spec: QuantSpec, edges: Tensor, window: int, histogram: Tensor, lo: Tensor, hi: Tensor) -> None:
        self.spec, self.lo, self.hi = spec, lo[:, None], hi[:, None]
        least, most = self.lo.double(), self.hi.double()
        self.extreme = torch.maximum(-least, most)
        edges, count = _window(edges, window, histogram, self.extreme)
        # The end bins also hold what is beyond them; clamped, every edge is within the data.
        edges[:, 0], edges[:, -1] = float("-inf"), float("inf")
        self.edges = torch.minimum(torch.maximum(edges, least), most)
        width = self.edges.diff(dim=-1)
        # The extremes were seen: one value of their bin is a point, or all where the bin has no width.
        flat = count.masked_fill(width > 0, 0)
        count = count - flat
        self.points = []
        for end, side in ((least, edges[:, :-1] <= least), (most, edges[:, 1:] >= most)):
            # The last bin that starts at or below the minimum; the first that ends at or above the maximum.
            at = side.sum(-1, keepdim=True) - 1 if end is least else (~side).sum(-1, keepdim=True)
            at = at.clamp(0, count.shape[-1] - 1)
            held = count.gather(-1, at).clamp(max=1)
            count = count.scatter_add(-1, at, -held)
            self.points.append(held)
        # A bin without width lies at one of the extremes.
        middle = (least + most) / 2
        self.points[0] = self.points[0] + (flat * (self.edges[:, 1:] <= middle)).sum(-1, keepdim=True)
        self.points[1] = self.points[1] + (flat * (self.edges[:, 1:] > middle)).sum(-1, keepdim=True)
        density = torch.where(width > 0, count / width, 0.0)
        # d0 (G1 - G0) + d1 (G2 - G1) + ... = sum of G_j (d_(j-1) - d_j)
        zero = torch.zeros_like(self.lo, dtype=torch.float64)
        self.weights = (-torch.cat([zero, density, zero], -1).diff(dim=-1))[..., None]

    def error(self, lo: Tensor, hi: Tensor) -> Tensor:
        """Return the sum of squared errors of each candidate range; (blocks, candidates)."""
        return self.total(from_range(self.spec, lo, hi))

    def total(self, qp: QParams) -> Tensor:
        """Return the sum of squared errors of each scale and zero point; (blocks, candidates)."""
        scale = qp.scale.double()
        t = self.edges[:, None, :] * (1 / scale)[..., None]
        if isinstance(self.spec.format, Float8):
            codes, area = code_table(self.spec.dtype, t.device)
            nearest = torch.bucketize(t, (codes[1:] + codes[:-1]) / 2)
            r = t.sub_(codes[nearest])
            integral = (r * r).mul_(r).div_(3).add_(area[nearest])
        else:
            qmin, qmax = self.spec.bounds
            zero_point = qp.zero_point.double()[..., None]
            k = torch.minimum(torch.maximum(t.round(), qmin - zero_point), qmax - zero_point)
            r = t.sub_(k)
            integral = (r * r).mul_(r).mul_(4).add_(k).div_(12)
        # The sum runs over n (t - k)**2 with t in steps and the density per input unit: * scale**3.
        total = (integral @ self.weights)[..., 0] * scale**3
        return total + (self.points[0] * r[..., 0] ** 2 + self.points[1] * r[..., -1] ** 2) * scale**2

    def squared_error(self, qp: QParams) -> SquaredError:
        """Return the sums of one scale and zero point for each block; qp and each sum (blocks, 1)."""
        ends = self.edges[:, [0, -1]]
        signal = self._integrate(self.edges**3 / 3) + self._at_ends(ends**2)
        # The code values at both ends, and how far beyond them a value still rounds to one: quantize
        # rounds an integer before it limits it, and limits a float8 before it rounds it.
        beyond = 0.0 if isinstance(self.spec.format, Float8) else 0.5
        scale, zero_point = qp.scale.double(), qp.zero_point.double()
        first, last = self.spec.bounds
        low, high = (first - zero_point) * scale, (last - zero_point) * scale
        least, most = low - beyond * scale, high + beyond * scale
        # An integral of the squared distance to the last code, over what saturates alone.
        cut = (torch.maximum(self.edges, most) - high) ** 3 + (torch.minimum(self.edges, least) - low) ** 3
        # Of the extremes by the very steps of quantize, which may be rounded, or rounded to even, across a border.
        steps = self.spec.format.steps(torch.cat([self.lo, self.hi], -1), qp)
        clipped = torch.where(steps > last, (ends - high) ** 2, torch.where(steps < first, (ends - low) ** 2, 0.0))
        clipping = self._integrate(cut / 3) + self._at_ends(clipped)
        return SquaredError(signal, self.total(qp), clipping)

    def _integrate(self, integral: Tensor) -> Tensor:
        """Sum density * (integral at b - integral at a) over the bins; (blocks, edges) -> (blocks, 1)."""
        return (integral[:, None] @ self.weights)[..., 0]

    def _at_ends(self, value: Tensor) -> Tensor:
        """Sum a function of the extremes over the values that lie at them; (blocks, 2) -> (blocks, 1)."""
        return self.points[0] * value[:, :1] + self.points[1] * value[:, 1:]

    def best(self, below: Tensor, above: Tensor) -> _Best:
        """Return the best of the ranges [-below, above], limited to what was seen and 0, which a scale is made for."""
        least, most = self.lo.clamp(max=0), self.hi.clamp(min=0)
        lo = torch.minimum(torch.maximum((-below).to(least.dtype), least), most)
        hi = torch.minimum(torch.maximum(above.to(least.dtype), least), most)
        # Where 0 was not seen, the end on its side is what was, and changes no scale.
        lo = torch.where(self.lo > 0, torch.minimum(self.lo, hi), lo)
        hi = torch.where(self.hi < 0, torch.maximum(self.hi, lo), hi)
        error = self.error(lo, hi)
        index = _least(error, lo, hi)
        return _Best(error.gather(-1, index), lo.gather(-1, index), hi.gather(-1, index), index)


def _window(edges: Tensor, window: int, histogram: Tensor, extreme: Tensor) -> tuple[Tensor, Tensor]:
    """Keep, of each row, the `window` bins of either sign below the extreme; the rest is the middle bin."""
    half = histogram.shape[-1] // 2
    # Bins of a magnitude are numbered 1 to half; the first one kept is `start` + 1.
    # `right`: an extreme that is itself an edge is in the bin that starts there.
    top = torch.bucketize(extreme, edges[half + 1 :].contiguous(), right=True).clamp(max=half)
    start = (top - window).clamp(min=0)
    steps = torch.arange(1, window + 1, device=edges.device)
    above, below = half + start + steps, half - start - steps.flip(0)
    total = torch.nn.functional.pad(histogram.cumsum(-1), (1, 0))
    middle = total.gather(-1, half + start + 1) - total.gather(-1, half - start)
    count = torch.cat([histogram.gather(-1, below), middle, histogram.gather(-1, above)], -1)
    first = torch.cat([below, half - start], -1)
    return torch.cat([edges[first], edges[torch.cat([half + start, above], -1) + 1]], -1), count.double()


def code_table(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ascending values of a float8, 0 more than once, and the integral of the squared error up to each."""
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(dtype).double()
    # NaN and Inf become further zeros, which are no gaps.
    codes = codes.nan_to_num(0.0, 0.0, 0.0).sort().values
    area = torch.nn.functional.pad(codes.diff() ** 3 / 12, (1, 0)).cumsum(0)
    return codes, area - area[torch.searchsorted(codes, codes.new_zeros(1))]


def _symmetric(model: _Model) -> tuple[Tensor, Tensor]:
    """Search one threshold on |x|: octaves in six steps, then twice six steps within one."""

    def tried(octaves: Tensor) -> _Best:
        t = model.extreme * torch.exp2(-octaves)
        return model.best(t, t)

    steps = torch.arange(6 * _OCTAVES, dtype=torch.float64, device=model.lo.device)[None] / 6
    rounds = [tried(steps)]
    centre = steps.expand(model.lo.shape[0], -1).gather(-1, rounds[0].at)
    around = torch.arange(-5, 6, dtype=torch.float64, device=model.lo.device) / 36
    for near in (around, around / 6):
        octaves = (centre + near).clamp(min=0)
        rounds.append(tried(octaves))
        centre = octaves.gather(-1, rounds[-1].at)
    return _winner(model, rounds)


def _asymmetric(model: _Model) -> tuple[Tensor, Tensor]:
    """Search one threshold on |x|, then each end as a multiple, 0 to 2, of what that one leaves."""
    octaves = torch.arange(3 * _OCTAVES, dtype=torch.float64, device=model.lo.device)[None] / 3
    t = model.extreme * torch.exp2(-octaves)
    rounds = [model.best(t, t)]
    lo, hi = -rounds[0].lo.double().clamp(max=0), rounds[0].hi.double().clamp(min=0)
    lower = upper = torch.ones_like(lo)
    for reach, parts in ((6, 6), (3, 20), (3, 70)):
        near = torch.arange(-reach, reach + 1, dtype=torch.float64, device=lo.device) / parts
        lowers, uppers = ((end + near).clamp(min=0) for end in (lower, upper))
        grid = [
            m.flatten(1)
            for m in (lowers[:, :, None].expand(-1, -1, near.numel()), uppers[:, None, :].expand(-1, near.numel(), -1))
        ]
        rounds.append(model.best(lo * grid[0], hi * grid[1]))
        lower, upper = (m.gather(-1, rounds[-1].at) for m in grid)
    return _winner(model, rounds)


def _winner(model: _Model, rounds: list[_Best]) -> tuple[Tensor, Tensor]:
    whole = model.best(-model.lo.double(), model.hi.double())
    error, lo, hi = (torch.cat([getattr(r, name) for r in (whole, *rounds)], -1) for name in ("error", "lo", "hi"))
    index = _least(error, lo, hi)
    return lo.gather(-1, index)[:, 0], hi.gather(-1, index)[:, 0]


def _least(error: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Return the index of the least error; of the widest range where errors differ by rounding alone."""
    # An error of 0 comes out of the sum over bins as a small number of either sign.
    same = error.amin(-1, keepdim=True).clamp(min=0) * (1 + 1e-6) + error.amax(-1, keepdim=True) * 1e-12
    return (hi - lo).masked_fill(error > same, -1).argmax(-1, keepdim=True)
