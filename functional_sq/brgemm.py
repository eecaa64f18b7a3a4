"""Products and convolutions of codes on a CPU with VNNI or AMX, by kernels of oneDNN that torch gives to C++.

The weight is packed once. A tile of sums is scaled, corrected, activated and made codes of while it is in the cache, so
no int32 matrix is written or read: asymmetric weights cost what symmetric ones do, and float8 is multiplied as bfloat16
and summed in float32, which no function of torch does on a CPU. With AMX each sum is exact too, other than those of
`functional_sq.onednn`. Of a convolution a tile copies its windows, which takes a fifth of the time of 64 columns and
less of more; where each channel is convolved alone, VNNI sums 64 of them where they lie. A product, and a convolution
of 1 x 1, makes the codes of its input too as a tile reads that; other eager convolutions make them by a pass before,
which puts the channels last, and another one puts the result in the order of its axes, if the input is in that.
The operations are those of `functional_sq.linear` in its order, so the same bits. `brgemm.cpp` is compiled when a
weight is first asked about, in 10 s, by the compiler of Inductor, and kept beside what Inductor compiles; where that
fails, a warning says so, and others multiply.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functional_sq import onednn, onednn_conv
from functional_sq.files import replacing
from functional_sq.formats import Float8, Integer
from functional_sq.int_mm import INT32_TERMS
from functional_sq.operands import Operands
from functional_sq.qparams import QParams, check_qparams
from functional_sq.quantize import quantize as _quantize
from functional_sq.requantize import Float8Codes, fills_a_byte, has_one_scale, requantizes
from functional_sq.spec import QuantSpec, check_spec
from functional_sq.tracing import always, asked_once, define_operator, is_batched, is_traced
from functional_sq.windows import are_alone, is_last, window_sizes
from functional_sq.windows import laid_out as _laid_out

__all__ = [
    "AVAILABLE",
    "CODES",
    "HAS_BFLOAT16",
    "NAME",
    "Float8Kernels",
    "convolution_of_reals",
    "convolve",
    "float8_for",
    "is_built",
    "key",
    "laid_out",
    "plus",
    "product",
    "product_of_reals",
    "quantize",
    "quantizes",
    "reads",
    "requantizes",
    "rows",
    "supports",
    "windows",
]

NAME: str = "brgemm"

CODES: torch.dtype = torch.uint8
"""VNNI adds products of unsigned and signed codes."""

_COMPILER = shlex.split(os.environ.get("CXX", "")) or ["g++"]

AVAILABLE: bool = sys.platform == "linux" and onednn.AVAILABLE and bool(shutil.which(_COMPILER[0]))
"""Whether this CPU adds products of 8 bits in 32, and there is a compiler."""

_FLAGS = (
    *("-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=off"),
    *(f"-m{isa}" for isa in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")),
    *("-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
)

_COPIED = 32
"""How many codes of a window at least lie side by side where a copy of it takes less time than a tile saves."""

_CALL, _PIECE, _CODE = 150e3, 3, 0.03
"""With AMX: what a call of oneDNN takes more than one of this, and what a copy takes for each piece of a window that
lies in memory side by side and for each code, in ns; of 11 layers and 15 with groups, 1 and 8 images."""

_TOGETHER, _ALONE = 64, 8e6
"""How many channels are convolved each alone at a time, and how many products of such take at most as long as with
oneDNN, or by a loop of Inductor."""

_REALS = (torch.float32, torch.bfloat16, torch.float16)

_FEW = 2**24 if onednn.AMX else 2**21
"""How many codes of a weight at most one row takes to multiply as long as with `torch._int_mm`."""

HAS_BFLOAT16: bool = torch.cpu._is_avx512_bf16_supported()
"""Whether this CPU multiplies bfloat16 and adds in float32."""


def supports(codes: Tensor, zero_point: Tensor | None) -> bool:
    """Whether a folded weight is multiplied or convolved with: int8, on a CPU with VNNI.

    Args:
        codes: `(N, K)`, or `(N, C / groups, *kernel)` in one to three dimensions: the weight's.
        zero_point: the weight's; None where it is 0.

    Example:
        >>> import torch
        >>> from functional_sq import brgemm
        >>> brgemm.supports(torch.zeros(4, 8), None)
        False
    """
    return (
        codes.dtype is torch.int8
        and 2 <= codes.ndim <= 5
        and _takes(codes)
        and math.prod(codes.shape[1:]) <= INT32_TERMS
    )


class Float8Kernels(Float8Codes):
    """What `linear` and `conv` ask for a weight of float8, as they ask a backend: codes that it makes are `CODES`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq import brgemm
        >>> spec = fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor())
        >>> brgemm.Float8Kernels().requantizes(spec, torch.ones(1), "gelu")
        True
    """

    def product(self, *given: Any, **rest: Any) -> Tensor:
        """As `brgemm.product`."""
        return product(*given, **rest)

    def plus(self, residual: Tensor, operands: Operands) -> Tensor:
        """As `brgemm.plus`."""
        return plus(residual, operands)

    def convolve(self, *given: Any, **rest: Any) -> Tensor:
        """As `brgemm.convolve`."""
        return convolve(*given, **rest)


_FLOAT8 = Float8Kernels()


def float8_for(codes: Tensor, groups: int = 1) -> Float8Kernels | None:
    """Return what multiplies, or convolves, codes of float8 with those of a weight as bfloat16 on this CPU, or None.

    Args:
        codes: `(N, K)`, or `(N, C / groups, *kernel)` in one to three dimensions.
        groups: as `functional_sq.conv`.

    Example:
        >>> import torch
        >>> from functional_sq import brgemm
        >>> brgemm.float8_for(torch.zeros(4, 8)) is None
        True
    """
    is_float8 = codes.is_floating_point() and codes.itemsize == 1
    fits = HAS_BFLOAT16 and is_float8 and 2 <= codes.ndim <= 5 and groups == 1 and _takes(codes)
    return _FLOAT8 if fits else None


def _takes(codes: Tensor) -> bool:
    return codes.is_cpu and codes.numel() > 0 and is_built()


def rows(codes: Tensor, zero_point: Tensor | None) -> range:
    """Return for how many rows it is the faster one: for any number, but one with a large weight, which `torch._int_mm`
    streams from memory at 25 GB/s, and this at 20.

    One row takes a layer of 384 x 384 in a compiled chain 14 us and `torch._int_mm` 32, of 1024 x 1024 80 and 90, of
    2048 x 2048 260 and 240, with AMX 245 and 280.

    Example:
        >>> import torch
        >>> from functional_sq import brgemm
        >>> [1 in brgemm.rows(torch.empty(n, 1024), None) for n in (1024, 2**15)]
        [True, False]
    """
    return range(1 if codes.numel() <= _FEW else 2, sys.maxsize)


def key(device: str) -> tuple[object, ...]:
    """Return what the answers here depend on, beside their arguments; for a CPU the kernel is built to know whether it
    works.
    """
    return (is_built(), HAS_BFLOAT16, onednn.AMX) if device == "cpu" else ()


def product(
    operands: Operands,
    activation: str = "none",
    to_scale: Tensor | None = None,
    to_zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `(q - zero_point) @ (codes - weight_zero_point).T * scale + bias`: exact, rounded, then as written.

    Of float8 products are exact, and summed in float32.

    Args:
        operands: uint8 codes, and a weight that `supports` takes; or codes of float8 without zero points, and a weight
            that `float8_for` takes. Packed at the first call, and again once it changes. What `q` are the codes of is
            read instead, if it is given.
        activation: what `requantizes` takes, applied before codes are made; "none" without `to_scale`.
        to_scale, to_zero_point: float32 and int32, one element each: the result is codes of them, uint8 or those of
            `Float8Kernels`. Beside `functional_sq.quantize` a code may differ by one where the value lies on the
            border of two, as `erf`, `exp` and `tanh` are polynomials.
        dtype: what the result is rounded to, once, where it is no codes.

    Returns:
        `(M, N)` in `dtype`, or codes with `to_scale`.

    Raises:
        RuntimeError: operands do not fit, or `brgemm.cpp` is not compiled.

    Example:
        >>> import torch
        >>> from functional_sq import brgemm
        >>> from functional_sq.operands import Operands
        >>> q, w = torch.tensor([[10, 1]], dtype=torch.uint8), torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> z, scale = torch.tensor([1], dtype=torch.int32), torch.tensor([1.0, 0.5])
        >>> if brgemm.is_built():
        ...     y = brgemm.product(Operands(q, z, w, None, scale, None, None))
        ...     assert y.tolist() == [[9.0, 13.5]]
    """
    call = torch.ops.functional_sq.brgemm_product.default
    return _call(call, operands, None, activation, to_scale, to_zero_point, dtype)


