"""MovingAverage and MeanRange: torch.ao's bits, masks and empty batches, experts, refusals."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver

import functional_sq as fsq
from functional_sq.observers.moving_average import MeanRange, MovingAverage
from functional_sq.testing import assert_same_bits

NAN = float("nan")


def per_tensor(observer: fsq.Observer) -> fsq.QuantSpec:
    return fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC, observer=observer)


def seen(spec: fsq.QuantSpec, *batches: torch.Tensor, dtype: torch.dtype = torch.float32) -> fsq.State:
    state = fsq.init(spec, batches[0].shape, dtype=dtype)
    for x in batches:
        state = fsq.observe(spec, state, x)
    return state


# The bits of torch.ao.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum", [0.01, 0.1, 1 / 3, 0.5, 1.0])
def test_bits_of_torch_per_tensor(momentum: float, dtype: torch.dtype) -> None:
    spec = per_tensor(MovingAverage(momentum))
    theirs = MovingAverageMinMaxObserver(averaging_constant=momentum)
    state = fsq.init(spec, (5, 7))
    for i in range(40):
        x = (torch.randn(5, 7) * (1 + i % 5) + i % 3).to(dtype)
        state = fsq.observe(spec, state, x)
        theirs(x)
        assert_same_bits("min", "torch's min_val", state["min"].reshape(()), theirs.min_val)
        assert_same_bits("max", "torch's max_val", state["max"].reshape(()), theirs.max_val)
    assert int(state["count"]) == 40 * 35


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_bits_of_torch_per_channel(axis: int) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(axis), observer=MovingAverage(0.07))
    theirs = MovingAveragePerChannelMinMaxObserver(averaging_constant=0.07, ch_axis=axis)
    state = fsq.init(spec, (3, 4, 5))
    for _ in range(20):
        x = torch.randn(3, 4, 5)
        state = fsq.observe(spec, state, x)
        theirs(x)
    assert_same_bits("min", "torch's min_val", state["min"].reshape(-1), theirs.min_val)
    assert_same_bits("max", "torch's max_val", state["max"].reshape(-1), theirs.max_val)


def test_the_first_batch_is_known_by_its_count_not_by_its_values() -> None:
    """A first batch of Inf looks to torch.ao as nothing seen, and the second replaces it."""
    spec = per_tensor(MovingAverage(0.5))
    state = seen(spec, torch.tensor([math.inf]), torch.tensor([1.0]))
    assert not state["min"].isfinite().any()
    with pytest.raises(fsq.CalibrationError, match="was seen"):
        fsq.check(spec, state)


@pytest.mark.parametrize("momentum", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finite_ends_have_a_finite_average(dtype: torch.dtype, momentum: float) -> None:
    top = torch.finfo(dtype).max
    spec = per_tensor(MovingAverage(momentum))
    state = seen(spec, *(torch.tensor([sign * top], dtype=dtype) for sign in (1, -1, 1, -1, -1)), dtype=dtype)
    assert state["min"].isfinite().all()
    assert state["max"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_state_is_averaged_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    spec = per_tensor(MovingAverage(0.3))
    batches = torch.randn(20, 9).to(dtype)
    state = seen(spec, *batches, dtype=dtype)
    expected = batches[0].min()
    for x in batches[1:]:
        old = expected.float()
        expected = (old + 0.3 * (x.min().float() - old)).to(dtype)
    assert_same_bits("min", "expected", state["min"], expected.reshape(1))


# What leaves a block as it was.


@pytest.mark.parametrize("observer", [MovingAverage(0.25), MeanRange()], ids=repr)
def test_a_batch_without_values_for_a_block_leaves_it(observer: fsq.Observer) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0), observer=observer)
    a, b, c = torch.randn(3, 2, 4)
    only_first = torch.tensor([True, False])
    state = fsq.observe(spec, fsq.init(spec, a.shape), a, mask=only_first)
    assert state["count"].tolist() == [[4], [0]]
    state = fsq.observe(spec, state, b)
    state = fsq.observe(spec, state, c[:, :0])
    state = fsq.observe(spec, state, c, mask=torch.zeros(2, dtype=torch.bool))
    # The second block never saw `a`: its first batch is `b`.
    for i, batches in enumerate(((a, b), (b,))):
        one = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=observer)
        expected = seen(one, *(x[i : i + 1] for x in batches))
        assert_same_bits(f"block {i}", "it alone", {k: v[i : i + 1] for k, v in state.items()}, expected)


@pytest.mark.parametrize("observer", [MovingAverage(0.25), MeanRange()], ids=repr)
def test_nan_stays_visible(observer: fsq.Observer) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(-1), observer=observer)
    state = seen(spec, torch.tensor([[1.0, NAN, 2.0]]), torch.ones(4, 3))
    lo, _ = observer.range(spec, state)
    assert lo.isnan().tolist() == [[False, True, False]]
    with pytest.raises(fsq.CalibrationError, match=r"NaN was seen .* in 1 of 3 blocks"):
        fsq.check(spec, state)


@pytest.mark.parametrize("observer", [MovingAverage(0.25), MeanRange()], ids=repr)
def test_nothing_seen(observer: fsq.Observer) -> None:
    spec = per_tensor(observer)
    state = fsq.init(spec, (3,))
    assert fsq.calc_qparams(spec, state).scale.item() == spec.eps
    with pytest.raises(fsq.CalibrationError, match="nothing was seen"):
        fsq.check(spec, state)
    fsq.check(spec, fsq.observe(spec, state, torch.ones(3)), min_count=3)


# The mean.


def test_the_mean_is_numpys() -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(1), observer=MeanRange())
    batches = torch.randn(16, 8, 3)
    state = seen(spec, *batches)
    lo, hi = spec.observer.range(spec, state)
    x = batches.double().numpy()
    # A sum of 16 float32 values of like size is exact in float64, so the order does not show.
    np.testing.assert_array_equal(lo.numpy()[0], x.min(axis=1).mean(axis=0))
    np.testing.assert_array_equal(hi.numpy()[0], x.max(axis=1).mean(axis=0))
    assert state["batches"].tolist() == [[16] * 3]
    assert state["count"].tolist() == [[128] * 3]


def test_a_state_of_a_mean_is_not_taken_for_a_range() -> None:
    """Its sums have other names than the ends of a range, so MinMax does not read them."""
    state = seen(per_tensor(MeanRange()), torch.ones(3))
    with pytest.raises(ValueError, match="reads"):
        fsq.calc_qparams(per_tensor(fsq.MinMax()), state)


# Refusals.


@pytest.mark.parametrize("observer", [MovingAverage(0.25), MeanRange()], ids=repr)
def test_merge_says_why_not(observer: fsq.Observer) -> None:
    spec = per_tensor(observer)
    state = seen(spec, torch.ones(3))
    with pytest.raises(TypeError, match=r"depends on the order of its batches .*; observe .* or record MinMax"):
        fsq.merge(spec, state, state)


def test_two_cuts_of_the_same_data_differ() -> None:
    """Why neither can merge, whatever its sums are held in."""
    a, b = torch.tensor([0.0, 4.0]), torch.tensor([2.0, 2.0])
    for observer in (MovingAverage(0.5), MeanRange()):
        spec = per_tensor(observer)
        apart = observer.range(spec, seen(spec, a, b))
        whole = observer.range(spec, seen(spec, torch.cat([a, b])))
        assert apart != whole, observer


@pytest.mark.parametrize("momentum", [0, -0.1, 1.5, NAN, math.inf])
def test_a_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"momentum={momentum!r} is not in \(0, 1\]; use"):
        MovingAverage(momentum)


@pytest.mark.parametrize("momentum", [True, "0.1", None, torch.tensor(0.1)])
def test_a_momentum_that_is_no_number(momentum: object) -> None:
    with pytest.raises(TypeError, match=r"momentum=.* is not a number; use"):
        MovingAverage(momentum)  # type: ignore[arg-type]


# vmap and compile.


@pytest.mark.parametrize("observer", [MovingAverage(0.25), MeanRange()], ids=repr)
def test_128_experts_in_one_call(observer: fsq.Observer) -> None:
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=observer)
    x, mask = torch.randn(128, 6, 4), torch.rand(128, 6) < 0.4
    mask[5] = False
    empty = fsq.init(spec, (6, 4))
    states = {k: torch.stack([v] * 128) for k, v in empty.items()}
    observe = torch.vmap(lambda s, x, m: fsq.observe(spec, s, x, mask=m))
    once = observe(states, x, mask)
    twice = observe(once, x.flip(0), mask.flip(0))
    for i in range(128):
        expected = fsq.observe(spec, empty, x[i], mask=mask[i])
        expected = fsq.observe(spec, expected, x[127 - i], mask=mask[127 - i])
        assert_same_bits(f"expert {i}", "the loop", {k: v[i] for k, v in twice.items()}, expected)
    assert_same_bits("an expert without tokens", "init", {k: v[5] for k, v in once.items()}, empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("observer", [MovingAverage(0.1), MeanRange()], ids=repr)
def test_generated_code_has_the_bits_of_eager(observer: fsq.Observer, dtype: torch.dtype) -> None:
    """Also with a 16-bit state, whose intermediate values a compiler does not round."""
    spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(-1), observer=observer)
    compiled = torch.compile(partial(fsq.observe, spec), fullgraph=True)
    state = fsq.init(spec, (8, 32), dtype=dtype)
    for x in torch.randn(5, 8, 32).to(dtype):
        expected = fsq.observe(spec, state, x)
        state = compiled(state, x)
        assert_same_bits("compiled", "eager", state, expected)


@pytest.mark.parametrize("observer", [MovingAverage(0.1), MeanRange()], ids=repr)
def test_one_compilation_for_any_batch_size(observer: fsq.Observer) -> None:
    counter = CompileCounter()
    spec = per_tensor(observer)
    step = torch.compile(partial(fsq.observe, spec), backend=counter, fullgraph=True, dynamic=True)
    state = expected = fsq.init(spec, (1, 4))
    for n in (3, 5, 8, 17):
        x = torch.randn(n, 4)
        state, expected = step(state, x), fsq.observe(spec, expected, x)
    assert counter.frame_count == 1
    assert_same_bits("compiled", "eager", state, expected)
