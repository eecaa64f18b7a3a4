"""Percentile: a range that leaves out the rare large values."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from functional_sq.observer import State, check_number
from functional_sq.observers.histogram import Histogram
from functional_sq.qparams import MappingType

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["Percentile"]


@dataclass(frozen=True, repr=False)
class Percentile(Histogram):
    """Take percentiles as the range: what is beyond them is clipped.

    With ASYMMETRIC the range is from the percentile `100 - p` to `p` of the values; with the
    symmetric mappings it is `-m` to `m`, with `m` the percentile `p` of the magnitudes. A percentile
    is that of `numpy.percentile`: between the two values next to its rank, which are known to a bin
    of the histogram, and exactly where they are the smallest or the largest (of magnitudes: the
    largest). So `p=100` gives what `MinMax` gives (symmetric: the larger of its two magnitudes).
    What else is smaller than `2**exponents[0]` counts as 0, and the values of an end bin as the most
    extreme one.

    State, and the arguments that come after `p`: those of `Histogram`.

    Args:
        p: the percentile, more than 50 and at most 100.
        exponents: magnitudes that are told apart, `2**least` to `2**end`.
        mantissa_bits: bits of the mantissa that tell bins apart.

    Raises:
        TypeError: `p` is not a number.
        ValueError: `p` is outside its limits.

    Source: Wu et al., Integer Quantization for Deep Learning Inference, 2020 (arXiv:2004.09602);
    `pytorch_quantization.calib.HistogramCalibrator` of TensorRT, `method="percentile"`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.observers.percentile import Percentile
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=Percentile(99.0))
        >>> x = torch.cat([torch.linspace(-1.0, 1.0, 999), torch.tensor([1000.0])])
        >>> lo, hi = spec.observer.range(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
        >>> bool(0.9 < hi < 1.1)
        True
    """

    p: float = 99.99
    _: KW_ONLY
    exponents: tuple[int, int] = (-24, 24)
    mantissa_bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "p", "a percentile is one such as 99.99")
        if not 50 < self.p <= 100:
            raise ValueError(f"p={self.p!r} is not more than 50 and at most 100; use one such as 99.99")

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        counts, low, high = state["histogram"], state["min"].double(), state["max"].double()
        edges = self.edges(device=counts.device)
        lower, upper = edges[:-1].clone(), edges[1:].clone()
        # The middle bin is 0, so that data times a power of two gives ranges times a power of two.
        lower[self.half] = upper[self.half] = 0.0
        if spec.mapping is MappingType.ASYMMETRIC:
            # The edges of the bins are the same with the other sign, in reverse.
            lo = -_upper(counts.flip(-1), (lower, upper), self.p, (-high, -low))
            hi = _upper(counts, (lower, upper), self.p, (low, high))
        else:
            negative, middle, positive = counts.tensor_split((self.half, self.half + 1), -1)
            magnitudes = torch.cat([middle, positive + negative.flip(-1)], -1)
            hi = _upper(
                magnitudes,
                (lower[self.half :], upper[self.half :]),
                self.p,
                (torch.full_like(low, float("-inf")), torch.maximum(-low, high)),  # no smallest magnitude is recorded
            )
            lo = -hi
        return lo.to(state["min"].dtype), hi.to(state["max"].dtype)


def _upper(counts: Tensor, bounds: tuple[Tensor, Tensor], p: float, ends: tuple[Tensor, Tensor]) -> Tensor:
    """Return the percentile `p` of counted values that lie within `ends`; the upper end where none was counted.

    counts (*blocks, bins) int64; bounds, of each bin, (bins,); ends (*blocks), not finite where unknown; all float64
    -> (*blocks)
    """
    lower, upper = bounds
    least, most = (end.unsqueeze(-1) for end in ends)
    total = counts.cumsum(-1)
    last = total[..., -1:] - 1
    rank = last.double() * (p / 100)
    # The values next to the rank, each at its place among those of its bin.
    below = rank.floor()
    pair = torch.minimum(torch.cat([below, below + 1], -1).to(torch.int64), last)
    at = (total.unsqueeze(-2) <= pair.unsqueeze(-1)).sum(-1).clamp(max=counts.shape[-1] - 1)
    n = counts.gather(-1, at)
    place = ((pair - (total.gather(-1, at) - n)).double() + 0.5) / n.clamp(min=1)
    value = lower[at] + place * (upper[at] - lower[at])
    value = torch.minimum(torch.maximum(value, least), most)
    # The ends are known, if they are finite, and the end bin has no upper bound but the largest value.
    value = torch.where((pair == 0) & least.isfinite(), least, value)
    value = torch.where((pair == last) | (at == counts.shape[-1] - 1), most, value)
    first, second = value.unbind(-1)
    step = (second - first) * (rank - below).squeeze(-1)
    # Not of two infinite values, and 0 times Inf is none.
    return torch.minimum(first + torch.where(step > 0, step, 0.0), most.squeeze(-1))
