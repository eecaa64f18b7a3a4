"""Histogram: counts of values in bins that do not depend on the data, and the range of everything seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functional_sq.observer import MAX, MIN, SUM, Accumulator, Observer, State, extremes

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["Histogram", "histogram_of", "search_blocks"]


@dataclass(frozen=True, repr=False)
class Histogram(Accumulator):
    """Count the values of each block in bins, and keep the smallest and the largest; these are the range.

    The bin of a value is the top bits of its own float encoding: sign, exponent and the first
    `mantissa_bits` of the mantissa. So bins are the same for all data, states add, and any rule that
    reads the counts (`Percentile`, `Mse`, `Entropy`) reads a state that this recorded.

    Bins are ordered by value. With `half = (exponents[1] - exponents[0]) << mantissa_bits`:

    * bin `half` has what is smaller in magnitude than `2**exponents[0]`, zeros too;
    * bin `half + k` has the `k`-th interval of magnitudes, `[m, m + w)` with `w / m <= 2**-mantissa_bits`;
    * bin `half - k` has the same magnitudes, negative: `(-m - w, -m]`;
    * the end bins, 0 and `2 * half`, also have all that is larger in magnitude, Inf too.

    A NaN is in no bin; it stays visible in `min` and `max`, as Inf does, and `check` refuses it.

    State: `min` and `max` in the state's dtype, `histogram` (int64; a last axis of `bins`), `count`
    (int64, values seen). A float32 state has `(bins + 1) * 8 + 8` bytes a scale: 12 kB for the
    default of 1537 bins, 50 MB for 4096 channels.

    Args:
        exponents: `(least, end)`; magnitudes in `[2**least, 2**end)` are told apart. The default,
            `6e-8` to `1.7e7`, starts below the default `eps` of a scale.
        mantissa_bits: bits of the mantissa that tell bins apart, 0 to 10; with 4, a bin is at most
            1/16 as wide as the values in it are large.

    Raises:
        TypeError: an argument is not an int, or not a pair of ints.
        ValueError: an argument is outside what a float32 encodes.

    Source: bins like those of HdrHistogram and DDSketch (Masson et al., VLDB 2019): of a fixed
    relative width, hence mergeable. `torch.ao.quantization.HistogramObserver` bins anew as data grows.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.observers.histogram import Histogram
        >>> observer = Histogram((-1, 1), 1)
        >>> observer.edges()
        tensor([-2.0000, -1.5000, -1.0000, -0.7500, -0.5000,  0.5000,  0.7500,  1.0000,
                 1.5000,  2.0000], dtype=torch.float64)
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=observer)
        >>> state = fsq.observe(spec, fsq.init(spec, (4,)), torch.tensor([-9.0, 0.0, 0.6, 1.5]))
        >>> state["histogram"]
        tensor([[1, 0, 0, 0, 1, 1, 0, 0, 1]])
    """

    exponents: tuple[int, int] = (-24, 24)
    mantissa_bits: int = 4

    reductions = {"min": MIN, "max": MAX, "histogram": SUM}

    def __post_init__(self) -> None:
        pair, bits = self.exponents, self.mantissa_bits
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(type(e) is int for e in pair):
            raise TypeError(f"exponents={pair!r} is not a tuple of two ints; use one such as (-24, 24)")
        # Smaller than 2**-126 a float32 is subnormal: its first mantissa bits are no longer its first digits.
        if not -126 <= pair[0] < pair[1] <= 128:
            raise ValueError(f"exponents={pair} is not least < end within -126 to 128; use two such as (-24, 24)")
        if type(bits) is not int:
            raise TypeError(f"mantissa_bits={bits!r} is not an int; use one from 0 to 10")
        if not 0 <= bits <= 10:
            raise ValueError(f"mantissa_bits={bits} is not within 0 to 10; each one doubles the memory, use 4")

    def __repr__(self) -> str:
        # Only what differs from the default: the bins are many and rarely chosen.
        chosen = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in chosen)})"

    @property
    def half(self) -> int:
        """The index of the bin of zero; also the number of bins on either side of it."""
        least, end = self.exponents
        return (end - least) << self.mantissa_bits

    @property
    def bins(self) -> int:
        """The number of bins, `2 * half + 1`."""
        return 2 * self.half + 1

    def edges(self, *, device: torch.device | None = None) -> Tensor:
        """Return the edges of the bins in ascending order.

        Args:
            device: device of the result.

        Returns:
            float64, `bins + 1` values, input units; those of bin `i` are `i` and `i + 1`. The ends
            are at `2**exponents[1]`, also where larger values were counted.

        Example:
            >>> Histogram((0, 2), 0).edges()
            tensor([-4., -2., -1.,  1.,  2.,  4.], dtype=torch.float64)
        """
        # The inverse of `index`: a run of float64 encodings.
        first = (1023 + self.exponents[0]) << self.mantissa_bits
        encoded = torch.arange(first, first + self.half + 1, device=device) << (52 - self.mantissa_bits)
        positive = encoded.view(torch.float64)
        return torch.cat([-positive.flip(0), positive])

    def index(self, x: Tensor) -> Tensor:
        """Return the bin of each value; `bins` for a NaN. Exact for each dtype: nothing is rounded.

        Args:
            x: real values, float32, float64, bfloat16 or float16.

        Returns:
            int32; shape of `x`.

        Example:
            >>> Histogram((0, 2), 0).index(torch.tensor([-1.0, 0.0, 3.0, 4.0, float("nan")]))
            tensor([1, 2, 4, 4, 5], dtype=torch.int32)
        """
        encoded, digits, bias = _encoding(x)
        # Few passes, in place on their own result: without a compiler each is one over memory.
        magnitude = encoded & torch.iinfo(encoded.dtype).max
        nan = magnitude > (2 * bias + 1) << digits
        least = (bias + self.exponents[0]) << self.mantissa_bits
        step = magnitude.bitwise_right_shift_(digits - self.mantissa_bits).sub_(least - 1).clamp(0, self.half)
        index = torch.where(encoded < 0, -step, step).to(torch.int32).add_(self.half)
        return index.masked_fill_(nan, self.bins)

    def measure(self, x: Tensor, dims: tuple[int, ...], keep: Tensor | None) -> State:
        lo, hi = extremes(x, dims, keep)
        if len(dims) == x.ndim:
            keep = None if keep is None else keep.expand(x.shape)
            counts: Tensor = _count(x, keep, *self.exponents, self.mantissa_bits)
        else:
            counts = self.count(x, [1 if i in dims else n for i, n in enumerate(x.shape)], keep)
        return {"min": lo, "max": hi, "histogram": counts}

    def count(self, x: Tensor, sizes: list[int], keep: Tensor | None) -> Tensor:
        """Return the counts of each block; (blocks * bins,) int64, block by block.

        x real values; sizes the shape of the statistics; keep bool or None; both broadcast to the
        shape of `x`
        """
        # All blocks are counted as one histogram: the bins of the first, then of the second, and so on.
        total = math.prod(sizes) * self.bins
        dtype = torch.int32 if total < 2**31 else torch.int64
        first = torch.arange(0, total, self.bins, dtype=dtype, device=x.device).reshape(sizes)
        index = self.index(x)
        outside = index == self.bins
        if keep is not None:
            outside = outside | ~keep
        counts: Tensor = _bincount((index + first).masked_fill(outside, total).reshape(-1), total)
        return counts

    def trailing(self, name: str) -> tuple[int, ...]:
        return (self.bins,) if name == "histogram" else ()

    def check_state(self, state: State, *, exact: bool = True) -> tuple[int, ...]:
        shape = super().check_state(state, exact=exact)
        found = tuple(state["histogram"].shape)
        if found != (*shape, self.bins):
            raise ValueError(
                f"the state's histogram has shape {found}, {self} has {self.bins} bins for each of {shape}; "
                f"use the exponents and mantissa_bits that it was recorded with"
            )
        return shape

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["min"], state["max"]


def histogram_of(observer: Observer) -> Histogram | None:
    """Return the Histogram that `observer` is or wraps, or None if it records no bins.

    Example:
        >>> import functional_sq as fsq
        >>> from functional_sq.observers.histogram import histogram_of
        >>> histogram_of(fsq.SkipNonfinite(fsq.Mse())), histogram_of(fsq.MinMax())
        (Mse(), None)
    """
    inner: object = observer
    while inner is not None and not isinstance(inner, Histogram):
        inner = getattr(inner, "observer", None)
    return inner


def search_blocks(
    state: State, search: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], chunk: int
) -> tuple[Tensor, Tensor]:
    """Return the range that `search(histogram, lo, hi)` finds for each block, `chunk` blocks at a time.

    Where nothing was seen, or NaN or Inf was, the range is what was recorded: it stays visible.
    """
    lo, hi, histogram = state["min"], state["max"], state["histogram"]
    rows = (histogram.reshape(-1, histogram.shape[-1]), lo.reshape(-1), hi.reshape(-1))
    found = [search(*part) for part in zip(*(torch.split(row, chunk) for row in rows), strict=True)]
    best_lo, best_hi = (torch.cat(ends).reshape(lo.shape) for ends in zip(*found, strict=True))
    fit = lo.isfinite() & hi.isfinite() & (state["count"] > 0)
    return torch.where(fit, best_lo, lo), torch.where(fit, best_hi, hi)


def _encoding(x: Tensor) -> tuple[Tensor, int, int]:
    """Return the bits of each value as an integer, the digits of the mantissa and the exponent's bias."""
    x = x.resolve_neg()  # The imaginary part of a conjugate has a sign that its memory does not have.
    if x.dtype is torch.float64:
        return x.view(torch.int64), 52, 1023
    return x.to(torch.float32).view(torch.int32), 23, 127


