"""The law suite is itself tested: strategies reach the rare inputs, and wrong observers fail the right law."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis.errors import NoSuchExample
from hypothesis.strategies import SearchStrategy
from torch import Tensor

import functional_sq as fsq
from functional_sq.formats import Float8
from functional_sq.observer import State
from functional_sq.testing import (
    LAWS,
    Law,
    assert_same_bits,
    cases,
    check_law,
    check_observer,
    compiled_equals_eager,
    granularities,
    shapes,
    specs,
    tensors,
)

T = TypeVar("T")
F32 = torch.finfo(torch.float32)


def find_any(strategy: SearchStrategy[T], condition: Callable[[T], bool], max_examples: int = 1000) -> T:
    """Return an example; hypothesis.NoSuchExample is raised, and fails the test, if none is reached."""
    search = settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    return find(strategy, condition, settings=search)


# Each input class is reachable.


def has_tie(x: Tensor) -> bool:
    """Whether an element lies exactly between two codes of the int8 scale of the tensor itself."""
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
    scale, _ = fsq.calc_qparams(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
    steps = (x / scale).abs()
    return bool(((steps - steps.floor() == 0.5) & (steps < 127)).any())


def is_subnormal(x: Tensor) -> Tensor:
    return (x != 0) & (x.abs() < torch.finfo(x.dtype).smallest_normal)


def one_row_of_each_sign(x: Tensor) -> bool:
    return x.ndim == 2 and bool((x > 0).all(-1).any() and (x < 0).all(-1).any())


TENSOR_CLASSES: dict[str, Callable[[Tensor], bool]] = {
    "tie at half a step": has_tie,
    "tie among more than 8": lambda x: x.numel() > 8 and has_tie(x),
    "all zero": lambda x: bool((x == 0).all()),
    "0.0 and -0.0": lambda x: bool(((x == 0) & x.signbit()).any() and ((x == 0) & ~x.signbit()).any()),
    "all positive": lambda x: bool((x > 0).all()) and x.numel() > 1,
    "all negative": lambda x: bool((x < 0).all()) and x.numel() > 1,
    "a positive and a negative row": one_row_of_each_sign,
    "a row of zeros beside another": lambda x: x.ndim == 2 and bool((x == 0).all(-1).any() and (x != 0).all(-1).any()),
    "subnormal": lambda x: bool(is_subnormal(x).any()),
    "all subnormal": lambda x: bool(is_subnormal(x).all()),
    "min == max": lambda x: x.numel() > 8 and bool(x.min() == x.max()),
    "width above the largest float": lambda x: bool((x.max() - x.min()).isinf()),
    "subnormal and huge": lambda x: bool(is_subnormal(x).any() and (x.abs() > torch.finfo(x.dtype).max / 4).any()),
    "not contiguous": lambda x: not x.is_contiguous(),
    "many different values": lambda x: x.unique().numel() > 20,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("condition", TENSOR_CLASSES.values(), ids=TENSOR_CLASSES.keys())
def test_tensors_reach(condition: Callable[[Tensor], bool], dtype: torch.dtype) -> None:
    x = find_any(shapes().flatmap(lambda shape: tensors(shape, dtype)), condition)
    assert x.dtype is dtype
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensors_reach_nonfinite_on_demand(value: float) -> None:
    def has(x: Tensor) -> bool:
        return bool((x.isnan() if math.isnan(value) else x == value).any() and x.isfinite().any())

    find_any(tensors((2, 6), nonfinite=True), has)


def test_tensors_of_float64_fit_a_float32_state() -> None:
    x = find_any(tensors((3,), torch.float64), lambda x: bool((x.abs() == F32.max).any()))
    assert bool(x.float().isfinite().all())


def test_exponents_limit_every_magnitude_but_zero() -> None:
    strategy = tensors((4,), exponents=(-20, 20))
    find_any(strategy, lambda x: bool((x == 0).any() and (x.abs() >= 2.0**19).any()))
    with pytest.raises(NoSuchExample):
        find_any(strategy, lambda x: bool(((x != 0) & ((x.abs() < 2.0**-20) | (x.abs() > 2.0**20))).any()), 200)


def test_shapes_reach_scalars_and_every_rank() -> None:
    for rank in range(4):
        find_any(shapes(), lambda shape, rank=rank: len(shape) == rank)
    find_any(shapes(), lambda shape: math.prod(shape) > 64)


@pytest.mark.parametrize(
    "kind",
    [fsq.PerTensor, fsq.PerToken, fsq.PerAxis, fsq.PerRow, fsq.PerGroup, fsq.PerBlock],
    ids=lambda kind: kind.__name__,
)
def test_granularities_reach_each_class(kind: type[fsq.Granularity]) -> None:
    g = find_any(granularities((2, 4, 6)), lambda g: type(g) is kind)
    assert len(g.stat_shape((2, 4, 6))) == 3


def test_granularities_of_a_scalar_apply_to_it() -> None:
    for kind in (fsq.PerTensor, fsq.PerBlock):
        assert find_any(granularities(()), lambda g, kind=kind: type(g) is kind).stat_shape(()) == ()


SPEC_CLASSES: dict[str, Callable[[fsq.QuantSpec], bool]] = {
    "int8 from -127": lambda s: s.dtype is torch.int8 and s.bounds == (-127, 127),
    "two codes": lambda s: s.bounds[1] - s.bounds[0] == 1,
    "uint8 within narrower bounds": lambda s: s.dtype is torch.uint8 and s.quant_max is not None,
    "each end narrowed": lambda s: s.quant_min is not None and s.quant_max is not None,
    "asymmetric per group": lambda s: s.mapping is fsq.MappingType.ASYMMETRIC and type(s.granularity) is fsq.PerGroup,
    "symmetric without clipping": lambda s: s.mapping is fsq.MappingType.SYMMETRIC_NO_CLIPPING_ERR,
    "float zero point": lambda s: s.zero_point_dtype is torch.float32,
    "float64 scale": lambda s: s.scale_dtype is torch.float64,
    "smallest eps": lambda s: s.eps == F32.tiny,
    "float8 per block": lambda s: isinstance(s.format, Float8) and type(s.granularity) is fsq.PerBlock,
}


@pytest.mark.parametrize("condition", SPEC_CLASSES.values(), ids=SPEC_CLASSES.keys())
def test_specs_reach(condition: Callable[[fsq.QuantSpec], bool]) -> None:
    find_any(specs((4, 6)), condition)


@pytest.mark.parametrize("dtype", fsq.FORMATS, ids=str)
def test_specs_reach_every_format(dtype: torch.dtype) -> None:
    find_any(specs((4, 6)), lambda spec: spec.dtype is dtype)


def test_cases_reach_a_state_in_the_dtype_of_the_data_and_in_float32() -> None:
    for dtype in (torch.float32, torch.float16):
        find_any(
            cases(fsq.MinMax()),
            lambda case, dtype=dtype: case["dtype"] is dtype and case["batches"][0].dtype is torch.float16,
        )


# Wrong observers, and the law that each breaks. Classes of this module, so that pickle finds them.


@dataclass(frozen=True)
class MeanRange(fsq.MinMax):
    """Merges by averaging: commutative, but neither associative nor with an identity."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        return fsq.MinMax().observe(state, x, keep)

    def merge(self, a: State, b: State) -> State:
        mean = {name: (a[name] + b[name]) / 2 for name in ("min", "max")}
        return mean | {"count": a["count"] + b["count"]}


