"""Windows of images of codes `(B, *space, C)`: how many there are, where they lie, and what pads them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pad_codes", "window_sizes", "windows"]


def window_sizes(
    space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Return how many windows fit along each axis of what is padded already."""
    each = zip(space, kernel, stride, dilation, strict=True)
    return tuple((n - gap * (taps - 1) - 1) // step + 1 for n, taps, step, gap in each)


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """View contiguous images as `(B, *size, *kernel, C)`."""
    batch, *space, channels = x.shape
    along, *step = x.stride()[:-1]
    # Not Tensor.unfold: Inductor would compute the codes under that view once for each window they are in.
    return x.as_strided(
        (batch, *window_sizes(space, kernel, stride, dilation), *kernel, channels),
        (along, *map(mul, step, stride), *map(mul, step, dilation), 1),
    )


def pad_codes(x: Tensor, zero_point: Tensor, sides: Sequence[int]) -> Tensor:
    """Pad codes with the zero point, as `F.pad` pads with a number.

    That takes no tensor: a code becomes 0 where it is the zero point, and again what it was. So do the bytes of float8,
    whose zero is the byte 0.
    """
    byte = zero_point.reshape(()).to(torch.int32).to(x.dtype)
    return F.pad(x ^ byte, sides) ^ byte
