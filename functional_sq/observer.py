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
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import torch
from torch import Tensor

from functional_sq.blocks import align, split

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
    "check_number",
    "extremes",
]

State = dict[str, Tensor]
"""What an observer recorded: bare nouns to tensors, each with one entry for each block."""


class CalibrationError(ValueError):
    """A recorded state is not fit to choose a range from.

    Example: see `check`.
    """


@dataclass(frozen=True)
class Reduction:
    """A commutative monoid on tensors: how elements are reduced and how two results combine.

    Attributes:
        name: `min`, `max` or `sum`; also what a distributed merge asks of the collective.
        reduce: `(x, dims) -> Tensor`, over at least one dim.
        combine: the binary operation; the same result in any order and grouping.
        identity: `dtype -> number` that `combine` leaves without effect.

    Example:
        >>> import torch, functional_sq as fsq
        >>> x = torch.tensor([[1, -2], [3, 0]])
        >>> fsq.MAX.combine(fsq.MAX.reduce(x[:1], (0, 1)), fsq.MAX.reduce(x[1:], (0, 1)))
        tensor(3)
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
"""The sum; identity 0. Held in int64: a float sum depends on the order of its terms."""


def extremes(x: Tensor, dims: tuple[int, ...], keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value over `dims` of `x` where `keep`; a NaN is both.

    Each case is the one that took least time: a whole tensor in one pass instead of two (0.43 ms for
    4096 x 1024 float32 values, 0.58 ms for two), and over all axes but the last, compiled for one number
    of rows, sixteen rows at once (0.50 ms, where one column at a time takes 0.78).
    """
    lo = hi = x
    if keep is not None:
        # Where a whole vector counts or does not (a token), its ends are masked, not its elements.
        whole = tuple(d for d in dims if keep.shape[d] < x.shape[d])
        if whole and not torch.compiler.is_compiling():
            lo, hi = torch.amin(x, whole, keepdim=True), torch.amax(x, whole, keepdim=True)
        lo, hi = lo.masked_fill(~keep, MIN.identity(x.dtype)), hi.masked_fill(~keep, MAX.identity(x.dtype))
    elif len(dims) == x.ndim:
        return torch.aminmax(x)
    elif dims == tuple(range(x.ndim - 1)) and torch.compiler.is_compiling() and _is_known(math.prod(x.shape[:-1])):
        rows = x.reshape(-1, x.shape[-1])
        n = -(-rows.shape[0] // 16)
        # The runs may overlap: seeing a value twice changes neither end.
        runs = [rows.narrow(0, min(i * n, rows.shape[0] - n), n) for i in range(16)]
        lo, hi, dims = functools.reduce(torch.minimum, runs), functools.reduce(torch.maximum, runs), (0,)
    return (torch.amin(lo, dims), torch.amax(hi, dims)) if dims else (lo, hi)


def _is_known(rows: int) -> bool:
    """Whether a compiled graph is for this number of rows alone; Python code on a symbol would add guards."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imports sympy

    return has_static_value(rows)


def check_number(owner: object, name: str, remedy: str) -> None:
    """Raise TypeError unless a field of a frozen dataclass is a number; numpy's float64, which is a float, becomes one.

    A spec prints as the call that makes it, and a compiler takes no number of numpy in it.
    """
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is not a number; {remedy}")
    if type(value) not in (int, float) or abs(value) >= 2**63:  # no operator of torch takes a larger int
        try:
            value = float(value)
        except OverflowError:
            value = math.inf if value > 0 else -math.inf
        object.__setattr__(owner, name, value)


class Observer(abc.ABC):
    """What is recorded of a tensor and how the record is read as a range.

    Subclasses are frozen dataclasses (hashable, comparable, picklable); all that changes is in the
    state, and each state has `count`: int64, the values that each scale has seen.
    `functional_sq.testing.check_observer` runs the laws on one.

    Example: see `Accumulator`, from which all derive that record by reductions.
    """

    @property
    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """The keys of a state, `count` among them."""

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
        """Return the range `lo, hi` of each block that `spec` is to represent.

        `state` has the keys in `names`; it may have more, recorded by another observer.
        """

    @property
    def table(self) -> Mapping[str, Reduction]:
        """The reduction by which each key of a state merges, `count` among them; empty if `merge` works otherwise."""
        return {}

    def check_state(self, state: State, *, exact: bool = True) -> tuple[int, ...]:
        """Raise ValueError unless `state` is one of this observer; return the shape of its statistics.

        Not `exact`: the state is to be read, not added to, and other keys do no harm.
        """
        remedy = "make a state with init(spec, shape)"
        if not isinstance(state, dict) or not (state.keys() == self.names if exact else state.keys() >= self.names):
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            verb, remedy = ("records", remedy) if exact else ("reads", "record with an observer that has them")
            raise ValueError(f"{self} {verb} {sorted(self.names)}, this state is {found}; {remedy}")
        for name, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"the state's {name} is a {type(value).__name__}, not a tensor; {remedy}")
        shape = tuple(state["count"].shape)
        for name, value in state.items():
            if value.shape[: len(shape)] != shape:
                raise ValueError(f"the state's {name} has shape {tuple(value.shape)} and its count {shape}; {remedy}")
        return shape

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
        """Return the statistics of one batch, reduced over `dims` of `x` where `keep`.

        `keep` is bool, of the rank of `x`, and broadcasts to its shape.
        """
        measured, elements = {}, self.elements(x)
        if elements.keys() != self.reductions.keys():
            raise TypeError(
                f"{self}: elements gives {sorted(elements)}, and reductions has {sorted(self.reductions)}; give the "
                f"same names, or a measure of your own"
            )
        for name, values in elements.items():
            reduction = self.reductions[name]
            if reduction is not SUM and not values.is_floating_point():
                values = values.double()  # A state holds an extreme as a real value: no integer is its identity.
            if keep is not None:
                values = values.masked_fill(~keep, reduction.identity(values.dtype))
            measured[name] = reduction.reduce(values, dims) if dims else values
        return measured

    def trailing(self, name: str) -> tuple[int, ...]:
        """Return the axes that the statistic `name` has after those of its block: bins of a histogram."""
        return ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.reductions) | {"count"}

    @property
    def table(self) -> Mapping[str, Reduction]:
        # A subclass with a merge of its own does not merge by the table.
        return {**self.reductions, "count": SUM} if type(self).merge is Accumulator.merge else {}

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        state = {}
        for name, reduction in (*self.reductions.items(), ("count", SUM)):
            kind = torch.int64 if reduction is SUM else dtype
            shape = stat_shape + (() if name == "count" else self.trailing(name))
            state[name] = torch.full(shape, reduction.identity(kind), dtype=kind, device=device)
        return state

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        count = state["count"]
        view, dims = split(x, align(count.shape, x.ndim))
        if keep is None:
            seen = torch.full_like(count, x.numel() // count.numel())
        else:
            if view.ndim != x.ndim:
                keep = keep.expand(x.shape).reshape(view.shape)
            # Each entry of `keep` stands for as many values as it is broadcast to.
            alike = math.prod([view.shape[d] for d in dims if keep.shape[d] != view.shape[d]])
            seen = (keep.sum(dims, keepdim=True) if dims else keep.to(count.dtype)) * alike
            seen = seen.expand([1 if d in dims else n for d, n in enumerate(view.shape)])
        batch = {"count": seen.reshape(count.shape)}
        for name, value in self.measure(view, dims, keep).items():
            kind = state[name].dtype
            if value.is_floating_point() and not kind.is_floating_point:
                raise TypeError(
                    f"{self}: {name} is a SUM of {value.dtype}, and sums are held in {kind}, which is exact in any "
                    f"order; give integers, such as values that are scaled and rounded"
                )
            value = value.reshape(state[name].shape).to(kind)
            # Adding 0 turns -0.0 into 0.0: which of the two a minimum returns depends on the order.
            batch[name] = value + 0 if value.is_floating_point() else value
        return self.merge(state, batch)

    def merge(self, a: State, b: State) -> State:
        merged = {name: reduction.combine(a[name], b[name]) for name, reduction in self.reductions.items()}
        return merged | {"count": a["count"] + b["count"]}

    def fault(self, state: State, min_count: int) -> str | None:
        count = state["count"]
        blocks = f" in {{}} of {count.numel()} blocks" if count.numel() > 1 else ""
        few = count < min_count
        if bool(few.any()):
            nothing = int(count.max()) == 0
            seen = "nothing was seen" if nothing else f"only {int(count.min())} values were seen"
            remedy = "calibrate with data that reaches it" if nothing else "calibrate with more data"
            return f"{seen}{blocks.format(int(few.sum()))}, at least {min_count} needed; {remedy}"
        real = {name: state[name] for name in self.reductions if state[name].is_floating_point()}
        for name, value in real.items():
            if not bool(value.isfinite().all()):
                kind = "NaN" if bool(value.isnan().any()) else "Inf"
                bad = int((~value.isfinite()).sum())
                fault = (
                    f"{kind} was seen ({name}{blocks.format(bad)}); remove such values from the calibration data, "
                    f"leave them out with a mask, or record with SkipNonfinite"
                )
                if kind == "Inf" and value.dtype is not torch.float64:
                    wider = torch.float64 if value.dtype is torch.float32 else torch.float32
                    fault += (
                        f"; if the data has none, the state's {value.dtype} is too small: use init(..., dtype={wider})"
                    )
                return fault
        if real and not any(bool(value.any()) for value in real.values()):
            return (
                "only zeros were seen, and a scale chosen from them clips every other value; "
                "calibrate with data that is not all zero here"
            )
        return None