@dataclass(frozen=True)
class AddsInPlace(fsq.MinMax):
    """Counts in the tensor of the state that it was given."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        new = super().observe(state, x, keep)
        state["count"].copy_(new["count"])
        return new


@dataclass(frozen=True)
class ChangesX(fsq.MinMax):
    """Clears the data once it has read it."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        new = super().observe(state, x, keep)
        x.mul_(0)
        return new


@dataclass(frozen=True)
class KeepsX(fsq.MinMax):
    """Holds on to the memory of the data where a block is one element."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        new = super().observe(state, x, keep)
        return new | {"max": x} if x.shape == new["max"].shape and x.dtype == new["max"].dtype else new


@dataclass(frozen=True)
class CountsFromOne(fsq.MinMax):
    """Has seen a value before it saw any: init is not the identity of merge."""

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        state = super().init(stat_shape, dtype, device)
        return state | {"count": state["count"] + 1}


@dataclass(frozen=True)
class Widens(fsq.MinMax):
    """Returns float64 statistics, whatever the state holds."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        new = super().observe(state, x, keep)
        return new | {name: new[name].double() for name in ("min", "max")}


@dataclass(frozen=True)
class FloatSum(fsq.MinMax):
    """Adds floats: the sum depends on the order of its terms."""

    reductions = {**fsq.MinMax.reductions, "sum": fsq.SUM}

    def elements(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"min": x, "max": x, "sum": x}


