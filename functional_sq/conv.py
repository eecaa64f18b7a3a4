"""Convolution on codes: exact integers, without dequantizing them.

A convolution is a matrix product whose rows are the windows of the input, so `fold`, `epilogue` and
the exact sums are those of `functional_sq.linear`, with K the elements of one window. Padding is
real zero: the code of the zero point. The windows are a copy of the codes, a byte an element and the
kernel's size times as many, written with the channels last, which is how `channels_last` codes lie in
memory already.

Groups have windows too short for a matrix product. Their sum runs over the differences `q - z` as
floats, which is as exact: in float32 every partial sum is an integer below 2**24 while
`K <= 258` (`K * 255**2 < 2**24`), above that float64 is used. Not every float convolution sums what
is written: Winograd's algorithm and the FFT round on the way. On a CPU neither exists for three
spatial axes, so one or two are given more of size 1; a CUDA device computes in float64 and
rounds to the integer. So such groups are exact, and no faster than floats.

A weight that is used again (`epilogue=`) is convolved by a backend where that is faster, with groups too: neither
windows nor floats are written, and the bits are the same. An asymmetric one also needs each window's sum. Where each
channel is convolved alone by no backend, or by oneDNN and such a weight, compiled code is one loop over the elements of
a window, fused with all that follows. Triton convolves float8 alike, and on a CPU `brgemm`, which alone takes three
dimensions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq import backends, brgemm, folded, onednn_conv, triton_conv
from functional_sq.backends import Convolution, convolution_for
from functional_sq.compat import is_exporting
from functional_sq.folded import (
    Epilogue,
    FoldedWeight,
    backend_codes,
    check_bias,
    check_epilogue,
    check_folded,
    operand,
    zero_point_of_rows,
)
from functional_sq.formats import Float8, check_real, check_real_dtype
from functional_sq.int_mm import as_written, integer_product, subtract, subtract_product
from functional_sq.linear import (
    bracket,
    check_operands,
    check_origin,
    check_residual,
    fits_operator,
    with_origin,
)
from functional_sq.operands import Operands
from functional_sq.qparams import QParams, check_qparams
from functional_sq.quantize import dequantize
from functional_sq.requantize import (
    Requantization,
    apply_epilogue,
    check_requantization,
    fills_a_byte,
    requantize,
    requantize_by,
)
from functional_sq.spec import QuantSpec
from functional_sq.tracing import always, computed_once, define_operator, is_traced
from functional_sq.windows import (
    Geometry,
    are_alone,
    as_bytes,
    check_windows,
    flatten_padding,
    geometry_of,
    laid_out,
    pad_codes,
    window_sizes,
    windows,
)

__all__ = [
    "check_channels",
    "check_conv",
    "conv",
    "conv_reference",
    "convolve_images",
    "direct_convolution",
    "direct_images",
    "is_tapped",
]

_FLOAT32_TERMS = 2**24 // 255**2
"""The largest K for which a sum of products of differences stays exact in float32: 258."""


def conv(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    then: Requantization | None = None,
    fast_accum: bool = False,
    x: Tensor | None = None,
) -> Tensor:
    """Convolve the codes of activations with a folded weight, in one to three dimensions.

    Integers: exact for every code, size and device, converted to float32 once, scaled, bias and residual
    added, rounded to `dtype`. Float8: products exact, accumulated in float32, then the same. Fastest
    on codes that lie `channels_last`.

    Args:
        spec: the activations' quantization; at most 8 bits, one scale.
        q: codes `(B, C, *space)` from `quantize(spec, x, qp)`, or without B.
        qp: scale and zero point of `q`; the zero point is a code.
        weight: `fold` of an `(N, C / groups, *kernel)` weight; its rank says how many dimensions.
        bias: `(N,)` or None, output units.
        stride: steps between windows, one for all dimensions or one each.
        padding: real zeros on both sides, one number for all dimensions or one each; "valid": none,
            "same": as many as keep the size where the stride is 1, an odd one at the end.
        dilation: steps between the elements of a window.
        groups: the channels are cut into so many groups that do not mix.
        dtype: dtype of the result.
        epilogue: as `linear`.
        residual: shape and `dtype` of the result, or None: what is added before the result is rounded to `dtype`.
        relu: what is negative becomes 0, after the residual is added.
        then: return the next layer's codes, `requantize(conv(...), then)`, as `linear` does.
        fast_accum: as `linear`.
        x: what `q` are the codes of, or None. A kernel that quantizes as it loads reads these instead, if they lie
            in memory anyway and the codes do not.

    Returns:
        `(B, N, *size)` in `dtype`, or without B; `channels_last` in memory where `q` is.

    Raises:
        TypeError: integer codes meet float8 codes, `dtype` holds no real values, or `residual` or `epilogue` has
            another dtype.
        ValueError: shapes or settings do not fit, or the activations have several scales.

    Source: Jacob et al. 2018 (arXiv:1712.05877), equation 7; settings as `torch.nn.functional.conv2d`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[[1, 2, 3]]], dtype=torch.int8), one)
        >>> fsq.conv(spec, torch.tensor([[1, 0, 0, 10]], dtype=torch.int8), one, weight, padding="same")
        tensor([[ 2.,  1., 30., 20.]])
    """
    qp, then = check_conv(spec, q, qp, weight, groups, dtype, then)
    if not isinstance(relu, bool):
        raise TypeError(f"relu={relu!r}; use True or False")
    shape, wide = weight.codes.shape, torch.promote_types(dtype, torch.float32)
    check_epilogue(epilogue, bias, weight, wide)
    geometry = geometry_of(shape[2:], stride, padding, dilation)
    size = check_windows(q.shape, shape, geometry)
    batch = q.shape[: q.ndim - len(shape) + 1]
    check_residual(residual, (*batch, shape[0], *size), dtype)
    check_origin(x, q.shape)
    images, added, real = (each if each is None or batch else each[None] for each in (q, residual, x))
    assert images is not None
    rest = then, fast_accum, added, relu, real
    y, then = convolve_images(spec, images, qp, weight, bias, geometry, groups, dtype, epilogue, *rest)
    y = brgemm.laid_out(y, images)
    y = y if batch else y[0]
    return y if then is None else requantize(y, then)


def convolve_images(
    spec: QuantSpec,
    images: Tensor,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None,
    geometry: Geometry,
    groups: int,
    dtype: torch.dtype,
    epilogue: Epilogue | None,
    then: Requantization | None,
    fast_accum: bool,
    added: Tensor | None = None,
    relu: bool = False,
    real: Tensor | None = None,
) -> tuple[Tensor, Requantization | None]:
    """Return what `conv` returns of checked operands, in any order of memory, and what is left to do of `then`.

    Padding is that of the geometry, which may be more on one side; `images`, `added` and `real` have a batch.
    """
    shape, wide = weight.codes.shape, torch.promote_types(dtype, torch.float32)
    size = check_windows(images.shape, shape, geometry)
    scale, offset = folded.epilogue(spec, qp, weight, dtype=wide) if epilogue is None else epilogue
    tapped = is_traced(images) and not is_exporting() and is_tapped(spec, weight.codes, groups)
    fits = fits_operator(scale, bias, wide)
    backend: Convolution | triton_conv.Float8Kernels | brgemm.Float8Kernels | None = None
    if offset is None and fits:
        backend = triton_conv.float8_for(images, weight.codes, fast_accum)
        if backend is None and epilogue is not None:
            backend = brgemm.float8_for(weight.codes, groups)
    elif epilogue is not None and fits:
        count, settings = images.shape[0] * math.prod(size), (geometry.stride, geometry.dilation, groups)
        backend = convolution_for(count, weight.codes, weight.zero_point, *settings)
        if tapped and backend is onednn_conv and weight.zero_point is not None:
            backend = None  # two convolutions, and a pass over both, take 2 to 4 times as long as a loop
    if backend is not None:
        operands = Operands(images, None, weight.codes, zero_point_of_rows(weight), scale, offset, bias)
        if offset is not None:
            taken, z_x = backend_codes(backend.CODES, spec, images, qp)
            operands = operands._replace(q=taken, zero_point=z_x)
        if real is not None:
            operands = with_origin(operands, real, spec, qp)
        convolve = partial(_convolve_by, backend, operands, geometry, groups)
        if added is not None and added.requires_grad:  # which an operator of a backend would not hand on
            y = (convolve(dtype=torch.float32) + added.to(torch.float32)).to(dtype)
        elif added is not None:
            y, relu = convolve("relu" if relu else "none", dtype=dtype, residual=added), False
        elif then is not None and not relu and backend.requantizes(then.spec, then.qp.scale, then.activation):
            y, then = requantize_by(convolve, then, backend.CODES), None
        else:
            y = convolve(dtype=dtype)
    else:
        if always(images.numel() == 0):  # no image, or nothing in its windows but zero points
            product = images.new_zeros((images.shape[0], *size, shape[0]), dtype=torch.int32).movedim(-1, 1)
        elif tapped:
            product = _tapped(images, qp, weight, geometry)
        elif groups > 1 or (isinstance(spec.format, Float8) and not images.is_cuda):
            # On a CPU a product of float8 codes is one of floats anyway, and needs no copy of the windows.
            product = _direct(spec, images, qp, weight, geometry, groups)
        else:
            product = _gathered(spec, images, qp, weight, geometry, offset, fast_accum)
        along = (-1, *(1 for _ in shape[2:]))
        of_output = scale.reshape(along), None if bias is None else bias.reshape(along)
        y = apply_epilogue(product, *of_output, dtype, added)
    return y.relu() if relu else y, then


def conv_reference(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Dequantize the activations and convolve floats: slow, for any format of both.

    Args:
        spec: the activations' quantization.
        q: codes `(B, C, *space)`, or without B.
        qp: scale and zero point of `q`.
        weight: real values `(N, C / groups, *kernel)`: a dequantized weight. Its dtype is the result's.
        bias: `(N,)` in the dtype of `weight`, or None.
        stride, padding, dilation, groups: as `conv`.

    Returns:
        `(B, N, *size)` in the dtype of `weight`, or without B.

    Raises:
        TypeError, ValueError: as `dequantize`; the weight, the bias or the geometry does not fit.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> weight = torch.tensor([[[1.0, 2.0]]])
        >>> fsq.conv_reference(spec, torch.tensor([[1, 0, 10]], dtype=torch.int8), one, weight)
        tensor([[ 1., 20.]])
    """
    check_real(weight, "conv_reference (weight)")
    x = dequantize(spec, q, qp, dtype=weight.dtype)
    check_channels(x.shape, weight.shape, groups)
    geometry = geometry_of(weight.shape[2:], stride, padding, dilation)
    check_windows(x.shape, weight.shape, geometry)
    check_bias(bias, weight.shape[0], weight.dtype)
    with as_written(x.device):
        return _convolve(x, weight, bias, geometry, groups)


