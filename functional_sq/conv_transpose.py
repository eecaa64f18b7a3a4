"""Transposed convolution on codes: a convolution, so everything of `conv` holds.

What a transposed convolution with a stride computes is the convolution, with stride 1, of the input with
`stride - 1` zeros between neighbours, by a weight whose kernel is turned round and whose output channels
come first. So a quantized weight is held in that layout, `transpose_weight`: PerAxis(0) is one scale for
each output channel, `fold` and `epilogue` are those of a convolution, and so is whatever multiplies. The
zeros are codes of the zero point, a byte each. Of the products `1 / prod(stride)` are with codes of the
input, the others with these: a kernel of 4 x 4 at stride 2 multiplies four times as often as it must.

`polyphase` cuts the kernel so that none is. Outputs `stride` apart, one phase of them, see the same elements
of it, one of `stride`; so each phase is a convolution of the input as it is, and all are one convolution to
`prod(stride)` times as many outputs, which are then put side by side. Groups and dilation stay with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq import brgemm
from functional_sq.conv import check_channels, check_conv, convolve_images, direct_images
from functional_sq.folded import (
    Epilogue,
    FoldedWeight,
    check_bias,
    check_epilogue,
    check_folded,
    check_single,
    is_readable,
)
from functional_sq.formats import check_real
from functional_sq.int_mm import as_written
from functional_sq.qparams import QParams, check_qparams
from functional_sq.quantize import dequantize
from functional_sq.requantize import Requantization, requantize
from functional_sq.spec import QuantSpec
from functional_sq.tracing import computed_once
from functional_sq.windows import Geometry, as_bytes, flatten_padding, pad_codes, per_dimension

__all__ = [
    "conv_transpose",
    "conv_transpose_reference",
    "direct_transposed",
    "is_polyphase",
    "polyphase",
    "transpose_weight",
]


def transpose_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """Turn torch's weight of a transposed convolution into the one that `conv_transpose` takes, and back.

    Args:
        weight: `(C, N / groups, *kernel)`, real values or codes.
        groups: as `conv_transpose`.

    Returns:
        `(N, C / groups, *kernel)`, the kernel turned round, contiguous; of that the `weight` again.

    Raises:
        TypeError: the weight is no tensor.
        ValueError: `groups` does not divide the first axis, or there is no kernel.

    Example:
        >>> import torch, functional_sq as fsq
        >>> fsq.transpose_weight(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
        tensor([[[2., 1.],
                 [4., 3.]]])
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; give a tensor of (in, out / groups, *kernel)")
    whole = isinstance(groups, int) and not isinstance(groups, bool) and groups > 0
    if weight.ndim < 3 or not whole or weight.shape[0] % groups:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} in groups={groups!r}; that of a transposed convolution is "
            f"(in, out / groups, *kernel), and groups a divisor of its first axis"
        )
    channels, outputs, *kernel = weight.shape
    turned = weight.reshape(groups, channels // groups, outputs, *kernel).transpose(1, 2)
    return turned.flatten(0, 1).flip([*range(2, weight.ndim)]).contiguous()


def polyphase(weight: FoldedWeight, stride: int | Sequence[int]) -> FoldedWeight:
    """Return the weight of the convolution that computes all phases of a transposed one, to be made once and kept.

    Phase `r` of the outputs, those at `r`, `r + stride`, ..., sums over elements `r`, `r + stride`, ... of torch's
    kernel. A kernel that the stride does not divide gets elements of the value 0 behind.

    Args:
        weight: `fold` of a weight `(N, C, *kernel)` in the layout of `transpose_weight`, in one group.
        stride: as `conv_transpose`.

    Returns:
        codes `(prod(stride) * N, C, *parts)`, the first phase's N outputs first, `parts` the kernel over the stride,
        rounded up. What `conv_transpose(..., kernel_size=)` takes, and `epilogue`.

    Raises:
        TypeError: `weight` is no FoldedWeight.
        ValueError: the weight has no kernel, or several scales an output; `stride` does not fit it; or elements are
            added to an asymmetric weight whose zero point is no code.

    Source: Vaidyanathan 1990, Multirate digital filters, filter banks, polyphase networks, and applications;
        Shi et al. 2016 (arXiv:1609.07009).

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> turned = fsq.transpose_weight(torch.tensor([[[1, 2, 3]]], dtype=torch.int8))
        >>> fsq.polyphase(fsq.fold(spec, turned, one), stride=2).codes
        tensor([[[3, 1]],
        <BLANKLINE>
                [[0, 2]]], dtype=torch.int8)
    """
    check_folded(weight)
    codes, scale, zero_point, _ = weight
    outputs, channels, *kernel = codes.shape
    if not kernel:
        raise ValueError(f"a weight of shape {tuple(codes.shape)} has no kernel; give (N, C, *kernel)")
    check_single(weight)
    steps = per_dimension("stride", stride, len(kernel), 1)
    parts = _parts(kernel, steps)
    missing = [part * step - size for part, step, size in zip(parts, steps, kernel, strict=True)]
    if zero_point is not None and any(missing) and is_readable(zero_point):
        low, high = torch.iinfo(codes.dtype).min, torch.iinfo(codes.dtype).max
        if not low <= int(zero_point.min()) <= int(zero_point.max()) <= high:
            raise ValueError(
                f"the weight's zero points {zero_point.flatten()[:4].tolist()} ... are no codes, so none is 0, with "
                f"which a kernel of {tuple(kernel)} is filled up to whole steps of {steps}; use other zero points, or "
                f"conv_transpose without polyphase"
            )
    # The kernel is turned round, so what is behind it is in front.
    x = pad_codes(as_bytes(codes), zero_point, flatten_padding([(size, 0) for size in missing]))
    x = x.reshape(outputs, channels, *chain(*zip(parts, steps, strict=True)))
    of_part, of_step = range(2, x.ndim, 2), range(3, x.ndim, 2)
    x = x.flip([*of_step]).permute(*of_step, 0, 1, *of_part).flatten(0, len(steps)).contiguous()

    def repeated(t: Tensor) -> Tensor:
        return t if len(t) == 1 else t.repeat(math.prod(steps), *(1 for _ in t.shape[1:]))

    return FoldedWeight(
        x.view(codes.dtype),
        repeated(scale),
        None if zero_point is None else repeated(zero_point),
        None if weight.sum is None else x.flatten(1).sum(1, dtype=weight.sum.dtype),
    )


def is_polyphase(stride: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    """Whether `polyphase` is for a transposed convolution: one with a stride, and neither groups nor dilation."""
    return groups == 1 and math.prod(stride) > 1 and math.prod(dilation) == 1


def conv_transpose(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    kernel_size: int | Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    epilogue: Epilogue | None = None,
    then: Requantization | None = None,
    fast_accum: bool = False,
) -> Tensor:
    """Convolve the codes of activations, transposed, with a folded weight, in one to three dimensions.

    Exact, and rounded, as `conv`.

    Args:
        spec, q, qp: as `conv`.
        weight: `fold` of a weight in the layout of `transpose_weight`; faster with a stride, in one group and without
            dilation, `polyphase(weight, stride)` of that.
        bias: `(N,)` or None, output units.
        stride: steps between the windows that the input's elements are spread over, one for all dimensions
            or one each.
        padding: what is cut off on both sides of the result.
        output_padding: what is added behind; less than the stride or the dilation.
        dilation, groups, dtype, then, fast_accum: as `conv`.
        kernel_size: of the weight that `polyphase` took, if `weight` is what it returned; else None.
        epilogue: `epilogue(spec, qp, weight)`, or None, as `conv`.

    Returns:
        `(B, N, *size)` in `dtype`, or without B, the size `(n - 1) * stride - 2 * padding + dilation * (kernel - 1)
        + output_padding + 1`; `channels_last` in memory where `q` is.

    Raises:
        TypeError, ValueError: as `conv`.

    Source: Dumoulin and Visin 2016 (arXiv:1603.07285), section 4; settings as
        `torch.nn.functional.conv_transpose2d`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> turned = fsq.transpose_weight(torch.tensor([[[1, 2, 3]]], dtype=torch.int8))
        >>> q = torch.tensor([[1, 10]], dtype=torch.int8)
        >>> fsq.conv_transpose(spec, q, one, fsq.fold(spec, turned, one), stride=2)
        tensor([[ 1.,  2., 13., 20., 30.]])
        >>> phases = fsq.polyphase(fsq.fold(spec, turned, one), stride=2)
        >>> fsq.conv_transpose(spec, q, one, phases, stride=2, kernel_size=3)
        tensor([[ 1.,  2., 13., 20., 30.]])
    """
    qp, then = check_conv(spec, q, qp, weight, groups, dtype, then)
    settings = stride, padding, output_padding, dilation, groups, kernel_size
    spread, geometry, phases = _plan(q.shape, weight.codes.shape, *settings)
    bias = _of_all_phases(bias, weight, phases)
    bias = bias if bias is None else bias.flatten()
    check_epilogue(epilogue, bias, weight, torch.promote_types(dtype, torch.float32))
    images = q if q.ndim == weight.codes.ndim else q[None]
    x = images.movedim(1, -1).contiguous()
    x = x if math.prod(spread) == 1 else _spread(x, qp.zero_point, spread)
    if _is_cut(geometry):
        x, geometry = _padded(x, qp.zero_point, geometry.padding), geometry._replace(padding=((0, 0),) * len(spread))
    how = dtype, epilogue, then, fast_accum
    y, then = convolve_images(spec, x.movedim(-1, 1), qp, weight, bias, geometry, groups, *how)
    y = brgemm.laid_out(y if phases is None else _interleaved(y, phases, images), images)
    y = y if images is q else y[0]
    return y if then is None else requantize(y, then)


def direct_transposed(
    spec: QuantSpec,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    kernel_size: int | Sequence[int] | None = None,
) -> Callable[[Tensor], Tensor | None] | None:
    """As `functional_sq.conv.direct_convolution`, transposed; it returns None too where zeros are put between codes.

    Args:
        spec, qp, weight, bias, stride, padding, output_padding, dilation, groups, kernel_size, epilogue: as
            `conv_transpose`.

    Raises:
        TypeError, ValueError: as `conv_transpose`; when called, as that for activations.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.conv_transpose import direct_transposed
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[[2, 1]]], dtype=torch.int8), one)
        >>> convolve = direct_transposed(spec, one, weight, None, fsq.epilogue(spec, one, weight))
        >>> if convolve is not None:
        ...     assert convolve(torch.tensor([[[10.2, 0.9]]])).tolist() == [[[10.0, 21.0, 2.0]]]
    """
    qp, shape = check_qparams(qp), weight.codes.shape
    check_folded(weight)
    if len(shape) < 3:
        return None

    @lru_cache(maxsize=16)
    def planned(images: torch.Size) -> tuple[Callable[[Tensor], Tensor | None], _Phases | None] | None:
        check_channels(images, shape, groups)
        settings = stride, padding, output_padding, dilation, groups, kernel_size
        spread, geometry, phases = _plan(images, shape, *settings)
        if len(images) != len(shape) or math.prod(spread) > 1 or _is_cut(geometry):
            return None
        check_epilogue(epilogue, None, weight, torch.float32)
        operands = spec, qp, weight, _of_all_phases(bias, weight, phases), epilogue, geometry, groups
        convolve = direct_images(*operands, last=phases is not None)
        return None if convolve is None else (convolve, phases)

    def transposed(x: Tensor) -> Tensor | None:
        plan = planned(x.shape)
        if plan is None:
            return None
        convolve, phases = plan
        y = convolve(x)
        return y if y is None or phases is None else brgemm.laid_out(_interleaved(y, phases, x), x)

    return transposed


def conv_transpose_reference(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Dequantize the activations and convolve floats, transposed: slow, for any format of both.

    Args:
        spec, q, qp: as `conv_reference`.
        weight: real values in the layout of `transpose_weight`. Its dtype is the result's.
        bias: `(N,)` in the dtype of `weight`, or None.
        stride, padding, output_padding, dilation, groups: as `conv_transpose`.

    Returns:
        as `conv_transpose`, in the dtype of `weight`: the bits of `torch.nn.functional.conv_transpose2d`.

    Raises:
        TypeError, ValueError: as `dequantize`; the weight, the bias or the geometry does not fit.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> turned = fsq.transpose_weight(torch.tensor([[[1.0, 2.0]]]))
        >>> fsq.conv_transpose_reference(spec, torch.tensor([[1, 10]], dtype=torch.int8), one, turned)
        tensor([[ 1., 12., 20.]])
    """
    check_real(weight, "conv_transpose_reference (weight)")
    x = dequantize(spec, q, qp, dtype=weight.dtype)
    check_channels(x.shape, weight.shape, groups)
    _geometry(x.shape, weight.shape, stride, padding, output_padding, dilation)
    check_bias(bias, weight.shape[0], weight.dtype)
    op = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
    with as_written(x.device):
        return op(x, transpose_weight(weight, groups), bias, stride, padding, output_padding, groups, dilation)


class _Phases(NamedTuple):
    """How phases make the result."""

    steps: tuple[int, ...]
    crop: list[tuple[int, int]]
    """Along each dimension, which output is the first one, and how many there are."""


def _plan(
    q: Sequence[int],
    weight: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    kernel_size: int | Sequence[int] | None,
) -> tuple[tuple[int, ...], Geometry, _Phases | None]:
    """Return how far codes are spread, how they are convolved then, with padding below 0 where cut off, and the
    phases that this gives; or raise ValueError."""
    outputs, channels, *kernel = weight
    rank = len(kernel)
    ones = (1,) * rank
    if kernel_size is None:
        steps, around, gaps = _geometry(q, weight, stride, padding, output_padding, dilation)
        # Behind the last element there are step - 1 zeros already.
        sides = ((first, last - step + 1) for (first, last), step in zip(around, steps, strict=True))
        return steps, Geometry(ones, tuple(sides), gaps), None
    sizes, steps = per_dimension("kernel_size", kernel_size, rank, 1), per_dimension("stride", stride, rank, 1)
    if groups != 1 or math.prod(per_dimension("dilation", dilation, rank, 1)) > 1:
        raise ValueError(
            f"kernel_size={kernel_size!r} says that the weight is one of polyphase, which is for one group without "
            f"dilation, not for groups={groups!r} and dilation={dilation!r}; give the weight that fold returned"
        )
    count, parts = math.prod(steps), _parts(sizes, steps)
    if tuple(kernel) != parts or outputs % count:
        raise ValueError(
            f"a weight of shape {tuple(weight)} is no kernel of {sizes} in phases of stride={stride!r}; "
            f"give what polyphase(weight, stride) returned, and the kernel_size of its weight"
        )
    of_phase = outputs // count, channels, *sizes
    _, around, _ = _geometry(q, of_phase, stride, padding, output_padding, dilation)
    reached, crop = [], []
    for n, size, part, step, (before, after) in zip(q[-rank:], sizes, parts, steps, around, strict=True):
        cut = size - 1 - before  # of the outputs: whole windows, and some of the first
        reached.append((part - 1 - cut // step, after // step))
        crop.append((cut % step, (n - 1) * step + 1 + after - cut))
    return ones, Geometry(ones, tuple(reached), ones), _Phases(steps, crop)


def _is_cut(geometry: Geometry) -> bool:
    """Whether codes are cut off, not padded."""
    return any(side < 0 for side in chain(*geometry.padding))


def _of_all_phases(bias: Tensor | None, weight: FoldedWeight, phases: _Phases | None) -> Tensor | None:
    """Return `(phases, N)`, a view of a bias: what is written to that counts; or raise unless it has N elements."""
    count = 1 if phases is None else math.prod(phases.steps)
    check_bias(bias, len(weight.codes) // count)
    return None if bias is None else bias.expand(count, -1)


def _interleaved(y: Tensor, phases: _Phases, images: Tensor) -> Tensor:
    """Put phases `(B, prod(steps) * N, *windows)` side by side: `(B, N, *size)`, with the channels last in memory."""
    steps, crop = phases
    rank = len(steps)
    y = y.reshape(y.shape[0], *steps, y.shape[1] // math.prod(steps), *y.shape[2:])
    axes = chain(*((rank + 2 + axis, 1 + axis) for axis in range(rank)))
    y = y.permute(0, *axes, rank + 1)
    y = y.reshape(y.shape[0], *(y.shape[i] * y.shape[i + 1] for i in range(1, 2 * rank, 2)), y.shape[-1])
    # Else Inductor, which does both in one loop, takes twice as long; of one or three dimensions half as long.
    y = computed_once(y) if rank == 2 and images.stride(1) != 1 else y
    for axis, (first, size) in enumerate(crop, 1):
        y = y.narrow(axis, first, size)
    return y.movedim(-1, 1)


def _parts(kernel: Sequence[int], steps: Sequence[int]) -> tuple[int, ...]:
    """Return how many elements of a kernel a phase has at most."""
    return tuple(-(-size // step) for size, step in zip(kernel, steps, strict=True))


def _geometry(
    q: Sequence[int],
    weight: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[tuple[int, ...], list[tuple[int, int]], tuple[int, ...]]:
    """Return stride, what is around the spread input, and dilation, for each dimension; or raise ValueError."""
    kernel, rank = weight[2:], len(weight) - 2
    steps, gaps = per_dimension("stride", stride, rank, 1), per_dimension("dilation", dilation, rank, 1)
    sides, more = per_dimension("padding", padding, rank, 0), per_dimension("output_padding", output_padding, rank, 0)
    for added, step, gap in zip(more, steps, gaps, strict=True):
        if added >= max(step, gap):
            raise ValueError(
                f"output_padding={output_padding!r} with stride={stride!r} and dilation={dilation!r}; "
                f"give less than the larger of the two"
            )
    before = [gap * (size - 1) - side for gap, size, side in zip(gaps, kernel, sides, strict=True)]
    around = [(first, first + added) for first, added in zip(before, more, strict=True)]
    extents = (gap * (size - 1) for gap, size in zip(gaps, kernel, strict=True))
    each_axis = zip(q[-rank:], steps, around, extents, strict=True)
    if any(n < 1 or (n - 1) * step + 1 + sum(pair) - extent < 1 for n, step, pair, extent in each_axis):
        raise ValueError(
            f"of activations of shape {tuple(q)} and a kernel of {tuple(kernel)} padding={padding!r} leaves nothing; "
            f"give more of them, or pad less"
        )
    return steps, around, gaps


def _spread(x: Tensor, zero_point: Tensor, steps: Sequence[int]) -> Tensor:
    """Return codes `(B, *space, C)` with zero points between neighbours, and behind the last."""
    batch, *space, channels = x.shape
    # Behind each axis one of size 1 is padded to the step, and the two become one.
    y = as_bytes(x).reshape(batch, *chain(*((n, 1) for n in space)), channels)
    y = pad_codes(y, zero_point, [0, 0, *chain(*((0, step - 1, 0, 0) for step in reversed(steps)))])
    return y.reshape(batch, *(n * step for n, step in zip(space, steps, strict=True)), channels).view(x.dtype)


def _padded(x: Tensor, zero_point: Tensor, around: Sequence[tuple[int, int]]) -> Tensor:
    """Return codes `(B, *space, C)` with zero points around; where it is less than 0, codes are cut off."""
    # What is cut off may be more than there is before the other side is padded.
    y = pad_codes(as_bytes(x), zero_point, [0, 0, *(max(side, 0) for side in flatten_padding(around))])
    return F.pad(y, [0, 0, *(min(side, 0) for side in flatten_padding(around))]).view(x.dtype)