@dataclass(frozen=True)
class IgnoresMask(fsq.MinMax):
    """Counts what the mask leaves out."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        return super().observe(state, x, None)


@dataclass(frozen=True)
class LooksAtData(fsq.MinMax):
    """Decides in Python by a value: no vmap, and no single graph."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        if float(x.max()) == 12345.0:
            return state
        return super().observe(state, x, keep)


@dataclass(frozen=True)
class SignedZero(fsq.MinMax):
    """Keeps the sign of zero, which depends on the order of the data."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        new = super().observe(state, x, keep)
        if keep is not None:
            return new
        last = x.reshape(-1)[-1]
        return new | {"max": torch.where(new["max"] == 0, last.to(new["max"].dtype) * 0, new["max"])}


@dataclass(frozen=True)
class AtLeastOne(fsq.MinMax):
    """Widens every range to 1: an absolute size in input units."""

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["min"].clamp(max=-1), state["max"].clamp(min=1)


@dataclass(frozen=True)
class Forgets(fsq.MinMax):
    """Is equal to no copy of itself."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


@dataclass(frozen=True)
class Infinite(fsq.MinMax):
    """Gives a range that no scale can express."""

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["min"] * 0 + math.nan, state["max"]


@dataclass(frozen=True)
class WeighsAxes(fsq.MinMax):
    """Reads the shape of the statistics as if it were a number of values."""

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        weight = 2.0 if isinstance(spec.granularity, fsq.PerBlock) else 1.0
        return state["min"] * weight, state["max"] * weight


@dataclass(frozen=True)
class RefusesToMerge(fsq.MinMax):
    """Raises a TypeError from merge that is an accident and gives no reason."""

    def merge(self, a: State, b: State) -> State:
        raise TypeError("unsupported operand")


@dataclass(frozen=True)
class KeepsFirst(fsq.MinMax):
    """Merges to the first state that saw anything: associative, with an identity, not commutative."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        return fsq.MinMax().observe(state, x, keep)

    def merge(self, a: State, b: State) -> State:
        return {name: torch.where(a["count"] > 0, a[name], b[name]) for name in a}


@dataclass(frozen=True)
class FewElements(fsq.MinMax):
    """Records a thousand at most."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        new = super().observe(state, x, keep)
        return state | {"count": new["count"]} if x.numel() > 1000 else new


@dataclass(frozen=True)
class CountsUpTo(fsq.MinMax):
    """Has a counter of few bits."""

    def merge(self, a: State, b: State) -> State:
        new = super().merge(a, b)
        return new | {"count": new["count"].clamp(max=5000)}


@dataclass(frozen=True)
class NeverFaulty(fsq.MinMax):
    """Lets a range be chosen from nothing."""

    def fault(self, state: State, min_count: int) -> str | None:
        return None


