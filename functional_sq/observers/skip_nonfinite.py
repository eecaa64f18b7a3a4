"""SkipNonfinite: leave NaN and Inf out, and count them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from functional_sq.observer import SUM, Observer, Reduction, State, check_number
from functional_sq.observers.fixed import Fixed

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["SkipNonfinite"]

# Records nothing but how many values each block has.
_COUNT: Final = Fixed(0.0, 0.0)


@dataclass(frozen=True)
class SkipNonfinite(Observer):
    """Record with another observer, NaN and Inf left out as if masked, and count those apart.

    Without it one NaN in the calibration data makes `check` refuse the state. With it the range is
    that of the finite values, and `check` refuses where too many were not finite.

    State: that of `observer`, and `nonfinite` (int64, values left out of each block); 8 bytes a
    scale more. `count` has the finite values alone. A state is read by `observer` itself too.

    Args:
        observer: what records the finite values.
        limit: largest share of a block's values that may be NaN or Inf, from 0 to 1; `check`
            refuses a state with more.

    Raises:
        TypeError: `observer` is no observer, or `limit` no number.
        ValueError: `limit` is not in [0, 1], or `observer` records `nonfinite` itself.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.observers.skip_nonfinite import SkipNonfinite
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=SkipNonfinite(fsq.MinMax()))
        >>> x = torch.tensor([-1.0, float("nan"), 3.0, float("inf")])
        >>> state = fsq.observe(spec, fsq.init(spec, x.shape), x)
        >>> state
        {'min': tensor([-1.]), 'max': tensor([3.]), 'count': tensor([2]), 'nonfinite': tensor([2])}
        >>> fsq.check(spec, state)
        Traceback (most recent call last):
        ...
        functional_sq.observer.CalibrationError: 2 of 4 values are NaN or Inf, more than limit=0.01 allows; \
remove them from the calibration data, mend the layer that makes them, or raise the limit
    """

    observer: Observer
    limit: float = 0.01

    def __post_init__(self) -> None:
        if not isinstance(self.observer, Observer):
            raise TypeError(f"observer={self.observer!r} is not an Observer; wrap one, as SkipNonfinite(MinMax())")
        if "nonfinite" in self.observer.names:
            raise ValueError(f"observer={self.observer!r} records 'nonfinite' itself; use it without SkipNonfinite")
        check_number(self, "limit", "use a share such as 0.01")
        if not 0 <= self.limit <= 1:
            raise ValueError(f"limit={self.limit!r} is not in [0, 1]; it is a share, 0.01 for one value in 100")

    @property
    def names(self) -> frozenset[str]:
        return self.observer.names | {"nonfinite"}

    @property
    def table(self) -> Mapping[str, Reduction]:
        inner = self.observer.table
        return {**inner, "nonfinite": SUM} if inner else {}

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        nonfinite = torch.zeros(stat_shape, dtype=torch.int64, device=device)
        return self.observer.init(stat_shape, dtype, device) | {"nonfinite": nonfinite}

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        finite = x.isfinite()
        left_out = ~finite if keep is None else keep & ~finite
        recorded = self.observer.observe(_inner(state), x, finite if keep is None else keep & finite)
        counted = _COUNT.observe({"count": state["nonfinite"]}, x, left_out)
        return recorded | {"nonfinite": counted["count"]}

    def merge(self, a: State, b: State) -> State:
        return self.observer.merge(_inner(a), _inner(b)) | {"nonfinite": a["nonfinite"] + b["nonfinite"]}

    def check_state(self, state: State, *, exact: bool = True) -> tuple[int, ...]:
        super().check_state(state, exact=exact)
        return self.observer.check_state(_inner(state), exact=exact)

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return self.observer.range(spec, state)

    def fault(self, state: State, min_count: int) -> str | None:
        # Before the inner observer: where nothing finite was seen, this is the reason.
        nonfinite = state["nonfinite"]
        total = state["count"] + nonfinite
        over = nonfinite > self.limit * total.to(torch.float64)
        if bool(over.any()):
            blocks = f" in {int(over.sum())} of {over.numel()} blocks" if over.numel() > 1 else ""
            return (
                f"{int(nonfinite[over].sum())} of {int(total[over].sum())} values{blocks} are NaN or Inf, more than "
                f"limit={self.limit} allows; remove them from the calibration data, mend the layer that makes them, "
                f"or raise the limit"
            )
        return self.observer.fault(state, min_count)


def _inner(state: State) -> State:
    return {name: value for name, value in state.items() if name != "nonfinite"}
