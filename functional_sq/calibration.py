"""A calibration is a value: start one, add data, join two, judge it, read it as qparams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from functional_sq.formats import check_real, check_real_dtype
from functional_sq.granularity import check_stats
from functional_sq.observer import CalibrationError, State
from functional_sq.qparams import QParams, from_range
from functional_sq.spec import QuantSpec, check_spec

__all__ = ["calc_qparams", "check", "init", "merge", "observe"]


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
        ValueError: the granularity does not apply to `shape`, or a size is no int from 0.
        TypeError: `shape` is no tuple or list, or `dtype` holds no real values.

    Example:
        >>> import torch, functional_sq as fsq
        >>> fsq.init(fsq.QuantSpec(torch.int8, fsq.PerTensor()), (4, 8))
        {'min': tensor([[inf]]), 'max': tensor([[-inf]]), 'count': tensor([[0]])}
    """
    check_spec(spec)
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape is a {type(shape).__name__}; give a tuple of ints, such as x.shape")
    for size in shape:
        if not isinstance(size, (int, torch.SymInt)) or isinstance(size, bool) or size < 0:
            raise ValueError(f"shape {tuple(shape)} has the size {size!r}; sizes are ints, at least 0")
    check_real_dtype(dtype, "init with dtype=")
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
    check_spec(spec)
    check_real(x, "observe")
    check_stats(spec.granularity, "the state", spec.observer.check_state(state), x.shape)
    keep = None
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask is {found}; give a bool tensor that is True where x counts (mask != 0)")
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
    check_spec(spec)
    for s in (state, other):
        spec.observer.check_state(s)
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
        spec: the quantization; may differ from the one that recorded in dtype, mapping and bounds,
            and in its observer, where that reads what was recorded.
        state: what was recorded.

    Returns:
        QParams of the statistics' shape, in `spec.scale_dtype` and `spec.zero_point_dtype`.

    Raises:
        ValueError: `state` has not what the spec's observer reads.

    Source: `torchao.quantization.choose_qparams_affine_with_min_max`; the same bits.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
        >>> state = fsq.observe(spec, fsq.init(spec, (2,)), torch.tensor([-1.0, 1.55]))
        >>> scale, zero_point = fsq.calc_qparams(spec, state)
        >>> scale, zero_point
        (tensor([0.0100]), tensor([100], dtype=torch.int32))
    """
    check_spec(spec)
    spec.observer.check_state(state, exact=False)
    lo, hi = spec.observer.range(spec, state)
    return from_range(spec, lo, hi)


def check(spec: QuantSpec, state: State, *, min_count: int = 1) -> None:
    """Raise CalibrationError if a range must not be chosen from `state`. Reads the data (a sync).

    Args:
        spec: the quantization that `state` was made for.
        state: what was recorded.
        min_count: values that each scale must have seen.

    Raises:
        ValueError: `min_count` is below 1.
        CalibrationError: nothing or too little was seen, NaN or Inf was, or zeros alone (in every
            block: a dead channel among others is data); the message says what, in how many blocks,
            and what to do.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> fsq.check(spec, fsq.init(spec, (4, 8)))
        Traceback (most recent call last):
        ...
        functional_sq.observer.CalibrationError: nothing was seen, at least 1 needed; calibrate with data \
that reaches it
    """
    check_spec(spec)
    spec.observer.check_state(state, exact=False)
    if not isinstance(min_count, int) or isinstance(min_count, bool) or min_count < 1:
        raise ValueError(f"min_count={min_count!r}; give an int, at least 1")
    if fault := spec.observer.fault(state, min_count):
        raise CalibrationError(fault)
