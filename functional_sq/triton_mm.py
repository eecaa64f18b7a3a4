"""The product of codes by a kernel of Triton, for CUDA: scale, bias, activation and the next layer's codes inside.

`torch._int_mm` has kernels of an earlier generation for int8 (on an H200 875 of 1979 TOP/s), and writes an int32 matrix
that the epilogue reads again. Here tiles of 128 x 128 by four warps, two of them on a multiprocessor, so that one
multiplies while the other stores: 1300 to 1400 TOP/s, epilogue included. A token or a few stream the weight, at 2 to
3.9 of 4.2 TB/s. The operations are those of `functional_sq.linear` in its order, so the same bits.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from functional_sq.int_mm import INT32_TERMS
from functional_sq.operands import Operands
from functional_sq.requantize import requantizes
from functional_sq.tracing import asked_once, is_traced, looped, reaches

__all__ = [
    "CODES",
    "IMPRECISE",
    "NAME",
    "Tile",
    "bare_product",
    "device_of",
    "float8_linear",
    "is_capable",
    "is_capable_of_float8",
    "key",
    "plus",
    "product",
    "requantizes",
    "rows",
    "supports",
    "tile",
]

NAME: str = "Triton"

CODES: torch.dtype = torch.int8

AVAILABLE: bool = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed, as it is with the CUDA builds of torch."""

DEVICE = "cuda"
"""Where Triton runs; another one where tests interpret it."""

_ALIGNED = 16
"""What K is a multiple of: bytes that a thread loads at once."""

IMPRECISE = 128
"""So many products of float8 a tensor core adds with fewer bits than float32 has, as cuBLAS lets it."""

_MOST_FLOAT8 = 256
"""Up to so many rows of float8 the kernel is the faster one."""

_WIDE = 128
"""How many columns of a weight, for each multiprocessor, make it a wide one where rows are few."""

Tile = tuple[int, int, int, int]
"""Rows, columns, codes of K at a time, and how many of these are loaded ahead; four warps, and at most 98 kB. Those
below were the fastest on an H200, for K and N from 4096 to 28672."""

_FEW: Tile = (16, 32, 512, 4)
_FEW_WIDE: Tile = (16, 64, 256, 5)
_FEW_FLOAT8: Tile = (16, 32, 256, 4)
_SOME_FLOAT8: Tile = (64, 64, 128, 6)
_MANY: tuple[Tile, ...] = (
    (128, 128, 128, 3),
    (64, 128, 128, 4),
    (128, 64, 128, 4),
    (64, 64, 128, 6),
    (64, 32, 256, 4),
)
"""The fastest first, where there are enough of them for all multiprocessors, and columns enough for one."""


def supports(codes: Tensor, zero_point: Tensor | None) -> bool:
    """Whether the kernel multiplies a folded weight: on an NVIDIA GPU from Ampere on, K a multiple of 16.

    Args:
        codes: `(N, K)`, the weight's.
        zero_point: the weight's; None where it is 0.

    Example:
        >>> import torch
        >>> from functional_sq import triton_mm
        >>> triton_mm.supports(torch.zeros(4, 16, dtype=torch.int8), None)  # not on a GPU
        False
    """
    return is_capable(codes) and codes.ndim == 2 and codes.shape[1] % _ALIGNED == 0 and codes.shape[1] <= INT32_TERMS


def rows(codes: Tensor, zero_point: Tensor | None) -> range:
    """Return for how many rows the kernel is the faster one: for any number.

    Example:
        >>> import torch
        >>> from functional_sq import triton_mm
        >>> 1 in triton_mm.rows(torch.empty(4096, 1024), None)
        True
    """
    return range(1, sys.maxsize)


def key(device: str) -> tuple[object, ...]:
    """Return what the answers here depend on, beside their arguments."""
    return (AVAILABLE,)


