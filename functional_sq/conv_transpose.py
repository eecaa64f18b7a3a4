"""Transposed convolution on codes: a convolution of codes that were spread, so everything of `conv` holds.

What a transposed convolution with a stride computes is the convolution, with stride 1, of the input with
`stride - 1` zeros between neighbours, by a weight whose kernel is turned round and whose output channels
come first. So a quantized weight is held in that layout, `transpose_weight`: PerAxis(0) is one scale for
each output channel, `fold` and `epilogue` are those of a convolution, and so is whatever multiplies. The
zeros are codes of the zero point, a byte each. Of the products `1 / prod(stride)` are with codes of the
input, the others with these: a kernel of 4 x 4 at stride 2 multiplies four times as often as it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq.conv import check_channels, check_conv, conv
from functional_sq.folded import Epilogue, FoldedWeight, check_bias
from functional_sq.formats import check_real
from functional_sq.int_mm import as_written
from functional_sq.qparams import QParams
from functional_sq.quantize import dequantize
from functional_sq.requantize import Requantization
from functional_sq.spec import QuantSpec
from functional_sq.windows import flatten_padding, laid_out, per_dimension

__all__ = ["conv_transpose", "conv_transpose_reference", "transpose_weight"]


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
    dtype: torch.dtype = torch.float32,
    epilogue: Epilogue | None = None,
    then: Requantization | None = None,
    fast_accum: bool = False,
) -> Tensor:
    """Convolve the codes of activations, transposed, with a folded weight, in one to three dimensions.

    Exact, and rounded, as `conv`.

    Args:
        spec, q, qp: as `conv`.
        weight: `fold` of a weight in the layout of `transpose_weight`.
        bias: `(N,)` or None, output units.
        stride: steps between the windows that the input's elements are spread over, one for all dimensions
            or one each.
        padding: what is cut off on both sides of the result.
        output_padding: what is added behind; less than the stride or the dilation.
        dilation, groups, dtype, epilogue, then, fast_accum: as `conv`.

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
    """
    qp, then = check_conv(spec, q, qp, weight, groups, dtype, then)
    shape = weight.codes.shape
    steps, around, gaps = _geometry(q.shape, shape, stride, padding, output_padding, dilation)
    x = q if q.ndim == len(shape) else q[None]
    y = conv(
        spec,
        _spread(x, qp.zero_point, steps, around),
        qp,
        weight,
        bias,
        dilation=gaps,
        groups=groups,
        dtype=dtype,
        epilogue=epilogue,
        then=then,
        fast_accum=fast_accum,
    )
    y = laid_out(y, x)
    return y if q.ndim == len(shape) else y[0]


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


def _spread(q: Tensor, zero_point: Tensor, steps: Sequence[int], around: Sequence[tuple[int, int]]) -> Tensor:
    """Return codes `(B, C, *space)` with zero points between neighbours and around; the channels last in memory."""
    # As in `conv`: a code is 0 where it is the zero point, so that F.pad pads, and then again what it was.
    byte = zero_point.reshape(()).to(torch.int32).to(torch.int8)
    x = q.movedim(1, -1).view(torch.int8) ^ byte
    batch, *space, channels = x.shape
    # Behind each axis one of size 1 is padded to the step, and the two become one.
    x = x.reshape(batch, *chain(*((n, 1) for n in space)), channels)
    x = F.pad(x, [0, 0, *chain(*((0, step - 1, 0, 0) for step in reversed(steps)))])
    x = x.reshape(batch, *(n * step for n, step in zip(space, steps, strict=True)), channels)
    # Behind the last element there are step - 1 zeros already.
    sides = [(first, last - step + 1) for (first, last), step in zip(around, steps, strict=True)]
    # What is cut off may be more than there is before the other side is padded.
    x = F.pad(x, [0, 0, *(max(side, 0) for side in flatten_padding(sides))])
    x = F.pad(x, [0, 0, *(min(side, 0) for side in flatten_padding(sides))])
    return (x ^ byte).view(q.dtype).movedim(-1, 1)
