"""Real values to codes, codes to real values, and both at once with a gradient."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from functional_sq.blocks import blockwise
from functional_sq.formats import check_real, check_real_dtype
from functional_sq.granularity import check_stats
from functional_sq.qparams import QParams, check_qparams
from functional_sq.spec import QuantSpec, check_codes, check_spec
from functional_sq.tracing import is_batched, is_traced

__all__ = ["dequantize", "fake_quantize", "quantize", "saturates"]

_LARGE = 2**22
"""Above so many elements an eager pass goes by pieces: memory for as many floats, above 16 MiB, is often new in each
call, and takes 4 times as long as the steps. Below that malloc keeps it, and pieces take up to 6 times as long."""

_PIECE = 2**17
"""How many elements of a piece each thread takes, so that the steps of one meet in the cache."""


def quantize(spec: QuantSpec, x: Tensor, qp: QParams) -> Tensor:
    """Map real values to codes.

    Integers: `clamp(round_half_even(x * (1 / scale)) + zero_point, qmin, qmax)`.
    Float8: `clamp(x.float() / scale, -largest, largest)`, then a cast that rounds to nearest even.

    Args:
        spec: the quantization.
        x: real values, float32, float64, bfloat16 or float16; infinities saturate. A NaN has no
            integer code: what it becomes is undefined.
        qp: scale (input units per step) and zero point, of the statistics' shape for `x`. A
            per-tensor pair fits any shape.

    Returns:
        codes in the format's storage dtype (`uint8` for `torch.uint4`), shape of `x`; without a gradient.

    Raises:
        TypeError: `x` holds no real values.
        ValueError: `qp` does not have the shape that the granularity gives `x`.

    Source: `torchao.quantization.quantize_affine` and `_quantize_affine_float8`; the same bits.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
        >>> qp = fsq.QParams(torch.tensor([0.5]), torch.tensor([128], dtype=torch.int32))
        >>> fsq.quantize(spec, torch.tensor([-1.0, 0.25, 0.75, 1e9]), qp)
        tensor([126, 128, 130, 255], dtype=torch.uint8)
    """
    check_spec(spec)
    check_real(x, "quantize")
    qp = _fitted(spec, x, qp)
    format, bounds = spec.format, spec.bounds
    # Codes have no gradient of `qp` either, which a cast to float8 would hand on, and one to an integer does not.
    return _elementwise(lambda x, s, z: format.encode(x, QParams(s, z), bounds), x.detach(), qp).detach()


def dequantize(spec: QuantSpec, q: Tensor, qp: QParams, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map codes to real values: `(q - zero_point) * scale`.

    Args:
        spec: the quantization that made the codes.
        q: codes, in the format's storage dtype.
        qp: scale and zero point that made them.
        dtype: dtype of the result; the subtraction runs in it, that of 16-bit codes in float32 at least.

    Returns:
        real values, shape of `q`.

    Raises:
        TypeError: `q` is not in the storage dtype, or `dtype` holds no real values.
        ValueError: `qp` does not have the shape that the granularity gives `q`.

    Source: `torchao.quantization.dequantize_affine` and `_dequantize_affine_float8`; the same bits, but for 16-bit
    codes to a 16-bit dtype, which torchao subtracts in that dtype, where they round or overflow.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
        >>> qp = fsq.QParams(torch.tensor([0.5]), torch.tensor([128], dtype=torch.int32))
        >>> fsq.dequantize(spec, torch.tensor([126, 128, 255], dtype=torch.uint8), qp)
        tensor([-1.0000,  0.0000, 63.5000])
    """
    check_spec(spec)
    check_codes(spec, q, "dequantize")
    check_real_dtype(dtype, "dequantize to ")
    qp = _fitted(spec, q, qp)
    format = spec.format
    return _elementwise(lambda q, s, z: format.decode(q, QParams(s, z), dtype), q, qp)


