"""Entropy: the threshold after which the quantized histogram tells most about the data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from functional_sq.formats import Float8
from functional_sq.observer import State
from functional_sq.observers.histogram import Histogram, search_blocks
from functional_sq.observers.mse import code_table
from functional_sq.qparams import QParams, from_range

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["Entropy"]

_OCTAVES = 8
"""Octaves below the extreme in which thresholds lie. The source goes down 4 (128 of 2048 bins)."""

_CHUNK = 1 << 19
"""Elements (blocks x candidates x bins) in memory at once: 4 MiB in float64."""


@dataclass(frozen=True, repr=False)
class Entropy(Histogram):
    """Use the range for which quantizing loses least information: the KL calibration of TensorRT.

    One threshold t on |x|: the range is `[max(min, -t), min(max, t)]`. Candidates are the extreme of
    what was seen and the bin edges of the 8 octaves below it. For each, with the grid that the spec
    makes of this range:

    * P: the histogram, with what is beyond a threshold added to the last bin within it.
    * Q: the histogram within the thresholds, without what is beyond; the bins whose middle has the
      same nearest code make one level, and the count of a level is spread over those of its bins in
      which P is not 0, in proportion to their widths.
    * The candidate with the least `KL(P || Q) = sum p log(p / q)`, P and Q divided by their sums, is
      taken; the widest of equals. Where P has values and Q has none, it is infinite.

    What differs from the source: its 2048 bins are equally wide, so it spreads a level evenly; ours
    are not, and widths make the same uniform density of it. It takes the histogram of |x|; ours is
    signed, as the codes are, and has two last bins. It has one threshold, hence so does ASYMMETRIC: a
    side that ends before t is not clipped, and for data of one sign the two definitions are the same.
    Its 128 levels become the codes of the spec, integers or float8. A bin wider than a level is a
    level of its own, as for the source where there are as many levels as bins. So is the bin of 0,
    whose width is none of the data's: zeros are exact in any range.

    Args:
        exponents: see `Histogram`.
        mantissa_bits: see `Histogram`.

    Source: Migacz, 8-bit Inference with TensorRT, GTC 2017, and its pseudocode.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.observers.entropy import Entropy
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Entropy())
        >>> x = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([20.0])])
        >>> lo, hi = spec.observer.range(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
        >>> bool(hi < 2)
        True
    """

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        candidates = _OCTAVES << self.mantissa_bits
        search = partial(_search, spec, self.edges(device=state["min"].device), candidates)
        return search_blocks(state, search, max(1, _CHUNK // (candidates * self.bins)))


def _search(
    spec: QuantSpec, edges: Tensor, candidates: int, histogram: Tensor, lo: Tensor, hi: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the best range of each row: histogram (blocks, bins), lo and hi (blocks,)."""
    half = histogram.shape[-1] // 2
    extreme = torch.maximum(-lo, hi).double()[:, None]
    # The interval of magnitudes that has the extreme, and those below it; 0 is the middle bin.
    top = torch.bucketize(extreme, edges[half + 1 :].contiguous(), right=True).clamp(max=half)
    last = (top - torch.arange(candidates, device=lo.device)).clamp(min=0)
    # All is kept by the first candidate; an end bin also has what is beyond its edge.
    t = edges[half + 1 + last]
    t = torch.cat([extreme, t[:, 1:]], -1).to(lo.dtype)
    los, his = (torch.minimum(torch.maximum(end, lo[:, None]), hi[:, None]) for end in (-t, t))
    reference, kept = _clipped(histogram.double(), half - last, half + last)
    level = _levels(spec, (edges[1:] + edges[:-1]) / 2, from_range(spec, los, his))
    divergence = _divergence(reference, kept, edges.diff(), level)
    index = divergence.argmin(-1, keepdim=True)
    return los.gather(-1, index)[:, 0], his.gather(-1, index)[:, 0]


def _clipped(histogram: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return P and the histogram within bins `first` to `last`, both (blocks, candidates, bins)."""
    bins = torch.arange(histogram.shape[-1], device=histogram.device)
    inside = (bins >= first[..., None]) & (bins <= last[..., None])
    kept = histogram[:, None] * inside
    total = pad(histogram.cumsum(-1), (1, 0))
    below = total.gather(-1, first)[..., None]
    above = (total[:, -1:] - total.gather(-1, last + 1))[..., None]
    return kept + below * (bins == first[..., None]) + above * (bins == last[..., None]), kept


def _levels(spec: QuantSpec, middle: Tensor, qp: QParams) -> Tensor:
    """Number, for each bin, the runs of bins with one nearest code, and 0 apart; (blocks, candidates, bins)."""
    steps = middle / qp.scale.double()[..., None]
    if isinstance(spec.format, Float8):
        codes, _ = code_table(spec.dtype, middle.device)
        nearest = codes[torch.bucketize(steps, (codes[1:] + codes[:-1]) / 2)]
    else:
        low, high = (end - qp.zero_point.double()[..., None] for end in spec.bounds)
        nearest = torch.minimum(torch.maximum(steps.round(), low), high)
    level = pad((nearest.diff(dim=-1) != 0).to(torch.int64).cumsum(-1), (1, 0))
    level[..., len(middle) // 2] = len(middle)
    return level


def _divergence(reference: Tensor, kept: Tensor, width: Tensor, level: Tensor) -> Tensor:
    """Return KL(P || Q) of each candidate, with Q made of `kept` by spreading each level over its bins."""
    support = torch.where(reference > 0, width, 0.0)
    count, room = (torch.zeros_like(pad(kept, (0, 1))).scatter_add_(-1, level, of) for of in (kept, support))
    spread = support * (count / room.clamp(min=torch.finfo(room.dtype).tiny)).gather(-1, level)
    p = reference / reference.sum(-1, keepdim=True)
    q = spread / spread.sum(-1, keepdim=True)
    # Where nothing is kept, q is 0 / 0.
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1).nan_to_num(float("inf"), float("inf"))