def plus(residual: Tensor, operands: Operands) -> Tensor:
    """Return `product(operands) + residual`, rounded once to the residual's dtype.

    Args:
        residual: `(..., N)`, in all M rows, float32, bfloat16 or float16; without a gradient.
        operands: as `product`.

    Raises:
        RuntimeError: as `product`.
    """
    call = torch.ops.functional_sq.brgemm_product.default
    rows = residual.reshape(-1, operands.codes.shape[0])
    return _call(call, operands, rows, "none", None, None, residual.dtype).reshape(residual.shape)


def windows(
    codes: Tensor, zero_point: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> range:
    """Return for how many windows, of all images together, it is the faster one.

    Where each channel is convolved alone for few: past them, and where channels fill no 64, others read less.
    With VNNI alone for any number without groups, unless windows are copied a few bytes at a time: one image takes 0.4
    to 1 of what it takes oneDNN, whose operator takes 100 us whatever it is called for, eight images 0.7 to 1.07, in a
    chain of 1 x 1 over 25 000 windows 1.13. With AMX while the copies of windows take less than that call; for any
    number where none are made, oneDNN is wrong, or the weight is asymmetric. In three dimensions for any number: others
    copy windows in memory.

    Args:
        codes, zero_point: the weight's, that `supports` takes; codes are `(N, C / groups, *kernel)`.
        stride, dilation, groups: as `functional_sq.conv`, one for each dimension.

    Example:
        >>> import torch
        >>> from functional_sq import brgemm
        >>> 1 in brgemm.windows(torch.empty(64, 64, 7, 7), None, (2, 2), (1, 1), 1)
        True
    """
    channels, *kernel = codes.shape[1:]
    taps, any_number = math.prod(kernel), range(1, sys.maxsize)
    k = channels * taps
    is_copied = groups > 1 or (zero_point is None and taps * math.prod(stride) > 1)
    if 1 < groups == codes.shape[0] and channels == 1:
        filled_up = -(-groups // _TOGETHER) * _TOGETHER
        few = range(1, int(_ALONE / (filled_up * taps)) + 1)
        return few if len(kernel) < 3 or are_alone(codes, groups) else any_number
    if len(kernel) == 3 or not is_copied or not onednn_conv.is_right(codes, groups):
        return any_number
    # Of a window, what lies side by side in memory.
    together = channels * kernel[-1] if groups == 1 and dilation[-1] == 1 else channels
    if onednn.AMX:
        return range(1, int(_CALL / (groups * (k // together * _PIECE + k * _CODE))))
    return any_number if groups == 1 and (together >= _COPIED or taps == 1) else range(0)


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
    """Return the sums of `(q - zero_point) (codes - weight_zero_point)` over windows, times `scale`, plus `bias`.

    Args:
        operands: as `product`, whose `x` a convolution of 1 x 1 reads where it has its channels last in memory; fastest
            where codes have.
        stride, dilation: along height and width, of images that have it along depth before.
        padding: above, below, left and right, before that in front and behind; the zero point is what is there.
        groups: as `functional_sq.conv`.
        activation: what `requantizes` takes, applied before codes are made; without `to_scale` "none", or "relu" with
            a residual.
        to_scale, to_zero_point, dtype: as `product`.
        residual: of the result's shape and `dtype`, without a gradient, or None: what is added before the activation.

    Returns:
        `(B, N, height, width)`, or with depth, in `dtype`, or codes with `to_scale`; the channels last in memory.

    Raises:
        RuntimeError: as `product`.

    Example:
        >>> import torch
        >>> from functional_sq import brgemm
        >>> from functional_sq.operands import Operands
        >>> q, w = torch.tensor([[[[1, 3, 1]]]], dtype=torch.uint8), torch.tensor([[[1, 2]]], dtype=torch.int8)
        >>> one, half = torch.tensor([1], dtype=torch.int32), torch.tensor([0.5])
        >>> if brgemm.is_built():
        ...     y = brgemm.convolve(Operands(q, one, w, None, half, None, None), (1, 1), (0, 0, 0, 1), (1, 1), 1)
        ...     assert y.tolist() == [[[[2.0, 1.0, 0.0]]]]
    """
    x, kernel = operands.x, operands.codes.shape[2:]
    # Windows of codes are copied, and images into another layout: a quarter of what real values would be.
    copied = math.prod((*kernel, *stride, groups)) > 1 or any(padding)
    if x is not None and (copied or not always(x.stride(1) == 1)):
        operands = operands._replace(x=None)
    call = torch.ops.functional_sq.brgemm_convolution.default
    then = activation, to_scale, to_zero_point, dtype
    return _call(call, operands, residual, stride, padding, dilation, groups, *then)


def reads(x: Tensor) -> bool:
    """Whether `product_of_reals` takes these real values: in the memory of this CPU, in eager mode.

    Example:
        >>> import torch
        >>> from functional_sq import brgemm
        >>> brgemm.reads(torch.ones(2, 3, dtype=torch.float64))
        False
    """
    plain = not is_traced(x) and x.is_cpu and x.layout is torch.strided and not x.is_nested
    return plain and x.dtype in _REALS and is_built()


def quantizes(spec: QuantSpec, scale: Tensor) -> bool:
    """Whether `product_of_reals` makes such codes of real values: float8 or all 8 bits, one scale.

    Args:
        spec: the codes' quantization.
        scale: its scale.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq import brgemm
        >>> brgemm.quantizes(fsq.QuantSpec(torch.int4, fsq.PerTensor()), torch.ones(1))
        False
    """
    fits = has_one_scale if isinstance(spec.format, Float8) else fills_a_byte
    return fits(spec, scale)


def product_of_reals(
    spec: QuantSpec,
    qp: QParams,
    codes: Tensor,
    weight_zero_point: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
) -> Callable[[Tensor], Tensor]:
    """Return what multiplies the codes of real values, which are made when a tile reads them and never written.

    Of `x`, `(..., K)` that `reads` takes, it returns `(..., N)` in the dtype of `x`: what `product` returns of
    `quantize(spec, x, qp)`. Operands are what they are when it is called.

    Args:
        spec, qp: the quantization of the real values, that `quantizes` takes.
        codes, weight_zero_point, scale, bias: as `Operands`.

    Raises:
        RuntimeError: as `product`; when called, the last axes are not equal.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq import brgemm
        >>> spec, w = fsq.QuantSpec(torch.int8, fsq.PerTensor()), torch.tensor([[1, 2]], dtype=torch.int8)
        >>> qp = fsq.QParams(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32))
        >>> if brgemm.is_built():
        ...     multiply = brgemm.product_of_reals(spec, qp, w, None, torch.tensor([0.5]), None)
        ...     assert multiply(torch.tensor([[2.0, 0.6]])).tolist() == [[3.0]]
    """
    call = torch.ops.functional_sq.brgemm_product_of_reals.default
    return _of_reals(call, spec, qp, codes, weight_zero_point, scale, bias)


def convolution_of_reals(
    spec: QuantSpec,
    qp: QParams,
    codes: Tensor,
    weight_zero_point: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    last: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Return what convolves the codes of real values, by one operator; as `product_of_reals`.

    Of `x`, `(B, C, *space)` in one to three dimensions that `reads` takes, it returns `(B, N, *size)` in the dtype of
    `x`, the channels last in memory where they are in `x`, or with `last` anyway.

    Args:
        spec, qp: the quantization of the real values: integers of all 8 bits, one scale.
        codes, weight_zero_point, scale, bias: as `Operands`.
        stride, padding, dilation, groups: as `convolve`.
        last: as above.

    Raises:
        RuntimeError: as `product`; when called, as `convolve`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq import brgemm
        >>> spec, w = fsq.QuantSpec(torch.int8, fsq.PerTensor()), torch.tensor([[[1, 2]]], dtype=torch.int8)
        >>> qp, one = fsq.QParams(torch.tensor([0.5]), torch.tensor([0], dtype=torch.int32)), (1, 1)
        >>> operands = spec, qp, w, None, torch.tensor([0.5]), None
        >>> if brgemm.is_built():
        ...     convolve = brgemm.convolution_of_reals(*operands, one, (0, 0, 0, 0), one, 1)
        ...     assert convolve(torch.tensor([[[2.0, 0.6, 1.0]]])).tolist() == [[[3.0, 2.5]]]
    """
    call = torch.ops.functional_sq.brgemm_convolution_of_reals.default
    settings = [*stride], [*padding], [*dilation], groups, last
    return _of_reals(call, spec, qp, codes, weight_zero_point, scale, bias, *settings)


def _of_reals(call: Callable[..., Tensor], spec: QuantSpec, qp: QParams, *of_weight: Any) -> Callable[[Tensor], Tensor]:
    _require()
    x_scale, storage = qp.scale, spec.format.storage

    def multiply(x: Tensor) -> Tensor:
        zero_point = qp.zero_point
        # A microsecond each for what is right as it is.
        if zero_point.dtype is not torch.int32:
            zero_point = zero_point.to(torch.int32)
        if x.requires_grad:
            x = x.detach()
        return call(x, x_scale, storage, zero_point, *of_weight)

    return multiply


def quantize(spec: QuantSpec, x: Tensor, qp: QParams) -> Tensor:
    """Return `functional_sq.quantize(spec, x, qp)`, in eager mode on this CPU by one pass, where that takes five.

    Args:
        spec, x, qp: as there.

    Raises:
        TypeError, ValueError: as there.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq import brgemm
        >>> qp = fsq.QParams(torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32))
        >>> brgemm.quantize(fsq.QuantSpec(torch.int4, fsq.PerTensor()), torch.tensor([0.6, 9.0]), qp)
        tensor([2, 7], dtype=torch.int8)
    """
    if not (isinstance(x, Tensor) and x.is_cpu and not is_traced(x) and is_built()):
        return _quantize(spec, x, qp)
    check_spec(spec)
    qp = check_qparams(qp)
    bits = spec.format.bits if isinstance(spec.format, Integer) else 0
    if not 0 < bits <= 8 or x.dtype not in _REALS or not has_one_scale(spec, qp.scale) or is_batched(x, *qp):
        return _quantize(spec, x, qp)
    low, high = (int(bound) for bound in spec.bounds)
    how = qp.scale, qp.zero_point.to(torch.int32), low, high, spec.format.storage
    y: Tensor = torch.ops.functional_sq.brgemm_quantize.default(x.detach(), *how)
    return y


def laid_out(y: Tensor, images: Tensor) -> Tensor:
    """Return `functional_sq.windows.laid_out(y, images)`; in eager mode on this CPU of real values in less time.

    Args:
        y, images: as there.

    Example:
        >>> import torch
        >>> from functional_sq import brgemm
        >>> y = torch.arange(6.0).reshape(1, 1, 3, 2).movedim(-1, 1)
        >>> brgemm.laid_out(y, torch.ones(1, 5, 1, 3))
        tensor([[[[0., 2., 4.]],
        <BLANKLINE>
                 [[1., 3., 5.]]]])
    """
    eager = reads(y) and not y.requires_grad and not is_batched(y)
    # Strides are asked for in eager mode alone: where a graph is traced they add guards.
    if not eager or is_last(images) or y.stride(1) != 1 or y.is_contiguous():
        return _laid_out(y, images)
    # The result of a transposed convolution may be cut out of a larger one.
    dense = y.movedim(1, -1).contiguous().movedim(-1, 1)
    in_order: Tensor = torch.ops.functional_sq.brgemm_in_order.default(dense)
    return in_order


def _require() -> None:
    if not is_built():
        raise RuntimeError("brgemm.cpp is not compiled on this machine; ask `supports` before")


def _call(call: Callable[..., Tensor], operands: Operands, *rest: Any) -> Tensor:
    _require()
    q, zero_point, codes, weight_zero_point, scale, _, bias, x, x_scale = operands
    of = zero_point, codes, weight_zero_point, scale, bias, *rest
    if x is None or x.dtype not in _REALS:
        return call(q, *of)
    return call(x, *of, x_scale, q.dtype)  # codes of that dtype, which are made in the tile


def _fake(q: Tensor, zero_point: Tensor | None, codes: Tensor, *rest: Any) -> Tensor:
    to_scale, _, dtype, *_ = rest[5:]
    return q.new_empty((*q.shape[:-1], codes.shape[0]), dtype=_result_dtype(codes, to_scale, dtype))


def _result_dtype(codes: Tensor, to_scale: Tensor | None, dtype: torch.dtype) -> torch.dtype:
    made = Float8Kernels.CODES if codes.is_floating_point() else CODES
    return dtype if to_scale is None else made


def _fake_convolution(q: Tensor, zero_point: Tensor | None, codes: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation, _, _, to_scale, _, dtype, *_ = rest[4:]
    padded = [n + before + after for n, before, after in zip(q.shape[2:], padding[::2], padding[1::2], strict=True)]
    size = window_sizes(padded, (1, *codes.shape[2:])[-len(stride) :], stride, dilation)
    y = q.new_empty((q.shape[0], *size, codes.shape[0]), dtype=_result_dtype(codes, to_scale, dtype))
    return y.movedim(-1, 1)


def _fake_convolution_of_reals(x: Tensor, *of: Any) -> Tensor:
    _, _, *weight, stride, padding, dilation, groups, last = of
    images, geometry = x.unsqueeze(2) if x.ndim == 3 else x, (stride, padding, dilation, groups)
    y = _fake_convolution(images, *weight, None, *geometry, "none", None, None, x.dtype)
    y = y.squeeze(2) if x.ndim == 3 else y
    return y if last else _laid_out(y, x)


define_operator(
    "brgemm_quantize",
    "(Tensor x, Tensor scale, Tensor zero_point, int low, int high, ScalarType storage) -> Tensor",
    None,  # in brgemm.cpp
    lambda x, *rest: torch.empty_like(x, dtype=rest[-1]),
)
define_operator(
    "brgemm_in_order",
    "(Tensor images) -> Tensor",
    None,
    lambda images: images.new_empty(images.shape),
)
define_operator(
    "brgemm_product",
    "(Tensor q, Tensor? zero_point, Tensor codes, Tensor? weight_zero_point, Tensor scale, Tensor? bias, "
    "Tensor? residual, str activation, Tensor? to_scale, Tensor? to_zero_point, ScalarType dtype, "
    "Tensor? q_scale=None, ScalarType? format=None) -> Tensor",
    None,
    _fake,
)
define_operator(
    "brgemm_product_of_reals",
    "(Tensor x, Tensor x_scale, ScalarType format, Tensor zero_point, Tensor codes, Tensor? weight_zero_point, "
    "Tensor scale, Tensor? bias) -> Tensor",
    None,
    lambda x, x_scale, format, zero_point, codes, *rest: x.new_empty((*x.shape[:-1], codes.shape[0])),
)
define_operator(
    "brgemm_convolution",
    "(Tensor q, Tensor? zero_point, Tensor codes, Tensor? weight_zero_point, Tensor scale, Tensor? bias, "
    "Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, str activation, "
    "Tensor? to_scale, Tensor? to_zero_point, ScalarType dtype, "
    "Tensor? q_scale=None, ScalarType? format=None) -> Tensor",
    None,
    _fake_convolution,
)
define_operator(
    "brgemm_convolution_of_reals",
    "(Tensor x, Tensor x_scale, ScalarType format, Tensor zero_point, Tensor codes, Tensor? weight_zero_point, "
    "Tensor scale, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, bool last) -> Tensor",
    None,
    _fake_convolution_of_reals,
)


@asked_once
def is_built() -> bool:
    """Whether the kernel is there, compiled if it never was; says why not.

    Example:
        >>> from functional_sq import brgemm
        >>> brgemm.is_built() <= brgemm.AVAILABLE
        True
    """
    return AVAILABLE and _works()


@functools.cache
def _works() -> bool:
    try:
        works = _library().works
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"products of codes on the CPU are slower than they could be: {said}", stacklevel=2)
        return False
    works.restype = ctypes.c_bool
    return bool(works())


def _library() -> ctypes.CDLL:
    path = _compiled()
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # damaged
        path.unlink()
        return ctypes.CDLL(str(_compiled()))


def _compiled() -> Path:
    """Return the shared library, which is named by all that it depends on, and built by one thread of one process."""
    import fcntl  # on Linux alone

    from torch._inductor.runtime.cache_dir_utils import cache_dir  # not needed by who never multiplies

    source, root = Path(__file__).with_suffix(".cpp"), Path(torch.__file__).parent
    flags = (*_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    name = sha256(repr((source.read_text(), _COMPILER, flags, torch.__version__, str(root))).encode()).hexdigest()
    path = Path(cache_dir()) / "functional_sq" / f"{name}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    held = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder) / path.name
                command = [*_COMPILER, *flags, f"-I{root / 'include'}", str(source), "-o", str(made)]
                libraries = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
                subprocess.run([*command, *libraries], check=True, capture_output=True, text=True)
                with replacing(path) as file:
                    file.write(made.read_bytes())
    finally:
        os.close(held)
    return path