def fake_quantize(spec: QuantSpec, x: Tensor, qp: QParams) -> Tensor:
    """Round `x` to values that the codes represent; the gradient goes straight through.

    The result has the bits of `dequantize(spec, quantize(spec, x, qp), qp, dtype=x.dtype)`. The
    gradient of `x` is 1 where `x` has a code and 0 where it saturates; `qp` is a constant.

    Args:
        spec: the quantization.
        x: real values.
        qp: scale and zero point, of the statistics' shape for `x`.

    Returns:
        real values in the dtype and shape of `x`.

    Raises:
        TypeError, ValueError: as `quantize`.

    Source: straight-through estimator, Bengio et al. 2013 (arXiv:1308.3432); the clipped form of
    `torch.fake_quantize_per_tensor_affine`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32))
        >>> x = torch.tensor([0.6, 100.0], requires_grad=True)
        >>> y = fsq.fake_quantize(spec, x, qp)
        >>> y.sum().backward(); y.detach(), x.grad
        (tensor([ 0.5000, 63.5000]), tensor([1., 0.]))
    """
    check_spec(spec)
    check_real(x, "fake_quantize")
    result: Tensor = _StraightThrough.apply(spec, x, *_fitted(spec, x, qp))  # type: ignore[no-untyped-call]
    return result


def saturates(spec: QuantSpec, x: Tensor, qp: QParams) -> Tensor:
    """Say which values have no code of their own and become the smallest or the largest one.

    An integer is rounded first: what rounds to the last code has a code. A float8 saturates as soon as
    it is beyond the largest finite value.

    Args:
        spec: the quantization.
        x: real values.
        qp: scale and zero point, of the statistics' shape for `x`.

    Returns:
        bool, shape of `x`; True for a NaN, which has no code. The gradient of `fake_quantize` is 0 there.

    Raises:
        TypeError, ValueError: as `quantize`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> qp = fsq.QParams(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32))
        >>> fsq.saturates(spec, torch.tensor([63.5, 63.7, 63.8, -65.0]), qp)
        tensor([False, False,  True,  True])
    """
    check_spec(spec)
    check_real(x, "saturates")
    format, (low, high) = spec.format, spec.bounds

    def beyond(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        steps = format.steps(x, QParams(s, z))
        return ~((steps >= low) & (steps <= high))

    return blockwise(beyond, x.detach(), *_fitted(spec, x, qp))


class _StraightThrough(torch.autograd.Function):
    """Quantize and dequantize forward; backward, the identity where nothing saturated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(spec: QuantSpec, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        qp = QParams(scale, zero_point)
        return dequantize(spec, quantize(spec, x, qp), qp, dtype=x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.spec = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        return None, grad * ~saturates(ctx.spec, x, QParams(scale, zero_point)), None, None


def _elementwise(op: Callable[..., Tensor], x: Tensor, qp: QParams) -> Tensor:
    """Apply `op(x, scale, zero_point)`. Eager steps over a large tensor on a CPU go piece by piece: each reads
    what the one before wrote from the cache, and takes memory that is there already."""
    if is_traced(x) or x.device.type != "cpu" or x.numel() <= _LARGE or qp.scale.numel() != 1 or _is_recorded(*qp):
        return blockwise(op, x, *qp)
    size = _PIECE * torch.get_num_threads()
    if x.numel() <= size:
        return blockwise(op, x, *qp)
    if not x.is_contiguous():
        last = x.movedim(1, -1) if x.ndim > 2 else x  # channels_last
        return _elementwise(op, last, qp).movedim(-1, 1) if last.is_contiguous() else blockwise(op, x, *qp)
    scale, zero_point = (value.reshape(1) for value in qp)
    pieces = torch.split(x.view(-1), size)
    first = op(pieces[0], scale, zero_point)
    # Made from the first piece, which has a batch where vmap gives one to qp alone.
    y = first.new_empty(x.shape)
    each = chain([first], (op(piece, scale, zero_point) for piece in pieces[1:]))
    for to, piece in zip(torch.split(y.view(-1), size), each, strict=True):
        to.copy_(piece)
    return y


def _is_recorded(*stats: Tensor) -> bool:
    """Whether the steps are recorded for the gradient of a statistic, so that none may write into a part of a tensor.
    A batch of vmap does not tell, and counts as if they were."""
    return torch.is_grad_enabled() and any(stat.requires_grad or is_batched(stat) for stat in stats)


def _fitted(spec: QuantSpec, x: Tensor, qp: QParams) -> QParams:
    """Return `qp` so that `blockwise` takes it with `x`, or raise ValueError where it does not belong to `x`."""
    qp = check_qparams(qp)
    scale, zero_point = qp
    shape = check_stats(spec.granularity, "the scale", scale.shape, x.shape)
    # One element broadcasts as it is. With no axis it would count as a number, and not decide a dtype.
    if scale.shape == shape or (scale.numel() == 1 and 0 < scale.ndim <= x.ndim):
        return qp
    return QParams(scale.reshape(shape), zero_point.reshape(shape))
