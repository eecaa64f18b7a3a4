"""Convolution of codes by oneDNN: packed weight, scale and bias inside, float32 written once.

The windows are not copied, and groups are computed as such. For an asymmetric weight the sums of windows are convolved
too, and both are put together behind. The bits are those of `functional_sq.conv`, for which oneDNN 3.12 needs some
care; each point was found by comparing with exact integers:

* Padding around a zero point other than 0, windows in the padding alone, an image smaller than a window,
  elements that no window reaches, a step where there is a single window: each gives wrong results for some shapes,
  with one of them the process ends. Such an image is padded and cropped first, so that windows fill it
  exactly. With images that they fill, and with zeros around where 0 is the code of zero, no result was
  wrong in 70 000 random geometries, with AMX and without.
* A zero point other than 0, and groups of one channel that have more than 32 outputs each: wrong for most
  numbers of outputs. Each group is given a second channel, whose weight is 0.
* With AMX and a zero point other than 0, groups of more than 32 outputs that are no multiple of 32: wrong for most
  numbers of channels up to 31, and for 1 x 1 and more than 64 channels an error. Such groups are left to others.
* Images one pixel wide, of which a stride leaves rows out: with two threads results are wrong now and then, and
  memory is written to that is not the result's. Such an image is one pixel high instead.
* Sums above 2**24, see `functional_sq.onednn.exactly`.
* The layout of a packed weight depends on the image's shape, and on whether the zero point is 0: where it is not,
  the weight holds the sums of its rows. One in another layout is reordered in each call, which for 512 x 512 x
  3 x 3 takes 1 ms where the convolution of 7 x 7 takes 0.26. Packing takes 10 times as long as reordering.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from functional_sq import onednn
from functional_sq.int_mm import INT32_TERMS, subtract_product
from functional_sq.operands import Operands
from functional_sq.spec import QuantSpec
from functional_sq.tracing import define_operator

__all__ = ["CODES", "NAME", "convolve", "is_right", "key", "requantizes", "supports", "windows"]

NAME: str = onednn.NAME

CODES: torch.dtype = onednn.CODES

WORTH = 900_000 if onednn.AMX else 300_000
"""Of M windows, what `6 M N` must reach; where they overlap and would be copied, `6 M N + M K + 4 N K`.

On one core, compiled, a call of oneDNN takes 90 us more than the product of windows, and less by 0.6 ns for one
of M N results, 0.1 ns for an element of a window, 0.4 ns for one of a weight that is laid out anew. Layers of ResNet,
MobileNet and Wav2Vec that reach it, 1 and 8 images: with AMX 3 x 3 gains 1.1 to 3.4 times, the first layers 1.1 to 3.8,
windows that do not overlap 0.8 to 3.1, the least with a stride of 2 and N <= 2 K; with VNNI alone (the same core,
limited) 3 x 3 gains 1.1 to 13 times, 1 x 1 1.0 to 7. Groups, which run as floats otherwise, gain 1.1 to 60 times, and
are always taken."""

LARGEST_K = 1028
"""The largest K of an asymmetric weight without groups: uniform codes have no sums that `onednn.exact_sums` cuts."""

_PACKED: MutableMapping[Tensor, _Packed] = WeakTensorKeyDictionary()
"""A memo of `_pack`, as `functional_sq.onednn` has one: weight codes to a `_Packed`, for as long as the codes live."""

_ONES: MutableMapping[Tensor, Tensor] = WeakTensorKeyDictionary()
"""The weight that `_ones` gives for the codes of a layer."""


def supports(codes: Tensor, zero_point: Tensor | None) -> bool:
    """Whether oneDNN convolves with a folded weight.

    Args:
        codes: `(N, C / groups, *kernel)`, the weight's, in one or two dimensions.
        zero_point: the weight's; None where it is 0.

    Example:
        >>> import torch
        >>> from functional_sq import onednn_conv
        >>> onednn_conv.supports(torch.zeros(4, 8, 3, 3), None)
        False
    """
    return onednn.is_capable(codes) and codes.ndim in (3, 4) and math.prod(codes.shape[1:]) <= INT32_TERMS


def windows(
    codes: Tensor, zero_point: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> range:
    """Return for how many windows, of all images together, oneDNN is the faster one.

    Args:
        codes, zero_point: the weight's, that `supports` takes; codes are `(N, C / groups, *kernel)`.
        stride, dilation, groups: as `functional_sq.conv`, one for each dimension.

    Example:
        >>> import torch
        >>> from functional_sq import onednn_conv
        >>> codes = torch.empty(512, 512, 3, 3)
        >>> [1 in onednn_conv.windows(codes, None, (1, 1), (1, 1), groups) for groups in (1, 2)]
        [True, True]
    """
    n, k = codes.shape[0], math.prod(codes.shape[1:])
    least = sys.maxsize
    if groups > 1:
        least = 1 if is_right(codes, groups) else least
    elif _overlap(codes.shape[2:], stride, dilation):
        least = max(1, -((4 * n * k - WORTH) // (6 * n + k))) if zero_point is None or k <= LARGEST_K else least
    elif zero_point is None:
        least = -(-WORTH // (6 * n))
    return range(least, sys.maxsize)


def is_right(codes: Tensor, groups: int) -> bool:
    """Whether oneDNN convolves groups right, as it does on every CPU without AMX.

    Example:
        >>> import torch
        >>> from functional_sq import onednn_conv
        >>> onednn_conv.is_right(torch.empty(128, 4, 3, 3), 2)
        True
    """
    outputs = codes.shape[0] // groups
    return not onednn.AMX or groups == 1 or outputs <= 32 or outputs % 32 == 0


def _overlap(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether windows share elements, so that rows of them are a copy."""
    return any(step < gap * (size - 1) + 1 for size, step, gap in zip(kernel, stride, dilation, strict=True))