# torch.bincount has an output whose shape depends on the data, which no graph can hold, and no rule
# for vmap. As operators of a shape known beforehand these have both.
@torch.library.custom_op("functional_sq::bincount", mutates_args=(), schema="(Tensor index, int bins) -> Tensor")
def _bincount(index: Tensor, bins: int) -> Tensor:
    """Count how often each of 0 ... bins - 1 is in `index`; `bins` stands for no bin.

    index (n,) integer -> (bins,) int64
    """
    return torch.bincount(index, minlength=bins + 1)[:bins]


@_bincount.register_fake
def _bincount_fake(index: Tensor, bins: int) -> Tensor:
    return index.new_empty((bins,), dtype=torch.int64)


@_bincount.register_vmap
def _bincount_vmap(info: Any, in_dims: tuple[int, None], index: Tensor, bins: int) -> tuple[Tensor, int]:
    index = index.movedim(in_dims[0], 0).to(torch.int64)
    total = index.shape[0] * bins
    first = torch.arange(0, total, bins, device=index.device).unsqueeze(1)
    flat = (index + first).masked_fill(index == bins, total).reshape(-1)
    return _bincount(flat, total).reshape(-1, bins), 0


_CHUNK = 1 << 18
"""Values that are counted at once, so that what is written on the way stays in the cache. The same
steps over whole tensors of 4 million values took seven times as long, most of it for fresh memory."""


