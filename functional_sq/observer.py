"""Observers: what is recorded of the data, as explicit state.

An observer is a value without state. What it recorded is a dict of tensors that each function takes
and returns. Nearly every useful observer records reductions of the data (a minimum, a count, a
histogram), and a reduction is a monoid: `Accumulator` turns a table of them into `init`, `observe`
and `merge`, so the laws hold by construction:

    init(...)            the identity of every reduction: nothing seen
    observe(state, x)    merge(state, what was measured of x)
    merge(a, b)          the reductions' own binary operation, name by name
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import Tensor

from functional_sq.blocks import align, split
from functional_sq.formats import REAL_DTYPES, check_real
from functional_sq.granularity import check_stats
from functional_sq.qparams import QParams, from_range

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = [
    "MAX",
    "MIN",
    "SUM",
    "Accumulator",
    "CalibrationError",
    "Observer",
    "Reduction",
    "State",
    "calc_qparams",
    "check",
    "init",
    "merge",
    "observe",
]

State = dict[str, Tensor]
"""What an observer recorded: bare nouns to tensors, each with one entry for each block."""


class CalibrationError(ValueError):
    """A recorded state is not fit to choose a range from."""


@dataclass(frozen=True)
class Reduction:
    """A commutative monoid on tensors: how elements are reduced and how two results combine.

    Attributes:
        name: `min`, `max` or `sum`; also what a distributed merge asks of the collective.
        reduce: `(x, dims) -> Tensor`, over at least one dim.
        combine: the binary operation; the same result in any order and grouping.
        identity: `dtype -> number` that `combine` leaves without effect.
    """

    name: str
    reduce: Callable[[Tensor, tuple[int, ...]], Tensor]
    combine: Callable[[Tensor, Tensor], Tensor]
    identity: Callable[[torch.dtype], float]


def _lowest(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float:
    return float("inf") if dtype.is_floating_point else torch.iinfo(dtype).max


# torch's amin, amax, minimum and maximum hand a NaN on, so a NaN in the data stays visible.
MIN: Final = Reduction("min", torch.amin, torch.minimum, _highest)
"""The smallest element; identity `+inf`."""
MAX: Final = Reduction("max", torch.amax, torch.maximum, _lowest)
"""The largest element; identity `-inf`."""
SUM: Final = Reduction("sum", torch.sum, torch.add, lambda dtype: 0)
"""The sum; identity 0. For integers only: a float sum depends on the order of its terms."""


class Observer(abc.ABC):
    """What is recorded of a tensor and how the record is read as a range.

    Subclasses are frozen dataclasses (hashable, comparable, picklable); all that changes is in the
    state. `functional_sq.testing.check_observer` runs the laws on one.
    """

    @abc.abstractmethod
    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        """Return the state that has seen nothing; statistics of `stat_shape`, real values in `dtype`."""

    @abc.abstractmethod
    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        """Return the state that has also seen the elements of `x` where `keep` (all, if None)."""

    @abc.abstractmethod
    def merge(self, a: State, b: State) -> State:
        """Return the state that has seen what `a` and what `b` saw; TypeError if order matters."""

    @abc.abstractmethod
    def range(self, spec: QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        """Return the range `lo, hi` of each block that `spec` is to represent."""

    @abc.abstractmethod
    def stat_shape(self, state: State) -> tuple[int, ...]:
        """Return the shape of the statistics in `state`."""

    def fault(self, state: State, min_count: int) -> str | None:
        """Say what makes `state` unfit to choose a range from, or None. Reads the data."""
        return None


class Accumulator(Observer):
    """An observer given by a table of reductions; `count` is added to every table.

    A subclass names its `reductions` and gives `elements` and `range`; masks, granularities, empty
    batches, vmap and merging follow. An observer whose statistics are no elementwise reductions (a
    histogram) gives `measure` instead of `elements`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class AbsMax(fsq.Accumulator):
        ...     reductions = {"absmax": fsq.MAX}
        ...     def elements(self, x):
        ...         return {"absmax": x.abs()}
        ...     def range(self, spec, state):
        ...         return -state["absmax"], state["absmax"]
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0), observer=AbsMax())
        >>> fsq.observe(spec, fsq.init(spec, (2, 3)), torch.tensor([[1., -2., 0.], [3., 0., 1.]]))
        {'absmax': tensor([[2.],
                [3.]]), 'count': tensor([[3],
                [3]])}
    """

    reductions: ClassVar[Mapping[str, Reduction]]

    def elements(self, x: Tensor) -> Mapping[str, Tensor]:
        """Return, for each name in `reductions`, the values to reduce; shape of `x`."""
        return {}

    def measure(self, x: Tensor, dims: tuple[int, ...], keep: Tensor | None) -> State:
        """Return the statistics of one batch, reduced over `dims` of `x` where `keep`."""
        measured = {}
        for name, values in self.elements(x).items():
            reduction = self.reductions[name]
            if keep is not None:
                values = values.masked_fill(~keep, reduction.identity(values.dtype))
            measured[name] = reduction.reduce(values, dims) if dims else values
        return measured

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        state = {
            name: torch.full(stat_shape, reduction.identity(dtype), dtype=dtype, device=device)
            for name, reduction in self.reductions.items()
        }
        return state | {"count": torch.zeros(stat_shape, dtype=torch.int64, device=device)}

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        count = state["count"]
        view, dims = split(x, align(count.shape, x.ndim))
        if keep is None:
            seen = torch.full_like(count, x.numel() // count.numel())
        else:
            keep = keep.expand(x.shape).reshape(view.shape)
            seen = keep.sum(dims) if dims else keep.to(count.dtype)
        batch = {"count": seen.reshape(count.shape)}
        for name, value in self.measure(view, dims, keep).items():
            # Adding 0 turns -0.0 into 0.0: which of the two a minimum returns depends on the order.
            batch[name] = value.reshape(state[name].shape).to(state[name].dtype) + 0
        return self.merge(state, batch)

    def merge(self, a: State, b: State) -> State:
        merged = {name: reduction.combine(a[name], b[name]) for name, reduction in self.reductions.items()}
        return merged | {"count": a["count"] + b["count"]}

    def stat_shape(self, state: State) -> tuple[int, ...]:
        expected = {*self.reductions, "count"}
        if not isinstance(state, dict) or state.keys() != expected:
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"{self} records {sorted(expected)}, this state is {found}; make a state with init(spec, shape)"
            )
        return tuple(state["count"].shape)

    def fault(self, state: State, min_count: int) -> str | None:
        count = state["count"]
        blocks = f" in {{}} of {count.numel()} blocks" if count.numel() > 1 else ""
        few = count < min_count
        if bool(few.any()):
            seen = "nothing was seen" if int(count.max()) == 0 else f"only {int(count.min())} values were seen"
            return f"{seen}{blocks.format(int(few.sum()))}, at least {min_count} needed; calibrate with more data"
        for name in self.reductions:
            value = state[name]
            if value.is_floating_point() and not bool(value.isfinite().all()):
                kind = "NaN" if bool(value.isnan().any()) else "Inf"
                bad = int((~value.isfinite()).sum())
                return (
                    f"{kind} was seen ({name}{blocks.format(bad)}); remove such values from the calibration data, "
                    f"or leave them out with observe(..., mask=)"
                )
        return None


def init(
    spec: QuantSpec,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> State:
    """Make the state that has seen nothing: the identity of `merge`.

    Args:
        spec: the quantization that the state is recorded for.
        shape: shape of the tensors to observe. Only the sizes that the granularity keeps matter: a
            per-tensor state fits any shape.
        dtype: dtype of recorded real values. float32 is exact for bfloat16 and float16 data; the
            data's own dtype gives the bits of torchao, which chooses qparams in it.
        device: device of the state.

    Returns:
        dict of tensors with one entry for each scale.

    Raises:
        ValueError: the granularity does not apply to `shape`.
        TypeError: `shape` is not a sequence of ints, or `dtype` holds no real values.

    Example:
        >>> import torch, functional_sq as fsq
        >>> fsq.init(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (4, 8))
        {'min': tensor([[inf]]), 'max': tensor([[-inf]]), 'count': tensor([[0]])}
    """
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape is a {type(shape).__name__}; give a tuple of ints, such as x.shape")
    if dtype not in REAL_DTYPES:
        raise TypeError(f"init with dtype={dtype}; use one of {', '.join(map(str, REAL_DTYPES))}")
    device = None if device is None else torch.device(device)
    return spec.observer.init(spec.granularity.stat_shape(tuple(shape)), dtype, device)


def observe(spec: QuantSpec, state: State, x: Tensor, *, mask: Tensor | None = None) -> State:
    """Record a batch; return a new state and change nothing.

    Neither this function nor anything in it looks at data from Python: it compiles to one graph and
    works under `torch.vmap`.

    Args:
        spec: the quantization that `state` was made for.
        state: what was recorded so far.
        x: real values, float32, float64, bfloat16 or float16; a batch without elements leaves the
            state as it was. Any rank and size that the state's granularity fits.
        mask: bool; True where `x` counts. Its shape is that of the leading axes of `x`, so the
            attention mask `(batch, tokens)` fits activations `(batch, tokens, channels)`.

    Returns:
        a state with the keys, shapes, dtypes and device of `state`.

    Raises:
        TypeError: `x` holds no real values, or `mask` is not bool.
        ValueError: `state` is of another observer or shape, or `mask` does not fit `x`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> fsq.observe(spec, fsq.init(spec, (3,)), torch.tensor([-1.0, 0.0, 4.0]))
        {'min': tensor([-1.]), 'max': tensor([4.]), 'count': tensor([3])}
    """
    check_real(x, "observe")
    check_stats(spec, "the state", spec.observer.stat_shape(state), x.shape)
    keep = None
    if mask is not None:
        if mask.dtype is not torch.bool:
            raise TypeError(f"mask is {mask.dtype}; give a bool tensor that is True where x counts (mask != 0)")
        if mask.shape != x.shape[: mask.ndim]:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not fit x of shape {tuple(x.shape)}; "
                f"its shape must be that of the leading axes of x"
            )
        keep = mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
    if x.numel() == 0:
        return dict(state)
    return spec.observer.observe(state, x.detach(), keep)


def merge(spec: QuantSpec, state: State, other: State) -> State:
    """Join what two states saw; the same bits for any order and grouping of the parts.

    Args:
        spec: the quantization that both states were made for.
        state: one state.
        other: another, with the same keys, shapes, dtypes and device.

    Raises:
        ValueError: the states do not belong together.
        TypeError: the observer depends on order (a moving average).

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> a, b = (fsq.observe(spec, fsq.init(spec, (1,)), torch.tensor([v])) for v in (-1.0, 2.0))
        >>> fsq.merge(spec, a, b)
        {'min': tensor([-1.]), 'max': tensor([2.]), 'count': tensor([2])}
    """
    for s in (state, other):
        spec.observer.stat_shape(s)
    for name, value in state.items():
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(value, what), getattr(other[name], what)
            if ours != theirs:
                raise ValueError(
                    f"states to merge differ in the {what} of {name!r}: {ours} and {theirs}; "
                    f"both must come from init() with the same spec, shape, dtype and device"
                )
    return spec.observer.merge(state, other)


def calc_qparams(spec: QuantSpec, state: State) -> QParams:
    """Choose scale and zero point from what was recorded.

    Pure and compilable, so it does not judge: a state that has seen nothing gives `spec.eps` as
    scale. `check(spec, state)` judges.

    Args:
        spec: the quantization; may differ from the one that recorded in dtype, mapping and bounds.
        state: what was recorded.

    Returns:
        QParams of the statistics' shape, in `spec.scale_dtype` and `spec.zero_point_dtype`.

    Raises:
        ValueError: `state` is of another observer.

    Source: `torchao.quantization.choose_qparams_affine_with_min_max`; the same bits.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
        >>> state = fsq.observe(spec, fsq.init(spec, (2,)), torch.tensor([-1.0, 1.55]))
        >>> scale, zero_point = fsq.calc_qparams(spec, state)
        >>> scale, zero_point
        (tensor([0.0100]), tensor([100], dtype=torch.int32))
    """
    spec.observer.stat_shape(state)
    lo, hi = spec.observer.range(spec, state)
    return from_range(spec, lo, hi)


def check(spec: QuantSpec, state: State, *, min_count: int = 1) -> None:
    """Raise CalibrationError if a range must not be chosen from `state`. Reads the data (a sync).

    Args:
        spec: the quantization that `state` was made for.
        state: what was recorded.
        min_count: values that each scale must have seen.

    Raises:
        CalibrationError: nothing or too little was seen, or NaN or Inf was; the message says what,
            in how many blocks, and what to do.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> fsq.check(spec, fsq.init(spec, (4, 8)))
        Traceback (most recent call last):
        ...
        functional_sq.observer.CalibrationError: nothing was seen, at least 1 needed; calibrate with more data
    """
    spec.observer.stat_shape(state)
    if fault := spec.observer.fault(state, min_count):
        raise CalibrationError(fault)
