"""Convolution of codes by a kernel of Triton, for CUDA: windows are read where they lie, and none is written.

What is inside a tile is that of `functional_sq.triton_mm`: a row of the first matrix is a window, of which each step
takes some channels of one pixel. Groups of few channels are put together, with zeros in the weight for what does not
mix, until a pixel has enough for a tensor core: 32 groups of 4 channels become 4 of 32. Images of integers are padded
before: with a kernel that loads the zero point where there is no pixel all took up to twice as long. Float8 is padded
by zeros, which cost nothing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from functional_sq import triton_mm
from functional_sq.int_mm import INT32_TERMS
from functional_sq.operands import Operands
from functional_sq.tracing import asked_once, looped
from functional_sq.triton_mm import CODES, IMPRECISE, Tile, requantizes
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

_TILES: tuple[Tile, ...] = (
    (64, 128, 128, 3),
    (128, 64, 128, 3),
    (64, 64, 128, 3),
    (128, 32, 128, 3),
    (64, 32, 128, 3),
)
"""Three or four of them on a multiprocessor: the steps are few, so that some load and store while others multiply.
Those were the fastest on an H200, for images of ResNets; of float8 all but the first."""


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


def key() -> tuple[object, ...]:
    """Return what the answers here depend on, beside their arguments."""
    return triton_mm.AVAILABLE, _TILES


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
        x = pad_codes(x, zero_point, [0, 0, *padding[2:], *padding[:2]])
    of_weight = scale, offset, bias, weight_zero_point
    then = activation, to_scale, to_zero_point, dtype
    return _call(x, codes, *of_weight, stride, [0, 0, 0, 0], dilation, groups, *then)


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
    then = "none", None, None, dtype, fast_accum
    return _call(q.movedim(1, -1), codes, scale, None, bias, None, stride, padding, dilation, groups, *then)


def _window_sums(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Return the sum of each group's codes in each window of `(B, H, W, C)`: `(B, H', W', groups)` int32."""
    sums = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups).sum(-1, dtype=torch.int32)
    for i in (0, 1):  # one after the other: a compiler writes out short sums
        along, *rest = ([n if i == j else 1 for j, n in enumerate(each)] for each in (kernel, stride, dilation))
        if any(n > 1 for n in (*along, *rest[0])):
            sums = windows(sums.contiguous(), along, *rest).sum((3, 4), dtype=torch.int32)
    return sums


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
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *rest: object,
) -> Tensor:
    """Return the convolution of images `(B, H, W, C)`, with zeros around them: `(B, N, H', W')`."""
    _define()
    w = (codes if codes.ndim == 4 else codes.unsqueeze(2)).movedim(1, -1)
    together = _together(codes.shape[1], groups)
    row_sum = None
    if weight_zero_point is not None and together == 1:
        row_sum = _window_sums(x, w.shape[1:3], stride, dilation, groups)
    of_weight = _joined(w, groups, together), scale, offset, bias, weight_zero_point, row_sum
    op = torch.ops.functional_sq.triton_convolution.default
    y: Tensor = op(x, *of_weight, together, [*stride, *dilation], padding, groups // together, *rest)
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
    together: int,
    steps: Sequence[int],
    padding: Sequence[int],
    groups: int,
    activation: str,
    to_scale: Tensor | None,
    to_zero_point: Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool = False,
) -> Tensor:
    from functional_sq import triton_kernel  # imports Triton

    images, *size, _ = x.shape
    n, *kernel, channels = w.shape
    out = window_sizes([size[i] + sum(padding[2 * i :][:2]) for i in (0, 1)], kernel, steps[:2], steps[2:])
    y = torch.empty((images, *out, n), dtype=dtype if to_scale is None else CODES, device=x.device)
    m = images * out[0] * out[1]
    if isinstance(m, int) and m == 0:
        return y
    tiles = _TILES[1:] if x.is_floating_point() else _TILES
    height, width, depth, stages = _in_steps(triton_mm.tile(tiles, m * groups, n // groups, x.device), channels)
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
            channels // unit,
            *size,
            *out,
            *steps,
            *padding[::2],
            ACTIVATION=activation,
            TAPS=math.prod(kernel),
            TAPS_IN_ROW=kernel[1],
            STEPS=-(-channels // depth),
            HEIGHT=height,
            WIDTH=width,
            DEPTH=depth,
            UNIT=unit,
            WHOLE=channels % depth == 0,
            ZEROS=any(padding),
            TOGETHER=together,
            IMPRECISE=None if fast_accum else min(depth, IMPRECISE),
            num_warps=4,
            num_stages=stages,
        )
    return y


def _in_steps(tile: Tile, channels: int) -> Tile:
    """Return a tile of which each step takes channels of one pixel: the fewest steps of those that are the fullest."""
    height, width, deepest, stages = tile
    depths = [_STEP << i for i in range(3) if _STEP << i <= deepest]
    return height, width, min(depths, key=lambda each: (-(-channels // each) * each, -each)), stages