@dataclass(frozen=True)
class DropsNaN(fsq.MinMax):
    """Leaves NaN out and says nothing."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        return super().observe(state, x, ~x.isnan() if keep is None else keep & ~x.isnan())


@dataclass(frozen=True)
class Positive(fsq.MinMax):
    """Has no room for what is below 0."""

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["max"] * 0, state["max"].clamp(min=0)


@dataclass(frozen=True)
class NaNIsZero(fsq.MinMax):
    """Replaces what is not finite by numbers, and says nothing."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        return super().observe(state, x.nan_to_num(), keep)


@dataclass(frozen=True)
class InfIsZero(fsq.MinMax):
    """Replaces Inf by 0, and says nothing."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        return super().observe(state, torch.where(x.isinf(), 0.0, x), keep)


@dataclass(frozen=True)
class Swapped(fsq.MinMax):
    """Returns its range from the largest value to the smallest."""

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["max"], state["min"]


@dataclass(frozen=True)
class OneRange(fsq.MinMax):
    """Gives every block the range of the whole tensor."""

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["min"].amin().expand_as(state["min"]), state["max"].amax().expand_as(state["max"])


@dataclass(frozen=True)
class AlwaysFaulty(fsq.MinMax):
    """Finds a fault with every state."""

    def fault(self, state: State, min_count: int) -> str | None:
        return "something is wrong; calibrate again"


@dataclass(frozen=True)
class CountsInFloats(fsq.MinMax):
    """Is right up to 2**24 values."""

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        state = super().init(stat_shape, dtype, device)
        return state | {"count": state["count"].float()}

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        new = super().observe(state | {"count": state["count"].long()}, x, keep)
        return new | {"count": new["count"].float()}


@dataclass(frozen=True)
class CountsWhatIsMasked(fsq.MinMax):
    """Counts the whole batch where a value of it counts."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        new = super().observe(state, x, keep)
        if keep is None:
            return new
        return new | {"count": torch.where(keep.any(), super().observe(state, x, None)["count"], state["count"])}


@dataclass(frozen=True)
class LooksAtTheMask(fsq.MinMax):
    """Takes a way round where all counts."""

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        return super().observe(state, x, None if keep is None or bool(keep.all()) else keep)


@dataclass(frozen=True)
class ReadsByPlace(fsq.MinMax):
    """Takes the first two tensors for the range."""

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        lo, hi, *_ = state.values()
        return lo, hi


@dataclass(frozen=True)
class OnTheCPU(fsq.MinMax):
    """Makes its state there, whatever device is asked for."""

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        return super().init(stat_shape, dtype, None)


@dataclass(frozen=True)
class InFloat32(fsq.MinMax):
    """Makes its state so, whatever dtype is asked for."""

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        return super().init(stat_shape, torch.float32, device)


@dataclass(frozen=True)
class OneInit(fsq.MinMax):
    """Gives the same tensors to all that ask."""

    @staticmethod
    @functools.cache
    def made(*given: Any) -> State:
        return fsq.MinMax().init(*given)

    def init(self, stat_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None) -> State:
        return dict(self.made(stat_shape, dtype, device))


@dataclass(frozen=True)
class AnotherTable(fsq.MinMax):
    """Merges over ranks as it does not merge by itself."""

    @property
    def table(self) -> Mapping[str, fsq.Reduction]:
        return {"min": fsq.MAX, "max": fsq.MAX, "count": fsq.SUM}


@dataclass(frozen=True)
class MergesIntoTheSecond(fsq.MinMax):
    """Writes to one of the parts."""

    def merge(self, a: State, b: State) -> State:
        b["min"].copy_(torch.minimum(a["min"], b["min"]))
        return super().merge(a, b)


@dataclass(frozen=True)
class IgnoresTheLeast(fsq.MinMax):
    """Is content with one value."""

    def fault(self, state: State, min_count: int) -> str | None:
        return super().fault(state, 1)


