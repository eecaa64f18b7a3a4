"""MinMax: the range of everything seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from functional_sq.observer import MAX, MIN, Accumulator, State, extremes

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["MinMax"]


@dataclass(frozen=True)
class MinMax(Accumulator):
    """Record the smallest and the largest value of each block; they are the range.

    State: `min` and `max` in the state's dtype, `count` (int64, values seen); 16 bytes a scale.

    A NaN or an Inf in the data stays visible in `min` and `max`, and `check` refuses it.

    Source: `torchao.quantization.AffineQuantizedMinMaxObserver`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.MinMax())
        >>> fsq.observe(spec, fsq.init(spec, (2,)), torch.tensor([-1.0, 3.0]))
        {'min': tensor([-1.]), 'max': tensor([3.]), 'count': tensor([2])}
    """

    reductions = {"min": MIN, "max": MAX}

    def measure(self, x: Tensor, dims: tuple[int, ...], keep: Tensor | None) -> State:
        lo, hi = extremes(x, dims, keep)
        return {"min": lo, "max": hi}

    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["min"], state["max"]
