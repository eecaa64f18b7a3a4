"""MovingAverage and MeanRange: an average of the ranges of batches.

Both read the range of one batch and weigh it, so what they record depends on how the data was cut
into batches, and on their order: neither has a `merge`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from functional_sq.observer import Observer, State, check_number
from functional_sq.observers.min_max import MinMax

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["MeanRange", "MovingAverage"]

# What measures one batch (masks, granularities, min, max, count), and what judges a range.
_BATCH: Final = MinMax()


@dataclass(frozen=True)
class MovingAverage(Observer):
    """Average the smallest and the largest value of each batch, recent batches more.

    `min <- min + momentum * (min of the batch - min)`, and so for `max`; the first batch sets them.
    A batch without elements for a block (empty, or all masked) leaves that block as it was.

    State: `min` and `max` in the state's dtype, `count` (int64, values seen); 16 bytes a scale. A
    bfloat16 or float16 state is averaged in float32 and rounded once a batch, which is what compiled
    code does; an update of less than half a step of such a dtype is lost, so float32 is the better
    state also for 16-bit data. A NaN or an Inf stays visible, and `check` refuses it.

    Order matters, so `merge` raises TypeError.

    Args:
        momentum: weight of the newest batch, above 0 and at most 1.

    Raises:
        TypeError: `momentum` is no number.
        ValueError: `momentum` is not in (0, 1].

    Source: `torch.ao.quantization.MovingAverageMinMaxObserver` and
    `MovingAveragePerChannelMinMaxObserver`, `momentum` being their `averaging_constant`; the same
    bits, but that a zero has no sign here and that two finite ends have a finite average.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.observers.moving_average import MovingAverage
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=MovingAverage(0.5))
        >>> state = fsq.init(spec, (2,))
        >>> for x in ([-1.0, 4.0], [-3.0, 0.0]):
        ...     state = fsq.observe(spec, state, torch.tensor(x))
        >>> state
        {'min': tensor([-2.]), 'max': tensor([2.]), 'count': tensor([4])}
    """

    momentum: float = 0.01

    def __post_init__(self) -> None:
        check_number(self, "momentum", "use one such as 0.01")
        if not 0 < self.momentum <= 1:
            raise ValueError(f"momentum={self.momentum!r} is not in (0, 1]; use a number such as 0.01")

    @property
    def names(self) -> frozenset[str]:
        return _BATCH.names

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        return _BATCH.init(stat_shape, dtype, device)

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        batch = _measure(state["count"], state["min"].dtype, x, keep)
        # Not by the value of min, as torch.ao does: Inf may be data.
        first, seen = state["count"] == 0, batch["count"] > 0
        new = {}
        for name in ("min", "max"):
            moved = torch.where(first, batch[name], self._moved(state[name], batch[name]))
            new[name] = torch.where(seen, moved, state[name])
        return new | {"count": state["count"] + batch["count"]}

    def _moved(self, old: Tensor, new: Tensor) -> Tensor:
        dtype = torch.promote_types(old.dtype, torch.float32)
        a, b = old.to(dtype), new.to(dtype)
        step = b - a
        # The difference of two finite numbers may overflow; their weighted sum does not.
        far = (a - self.momentum * a) + self.momentum * b
        return torch.where(step.isinf(), far, a + self.momentum * step).to(old.dtype)

    def merge(self, a: State, b: State) -> State:
        raise _depends_on_order(self)

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["min"], state["max"]

    def fault(self, state: State, min_count: int) -> str | None:
        return _BATCH.fault(state, min_count)


@dataclass(frozen=True)
class MeanRange(Observer):
    """Average the smallest and the largest value of each batch, every batch alike.

    A batch without elements for a block (empty, or all masked) is no batch of that block.

    State: `min_sum` and `max_sum` (float64 in a state of any dtype: a sum of 2**29 float32 values of
    like size is exact to a float32, and the range is read in float64), `batches` (int64) and `count`
    (int64, values seen); 32 bytes a scale. A NaN or an Inf stays visible, and `check` refuses it.

    `merge` raises TypeError. Exact sums in integers could be merged in any order, but that is not
    the promise of `merge`: the mean depends on how the data was cut into batches, so that a batch
    split over two shards has another mean than the batch itself.

    Source: the mean of minima and maxima is the plain form of the moving average of
    https://arxiv.org/abs/1712.05877, section 3.1.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.observers.moving_average import MeanRange
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=MeanRange())
        >>> state = fsq.init(spec, (2,))
        >>> for x in ([-1.0, 4.0], [-3.0, 0.0], [-5.0, 2.0]):
        ...     state = fsq.observe(spec, state, torch.tensor(x))
        >>> spec.observer.range(spec, state)
        (tensor([-3.], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    """

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"min_sum", "max_sum", "batches", "count"})

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        kinds = {"min_sum": torch.float64, "max_sum": torch.float64, "batches": torch.int64, "count": torch.int64}
        return {name: torch.zeros(stat_shape, dtype=kind, device=device) for name, kind in kinds.items()}

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        batch = _measure(state["count"], torch.float64, x, keep)
        seen = batch["count"] > 0
        return {
            "min_sum": torch.where(seen, state["min_sum"] + batch["min"], state["min_sum"]),
            "max_sum": torch.where(seen, state["max_sum"] + batch["max"], state["max_sum"]),
            "batches": state["batches"] + seen,
            "count": state["count"] + batch["count"],
        }

    def merge(self, a: State, b: State) -> State:
        raise _depends_on_order(self)

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        batches = state["batches"].clamp(min=1)  # nothing seen: the range [0, 0], whose scale is eps
        return state["min_sum"] / batches, state["max_sum"] / batches

    def fault(self, state: State, min_count: int) -> str | None:
        ends = {"min": state["min_sum"], "max": state["max_sum"], "count": state["count"]}
        return _BATCH.fault(ends, min_count)


def _measure(count: Tensor, dtype: torch.dtype, x: Tensor, keep: Tensor | None) -> State:
    """Return the min, max and count of one batch, in the form of `count`."""
    return _BATCH.observe(_BATCH.init(tuple(count.shape), dtype, count.device), x, keep)


def _depends_on_order(observer: Observer) -> TypeError:
    return TypeError(
        f"{observer} depends on the order of its batches and on how the data was cut into them, so two states "
        f"do not merge; observe every batch in turn in one process, or record MinMax(), whose states merge exactly"
    )
