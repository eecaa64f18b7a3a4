"""Fixed: a range that is known without looking at data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from functional_sq.observer import Accumulator, State, check_number

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed(Accumulator):
    """Use the range `[lo, hi]` for every block, whatever is observed.

    For values whose range is known: the output of a sigmoid, normalised pixels, logits that are
    clipped. State: `count` (int64, values seen), 8 bytes a scale; it may be 0.

    Args:
        lo: smallest value to represent, input units.
        hi: largest value to represent, input units.

    Raises:
        TypeError: `lo` or `hi` is no number.
        ValueError: `lo` or `hi` is not a finite float32, or `lo > hi`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(
        ...     torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=fsq.Fixed(0.0, 1.0)
        ... )
        >>> fsq.calc_qparams(spec, fsq.init(spec, (4, 8)))
        QParams(scale=tensor([[0.0039]]), zero_point=tensor([[0]], dtype=torch.int32))
    """

    lo: float
    hi: float

    reductions = {}

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            check_number(self, name, "a Fixed range is two numbers")
            value = getattr(self, name)
            if not abs(value) <= torch.finfo(torch.float32).max:
                raise ValueError(f"{name}={value!r} is not a finite float32; a Fixed range has two such ends")
        if self.lo > self.hi:
            raise ValueError(f"lo={self.lo} is above hi={self.hi}; exchange them")

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        lo = torch.full_like(state["count"], self.lo, dtype=torch.float32)
        return lo, torch.full_like(lo, self.hi)

    def fault(self, state: State, min_count: int) -> str | None:
        return None
