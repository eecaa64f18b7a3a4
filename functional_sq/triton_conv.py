"""Convolution of codes by a kernel of Triton, for CUDA: windows are read where they lie, and none is written.

The tiles and what is inside them are those of `functional_sq.triton_mm`: a row of the first matrix is a window, of
which each step takes some channels of one pixel. Images are padded before. Groups of few channels are put together,
with zeros in the weight for what does not mix, until a pixel has enough for a tensor core: 32 groups of 4 channels
become 4 of 32.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq import triton_mm
from functional_sq.int_mm import INT32_TERMS
from functional_sq.operands import Operands
from functional_sq.tracing import asked_once, looped
from functional_sq.triton_mm import CODES, key, requantizes
from functional_sq.windows import pad_codes, window_sizes, windows

__all__ = [
    "CODES",
    "NAME",
    "convolve",
    "convolves_float8",
    "float8_convolve",
    "key",
    "least_windows",
    "requantizes",
    "supports",
]

NAME: str = triton_mm.NAME

_STEP = 32
"""The smallest number of codes that a tensor core takes of each row."""

_UNIT = 8
"""What the channels of a pixel are a multiple of: bytes that a thread loads at once, so that it loads ahead."""

_IMPRECISE = 128
"""So many products of float8 a tensor core adds with fewer bits than float32 has, as cuBLAS lets it."""


def supports(codes: Tensor, zero_point: Tensor | None) -> bool:
    """Whether the kernel convolves with a folded weight: on an NVIDIA GPU from Ampere on, in one or two dimensions.

    Args:
        codes: `(N, C / groups, *kernel)`, the weight's.
        zero_point: the weight's; None where it is 0.

    Example:
        >>> import torch
        >>> from functional_sq import triton_conv
        >>> triton_conv.supports(torch.zeros(4, 32, 3, 3, dtype=torch.int8), None)  # not on a GPU
        False
    """
    return codes.ndim in (3, 4) and math.prod(codes.shape[1:]) <= INT32_TERMS and triton_mm.is_capable(codes)


def least_windows(
    codes: Tensor, zero_point: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> int:
    """Return from how many windows on the kernel is the faster one: from the first, if 8 bytes are loaded at once.

    Args:
        codes, zero_point: the weight's, that `supports` takes; codes are `(N, C / groups, *kernel)`.
        stride, dilation: of each dimension.
        groups: the channels are cut into so many.

    Example:
        >>> import torch
        >>> from functional_sq import triton_conv
        >>> triton_conv.least_windows(torch.empty(64, 4, 3), None, (1,), (1,), 16)
        1
    """
    return 1 if _loads(codes, groups) else sys.maxsize


def convolve(
    operands: Operands,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    to_scale: Tensor | None = None,
    to_zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the sums of windows over `q - zero_point`, times `scale`, plus `bias`: rounded as by `triton_mm.product`.

    Args:
        operands: int8 codes, and a weight that `supports` takes.
        stride, dilation: along H and W.
        padding: above, below, left and right; the zero point is what is there.
        groups: the channels are cut into so many.
        activation, to_scale, to_zero_point, dtype: as `triton_mm.product`.

    Returns:
        `(B, N, H', W')` in `dtype`, or int8 with `to_scale`; channels last in memory.
    """
    q, zero_point, codes, weight_zero_point, scale, offset, bias = operands
    x = q.movedim(1, -1)
    if any(padding):
        x = pad_codes(x, zero_point, _sides(padding))
    of_weight = scale, offset, bias, weight_zero_point
    return _call(x, codes, *of_weight, stride, dilation, groups, activation, to_scale, to_zero_point, dtype, False)


def convolves_float8(q: Tensor, codes: Tensor, groups: int) -> bool:
    """Whether the kernel convolves codes of float8 with those of a weight: as it does int8, from Ada on.

    Args:
        q: `(B, C, *size)`.
        codes: `(N, C / groups, *kernel)`.
        groups: the channels are cut into so many.

    Example:
        >>> import torch
        >>> from functional_sq import triton_conv
        >>> codes = torch.ones(1, 32, 1, 1).to(torch.float8_e4m3fn)
        >>> triton_conv.convolves_float8(codes, codes, 1)  # not on a GPU
        False
    """
    if codes.ndim not in (3, 4) or not triton_mm.is_capable_of_float8(q, codes):
        return False
    return _loads(codes, groups)