def check_conv(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: FoldedWeight,
    groups: int,
    dtype: torch.dtype,
    then: Requantization | None,
) -> tuple[QParams, Requantization | None]:
    """Return `qp` and `then`; raise unless these are operands of a convolution, wherever its windows lie."""
    qp = check_operands(spec, q, qp, weight)
    check_real_dtype(dtype, "conv to ")
    if then is not None:
        then = check_requantization(then)
    if qp.scale.numel() != 1:
        raise ValueError(
            f"the activations have scales of shape {tuple(qp.scale.shape)}, and the windows of a convolution mix them; "
            f"use PerTensor()"
        )
    check_channels(q.shape, weight.codes.shape, groups)
    return qp, then


def check_channels(q: Sequence[int], weight: Sequence[int], groups: int) -> None:
    """Raise ValueError unless activations have the rank and the channels that a weight takes."""
    rank = len(weight) - 2
    if rank not in (1, 2, 3):
        raise ValueError(
            f"got a weight of shape {tuple(weight)}; that of a convolution is (out, in / groups, *kernel) "
            f"with one to three dimensions; use linear for a matrix"
        )
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or weight[0] % groups:
        raise ValueError(f"groups={groups!r} and {weight[0]} output channels; use a divisor of {weight[0]}")
    if len(q) - rank not in (1, 2) or q[-rank - 1] != weight[1] * groups:
        space = ("length", "height, width", "depth, height, width")[rank - 1]
        raise ValueError(
            f"activations of shape {tuple(q)} meet a weight of shape {tuple(weight)} in groups={groups}; "
            f"give (batch, {weight[1] * groups}, {space}), or without the batch"
        )


