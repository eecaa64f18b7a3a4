"""Windows of images: where they lie, how many there are, and what pads the codes `(B, *space, C)` of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Geometry",
    "are_alone",
    "as_bytes",
    "check_windows",
    "flatten_padding",
    "geometry_of",
    "is_last",
    "laid_out",
    "pad_codes",
    "per_dimension",
    "window_sizes",
    "windows",
]


_TAPS = 25
"""The largest window whose elements are written out one after the other; so many sums of int8 are exact in float32."""


class Geometry(NamedTuple):
    """Where windows lie; one entry for each dimension."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Before and after."""
    dilation: tuple[int, ...]


def geometry_of(
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
) -> Geometry:
    """Return where windows lie, of what `conv` takes; ValueError where it is no such."""
    rank = len(kernel)
    steps, gaps = per_dimension("stride", stride, rank, 1), per_dimension("dilation", dilation, rank, 1)
    if padding == "same":
        if any(step != 1 for step in steps):
            raise ValueError(f"padding='same' with stride={stride}: the size cannot stay; use stride=1, or numbers")
        missing = [gap * (size - 1) for size, gap in zip(kernel, gaps, strict=True)]
        return Geometry(steps, tuple((m // 2, m - m // 2) for m in missing), gaps)
    sides = per_dimension("padding", 0 if padding == "valid" else padding, rank, 0, " or 'same' or 'valid'")
    return Geometry(steps, tuple((side, side) for side in sides), gaps)


def are_alone(codes: Tensor, groups: int) -> bool:
    """Whether a weight `(N, C / groups, *kernel)` convolves each channel alone, in few elements."""
    outputs, channels, *kernel = codes.shape
    return outputs == groups and channels == 1 and math.prod(kernel) <= _TAPS


def per_dimension(name: str, value: object, rank: int, least: int, words: str = "") -> tuple[int, ...]:
    """Return a setting for each dimension, or raise ValueError; `words` are what else may be given."""
    values = list(value) if isinstance(value, Sequence) else [value] * rank
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= least]
    if not len(values) == len(whole) == rank:
        raise ValueError(
            f"{name}={value!r}; give an int from {least}{words}, or {rank} of them, one for each dimension"
        )
    return tuple(whole)


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


def pad_codes(x: Tensor, zero_point: Tensor | None, sides: Sequence[int]) -> Tensor:
    """Pad codes with the zero point, one or as many as broadcast, or None for 0, as `F.pad` pads with a number.

    That takes no tensor: a code becomes 0 where it is the zero point, and again what it was. So do the bytes of float8,
    whose zero is the byte 0.
    """
    if zero_point is None:
        return F.pad(x, sides)
    one_or_more = zero_point.reshape(()) if zero_point.numel() == 1 else zero_point
    byte = one_or_more.to(torch.int32).to(x.dtype)
    return F.pad(x ^ byte, sides) ^ byte


def as_bytes(q: Tensor) -> Tensor:
    """Return codes of float8 as int8, which are padded and copied as such; integers as they are."""
    return q.view(torch.int8) if q.is_floating_point() else q


def check_windows(q: Sequence[int], weight: Sequence[int], geometry: Geometry) -> tuple[int, ...]:
    """Return how many windows fit along each axis, or raise ValueError where the weight has none."""
    space = q[2 - len(weight) :]
    padded = [n + before + after for n, (before, after) in zip(space, geometry.padding, strict=True)]
    size = window_sizes(padded, weight[2:], geometry.stride, geometry.dilation)
    if any(n < 1 for n in size):
        raise ValueError(
            f"activations of shape {tuple(q)} with padding {geometry.padding} are smaller than a window of "
            f"{tuple(weight[2:])} elements in steps of {geometry.dilation}; pad more, or use a smaller kernel"
        )
    return size


def flatten_padding(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Return padding as `F.pad` takes it: the last axis first."""
    return [side for pair in reversed(padding) for side in pair]


def laid_out(y: Tensor, x: Tensor) -> Tensor:
    """Return images as others lie in memory: channels last, or contiguous.

    The strides say it under vmap too, where the format cannot be asked.
    """
    return y.movedim(1, -1).contiguous().movedim(-1, 1) if is_last(x) else y.contiguous()


def is_last(x: Tensor) -> bool:
    """Whether the channels of images lie last in memory."""
    return x.ndim > 3 and x.stride(1) == 1 and x.stride(-1) > 1
