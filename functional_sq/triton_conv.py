"""Convolution of codes by a kernel of Triton, for CUDA: windows are read where they lie, and none is written.

The tiles and what is inside them are those of `functional_sq.triton_mm`: a row of the first matrix is a window, of
which each step takes some channels of one pixel. So there are 32 channels or a multiple of it, and images are padded
before.
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

__all__ = ["CODES", "NAME", "convolve", "key", "least_windows", "requantizes", "supports"]

NAME: str = triton_mm.NAME

_STEP = 32
"""The smallest number of codes that a tensor core takes of each row."""


def supports(codes: Tensor, zero_point: Tensor | None) -> bool:
    """Whether the kernel convolves with a folded weight: on an NVIDIA GPU from Ampere on, channels in 32.

    Args:
        codes: `(N, C / groups, *kernel)`, the weight's, of one or two dimensions.
        zero_point: the weight's; None where it is 0.

    Example:
        >>> import torch
        >>> from functional_sq import triton_conv
        >>> triton_conv.supports(torch.zeros(4, 32, 3, 3, dtype=torch.int8), None)  # not on a GPU
        False
    """
    fits = codes.ndim in (3, 4) and codes.shape[1] % _STEP == 0 and math.prod(codes.shape[1:]) <= INT32_TERMS
    return fits and zero_point is None and triton_mm.is_capable(codes)


def least_windows(
    codes: Tensor, zero_point: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> int:
    """Return from how many windows on the kernel is the faster one: from the first, and for no groups.

    Args:
        codes, zero_point: the weight's, that `supports` takes; codes are `(N, C / groups, *kernel)`.
        stride, dilation: of each dimension.
        groups: the channels are cut into so many.

    Example:
        >>> import torch
        >>> from functional_sq import triton_conv
        >>> triton_conv.least_windows(torch.empty(4, 32, 3), None, (1,), (1,), 1)
        1
    """
    return 1 if groups == 1 else sys.maxsize


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
        groups: the channels are cut into so many, which are convolved one after the other.
        activation, to_scale, to_zero_point, dtype: as `triton_mm.product`.

    Returns:
        `(B, N, H', W')` in `dtype`, or int8 with `to_scale`; channels last in memory.
    """
    q, zero_point, codes, _, scale, offset, bias = operands
    x = q.movedim(1, -1)
    if any(padding):
        above, below, left, right = padding
        byte = zero_point.reshape(()).to(torch.int8)  # F.pad takes no tensor: the code becomes 0, and what it was again
        x = F.pad(x ^ byte, [0, 0, left, right, above, below]) ^ byte
    w = codes if codes.ndim == 4 else codes.unsqueeze(2)
    rest = (*stride, *dilation), activation, to_scale, to_zero_point, dtype
    _define()
    op = torch.ops.functional_sq.triton_convolution.default
    whole = x, w.movedim(1, -1), scale, offset, bias
    if groups == 1:
        return op(*whole, *rest).movedim(-1, 1)  # type: ignore[no-any-return]
    axes = -1, 0, 0, 0, 0
    cut = ([None] * groups if t is None else t.tensor_split(groups, dim) for t, dim in zip(whole, axes, strict=True))
    return torch.cat([op(*each, *rest) for each in zip(*cut, strict=True)], -1).movedim(-1, 1)


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
    offset: Tensor,
    bias: Tensor | None,
    steps: Sequence[int],
    activation: str,
    to_scale: Tensor | None,
    to_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from functional_sq import triton_kernel  # imports Triton

    images, *size, channels = x.shape
    n, *kernel, _ = w.shape
    places = zip(size, kernel, steps[:2], steps[2:], strict=True)
    out = [(length - gap * (taps - 1) - 1) // step + 1 for length, taps, step, gap in places]
    y = torch.empty((images, *out, n), dtype=dtype if to_scale is None else CODES, device=x.device)
    m = images * out[0] * out[1]
    if isinstance(m, int) and m == 0:
        return y
    height, width, deepest, stages = triton_mm.tile(m, n, x.device)
    depth = math.gcd(deepest, channels)
    with triton_mm.device_of(x):
        torch.library.wrap_triton(triton_kernel.convolve)[(-(-m // height) * -(-n // width),)](
            x.contiguous(),
            w.contiguous(),
            *(None if t is None else t.contiguous() for t in (scale, offset, bias, to_scale, to_zero_point)),
            y,
            m,
            n,
            math.prod(kernel) * channels,
            channels,
            *size,
            *out,
            kernel[1],
            *steps,
            ACTIVATION=activation,
            HEIGHT=height,
            WIDTH=width,
            DEPTH=depth,
            num_warps=4,
            num_stages=min(8, stages * (deepest // depth)),
        )
    return y