def _padded(q: Tensor, zero_point: Tensor, geometry: Geometry) -> Tensor:
    """Return codes `(B, C, *space)` as `(B, *space, C)` in memory, padded with the zero point."""
    x = q.movedim(1, -1).contiguous()
    if any(map(any, geometry.padding)):
        x = computed_once(x)  # else with a mask for the padding at each step
        x = pad_codes(x, zero_point, [0, 0, *flatten_padding(geometry.padding)])
    return x.contiguous()


def _windows(q: Tensor, zero_point: Tensor, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """Return the windows of codes `(B, C, *space)`, padded with the zero point: `(B, *size, *kernel * C)`."""
    x = _padded(as_bytes(q), zero_point, geometry)
    view = windows(x, kernel, geometry.stride, geometry.dilation)
    # Of one channel, windows may be rows that overlap in memory, which no product of int8 takes.
    return view.flatten(-1 - len(kernel)).contiguous().view(q.dtype)


def _convolve_by(
    backend: Convolution | triton_conv.Float8Kernels | brgemm.Float8Kernels,
    operands: Operands,
    geometry: Geometry,
    groups: int,
    *then: Any,
    **rest: Any,
) -> Tensor:
    """Return the convolution with a kept weight, by a backend that knows two dimensions, or three: `(B, N, *size)`, or
    codes."""
    # As `contiguous(memory_format=torch.channels_last)`, which vmap does not take.
    operands = operands._replace(q=operands.q.movedim(1, -1).contiguous().movedim(-1, 1))
    along = _for_backend(geometry)
    if len(geometry.stride) > 1:
        return backend.convolve(operands, *along, groups, *then, **rest)
    x = None if operands.x is None else operands.x.unsqueeze(2)
    operands = operands._replace(q=operands.q.unsqueeze(2), x=x)
    if "residual" in rest:
        rest["residual"] = rest["residual"].unsqueeze(2)
    return backend.convolve(operands, *along, groups, *then, **rest).squeeze(2)


def _for_backend(geometry: Geometry) -> tuple[tuple[int, ...], list[int], tuple[int, ...]]:
    """Return stride, padding and dilation as a backend takes them; of one dimension, that is the width."""
    missing = max(0, 2 - len(geometry.stride))
    sides = [0, 0] * missing + [*itertools.chain(*geometry.padding)]
    return (1,) * missing + geometry.stride, sides, (1,) * missing + geometry.dilation


def direct_convolution(
    spec: QuantSpec,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Callable[[Tensor], Tensor | None] | None:
    """Return what makes codes of real values that `brgemm.reads` and convolves them, by one operator; or None.

    As `functional_sq.linear.direct_product`. It returns None of images that have no batch, are none, or that another
    backend convolves.

    Args:
        spec, qp, weight, bias, stride, padding, dilation, groups, epilogue: as `conv`.

    Raises:
        TypeError, ValueError: as `conv`; when called, as that for activations.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.conv import direct_convolution
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[[1, 2]]], dtype=torch.int8), one)
        >>> convolve = direct_convolution(spec, one, weight, None, fsq.epilogue(spec, one, weight))
        >>> if convolve is not None:
        ...     assert convolve(torch.tensor([[[10.2, 0.9, 3.0]]])).tolist() == [[[12.0, 7.0]]]
    """
    check_folded(weight)
    check_epilogue(epilogue, bias, weight, torch.float32)
    if weight.codes.ndim < 3:
        return None
    geometry = geometry_of(weight.codes.shape[2:], stride, padding, dilation)
    return direct_images(spec, check_qparams(qp), weight, bias, epilogue, geometry, groups)


def direct_images(
    spec: QuantSpec,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None,
    epilogue: Epilogue,
    geometry: Geometry,
    groups: int,
    *,
    last: bool = False,
) -> Callable[[Tensor], Tensor | None] | None:
    """Return what `direct_convolution` does, of checked operands; as `convolve_images`, and the channels last with
    `last`."""
    codes = weight.codes
    if brgemm not in backends.CONVOLUTIONS or not brgemm.supports(codes, weight.zero_point):
        return None
    if not fills_a_byte(spec, qp.scale) or not fits_operator(epilogue.scale, bias, torch.float32):
        return None
    operands = codes, zero_point_of_rows(weight), epilogue.scale, bias
    convolve = brgemm.convolution_of_reals(spec, qp, *operands, *_for_backend(geometry), groups, last=last)

    @lru_cache(maxsize=16)
    def is_taken(shape: torch.Size) -> bool:
        check_channels(shape, codes.shape, groups)
        count = shape[0] * math.prod(check_windows(shape, codes.shape, geometry))
        by = convolution_for(count, codes, weight.zero_point, geometry.stride, geometry.dilation, groups)
        # Each channel alone in any number of windows: oneDNN is asked by a call for each pass before it and after it.
        return len(shape) == codes.ndim and (by is brgemm or (by is onednn_conv and are_alone(codes, groups)))

    return lambda x: convolve(x) if is_taken(x.shape) else None


def _gathered(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: FoldedWeight,
    geometry: Geometry,
    offset: Tensor | None,
    fast_accum: bool,
) -> Tensor:
    """Return the bracket of `functional_sq.linear` over the windows, by a matrix product: `(B, N, *size)`."""
    gathered = _windows(q, qp.zero_point, weight.codes.shape[2:], geometry)
    rows, codes = operand(spec, gathered.flatten(0, -2)), weight.codes.movedim(1, -1).flatten(1)
    if weight.zero_point is None:
        product = bracket(rows, weight._replace(codes=codes), offset, fast_accum)
    else:
        assert offset is not None
        # A row of ones sums each window: cheaper than to read all windows a second time.
        product = integer_product(rows, torch.cat([codes, torch.ones_like(codes[:1])]))
        product = subtract(subtract_product(product[:, :-1], product[:, -1:], weight.zero_point.reshape(-1)), offset)
    return product.reshape(*gathered.shape[:-1], len(codes)).movedim(-1, 1)


def is_tapped(spec: QuantSpec, codes: Tensor, groups: int) -> bool:
    """Whether a weight's codes convolve each channel alone, in few elements, so that a loop of them is fast.

    A compiled one is then such a loop where no backend takes it, or oneDNN a weight with zero points.
    """
    return groups > 1 and are_alone(codes, groups) and (codes.is_cuda or not isinstance(spec.format, Float8))


def _tapped(q: Tensor, qp: QParams, weight: FoldedWeight, geometry: Geometry) -> Tensor:
    """Return `sum_k (q_x - z_x) (q_w - z_w)` over the windows of each channel alone, as floats: `(B, N, *size)`.

    Exact of integers. A compiler makes one loop of it, with all that follows: no sum is written, whatever zero points
    there are.
    """
    codes = weight.codes.flatten(1).to(torch.float32)
    if weight.zero_point is not None:
        codes = codes - weight.zero_point.reshape(-1, 1).to(torch.float32)
    rows = codes.t().contiguous()
    offset = computed_once(qp.zero_point.reshape(()).to(torch.float32) * rows.sum(0))
    x = _padded(as_bytes(q), qp.zero_point, geometry).view(q.dtype)
    kernel = weight.codes.shape[2:]
    batch, *space, channels = x.shape
    along, *step = x.stride()[:-1]
    shape = batch, *window_sizes(space, kernel, geometry.stride, geometry.dilation), channels
    strides = along, *map(mul, step, geometry.stride), 1
    y = None
    for i, place in enumerate(itertools.product(*map(range, kernel))):
        at = sum(map(mul, place, map(mul, step, geometry.dilation)))
        # Not slices, which Inductor would compute from what the codes are made of, once for each element of a window.
        term = x.as_strided(shape, strides, at).to(torch.float32) * rows.as_strided((channels,), (1,), i * channels)
        y = term if y is None else y + term
    assert y is not None
    return (y - offset).movedim(-1, 1)


def _direct(spec: QuantSpec, q: Tensor, qp: QParams, weight: FoldedWeight, geometry: Geometry, groups: int) -> Tensor:
    """Return `sum_k (q_x - z_x) (q_w - z_w)` over the windows, in floats: `(B, N, *size)`."""
    integer = not isinstance(spec.format, Float8)
    narrow = not q.is_cuda and (not integer or math.prod(weight.codes.shape[1:]) <= _FLOAT32_TERMS)
    real = torch.float32 if narrow else torch.float64
    x, w = q.to(real), weight.codes.to(real)
    if integer:
        x = x - qp.zero_point.to(real).reshape(())
        w = w if weight.zero_point is None else w - weight.zero_point.to(real)
    extra = 3 - len(geometry.stride)
    geometry = Geometry(
        (1,) * extra + geometry.stride, ((0, 0),) * extra + geometry.padding, (1,) * extra + geometry.dilation
    )
    for _ in range(extra):
        x, w = x.unsqueeze(2), w.unsqueeze(2)
    x, (stride, padding, dilation) = _evenly_padded(x, geometry)
    op = _conv3d if is_exporting() else torch.ops.functional_sq.conv3d.default
    with as_written(q.device):
        y: Tensor = op(x, w, stride, padding, dilation, groups)
    for _ in range(extra):
        y = y.squeeze(2)
    return y.round() if integer and q.is_cuda else y


def _conv3d(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    return laid_out(F.conv3d(x, w, None, stride, padding, dilation, groups), x)


def _empty_conv3d(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    space = [n + 2 * side for n, side in zip(x.shape[2:], padding, strict=True)]
    size = window_sizes(space, w.shape[2:], stride, dilation)
    return laid_out(x.new_empty((x.shape[0], w.shape[0], *size)), x)


# An operator of its own: Inductor takes no torch.conv3d of images whose sizes are symbols (torch 2.13), and that asks
# whether there are 16 images or more, on which its result's layout depends.
define_operator(
    "conv3d",
    "(Tensor x, Tensor weight, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups) -> Tensor",
    _conv3d,
    _empty_conv3d,
    device="default",
)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, groups: int) -> Tensor:
    """Convolve floats in one to three dimensions."""
    x, (stride, padding, dilation) = _evenly_padded(x, geometry)
    return (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3](x, weight, bias, stride, padding, dilation, groups)


def _evenly_padded(x: Tensor, geometry: Geometry) -> tuple[Tensor, tuple[Sequence[int], ...]]:
    """Return images, and stride, padding and dilation, as torch takes them: padded alike on both sides."""
    stride, padding, dilation = geometry
    if any(before != after for before, after in padding):
        x, padding = F.pad(x, flatten_padding(padding)), ((0, 0),) * len(padding)
    return x, (stride, [before for before, _ in padding], dilation)