def key(device: str) -> tuple[object, ...]:
    """Return what the answers here depend on, apart from their arguments."""
    return onednn.AVAILABLE, onednn.AMX, WORTH, LARGEST_K


def requantizes(spec: QuantSpec, scale: Tensor, activation: str) -> bool:
    """Whether oneDNN makes codes of the result: as `functional_sq.onednn.requantizes`, after fewer activations.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq import onednn_conv
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> [onednn_conv.requantizes(spec, torch.ones(1), name) for name in ("relu", "gelu")]
        [True, False]
    """
    return activation in ("none", "relu", "relu6", "silu", "hardswish") and onednn.requantizes(spec, scale, activation)


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
) -> Tensor:
    """Return the sums of `(q - zero_point) codes` over windows, times `scale`, plus `bias`; each rounded as written.

    Args:
        operands: uint8 codes, fastest with their channels last in memory, and a weight that `supports` takes; packed
            at the first call, and again once it changes.
        stride, dilation: along height and width.
        padding: above, below, left and right; the zero point is what is there.
        groups: as `functional_sq.conv`.
        activation: what `requantizes` takes, applied before codes are made; without `to_scale` "none", or "relu" with
            a residual.
        to_scale, to_zero_point, dtype: as `functional_sq.onednn.product`.
        residual: `(B, N, height, width)` of `dtype`, without a gradient, or None: what is added before the activation,
            by a pass that oneDNN would not save.

    Returns:
        `(B, N, height, width)` in `dtype`, or uint8 with `to_scale`; the channels last in memory.

    Example:
        >>> import torch
        >>> from functional_sq import onednn_conv
        >>> from functional_sq.operands import Operands
        >>> q, w = torch.tensor([[[[1, 3, 1]]]], dtype=torch.uint8), torch.tensor([[[1, 2]]], dtype=torch.int8)
        >>> one, half = torch.tensor([1], dtype=torch.int32), torch.tensor([0.5])
        >>> operands = Operands(q, one, w, None, half, torch.empty(0), None)
        >>> onednn_conv.convolve(operands, (1, 1), (0, 0, 0, 1), (1, 1), 1)
        tensor([[[[2., 1., 0.]]]])
    """
    if residual is not None:
        total = convolve(operands, stride, padding, dilation, groups) + residual.to(torch.float32)
        return (total.relu() if activation == "relu" else total).to(dtype)
    if operands.weight_zero_point is not None:
        total = _corrected(operands, operands.weight_zero_point, (stride, padding, dilation, groups))
        return onednn.finish(total, operands.scale, operands.bias, activation, to_scale, to_zero_point, dtype)
    result: Tensor = torch.ops.functional_sq.onednn_conv.default(
        *onednn.arguments(operands),
        stride,
        padding,
        dilation,
        groups,
        activation,
        to_scale,
        to_zero_point,
        onednn.result_dtype(dtype),
    )
    return result if to_scale is not None else result.to(dtype)