def float8_convolve(
    q: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    """Return the sums of windows, times `scale`, plus `bias`, of codes that `convolves_float8`; summed in float32.

    Args:
        q: `(B, C, H, W)`, channels last in memory.
        codes: `(N, C / groups, *kernel)`, of one or two dimensions.
        scale: `(N,)` float32.
        bias: `(N,)` of any real dtype, or None.
        stride, padding, dilation, groups: as `convolve`.
        dtype: of the result.
        fast_accum: a tensor core adds all products, not 128 of them, with fewer bits than float32 has.

    Returns:
        `(B, N, H', W')` in `dtype`, channels last in memory.
    """
    x = q.movedim(1, -1)
    if any(padding):
        x = F.pad(x.view(torch.int8), _sides(padding)).view(q.dtype)  # the byte 0 is 0
    of_weight = scale, None, bias, None
    return _call(x, codes, *of_weight, stride, dilation, groups, "none", None, None, dtype, fast_accum)


def _sides(padding: Sequence[int]) -> list[int]:
    """Return padding as `F.pad` takes it for `(B, H, W, C)`."""
    return [0, 0, *padding[2:], *padding[:2]]


def _window_sums(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Return the sum of each group's codes in each window of `(B, H, W, C)`: `(B, H', W', groups)` int32."""
    of_pixel = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups).sum(-1, dtype=torch.int32).contiguous()
    return windows(of_pixel, kernel, stride, dilation).sum((3, 4), dtype=torch.int32)


def _together(channels: int, groups: int) -> int:
    """Return how many groups are put together: few, of which the channels fill steps, or are whole units and a step."""
    # Not by math.gcd, which Dynamo does not ask of a symbol.
    full, whole = (next(n for n in (1, 2, 4, 8, 16, 32) if n * channels % size == 0) for size in (_STEP, _UNIT))
    if groups % full == 0:
        return full
    return next((n for n in range(whole, groups, whole) if groups % n == 0 and n * channels >= _STEP), groups)


def _loads(codes: Tensor, groups: int) -> bool:
    """Whether a pixel has whole units of channels in each group."""
    channels = codes.shape[1]
    return channels * _together(channels, groups) % _UNIT == 0


def _joined(w: Tensor, groups: int, together: int) -> Tensor:
    """Return a weight `(N, *kernel, C)` of groups as one of `groups / together`, with zeros for what does not mix."""
    if together == 1:
        return w
    n, *kernel, channels = w.shape
    parts = w.view(torch.int8).reshape(groups // together, together, n // groups, *kernel, 1, channels)
    own = torch.eye(together, dtype=torch.int8, device=w.device).reshape(together, 1, 1, 1, together, 1)
    return (parts * own).reshape(n, *kernel, together * channels).view(w.dtype)


def _call(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    weight_zero_point: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *rest: object,
) -> Tensor:
    """Return the convolution of padded images `(B, H, W, C)`: `(B, N, H', W')`."""
    _define()
    w = (codes if codes.ndim == 4 else codes.unsqueeze(2)).movedim(1, -1)
    row_sum = None if weight_zero_point is None else _window_sums(x, w.shape[1:3], stride, dilation, groups)
    together = _together(codes.shape[1], groups)
    of_weight = _joined(w, groups, together), scale, offset, bias, weight_zero_point, row_sum
    op = torch.ops.functional_sq.triton_convolution.default
    y: Tensor = op(x, *of_weight, [*stride, *dilation], groups // together, *rest)
    return y.movedim(-1, 1)


@asked_once
def _define() -> None:
    """Define `functional_sq::triton_convolution`, once it is needed: that imports Triton."""
    if not hasattr(torch.ops.functional_sq, "triton_convolution"):
        torch.library.triton_op("functional_sq::triton_convolution", _convolved, mutates_args=())
        op = torch.ops.functional_sq.triton_convolution.default
        torch.library.register_vmap(op, looped(op))


def _convolved(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    weight_zero_point: Tensor | None,
    row_sum: Tensor | None,
    steps: Sequence[int],
    groups: int,
    activation: str,
    to_scale: Tensor | None,
    to_zero_point: Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    from functional_sq import triton_kernel  # imports Triton

    images, *size, _ = x.shape
    n, *kernel, channels = w.shape
    out = window_sizes(size, kernel, steps[:2], steps[2:])
    y = torch.empty((images, *out, n), dtype=dtype if to_scale is None else CODES, device=x.device)
    m = images * out[0] * out[1]
    if isinstance(m, int) and m == 0:
        return y
    tile = triton_mm.tile(m * groups, n // groups, x.device)
    height, width, depth, stages = _in_steps(tile, channels, adds=x.is_floating_point() and not fast_accum)
    unit = math.gcd(channels, 16)
    given = scale, offset, bias, weight_zero_point, row_sum, to_scale, to_zero_point
    with triton_mm.device_of(x):
        torch.library.wrap_triton(triton_kernel.convolve)[(-(-m // height) * -(-(n // groups) // width), groups)](
            x.contiguous(),
            w.contiguous(),
            *(None if t is None else t.contiguous() for t in given),
            y,
            m,
            n // groups,
            groups,
            math.prod(kernel),
            channels // unit,
            *size,
            *out,
            kernel[1],
            *steps,
            ACTIVATION=activation,
            HEIGHT=height,
            WIDTH=width,
            DEPTH=depth,
            UNIT=unit,
            WHOLE=channels % depth == 0,
            TOGETHER=1 if row_sum is None else row_sum.shape[-1] // groups,
            IMPRECISE=None if fast_accum else min(depth, _IMPRECISE),
            num_warps=4,
            num_stages=stages,
        )
    return y


def _in_steps(tile: triton_mm.Tile, channels: int, *, adds: bool) -> triton_mm.Tile:
    """Return a tile of which each step takes channels of one pixel: the fewest steps of those that are the fullest.

    adds: it adds sums of float8 in float32; of 128 rows, tensor cores would wait for each.
    """
    height, width, deepest, stages = tile
    depths = [_STEP << i for i in range(5) if _STEP << i <= deepest]
    depth = min(depths, key=lambda each: (-(-channels // each) * each, -each))
    return min(height, 64) if adds else height, width, depth, min(8, stages * (deepest // depth))
