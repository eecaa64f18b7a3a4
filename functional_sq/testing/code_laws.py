"""Laws of what a state is for: scales, zero points and the codes that they give."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import functional_sq as fsq
from functional_sq.qparams import QParams
from functional_sq.testing.assertions import assert_same_bits, bits, require
from functional_sq.testing.state_laws import observe_in_turn
from functional_sq.testing.strategies import divisors

__all__ = [
    "a_constant_is_represented",
    "codes_in_range_idempotent_monotone",
    "each_block_is_represented",
    "granularities_agree",
    "scale_equivariance",
    "zero_is_exact",
]


def zero_is_exact(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that `dequantize(quantize(0)) == 0`, whatever was observed.

    As values, not as bits: a float8 keeps the sign of -0.0.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, finite; zeros of their shape and dtype are quantized.
        dtype: dtype of the state.

    Example:
        >>> zero_is_exact(fsq.QuantSpec(torch.uint8, fsq.PerTensor()), (torch.ones(2), torch.zeros(2)))
    """
    empty = fsq.init(spec, batches[0].shape, dtype=dtype)
    for count in range(len(batches) + 1):
        qp = fsq.calc_qparams(spec, observe_in_turn(spec, empty, *batches[:count]))
        for zero in (0.0, -0.0):
            q = fsq.quantize(spec, torch.full_like(batches[0], zero), qp)
            for out in {torch.float32, batches[0].dtype}:
                y = fsq.dequantize(spec, q, qp, dtype=out)
                text = f"dequantize(quantize({zero}), dtype={out}) == 0"
                require(bool((y == 0).all()), text, **qp._asdict(), codes=q, dequantized=y)


