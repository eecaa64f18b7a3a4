"""SkipNonfinite: NaN and Inf are left out of the range and counted, whatever observer it wraps."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import functional_sq as fsq
from functional_sq.observers.moving_average import MeanRange, MovingAverage
from functional_sq.observers.skip_nonfinite import SkipNonfinite
from functional_sq.serialize import load, save, spec_from_json, spec_to_json
from functional_sq.testing import assert_same_bits

NAN, INF = math.nan, math.inf
INNER = [fsq.MinMax(), fsq.Fixed(-1.0, 2.0), MovingAverage(0.3), MeanRange()]
GRANULARITIES = [fsq.PerTensor(), fsq.PerAxis(0), fsq.PerAxis(-1), fsq.PerGroup(4), fsq.PerBlock((2, 2))]


def spec_of(
    inner: fsq.Observer,
    limit: float = 0.01,
    granularity: fsq.Granularity = fsq.PerTensor(),  # noqa: B008
) -> fsq.QuantSpec:
    return fsq.QuantSpec(torch.int8, granularity, observer=SkipNonfinite(inner, limit))


def dirty(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values of which about a third is NaN, inf or -inf, and where they are finite."""
    x = torch.randn(shape)
    what = torch.randint(0, 9, shape)
    for i, bad in enumerate((NAN, INF, -INF)):
        x = torch.where(what == i, bad, x)
    return x, what > 2


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_it_is_the_inner_observer_on_the_finite_values(inner: fsq.Observer, granularity: fsq.Granularity) -> None:
    spec = spec_of(inner, granularity=granularity)
    plain = dataclasses.replace(spec, observer=inner)
    state, expected = fsq.init(spec, (6, 8)), fsq.init(plain, (6, 8))
    for _ in range(3):
        x, finite = dirty(6, 8)
        state, expected = fsq.observe(spec, state, x), fsq.observe(plain, expected, x, mask=finite)
    nonfinite = state.pop("nonfinite")
    assert_same_bits("the inner state", "observe(mask=finite)", state, expected)
    assert (nonfinite + state["count"] == 3 * 48 // nonfinite.numel()).all()
    assert nonfinite.sum() > 20
    state["nonfinite"] = nonfinite
    assert_same_bits("qparams", "theirs", fsq.calc_qparams(spec, state), fsq.calc_qparams(plain, expected))
    # What was recorded is a state that the inner observer reads.
    assert_same_bits("qparams", "read by it", fsq.calc_qparams(plain, state), fsq.calc_qparams(plain, expected))


def test_a_masked_nan_is_not_counted() -> None:
    spec = spec_of(fsq.MinMax())
    x = torch.tensor([[1.0, NAN], [NAN, INF], [2.0, 3.0]])
    state = fsq.observe(spec, fsq.init(spec, x.shape), x, mask=torch.tensor([True, False, True]))
    assert {k: v.item() for k, v in state.items()} == {"min": 1.0, "max": 3.0, "count": 3, "nonfinite": 1}


def test_without_it_nan_stays_visible() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
    state = fsq.observe(spec, fsq.init(spec, (2,)), torch.tensor([NAN, 1.0]))
    assert state["min"].isnan().all()


# check: how many, in how many blocks, and what to do.


def test_check_says_how_many_in_how_many_blocks() -> None:
    spec = spec_of(fsq.MinMax(), 0.25, fsq.PerAxis(0))
    x = torch.ones(3, 8)
    x[0, :2] = NAN  # a quarter: at the limit, not above it
    fsq.check(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
    x[1, :3] = INF
    x[2, :5] = -INF
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    message = r"^8 of 16 values in 2 of 3 blocks are NaN or Inf, more than limit=0\.25 allows; remove .* raise the"
    with pytest.raises(fsq.CalibrationError, match=message):
        fsq.check(spec, state)
    fsq.check(dataclasses.replace(spec, observer=SkipNonfinite(fsq.MinMax(), 0.7)), state)  # a limit is no state


def test_limits_at_the_ends() -> None:
    x = torch.tensor([1.0] * 999 + [NAN])
    for limit, refused in ((0, True), (0.0009, True), (0.001, False), (1, False)):
        spec = spec_of(fsq.MinMax(), limit)
        state = fsq.observe(spec, fsq.init(spec, x.shape), x)
        if refused:
            with pytest.raises(fsq.CalibrationError, match="1 of 1000 values are NaN or Inf"):
                fsq.check(spec, state)
        else:
            fsq.check(spec, state)


def test_check_where_nothing_finite_was_seen() -> None:
    x = torch.full((4,), NAN)
    for limit, message in ((0.01, "4 of 4 values are NaN"), (1.0, "nothing was seen")):
        spec = spec_of(fsq.MinMax(), limit)
        with pytest.raises(fsq.CalibrationError, match=message):
            fsq.check(spec, fsq.observe(spec, fsq.init(spec, x.shape), x))
    with pytest.raises(fsq.CalibrationError, match="nothing was seen"):
        fsq.check(spec_of(fsq.MinMax()), fsq.init(spec_of(fsq.MinMax()), (4,)))


def test_check_asks_the_inner_observer_too() -> None:
    spec = spec_of(fsq.MinMax())
    x = torch.tensor([1e300, 1.0], dtype=torch.float64)  # finite, and Inf in a float32 state
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    assert int(state["nonfinite"]) == 0
    with pytest.raises(fsq.CalibrationError, match="Inf was seen"):
        fsq.check(spec, state)
    with pytest.raises(fsq.CalibrationError, match="only 1 values were seen"):
        fsq.check(spec, fsq.observe(spec, fsq.init(spec, (1,)), torch.ones(1)), min_count=2)


# Merge and refusals.


def test_merge_adds() -> None:
    spec = spec_of(fsq.MinMax(), granularity=fsq.PerAxis(-1))
    x, _ = dirty(12, 3)
    empty = fsq.init(spec, x.shape)
    parts = [fsq.observe(spec, empty, part) for part in torch.split(x, [1, 4, 0, 7])]
    merged = empty
    for part in reversed(parts):
        merged = fsq.merge(spec, merged, part)
    assert_same_bits("merged", "in one", merged, fsq.observe(spec, empty, x))


def test_merge_refuses_what_the_inner_observer_refuses() -> None:
    spec = spec_of(MovingAverage(0.1))
    state = fsq.init(spec, (2,))
    with pytest.raises(TypeError, match=r"MovingAverage\(momentum=0\.1\) depends on the order"):
        fsq.merge(spec, state, state)


@pytest.mark.parametrize("limit", [-0.01, 1.01, NAN, INF])
def test_a_limit_out_of_range(limit: float) -> None:
    with pytest.raises(ValueError, match=rf"limit={limit!r} is not in \[0, 1\]; it is a share"):
        SkipNonfinite(fsq.MinMax(), limit)


@pytest.mark.parametrize("limit", [True, "0.1", None])
def test_a_limit_that_is_no_number(limit: object) -> None:
    with pytest.raises(TypeError, match=r"limit=.* is not a number; use"):
        SkipNonfinite(fsq.MinMax(), limit)  # type: ignore[arg-type]


@pytest.mark.parametrize("inner", [fsq.MinMax, None, "MinMax"])
def test_it_wraps_observers_only(inner: object) -> None:
    with pytest.raises(TypeError, match=r"is not an Observer; wrap one, as SkipNonfinite\(MinMax\(\)\)"):
        SkipNonfinite(inner)  # type: ignore[arg-type]


def test_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="records 'nonfinite' itself"):
        SkipNonfinite(SkipNonfinite(fsq.MinMax()))


# Values: repr, JSON, files.


def test_repr_json_and_file(tmp_path: Path) -> None:
    observer = SkipNonfinite(MovingAverage(0.3), limit=0.5)
    names = {"SkipNonfinite": SkipNonfinite, "MovingAverage": MovingAverage}
    assert eval(repr(observer), dict(names)) == observer  # eval adds to its dict
    spec = spec_of(observer.observer, 0.5, fsq.PerAxis(0))
    classes = tuple(names.values())
    assert spec_from_json(spec_to_json(spec), classes=classes) == spec
    x, _ = dirty(4, 9)
    state = fsq.observe(spec, fsq.init(spec, x.shape), x)
    save(tmp_path / "c.safetensors", {"layer": (spec, state)})
    loaded_spec, loaded = load(tmp_path / "c.safetensors", classes=classes)["layer"]
    assert loaded_spec == spec
    assert_same_bits("loaded", "saved", loaded, state)


# vmap and compile.


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_128_experts_in_one_call(inner: fsq.Observer) -> None:
    spec = spec_of(inner, granularity=fsq.PerAxis(-1))
    x, _ = dirty(128, 6, 4)
    mask = torch.rand(128, 6) < 0.4
    mask[5] = False
    empty = fsq.init(spec, (6, 4))
    states = {k: torch.stack([v] * 128) for k, v in empty.items()}
    mapped = torch.vmap(lambda s, x, m: fsq.observe(spec, s, x, mask=m))(states, x, mask)
    for i in range(128):
        expected = fsq.observe(spec, empty, x[i], mask=mask[i])
        assert_same_bits(f"expert {i}", "the loop", {k: v[i] for k, v in mapped.items()}, expected)
    assert not mapped["count"][5].any()
    assert not mapped["nonfinite"][5].any()


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_one_graph_compiled_once(inner: fsq.Observer) -> None:
    counter = CompileCounter()
    spec = spec_of(inner, granularity=fsq.PerAxis(-1))
    step = torch.compile(partial(fsq.observe, spec), backend=counter, fullgraph=True, dynamic=True)
    state = expected = fsq.init(spec, (1, 4))
    for n in (3, 5, 8, 17):
        x, _ = dirty(n, 4)
        state, expected = step(state, x), fsq.observe(spec, expected, x)
    assert counter.frame_count == 1
    assert_same_bits("compiled", "eager", state, expected)


def test_generated_code_has_the_bits_of_eager() -> None:
    spec = spec_of(fsq.MinMax(), granularity=fsq.PerGroup(8))
    compiled = torch.compile(partial(fsq.observe, spec), fullgraph=True)
    state = fsq.init(spec, (8, 32))
    for _ in range(3):
        x, _ = dirty(8, 32)
        expected = fsq.observe(spec, state, x)
        state = compiled(state, x)
        assert_same_bits("compiled", "eager", state, expected)


def test_it_merges_by_a_table_where_the_inner_observer_does() -> None:
    assert SkipNonfinite(fsq.MinMax()).table == fsq.MinMax().table | {"nonfinite": fsq.SUM}
    assert SkipNonfinite(MovingAverage(0.3)).table == {}
