"""Convolution of codes by a kernel of Triton, for CUDA: windows are read where they lie, and none is written.

What is inside a tile is that of `functional_sq.triton_mm`: a row of the first matrix is a window, of which each step
takes some channels of one pixel. Groups of few channels are put together, with zeros in the weight for what does not
mix, until a pixel has enough for a tensor core: 32 groups of 4 channels become 4 of 32. Where all have not enough, as
the colours of an image, a step takes pixels that lie side by side: a row of the kernel is one row in memory. Channels
that are no multiple of what is loaded at once are made one, by zeros in the codes and in the weight.

Where there is no pixel zeros are loaded, which costs nothing, or codes of the zero point, from a few rows of them. A
kernel that put it between what it loaded took up to twice as long.

Where each pixel is a window, and few outputs are made of it, the codes need not be written: the kernel quantizes what
it loads. Where each channel is convolved alone there is nothing for a tensor core, and another kernel sums.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq import triton_mm
from functional_sq.int_mm import INT32_TERMS
from functional_sq.operands import Operands
from functional_sq.requantize import Float8Codes, requantizes
from functional_sq.tracing import always, asked_once, looped
from functional_sq.triton_mm import CODES, IMPRECISE, Tile
from functional_sq.windows import are_alone, as_bytes, pad_codes, window_sizes

__all__ = [
    "CODES",
    "NAME",
    "Float8Kernels",
    "convolve",
    "float8_for",
    "key",
    "reads_real",
    "requantizes",
    "supports",
    "windows",
]

NAME: str = triton_mm.NAME

_STEP = 32
"""The smallest number of codes that a tensor core takes of each row."""

_ROWS = 512
"""Of how many rows of the zero point programs read one each, where there is no pixel. With one for all of them a layer
of 7 x 7 pixels took twice as long: they waited for the same bytes."""

_UNIT, _UNIT_OF_ROWS = 8, 4
"""What the channels of a pixel are a multiple of: bytes that a thread loads at once, so that it loads ahead."""

_NARROW = 128
"""Up to so many outputs floats are read rather than codes: what one tile of them takes is quantized once."""

_OF_FLOATS: tuple[Tile, ...] = ((64, 128, 64, 3), (128, 64, 64, 3), (64, 64, 64, 3))
"""As `_TILES`, where floats are read."""

_SHALLOW: tuple[Tile, ...] = ((128, 32, 32, 3),)
"""As `_TILES`, where one step takes all that there is: as in 1 x 1 of few channels."""

_LEAST, _LEAST_FLOAT8 = 1.25, 1.5
"""Of how many tiles for each multiprocessor larger ones are the faster ones."""

_ALONE, _ALONE_FLOAT8 = (128, 32), (256, 16)
"""Rows and columns of a tile where each channel is convolved alone."""

_TILES: tuple[Tile, ...] = (
    (64, 128, 128, 3),
    (128, 64, 128, 3),
    (64, 64, 128, 4),
    (128, 32, 128, 3),
    (64, 32, 128, 3),
)
"""Three or four of them on a multiprocessor: the steps are few, so that some load and store while others multiply.
Those were the fastest on an H200, for images of ResNets; of float8, and with a residual, all but the first, and with a
residual and sums of codes all but two, which take so many registers that one less fits."""


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


def key(device: str) -> tuple[object, ...]:
    """Return what the answers here depend on, beside their arguments."""
    return triton_mm.key(device)


def windows(
    codes: Tensor, zero_point: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> range:
    """Return for how many windows the kernel is the faster one: for any number.

    Args:
        codes, zero_point: the weight's, that `supports` takes; codes are `(N, C / groups, *kernel)`.
        stride, dilation: of each dimension.
        groups: the channels are cut into so many.

    Example:
        >>> import torch
        >>> from functional_sq import triton_conv
        >>> 1 in triton_conv.windows(torch.empty(64, 4, 3), None, (1,), (1,), 16)
        True
    """
    return range(1, sys.maxsize)


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
    residual: Tensor | None = None,
    fast_accum: bool = False,
) -> Tensor:
    """Return the sums of windows over `q - zero_point`, times `scale`, plus `bias`: rounded as by `triton_mm.product`.

    Those of float8 are summed in float32.

    Args:
        operands: int8 codes, and a weight that `supports` takes; or those that `float8` takes. `x` is read where
            each pixel is a window, and few outputs are made of it.
        stride, dilation: along H and W.
        padding: above, below, left and right; the zero point is what is there.
        groups: the channels are cut into so many.
        activation, to_scale, to_zero_point, dtype: as `triton_mm.product`; "relu" with a residual too. Codes are of the
            weight's dtype.
        residual: `(B, N, H', W')` of `dtype`, without a gradient, or None: what is added before the activation.
        fast_accum: a tensor core adds all products of float8, not 128 of them, with fewer bits than float32 has.

    Returns:
        `(B, N, H', W')` in `dtype`, or codes with `to_scale`; channels last in memory.
    """
    _define()
    q, zero_point, codes, weight_zero_point, scale, offset, bias, x, x_scale = operands
    image = q.movedim(1, -1)
    w = (codes if codes.ndim == 4 else codes.unsqueeze(2)).movedim(1, -1)
    alone, each = are_alone(codes, groups), codes.shape[1]
    together = 1 if alone else _together(each, groups)
    pixel, in_rows = (each, False) if alone else _pixel(together * each, w.shape[2], dilation[1], groups // together)
    w = _joined(w, groups, together, pixel)
    if x is not None and reads_real(x, codes, stride, groups):
        image = x.movedim(1, -1)
    else:
        x_scale, added_channels, step = None, pixel - together * each, stride[1]
        # Beyond the kernel are pixels, times 0: among float8 may be NaNs, and others would be part of the sum of codes.
        merged = in_rows and step > 1 and weight_zero_point is None and (offset is not None or w.shape[2] % step == 0)
        if merged:
            padding = [*padding[:3], _last_side(image.shape[2] + padding[2], padding[3], w.shape[2], step)]
        if merged or (any(padding) and zero_point is not None and (in_rows or added_channels)):
            sides = [0, 0, *padding[2:], *padding[:2]]
            image, padding = pad_codes(as_bytes(image), zero_point, sides).view(q.dtype), [0, 0, 0, 0]
        image = _with_zeros(image, added_channels)
        if merged:
            wide = F.pad(as_bytes(w), [0, 0, 0, -w.shape[2] % step]).view(w.dtype)
            image, w, stride = _side_by_side(image, step), _side_by_side(wide, step), [stride[0], 1]
        if not (alone or any(padding)):
            zero_point = None  # nothing reads it
    added = None if residual is None else residual.movedim(1, -1)
    of_weight = w, scale, offset, bias, added, weight_zero_point
    op = torch.ops.functional_sq.triton_convolution.default
    of_x = image, x_scale, zero_point
    settings = in_rows, together, each, [*stride, *dilation], padding, groups // together
    y: Tensor = op(*of_x, *of_weight, *settings, activation, to_scale, to_zero_point, dtype, fast_accum)
    return y.movedim(-1, 1)


class Float8Kernels(Float8Codes):
    """The kernel as `conv` asks it for codes of float8, of which the codes that it makes are too.

    Attributes:
        fast_accum: as `convolve`.
    """

    def __init__(self, fast_accum: bool) -> None:
        self.fast_accum = fast_accum

    def convolve(self, *operands: Any, **rest: Any) -> Tensor:
        """As `triton_conv.convolve`."""
        return convolve(*operands, **rest, fast_accum=self.fast_accum)


_FLOAT8 = {fast_accum: Float8Kernels(fast_accum) for fast_accum in (False, True)}


def float8_for(q: Tensor, codes: Tensor, fast_accum: bool) -> Float8Kernels | None:
    """Return the kernel for codes of float8 and those of a weight, from Ada on, where it would convolve int8; or None.

    Args:
        q: `(B, C, *size)`.
        codes: `(N, C / groups, *kernel)`.
        fast_accum: as `convolve`.

    Example:
        >>> import torch
        >>> from functional_sq import triton_conv
        >>> codes = torch.ones(1, 32, 1, 1).to(torch.float8_e4m3fn)
        >>> triton_conv.float8_for(codes, codes, False) is None  # not on a GPU
        True
    """
    fits = codes.ndim in (3, 4) and triton_mm.is_capable_of_float8(q, codes)
    return _FLOAT8[fast_accum] if fits else None


def _together(channels: int, groups: int) -> int:
    """Return how many groups are put together: few, of which the channels fill steps, or are whole units and a step."""
    # Not by math.gcd, which Dynamo does not ask of a symbol.
    full, whole = (next(n for n in (1, 2, 4, 8, 16, 32) if n * channels % size == 0) for size in (_STEP, _UNIT))
    if groups % full == 0:
        return full
    return next((n for n in range(whole, groups, whole) if groups % n == 0 and n * channels >= _STEP), groups)


def _pixel(channels: int, kernel: int, dilation: int, groups: int) -> tuple[int, bool]:
    """Return how many channels a pixel gets, and whether pixels side by side are one step: if those are fewer.

    Args:
        channels: of a group.
        kernel, dilation: along the width.
        groups: of so many channels.
    """
    pixel, in_rows = (channels + -channels % unit for unit in (_UNIT, _UNIT_OF_ROWS))
    if groups == dilation == 1 and 2 * in_rows <= _STEP and -(-kernel * in_rows // _STEP) < kernel:
        return in_rows, True
    return pixel, False


def _last_side(size: int, side: int, kernel: int, step: int) -> int:
    """Return the padding at the right with which pixels are whole steps, and windows of such as many as before."""
    out = (size + side - kernel) // step + 1
    return step * (out - 1 - -kernel // step) - size


def _side_by_side(x: Tensor, step: int) -> Tensor:
    """Return `(B, H, W, C)` where each pixel is `step` of them."""
    x = x.contiguous()
    (images, height, width, channels), (*strides, along, one) = x.shape, x.stride()
    # Not a shape of the same elements, by whose indices a compiler would compute the codes.
    return x.as_strided((images, height, width // step, step * channels), (*strides, step * along, one))


def _with_zeros(x: Tensor, channels: int) -> Tensor:
    """Return codes `(..., C)` with so many channels more, of zeros."""
    return F.pad(as_bytes(x), [0, channels]).view(x.dtype) if channels else x


def reads_real(x: Tensor, codes: Tensor, stride: Sequence[int], groups: int) -> bool:
    """Whether the kernel reads real values rather than their codes, which a pass makes of what strides leave out too.

    Args:
        x: `(B, C, *size)`, what codes are made of.
        codes: `(N, C / groups, *kernel)`, the weight's, that the kernel takes.
        stride: of each dimension.
        groups: the channels are cut into so many.

    Example:
        >>> import torch
        >>> from functional_sq import triton_conv
        >>> x = torch.empty(2, 64, 8, 8).contiguous(memory_format=torch.channels_last)
        >>> [triton_conv.reads_real(x, torch.empty(n, 64, 1, 1), (1, 1), 1) for n in (32, 512)]
        [True, False]
    """
    few = math.prod(codes.shape[2:]) == groups == 1 and len(codes) <= _NARROW * math.prod(stride)
    return few and codes.shape[1] % _UNIT == 0 and x.dtype is not torch.float64 and always(x.stride(1) == 1)


def _joined(w: Tensor, groups: int, together: int, pixel: int) -> Tensor:
    """Return a weight `(N, *kernel, C)` of groups as one of `groups / together`, with zeros for what does not mix.

    And for channels up to those of a pixel.
    """
    n, *kernel, channels = w.shape
    if together > 1:
        parts = as_bytes(w).reshape(groups // together, together, n // groups, *kernel, 1, channels)
        own = torch.eye(together, dtype=torch.int8, device=w.device).reshape(together, 1, 1, 1, together, 1)
        w = (parts * own).reshape(n, *kernel, together * channels).view(w.dtype)
    return _with_zeros(w, pixel - together * channels)


@asked_once
def _define() -> None:
    """Define `functional_sq::triton_convolution`, once it is needed: that imports Triton."""
    if not hasattr(torch.ops.functional_sq, "triton_convolution"):
        torch.library.triton_op("functional_sq::triton_convolution", _convolved, mutates_args=())
        op = torch.ops.functional_sq.triton_convolution.default
        torch.library.register_vmap(op, looped(op))


def _convolved(
    x: Tensor,
    x_scale: Tensor | None,
    zero_point: Tensor | None,
    w: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    weight_zero_point: Tensor | None,
    in_rows: bool,
    together: int,
    each: int,
    steps: Sequence[int],
    padding: Sequence[int],
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
    out = window_sizes([size[i] + sum(padding[2 * i :][:2]) for i in (0, 1)], kernel, steps[:2], steps[2:])
    y = torch.empty((images, *out, n), dtype=dtype if to_scale is None else w.dtype, device=x.device)
    m = images * out[0] * out[1]
    if isinstance(m, int) and m == 0:
        return y
    images_and_windows = *size, *out, *steps, *padding[::2]
    pixel = channels if in_rows else None
    if in_rows:
        kernel, channels = [kernel[0], 1], kernel[1] * channels
    taps = math.prod(kernel)
    constants: dict[str, Any] = {"ACTIVATION": activation, "TAPS_IN_ROW": kernel[1]}

    def ready(*operands: Tensor | None) -> list[Tensor | None]:
        return [None if t is None else t.contiguous() for t in operands]

    if are_alone(w.movedim(-1, 1), groups):
        dots = w.dtype is torch.int8 and x.is_cuda  # no interpreter knows them
        height, width = _ALONE if dots else _ALONE_FLOAT8
        unit = math.gcd(n, 16)
        of_w = _by_fours(w) if dots else w.flatten(1).t()
        given = ready(zero_point, of_w, scale, offset, bias, residual, weight_zero_point)
        with triton_mm.device_of(x):
            torch.library.wrap_triton(triton_kernel.convolve_alone)[(-(-m // height), -(-n // width))](
                *ready(x),
                *given,
                *ready(to_scale, to_zero_point),
                y,
                m,
                n // unit,
                *images_and_windows,
                TAPS=taps,
                HEIGHT=height,
                WIDTH=width,
                UNIT=unit,
                DOTS=dots,
                **constants,
                num_warps=4,
            )
        return y
    of_codes = _TILES if residual is None and not w.is_floating_point() else _TILES[1:]
    if residual is not None and weight_zero_point is not None:
        of_codes = _TILES[2:]
    tiles = _SHALLOW if taps * channels <= _STEP else of_codes if x_scale is None else _OF_FLOATS
    tile = triton_mm.tile(tiles, m * groups, n // groups, x.device, _LEAST_FLOAT8 if w.is_floating_point() else _LEAST)
    height, width, depth, stages = _in_steps(tile, channels)
    unit = math.gcd(channels, 16)
    zeros = None
    if zero_point is not None and x_scale is None and any(padding):
        zeros = zero_point.to(torch.int8).repeat(_ROWS * depth)
    given = ready(x_scale, zero_point, zeros, w, scale, offset, bias, residual, weight_zero_point)
    with triton_mm.device_of(x):
        torch.library.wrap_triton(triton_kernel.convolve)[(-(-m // height) * -(-(n // groups) // width), groups)](
            *ready(x),
            *given,
            *ready(to_scale, to_zero_point),
            y,
            m,
            n // groups,
            groups,
            channels // unit,
            *images_and_windows,
            taps,
            STEPS=-(-channels // depth),
            HEIGHT=height,
            WIDTH=width,
            DEPTH=depth,
            UNIT=unit,
            WHOLE=channels % depth == 0,
            ZEROS=any(padding),
            ROWS=_ROWS,
            TOGETHER=together,
            EACH=each,
            PIXEL=pixel,
            IMPRECISE=None if fast_accum else min(depth, IMPRECISE),
            **constants,
            num_warps=4,
            num_stages=stages,
        )
    return y


def _by_fours(w: Tensor) -> Tensor:
    """Return a weight `(N, *kernel, 1)` as `(fours, N, 4)`, with zeros after the last element."""
    rows = w.flatten(1)
    return F.pad(rows, [0, -rows.shape[1] % 4]).reshape(len(rows), -1, 4).movedim(1, 0)


def _in_steps(tile: Tile, channels: int) -> Tile:
    """Return a tile of which each step takes channels of one pixel: the fewest steps of those that are the fullest."""
    height, width, deepest, stages = tile
    depths = [_STEP << i for i in range(3) if _STEP << i <= deepest]
    return height, width, min(depths, key=lambda each: (-(-channels // each) * each, -each)), stages