def codes_in_range_idempotent_monotone(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that codes stay in bounds, come back as themselves, and are ordered as the values are.

    Every code in use of an 8-bit format is dequantized and quantized again, with the qparams of
    every block; of a 16-bit format, the ends and each 251st. They are dequantized to float32: a
    bfloat16 has 8 bits, not enough to tell neighbouring codes apart after the multiplication. A
    code whose value is above the largest float32 (where the range ends near it) has no way back.
    Bounds and order are checked for the batches with 0, infinities and the largest floats.

    Args:
        spec: the quantization, with the observer under test.
        batches: tensors of one shape, finite; all but the last are observed, all are quantized.
        dtype: dtype of the state.

    Example:
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor())
        >>> codes_in_range_idempotent_monotone(spec, (torch.ones(2), torch.zeros(2)))
    """
    x = batches[-1]
    qp = fsq.calc_qparams(spec, observe_in_turn(spec, fsq.init(spec, x.shape, dtype=dtype), *batches[:-1]))
    codes = fsq.quantize(spec, x, qp)
    _assert_come_back(spec, "quantize(x)", codes, qp)

    # Each block as a row, so that each meets every value; the same arithmetic, one call.
    rows = dataclasses.replace(spec, granularity=fsq.PerAxis(0))
    row_qp = QParams(qp.scale.reshape(-1, 1), qp.zero_point.reshape(-1, 1))
    blocks = row_qp.scale.numel()
    _assert_come_back(rows, "every code", _codes_in_use(spec).expand(blocks, -1), row_qp)
    top = torch.finfo(x.dtype).max
    ends = torch.tensor([-math.inf, -top, -0.0, 0.0, top, math.inf], dtype=x.dtype)
    values = torch.cat([ends, *(b.reshape(-1) for b in batches)]).sort().values
    q = fsq.quantize(rows, values.expand(blocks, -1), row_qp).to(torch.float32)
    low, high = spec.bounds
    outside = ~((q >= low) & (q <= high))
    require(not bool(outside.any()), f"codes lie in [{low}, {high}]", **row_qp._asdict(), values=values, codes=q)
    falls = q.diff() < 0
    require(not bool(falls.any()), "larger values have no smaller codes", **row_qp._asdict(), values=values, codes=q)


def scale_equivariance(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, exponent: int) -> None:
    """Assert that data times `2**k` gives scales times `2**k`, the same zero points and codes.

    It holds while nothing overflows, becomes subnormal or is raised to `eps`. So the state is
    float32 and `eps` is set to the smallest that is allowed, and magnitudes that are not 0 are to
    lie in `[2**-12, 2**12]`, `k` in -11 ... 11. A range of width 0 still gives `eps`, with any `k`.
    An observer that records no values (`Fixed`) has the same state for both, and then must give the
    same qparams.

    Args:
        spec: the quantization, with the observer under test; its `eps` is not used.
        batches: tensors of one shape, observed in turn; the first is quantized.
        exponent: the `k`.

    Example:
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor())
        >>> scale_equivariance(spec, (torch.ones(2), torch.zeros(2)), exponent=-3)
    """
    spec = dataclasses.replace(spec, eps=torch.finfo(torch.float32).tiny)
    factor = 2.0**exponent
    empty = fsq.init(spec, batches[0].shape)
    state, large = observe_in_turn(spec, empty, *batches), observe_in_turn(spec, empty, *(x * factor for x in batches))
    qp, large_qp = fsq.calc_qparams(spec, state), fsq.calc_qparams(spec, large)
    if all(torch.equal(bits(state[name]), bits(large[name])) for name in state):
        assert_same_bits("calc_qparams(s)", "calc_qparams(the same s)", qp, large_qp)
        return
    raised = qp.scale <= spec.eps
    expected = QParams(torch.where(raised, qp.scale, qp.scale * factor), qp.zero_point)
    names = (f"calc_qparams(observed x * 2**{exponent})", f"calc_qparams(observed x) * 2**{exponent}")
    assert_same_bits(*names, large_qp, expected)
    scaled = QParams(qp.scale * factor, qp.zero_point)
    codes = fsq.quantize(spec, batches[0], qp)
    large_codes = fsq.quantize(spec, batches[0] * factor, scaled)
    assert_same_bits(f"quantize(x * 2**{exponent}, scale * 2**{exponent})", "quantize(x, scale)", large_codes, codes)


def granularities_agree(spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> None:
    """Assert that granularities which name the same blocks give the same bits.

    PerToken, PerRow(-1), PerGroup(C) and PerBlock((1, C)); PerGroup(g) and PerBlock((1, g)); PerAxis
    and PerBlock; PerTensor, PerBlock of the whole shape, and PerAxis on an axis of size 1. And a
    per-tensor state is the same for data of any shape.

    Args:
        spec: the quantization, with the observer under test; its granularity is not used.
        batches: tensors of one shape, observed in turn; the first is quantized.
        dtype: dtype of the states.

    Example:
        >>> granularities_agree(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.ones(2, 3), torch.zeros(2, 3)))
    """

    def results(granularity: fsq.Granularity, xs: Sequence[Tensor]) -> dict[str, object]:
        same = dataclasses.replace(spec, granularity=granularity)
        state = observe_in_turn(same, fsq.init(same, xs[0].shape, dtype=dtype), *xs)
        qp = fsq.calc_qparams(same, state)
        return {"state": state, "qparams": qp, "codes": fsq.quantize(same, xs[0], qp)}

    # An axis of size 1 in front, for PerAxis(0) and for scalars.
    xs = [x.unsqueeze(0) for x in batches]
    shape = xs[0].shape
    ones, last = (1,) * (len(shape) - 1), shape[-1]
    equal: list[tuple[fsq.Granularity, fsq.Granularity]] = [
        (fsq.PerAxis(0), fsq.PerTensor()),
        (fsq.PerBlock(tuple(shape)), fsq.PerTensor()),
        (fsq.PerGroup(last), fsq.PerToken()),
        (fsq.PerRow(-1), fsq.PerToken()),
    ]
    equal += [(fsq.PerBlock((*ones, g)), fsq.PerGroup(g)) for g in divisors(last)]
    equal += [
        (fsq.PerBlock(tuple(1 if i == axis else n for i, n in enumerate(shape))), fsq.PerAxis(axis))
        for axis in range(1, len(shape))
    ]
    for one, other in equal:
        assert_same_bits(repr(one), repr(other), results(one, xs), results(other, xs))
    per_tensor = dataclasses.replace(spec, granularity=fsq.PerTensor())
    empty = fsq.init(per_tensor, shape, dtype=dtype)
    flat = [x.reshape(-1) for x in xs]
    assert_same_bits(
        "a PerTensor state",
        "that of the flattened data",
        observe_in_turn(per_tensor, empty, *xs),
        observe_in_turn(per_tensor, empty, *flat),
    )


def a_constant_is_represented(
    spec: fsq.QuantSpec, batches: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
) -> None:
    """Assert that where one value was seen, of either sign, it has a code that stands for it within an eighth.

    An observer whose range does not depend on data need not.

    Args:
        spec: the quantization, of 8 bits, with the observer under test.
        batches: tensors of one element that is not 0, within `[2**-12, 2**12]`.
        dtype: dtype of the states.

    Example:
        >>> a_constant_is_represented(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (torch.tensor([-3.0]),))
    """
    for one in batches:
        x = one.expand(4, 3).contiguous()
        empty = fsq.init(spec, x.shape, dtype=dtype)
        if spec.observer.fault(empty, 1) is None:
            return
        qp = fsq.calc_qparams(spec, observe_in_turn(spec, empty, x, x))
        y = fsq.dequantize(spec, fsq.quantize(spec, x, qp), qp)
        near = (y - x).abs() <= x.abs() / 8
        require(bool(near.all()), "dequantize(quantize(x)) is near to x", **qp._asdict(), x=x, dequantized=y)


def each_block_is_represented(spec: fsq.QuantSpec, *, columns: int, dtype: torch.dtype = torch.float32) -> None:
    """Assert that rows of very different sizes have ranges of their own that are fit to be used.

    The rows are normal values times `2**-9`, 1, `2**5` and `2**10`. The state has no fault. Of each row,

    * the range has a width: `lo < hi`;
    * the squared error is below the signal, the sum of the values' own squares. 0 is a code, so a value with its
      nearest code, or limited by the range, errs by no more than itself, and the sums are equal only where all
      become 0. So a range passes however much it clips, and fails if it is not finite, or too wide for any value;
    * scale and zero point are those of the row alone, per tensor.

    An observer whose range does not depend on data need not.

    Args:
        spec: the quantization, of 8 bits and one scale for each row, with the observer under test.
        columns: values in each of the four rows.
        dtype: dtype of the states.

    Example:
        >>> each_block_is_represented(fsq.QuantSpec(torch.int8, fsq.PerAxis(0)), columns=50)
    """
    sizes = torch.tensor([[2.0**-9], [1.0], [2.0**5], [2.0**10]])
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(columns)) * sizes
    empty = fsq.init(spec, x.shape, dtype=dtype)
    if spec.observer.fault(empty, 1) is None:
        return
    state = fsq.observe(spec, empty, x)
    fault = spec.observer.fault(state, 1)
    require(fault is None, "a state that saw normal values has no fault", fault=str(fault))
    lo, hi = spec.observer.range(spec, state)
    require(bool((lo < hi).all()), "lo < hi of each row", lo=lo, hi=hi)
    qp = fsq.calc_qparams(spec, state)
    y = fsq.dequantize(spec, fsq.quantize(spec, x, qp), qp)
    signal, error = (v.double().square().sum(-1) for v in (x, y - x))
    require(bool((error < signal).all()), "error < signal of each row", **qp._asdict(), error=error, signal=signal)
    alone = dataclasses.replace(spec, granularity=fsq.PerTensor())
    for i, row in enumerate(torch.split(x, 1)):
        own = fsq.calc_qparams(alone, fsq.observe(alone, fsq.init(alone, row.shape, dtype=dtype), row))
        assert_same_bits(f"qparams of row {i}", "those of the row alone", QParams(*(v[i : i + 1] for v in qp)), own)


def _assert_come_back(spec: fsq.QuantSpec, text: str, q: Tensor, qp: QParams) -> None:
    y = fsq.dequantize(spec, q, qp)
    again = torch.where(y.isinf(), q, fsq.quantize(spec, y, qp))
    assert_same_bits(f"quantize(dequantize({text}))", text, again, q)


def _codes_in_use(spec: fsq.QuantSpec) -> Tensor:
    storage, (low, high) = spec.format.storage, spec.bounds
    if storage.itemsize == 1:
        codes = torch.arange(256).to(torch.uint8).view(storage)
    else:
        codes = torch.tensor([*range(int(low), int(high) + 1, 251), int(high)], dtype=storage)
    values = codes.to(torch.float32)
    return codes[(values >= low) & (values <= high)]  # a comparison with NaN is false