def _corrected(operands: Operands, weight_zero_point: Tensor, settings: tuple[Any, ...]) -> Tensor:
    """Return the exact sums for a weight that has zero points: those of its codes, less those of the windows."""
    q, zero_point, codes, *_ = operands
    groups = settings[-1]
    sums = torch.ops.functional_sq.onednn_conv_sums.default
    of_codes, of_windows = (sums(q, zero_point, codes, of, *settings).to(torch.int32) for of in (True, False))
    # The outputs of a group have an axis of their own, along which a compiler reads one sum of a window for all.
    each, (batch, _, *size) = len(codes) // groups, of_windows.shape
    of_weight = weight_zero_point.reshape(groups, each, 1, 1)
    total = subtract_product(of_codes.reshape(batch, groups, each, *size), of_windows.unsqueeze(2), of_weight)
    return total.flatten(1, 2)


class _Packed(NamedTuple):
    version: int | Tensor
    """As `functional_sq.onednn.version` gives it."""
    form: tuple[Any, ...]
    """What the layout was chosen for."""
    asked: tuple[Any, ...]
    """What the last call would have chosen."""
    weight: Tensor
    zero: Tensor
    largest: int


def _conv(
    q: Tensor,
    zero_point: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    to_scale: Tensor | None,
    to_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    then = activation, to_scale, to_zero_point, dtype
    if q.shape[0] == 0:
        return _empty(q, codes, stride, padding, dilation, dtype if to_scale is None else torch.uint8)
    convolved, q, z, largest = _prepared(q, zero_point, codes, stride, padding, dilation, groups)
    return onednn.exactly(convolved, q, z, scale, bias, largest, *then)


def _sums(
    q: Tensor,
    zero_point: Tensor,
    codes: Tensor,
    of_codes: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return the sums of `(q - zero_point) codes` over windows, or of `q - zero_point`, one for each group."""
    dtype = _sums_dtype(codes, of_codes)
    if not of_codes:
        codes = _ones(codes, groups)
    if q.shape[0] == 0:
        return _empty(q, codes, stride, padding, dilation, dtype)
    one = torch.ones(len(codes), dtype=torch.float32)
    convolved, q, z, largest = _prepared(q, zero_point, codes, stride, padding, dilation, groups)
    if dtype is torch.int32:
        return onednn.exact_sums(convolved, q, z, one, largest)
    return convolved(q, z, one, None, onednn.SUMS, None)


def _sums_dtype(codes: Tensor, of_codes: bool) -> torch.dtype:
    """Return the dtype of `_sums`: float32 where it holds every such sum exactly, which saves a pass."""
    largest = math.prod(codes.shape[1:]) * 255 * (128 if of_codes else 1)
    return torch.float32 if largest <= 2**24 else torch.int32


def _fake_sums(q: Tensor, zero_point: Tensor, codes: Tensor, of_codes: bool, *settings: Any) -> Tensor:
    stride, padding, dilation, groups = settings
    dtype = _sums_dtype(codes, of_codes)
    return _empty(q, codes if of_codes else codes[:groups], stride, padding, dilation, dtype)


def _ones(codes: Tensor, groups: int) -> Tensor:
    """Return the weight whose sums are those of windows: the same one for a layer's codes, so that it stays packed."""
    known = _ONES.get(codes)
    if known is None or known.shape != (groups, *codes.shape[1:]):
        with torch.inference_mode(False):
            known = _ONES[codes] = torch.ones((groups, *codes.shape[1:]), dtype=torch.int8)
    return known


def _prepared(
    q: Tensor,
    zero_point: Tensor,
    codes: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Callable[..., Tensor], Tensor, int, int]:
    """Return what `onednn.exactly` takes: what convolves, and its codes, zero point and largest sum."""
    z = int(zero_point)
    q = q.contiguous(memory_format=torch.channels_last)
    if _is_widened(codes, groups):
        q = F.pad(q.unsqueeze(2), [0, 0, 0, 0, 0, 1]).flatten(1, 2)
        q = q.contiguous(memory_format=torch.channels_last)
    q, steps, around = _fitted(q, z, codes, stride, padding, dilation)
    along = [tuple(pair) for pair in (_kernel(codes), steps, around, dilation)]
    turned = q.shape[3] == 1
    if turned:
        q, along = _turned(q), [pair[::-1] for pair in along]
    kernel, *settings = along
    packed = _pack(codes, (q.shape, z == 0, kernel, *settings, groups))

    def convolved(
        q: Tensor, z: int, scale: Tensor, bias: Tensor | None, tail: onednn.Tail, onto: Tensor | None
    ) -> Tensor:
        y: Tensor = torch.ops.onednn.qconv_pointwise.default(
            q, 1.0, z, packed.weight, scale, packed.zero, bias, *settings, groups, *tail
        )
        return _turned(y) if turned else y

    return convolved, q, z, packed.largest


def _turned(x: Tensor) -> Tensor:
    """Return images that are one pixel wide or high, with height and width exchanged; the channels last in memory."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    return x.as_strided((batch, channels, width, height), (x[0].numel(), 1, channels * height, channels))


def _fake(q: Tensor, zero_point: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    stride, padding, dilation, _, _, to_scale, _, dtype = rest
    return _empty(q, codes, stride, padding, dilation, dtype if to_scale is None else torch.uint8)


def _empty(
    q: Tensor,
    codes: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    size = (q.shape[0], codes.shape[0], *(axis.windows for axis in _axes(q, codes, stride, padding, dilation)))
    return torch.empty(size, dtype=dtype, device=q.device, memory_format=torch.channels_last)


# An operator of its own for the reason that is given in functional_sq.onednn.
define_operator(
    "onednn_conv",
    "(Tensor q, Tensor zero_point, Tensor codes, Tensor scale, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, str activation, Tensor? to_scale, Tensor? to_zero_point, ScalarType dtype) -> Tensor",
    _conv,
    _fake,
)
define_operator(
    "onednn_conv_sums",
    "(Tensor q, Tensor zero_point, Tensor codes, bool of_codes, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    _sums,
    _fake_sums,
)


def _is_widened(codes: Tensor, groups: int) -> bool:
    return groups > 1 and codes.shape[1] == 1 and codes.shape[0] // groups > 32


def _kernel(codes: Tensor) -> tuple[int, ...]:
    return (1,) * (4 - codes.ndim) + codes.shape[2:]


def _axes(
    q: Tensor, codes: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[_Axis]:
    pairs = (padding[:2], padding[2:])
    each = zip(q.shape[2:], _kernel(codes), stride, pairs, dilation, strict=True)
    return [_Axis(n, gap * (k - 1) + 1, step, *sides) for n, k, step, sides, gap in each]


class _Axis(NamedTuple):
    size: int
    extent: int
    step: int
    before: int
    after: int

    @property
    def windows(self) -> int:
        return (self.before + self.size + self.after - self.extent) // self.step + 1

    @property
    def reached(self) -> int:
        """How far the last window goes beyond the image; below 0, some of it is in no window."""
        return (self.windows - 1) * self.step + self.extent - self.before - self.size

    def is_right(self, z: int) -> bool:
        """Whether oneDNN pads the image itself, and gives the right sums."""
        return (
            self.before == self.after
            and (self.before == 0 or (z == 0 and 2 * self.before < self.extent <= self.size))
            and (self.reached >= 0 or self.extent == 1)
            and (self.windows > 1 or self.reached == self.before)
        )


def _fitted(
    q: Tensor, z: int, codes: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Return an image, and the stride and the zeros around it, of which oneDNN gives the right sums."""
    rows, columns = axes = _axes(q, codes, stride, padding, dilation)
    steps = tuple(axis.step if axis.windows > 1 else 1 for axis in axes)
    if rows.is_right(z) and columns.is_right(z):
        return q, steps, (rows.before, columns.before)
    q = F.pad(q, [columns.before, max(columns.reached, 0), rows.before, max(rows.reached, 0)], value=z)
    height, width = (axis.before + axis.size + axis.reached for axis in axes)
    return q[:, :, :height, :width], steps, (0, 0)


def _pack(codes: Tensor, form: tuple[Any, ...]) -> _Packed:
    known = _PACKED.get(codes)
    # Another layout is chosen when it is asked for twice in a row: sizes that always change cost no packing.
    if known is None or not onednn.is_unchanged(known.version, codes) or (form == known.asked and form != known.form):
        known = _PACKED[codes] = _prepack(codes, form)
    elif form != known.asked:
        known = _PACKED[codes] = known._replace(asked=form)
    return known


def _prepack(codes: Tensor, form: tuple[Any, ...]) -> _Packed:
    # Which layout fits is remembered in torch without the zero point: of two layers with one form but for it, the
    # second gets the layout of the first, and is reordered in each call.
    shape, is_zero, kernel, *settings = form
    with torch.inference_mode(False):  # what is kept serves calls outside of it too
        weight, one = codes.reshape(*codes.shape[:2], *kernel), torch.ones(1, dtype=torch.float32)
        if _is_widened(codes, settings[-1]):
            weight = F.pad(weight, [0, 0, 0, 0, 0, 1])
        return _Packed(
            onednn.version(codes),
            form,
            form,
            torch.ops.onednn.qconv_prepack(weight, one, 1.0, int(not is_zero), *settings, shape),
            torch.zeros(1, dtype=torch.int32),
            onednn.largest_sum(codes),
        )