@torch.library.custom_op(
    "functional_sq::count_bins",
    mutates_args=(),
    schema="(Tensor x, Tensor? keep, int least, int end, int mantissa_bits) -> Tensor",
)
def _count(x: Tensor, keep: Tensor | None, least: int, end: int, mantissa_bits: int) -> Tensor:
    """Count all values of `x` in the bins of `Histogram((least, end), mantissa_bits)`.

    x real values; keep bool, of the shape of `x`, or None -> (bins,) int64
    """
    # The sign, the whole exponent and the first digits are one shift; the few thousand tops that there
    # are become bins afterwards.
    observer = Histogram((least, end), mantissa_bits)
    empty, digits, _ = _encoding(x.new_empty(0))
    shift = digits - mantissa_bits
    tops = 1 << (8 * empty.element_size() - shift)
    # Three histograms in turn: adding to the counter that the processor has just added to makes it wait,
    # and after a ReLU half of the values share a bin. Three of 2**13 tops fit 16 bits: fewer bytes.
    parts = 3 if tops <= 1 << 13 else 1
    junk = parts * tops
    dtype = torch.int16 if junk < 1 << 15 else torch.int32
    first = torch.arange(tops // 2, junk, tops, dtype=empty.dtype, device=x.device)
    first = first.repeat(-(-min(x.numel(), _CHUNK) // parts))
    counts = torch.zeros(junk + 1, dtype=torch.int64, device=x.device)
    kept = None if keep is None else torch.split(keep.reshape(-1), _CHUNK)
    for i, chunk in enumerate(torch.split(x.reshape(-1), _CHUNK)):
        index = (_encoding(chunk)[0] >> shift).add_(first[: chunk.numel()]).to(dtype)
        if kept is not None:
            index.masked_fill_(~kept[i], junk)
        counts += torch.bincount(index, minlength=junk + 1)
    counts = counts[:-1].reshape(parts, tops).sum(0)
    encoded = torch.arange(-tops // 2, tops // 2, dtype=empty.dtype, device=x.device) << shift
    value = encoded.view(torch.float64 if digits == 52 else torch.float32)
    infinite = value.isinf()
    if bool(counts[infinite].any()):
        # A NaN whose first digits are 0 has the top of Inf.
        for at in infinite.nonzero():
            same = x == value[at].to(x.dtype)
            counts[at] = (same if keep is None else same & keep).sum()
    bins = torch.zeros(observer.bins + 1, dtype=torch.int64, device=x.device)
    return bins.index_add_(0, observer.index(value), counts)[:-1]


@_count.register_fake
def _count_fake(x: Tensor, keep: Tensor | None, least: int, end: int, mantissa_bits: int) -> Tensor:
    return x.new_empty((Histogram((least, end), mantissa_bits).bins,), dtype=torch.int64)


@_count.register_vmap
def _count_vmap(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, keep: Tensor | None, least: int, end: int, mantissa_bits: int
) -> tuple[Tensor, int]:
    def batched(value: Tensor, dim: int | None) -> Tensor:
        return value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)

    x = batched(x, in_dims[0])
    keep = None if keep is None else batched(keep, in_dims[1])
    observer = Histogram((least, end), mantissa_bits)
    return observer.count(x, [info.batch_size] + [1] * (x.ndim - 1), keep).reshape(-1, observer.bins), 0