def product(
    operands: Operands,
    activation: str = "none",
    to_scale: Tensor | None = None,
    to_zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `(q - zero_point) @ (codes - weight_zero_point).T * scale + bias`: exact, rounded, then as written.

    Args:
        operands: int8 codes, and a weight that `supports` takes.
        activation: what `requantizes` takes, applied before codes are made; "none" without `to_scale`.
        to_scale, to_zero_point: float32 and int32, one element each: the result is int8 codes of them. Beside
            `functional_sq.quantize` a code may differ by one where the value lies on the border of two, as the
            kernel has its own `tanh` and `exp`.
        dtype: what the result is rounded to, once, where it is no codes.

    Returns:
        `(M, N)` in `dtype`, or int8 with `to_scale`.
    """
    return _call(*_arguments(operands), None, activation, to_scale, to_zero_point, dtype)


def plus(residual: Tensor, operands: Operands) -> Tensor:
    """Return `product(operands) + residual`, rounded once to the residual's dtype.

    Args:
        residual: `(..., N)`, in all M rows, of any real dtype; without a gradient.
        operands: as `product`.
    """
    flat = residual.reshape(-1, operands.codes.shape[0])
    return _call(*_arguments(operands), flat, "none", None, None, residual.dtype).reshape(residual.shape)


def _arguments(operands: Operands) -> tuple[Tensor | None, ...]:
    """Return what the kernel reads of them; of each row the sum too, if the weight is asymmetric.

    A compiler sums where it makes the codes.
    """
    q, _, codes, weight_zero_point, scale, offset, bias, *_ = operands
    row_sum = None if weight_zero_point is None else q.sum(1, dtype=torch.int32)
    return q, codes, weight_zero_point, row_sum, scale, offset, bias


def float8_linear(
    q: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, fast_accum: bool = False
) -> Tensor | None:
    """Return `q @ codes.T * scale + bias` of float8, 256 rows at most, summed in float32; None where it is not faster.

    `torch._scaled_mm` has no scale for each column beside one for all rows, so it takes one or two more kernels. It
    streams a large weight faster, and many rows.

    Args:
        q, codes: `(M, K)` and `(N, K)`, on one device.
        scale: `(N,)` float32.
        bias: `(N,)` of any real dtype, or None.
        dtype: of the result.
        fast_accum: a tensor core adds all products, not 128 of them, with fewer bits than float32 has.

    Example:
        >>> import torch
        >>> from functional_sq import triton_mm
        >>> codes = torch.ones(1, 16).to(torch.float8_e4m3fn)
        >>> triton_mm.float8_linear(codes, codes, torch.ones(1), None, torch.float32) is None  # not on a GPU
        True
    """
    n, k = codes.shape
    fits = is_capable_of_float8(q, codes) and k % _ALIGNED == 0 and not reaches(q.shape[0], _MOST_FLOAT8 + 1)
    if not fits or n > _WIDE * _multiprocessors(q.device):
        return None
    return _call(q, codes, None, None, scale, None, bias, None, "none", None, None, dtype, fast_accum)


def bare_product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of int8 codes, int32; `b` is one that `is_capable`, K a multiple of 16.

    `torch._int_mm` takes 1.5 times as long, and raises for some sizes (100352 rows, K = 64, N = 264 on an H200).

    Args:
        a, b: `(M, K)` and `(N, K)`.
    """
    return _call(a, b, None, None, None, None, None, None, "none", None, None, torch.int32)


def is_capable(codes: Tensor) -> bool:
    """Whether codes are int8 on a GPU that multiplies them as tiles, and has the shared memory that these take.

    Example:
        >>> import torch
        >>> from functional_sq import triton_mm
        >>> triton_mm.is_capable(torch.zeros(4, 16, dtype=torch.int8))
        False
    """
    return codes.dtype is torch.int8 and codes.numel() > 0 and _runs_on(codes.device, (8, 0))


def is_capable_of_float8(q: Tensor, codes: Tensor) -> bool:
    """Whether codes and those of a weight are float8 on a GPU that multiplies them.

    Example:
        >>> import torch
        >>> from functional_sq import triton_mm
        >>> triton_mm.is_capable_of_float8(*torch.zeros(2, 4, 16, dtype=torch.float8_e4m3fn))
        False
    """
    fits = {q.dtype, codes.dtype} == {torch.float8_e4m3fn} and codes.numel() > 0
    return fits and _runs_on(q.device, (8, 9))


@asked_once
def _runs_on(device: torch.device, least: tuple[int, int]) -> bool:
    """Whether Triton runs on a device, one of NVIDIA of this compute capability or a higher one."""
    if not AVAILABLE or device.type != DEVICE:
        return False
    if device.type != "cuda":  # interpreted, in tests
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= least


@asked_once
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton runs where `x` is; by itself it runs on the current device.

    Example:
        >>> import torch
        >>> from functional_sq import triton_mm
        >>> with triton_mm.device_of(torch.zeros(1)):  # nothing to change
        ...     pass
    """
    return torch.cuda.device(x.device) if x.is_cuda and not is_traced(x) else nullcontext()


def tile(tiles: Sequence[Tile], m: int | torch.SymInt, n: int, device: torch.device, least: float = 1.5) -> Tile:
    """Return the first tile of which there are enough for all multiprocessors, and columns enough for one.

    Args:
        tiles: the fastest first; the last is taken where there are not enough of any.
        m, n: rows and columns of the result; of unknown rows those of the input that a graph is compiled with, without
            a guard.
        device: that of the codes.
        least: how many for each multiprocessor are enough.

    Example:
        >>> import torch
        >>> from functional_sq import triton_mm
        >>> tiles = [(128, 128, 128, 3), (64, 32, 256, 4)]
        >>> triton_mm.tile(tiles, 4096, 4096, torch.device("cpu")), triton_mm.tile(tiles, 17, 8, torch.device("cpu"))
        ((128, 128, 128, 3), (64, 32, 256, 4))
    """
    rows = _known(m)
    for each in tiles:
        if each[1] < 2 * n and -(-rows // each[0]) * -(-n // each[1]) >= least * _multiprocessors(device):
            return each
    return tiles[-1]


def _known(m: int | torch.SymInt) -> int:
    rows = m if isinstance(m, int) else m.node.hint
    return rows if isinstance(rows, int) else 1024


def _tile(m: int | torch.SymInt, n: int, codes: Tensor) -> Tile:
    if codes.dtype.is_floating_point:
        return _FEW_FLOAT8 if _known(m) <= 16 else _SOME_FLOAT8
    if _known(m) <= 16:
        return _FEW if n <= _WIDE * _multiprocessors(codes.device) else _FEW_WIDE
    return tile(_MANY, m, n, codes.device)


@asked_once
def _define() -> None:
    """Define `functional_sq::triton_product`, once it is needed: that imports Triton."""
    if not hasattr(torch.ops.functional_sq, "triton_product"):
        torch.library.triton_op("functional_sq::triton_product", _multiplied, mutates_args=())
        op = torch.ops.functional_sq.triton_product.default
        torch.library.register_vmap(op, looped(op))


def _call(*operands: Any) -> Tensor:
    _define()
    y: Tensor = torch.ops.functional_sq.triton_product.default(*operands)
    return y


def _multiplied(
    q: Tensor,
    codes: Tensor,
    weight_zero_point: Tensor | None,
    row_sum: Tensor | None,
    scale: Tensor | None,
    offset: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    to_scale: Tensor | None,
    to_zero_point: Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool = False,
) -> Tensor:
    from functional_sq import triton_kernel  # imports Triton

    (m, k), n = q.shape, codes.shape[0]
    y = torch.empty((m, n), dtype=dtype if to_scale is None else CODES, device=q.device)
    if isinstance(m, int) and m == 0:
        return y
    given = scale, offset, bias, residual, weight_zero_point, row_sum, to_scale, to_zero_point
    height, width, depth, stages = _tile(m, n, codes)
    with device_of(q):
        torch.library.wrap_triton(triton_kernel.multiply)[(-(-m // height) * -(-n // width),)](
            q.contiguous(),
            codes.contiguous(),
            *(None if t is None else t.contiguous() for t in given),
            y,
            m,
            n,
            k,
            ACTIVATION=activation,
            HEIGHT=height,
            WIDTH=width,
            DEPTH=depth,
            WHOLE=k % depth == 0,
            IMPRECISE=None if fast_accum else min(depth, IMPRECISE),
            num_warps=4,
            num_stages=stages,
        )
    return y