@dataclass(frozen=True)
class LooksAtOneBlock(fsq.MinMax):
    """Is content where the first block is."""

    def fault(self, state: State, min_count: int) -> str | None:
        return super().fault({name: value.reshape(-1)[:1] for name, value in state.items()}, min_count)


@dataclass(frozen=True)
class OverlooksEmptyBlocks(fsq.MinMax):
    """Finds no fault where any block saw enough."""

    def fault(self, state: State, min_count: int) -> str | None:
        seen = state["count"] > 0
        seen_alone = {name: value[seen] for name, value in state.items()}
        return super().fault(state if not seen.any() else seen_alone, min_count)


@dataclass(frozen=True)
class ReadsInPython(fsq.MinMax):
    """Its range looks at values, which vmap and a compiler do not have."""

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        lo, hi = super().range(spec, state)
        return (lo, hi) if bool((state["count"] > 0).all()) else (lo.clamp(max=0), hi.clamp(min=0))


WRONG = [
    (OverlooksEmptyBlocks(), "unfit_states_are_faulty"),
    (ReadsInPython(), "vmap_equals_loop"),
    (MeanRange(), "merge_is_a_commutative_monoid"),
    (CountsFromOne(), "merge_is_a_commutative_monoid"),
    (KeepsFirst(), "merge_is_a_commutative_monoid"),
    (RefusesToMerge(), "merge_is_a_commutative_monoid"),
    (AnotherTable(), "merge_is_a_commutative_monoid"),
    (MergesIntoTheSecond(), "merge_is_a_commutative_monoid"),
    (FloatSum(), "observe_is_a_homomorphism"),
    (SignedZero(), "observe_is_a_homomorphism"),
    (IgnoresMask(), "masked_values_do_not_count"),
    (CountsWhatIsMasked(), "masked_values_do_not_count"),
    (AddsInPlace(), "observe_is_pure"),
    (CountsInFloats(), "observe_is_pure"),
    (ReadsByPlace(), "observe_is_pure"),
    (OnTheCPU(), "observe_is_pure"),
    (InFloat32(), "observe_is_pure"),
    (OneInit(), "observe_is_pure"),
    (ChangesX(), "observe_is_pure"),
    (KeepsX(), "observe_is_pure"),
    (Widens(), "observe_is_pure"),
    (LooksAtData(), "vmap_equals_loop"),
    (LooksAtTheMask(), "vmap_equals_loop"),
    (LooksAtData(), "compiled_equals_eager"),
    (Forgets(), "round_trips"),
    (Infinite(), "zero_is_exact"),
    (Infinite(), "codes_in_range_idempotent_monotone"),
    (AtLeastOne(), "scale_equivariance"),
    (WeighsAxes(), "granularities_agree"),
    (MeanRange(), "qparams_ignore_splits"),
    (FewElements(), "large_is_its_pieces"),
    (CountsUpTo(), "large_is_its_pieces"),
    (NeverFaulty(), "unfit_states_are_faulty"),
    (IgnoresTheLeast(), "unfit_states_are_faulty"),
    (LooksAtOneBlock(), "unfit_states_are_faulty"),
    (DropsNaN(), "unfit_states_are_faulty"),
    (NaNIsZero(), "unfit_states_are_faulty"),
    (InfIsZero(), "unfit_states_are_faulty"),
    (Positive(), "a_constant_is_represented"),
    (Swapped(), "each_block_is_represented"),
    (OneRange(), "each_block_is_represented"),
    (AlwaysFaulty(), "each_block_is_represented"),
]


@pytest.mark.usefixtures("as_found")
@pytest.mark.parametrize(
    ("observer", "name"), WRONG, ids=lambda value: value if isinstance(value, str) else repr(value)
)
def test_wrong_observer_fails_its_law(observer: fsq.Observer, name: str) -> None:
    with pytest.raises(AssertionError) as failure:
        check_law(LAWS[name], observer)
    message = str(failure.value)
    assert message.startswith(f"{name}(\n    spec=QuantSpec(")
    assert "batches=(tensor(" in message or "rows=2000" in message or "columns=200" in message


@pytest.mark.parametrize(
    ("observer", "name", "smallest"),
    [
        (KeepsFirst(), "merge_is_a_commutative_monoid", "tensor(0.0), tensor(nan), tensor(0.0)"),
        (InFloat32(), "observe_is_pure", ", ".join(["tensor(0.0, dtype=torch.float64)"] * 3)),
        (Positive(), "a_constant_is_represented", "tensor([-1.0]),"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_the_case_that_is_shown_is_the_smallest(observer: fsq.Observer, name: str, smallest: str) -> None:
    with pytest.raises(AssertionError, match=r"PerTensor\(\)") as failure:
        check_law(LAWS[name], observer)
    assert f"batches=({smallest})," in str(failure.value)


@dataclass(frozen=True)
class PowerOfTwo(fsq.Accumulator):
    """Gives scales that are powers of two; what it reduces are integers."""

    reductions = {"exponent": fsq.MAX}

    def elements(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"exponent": torch.frexp(x).exponent}

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return -torch.exp2(state["exponent"]), torch.exp2(state["exponent"])


def test_the_largest_integer_of_nothing_is_nothing() -> None:
    check_law(LAWS["masked_values_do_not_count"], PowerOfTwo(), max_examples=25)


def test_a_range_that_clips_nearly_everything_is_still_one() -> None:
    check_law(LAWS["each_block_is_represented"], fsq.Percentile(51.0))


def test_every_law_has_an_observer_that_breaks_it() -> None:
    assert {name for _, name in WRONG} == set(LAWS)


def test_example_is_small_and_runs_as_printed() -> None:
    with pytest.raises(AssertionError) as failure:
        check_law(LAWS["observe_is_pure"], AddsInPlace())
    call, reason = str(failure.value).split("\n)\n")
    assert reason.startswith("s after observe(s, x)['count'] is not s before['count'], in 1 of 1 elements")
    names = {"torch": torch, "tensor": torch.tensor, "AddsInPlace": AddsInPlace}
    names |= {name: getattr(fsq, name) for name in fsq.__all__} | {"observe_is_pure": LAWS["observe_is_pure"].holds}
    assert call.count("tensor(0.0)") == 3
    with pytest.raises(AssertionError, match="s before"):
        eval(f"{call}\n)", names)


# check_observer and check_law.


def test_check_observer_is_silent_when_all_laws_hold(capfd: pytest.CaptureFixture[str]) -> None:
    check_observer(fsq.MinMax(), max_examples=3)
    assert capfd.readouterr() == ("", "")


def test_check_observer_names_each_broken_law_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError) as failure:
        check_observer(LooksAtData(), max_examples=10)
    title, examples = str(failure.value).split("\n", 1)
    broken = ["vmap_equals_loop", "compiled_equals_eager"]
    assert title == f"LooksAtData() fails 2 of {len(LAWS)} laws: {', '.join(broken)}"
    assert [name for name in LAWS for _ in range(examples.count(f"\n{name}(\n"))] == broken
    assert capfd.readouterr() == ("", "")


def test_check_law_is_deterministic() -> None:
    messages = set()
    for _ in range(2):
        with pytest.raises(AssertionError) as failure:
            check_law(LAWS["merge_is_a_commutative_monoid"], MeanRange())
        messages.add(str(failure.value))
    assert len(messages) == 1


def test_an_error_of_the_strategy_is_no_failure_of_the_observer() -> None:
    def broken(observer: fsq.Observer) -> SearchStrategy[dict[str, object]]:
        return shapes().map(lambda shape: {"spec": 1 / 0})

    with pytest.raises(ZeroDivisionError):
        check_law(Law(LAWS["observe_is_pure"].holds, broken), fsq.MinMax())


@dataclass(frozen=True)
class Last(fsq.Accumulator):
    """The range of the last batch: depends on order and says so."""

    reductions = {"min": fsq.MIN, "max": fsq.MAX}

    def elements(self, x: Tensor) -> Mapping[str, Tensor]:
        return {"min": x, "max": x}

    def observe(self, state: State, x: Tensor, keep: Tensor | None) -> State:
        batch = fsq.MinMax().observe(self.init(self.check_state(state), state["min"].dtype, x.device), x, keep)
        return {name: torch.where(batch["count"] > 0, batch[name], state[name]) for name in state}

    def merge(self, a: State, b: State) -> State:
        raise TypeError("Last depends on the order of batches; observe them in turn instead of merging")

    def range(self, spec: fsq.QuantSpec, state: State) -> tuple[Tensor, Tensor]:
        return state["min"], state["max"]


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_an_observer_that_depends_on_order_and_says_so_passes(law: Law) -> None:
    check_law(law, Last(), max_examples=10)


@dataclass(frozen=True)
class First(fsq.MinMax):
    """Holds observers in a tuple."""

    of: tuple[fsq.Observer, ...] = ()


def test_an_observer_that_holds_others_of_the_users_own_passes() -> None:
    check_law(LAWS["round_trips"], fsq.SkipNonfinite(First((First(), Last()))), max_examples=3)


def test_compiling_per_batch_is_counted() -> None:
    # Another shape each time is another graph: the count that the law relies on does rise.
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
    batches = [torch.ones(2), torch.ones(3), torch.ones(2, 2)]
    with pytest.raises(AssertionError, match=r"compile once\n  compilations = [23]"):
        compiled_equals_eager(spec, batches, backend="eager")


# The assertion helper.

A = torch.tensor([[1.0, 2.0]])
DIFFERENT = {
    "value": (A, A + 1, "in 2 of 2 elements, first at (0, 0): 1.0 and 2.0"),
    "sign of zero": (A * 0, A * -0.0, "first at (0, 0): 0.0 and -0.0"),
    "one bit": (A, torch.nextafter(A, A + 1), "first at (0, 0): 1.0 and 1.0000001192092896"),
    "NaN and number": (A, A * math.nan, "1.0 and nan"),
    "dtype": (A, A.double(), "left.dtype = torch.float32"),
    "shape": (A, A[0], "left.shape = (1, 2)"),
    "keys": ({"a": A}, {"b": A}, "left has the keys of right"),
    "in a dict": ({"a": A}, {"a": -A}, "left['a'] is not right['a']"),
    "in a tuple": ((A, A), (A, -A), "left[1] is not right[1]"),
    "in qparams": (fsq.QParams(A, A), fsq.QParams(A, -A), "left.zero_point is not right.zero_point"),
    "length": ((A, A), (A,), "not so: left == right"),
    "other values": (1, 2, "left = 1\n  right = 2"),
    "type": (A, 1.0, "not so: left == right"),
    "float8": (A.to(torch.float8_e4m3fn), (-A).to(torch.float8_e4m3fn), "1.0 and -1.0"),
}


@pytest.mark.parametrize(("a", "b", "part"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_assert_same_bits_fails(a: object, b: object, part: str) -> None:
    with pytest.raises(AssertionError) as failure:
        assert_same_bits("left", "right", a, b)
    assert part in str(failure.value)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e5m2fnuz],
    ids=str,
)
def test_assert_same_bits_holds(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, 3.0]).to(dtype)
    assert_same_bits("x", "x", {"a": (x, x[0])}, {"a": (x.clone(), x[0].clone())})


def test_assert_same_bits_takes_any_nan_for_any_other() -> None:
    quiet, other = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7F800001))
    assert_same_bits("quiet", "other", quiet, other)


def test_laws_are_named_by_their_functions_and_documented() -> None:
    for name, law in LAWS.items():
        assert law.holds.__name__ == name
        assert (law.holds.__doc__ or "").startswith("Assert that ")
    assert dataclasses.is_dataclass(Law)
