"""The product of codes by oneDNN: packed weight, scale and bias inside, float32 written once.

`torch._int_mm` writes an int32 matrix that the epilogue reads again, and takes the weight as it lies. Here
oneDNN takes the weight packed, subtracts the zero point, converts once, multiplies, adds the bias:
the operations of `functional_sq.linear` in its order, so the same bits: `exactly` sees to it. On two cores, a compiled
layer of 1000 rows or more takes 1.0 to 1.1 times as long as a pass that quantizes and a bare `torch._int_mm`, with AMX
0.4 to 1.1 times (examples/benchmarks/results); with `torch._int_mm` and an epilogue 1.1 to 2.4 times.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from functional_sq.granularity import PerTensor
from functional_sq.int_mm import INT32_TERMS, subtract_product, with_plain_strides
from functional_sq.operands import Operands
from functional_sq.qparams import MappingType, QParams
from functional_sq.requantize import Requantization, apply_epilogue, requantize, requantizes
from functional_sq.spec import QuantSpec
from functional_sq.tracing import always, define_operator, is_batched, is_traced

__all__ = [
    "AMX",
    "AVAILABLE",
    "CODES",
    "NAME",
    "SUMS",
    "Tail",
    "arguments",
    "exact_sums",
    "exactly",
    "finish",
    "is_capable",
    "is_unchanged",
    "key",
    "largest_sum",
    "plus",
    "product",
    "requantizes",
    "result_dtype",
    "rows",
    "supports",
    "version",
]

NAME: str = "oneDNN"

CODES: torch.dtype = torch.uint8
"""Codes of int8 take a reference kernel where there is VNNI and no AMX: 1500 ms where these take 0.1."""

AVAILABLE = (
    hasattr(torch.ops.onednn, "qlinear_prepack")
    and torch.cpu._is_vnni_supported()
    and "ONEDNN_MAX_CPU_ISA" not in os.environ
)
"""Whether this CPU adds products of 8 bits in 32; without VNNI oneDNN adds pairs in 16, which saturates."""

AMX: bool = torch.cpu._is_amx_tile_supported()
"""Whether oneDNN multiplies in tiles, and then rounds where `exactly` says."""

WORTH = 1_500_000 if AMX else 4_000_000
"""What N (K + 10 M) must reach. A call of oneDNN takes 40 us more; with AMX a byte of the weight takes 0.03 ns less
and one of M N results 0.3 ns, measured on one core for K, N from 384 to 4096, compiled, GELU behind it or not. With
VNNI alone (the same core, limited) a layer followed by GELU stays within 5 %, one that writes its result gains."""

LARGEST_K = 5000 if AMX else INT32_TERMS
"""The largest K that is multiplied. With AMX, above it the codes of a trained weight too would be cut, see `exactly`,
and two products take 2 to 3 times as long as `torch._int_mm` and an epilogue."""

_POST_OPS: dict[str, tuple[str, list[float], str]] = {
    "none": ("none", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
    "hardswish": ("hardswish", [], ""),
    "tanh": ("tanh", [], ""),
}
"""What oneDNN calls `functional_sq.ACTIVATIONS`, what it takes beside, and the algorithm."""

_UINT8 = QuantSpec(torch.uint8, PerTensor(), mapping=MappingType.ASYMMETRIC)

_PACKED: MutableMapping[Tensor, tuple[int | Tensor, tuple[Tensor, Tensor, int]]] = WeakTensorKeyDictionary()
"""A memo of `_pack`: weight codes to their `version` and what was packed, for as long as the codes live.

Packing takes 3.5 ns a byte, as long as the product with 4000 rows. The packed tensor is opaque: a compiled
graph takes none, it cannot be saved, and a `state_dict` must not hold it. Kept here, it needs no care: a copied,
loaded or moved weight is another tensor, or the same with another version, and is packed when first used.
"""


def supports(codes: Tensor, zero_point: Tensor | None) -> bool:
    """Whether oneDNN multiplies a folded weight.

    Args:
        codes: `(N, K)`, the weight's.
        zero_point: the weight's; None where it is 0.

    Example:
        >>> import torch
        >>> from functional_sq import onednn
        >>> onednn.supports(torch.zeros(4, 8), None)
        False
    """
    return is_capable(codes) and codes.ndim == 2 and codes.shape[1] <= LARGEST_K


def is_capable(codes: Tensor) -> bool:
    """Whether codes are int8 on a CPU on which oneDNN multiplies them exactly.

    Example:
        >>> import torch
        >>> from functional_sq import onednn
        >>> onednn.is_capable(torch.zeros(4, 8))
        False
    """
    return AVAILABLE and codes.device.type == "cpu" and codes.dtype is torch.int8 and codes.numel() > 0


def rows(codes: Tensor, zero_point: Tensor | None) -> range:
    """Return for how many rows oneDNN is the faster one; for others `torch._int_mm` has the same bits.

    A weight with zero points needs each token's sum, which oneDNN does not give: the product is corrected afterwards,
    as after `torch._int_mm`. That one packs the weight in each call, which costs little where many rows share it. With
    4096 x 4096 codes, oneDNN takes 0.3 times as long for 4 rows and half as long for 32, or as long where `exactly`
    cuts the sums in two, as it does for uniform weights, or normal ones with K above 5000.

    Args:
        codes, zero_point: the weight's, that `supports` takes.

    Example:
        >>> import torch
        >>> from functional_sq import onednn
        >>> 2 in onednn.rows(torch.empty(4096, 4096), None), 300 in onednn.rows(torch.empty(384, 384), None)
        (True, False)
    """
    n, k = codes.shape
    # One row by torch's product of one, which packs nothing: without AMX it streams 1 x 11008 x 4096 at 25 GB/s on one
    # CPU and at 45 on another, oneDNN at 18 and 55.
    least = max(1 if AMX and 2 * n * k >= 5 * WORTH else 2, (WORTH // n - k + 9) // 10)
    return range(least, sys.maxsize) if zero_point is None else range(max(least, 2), k // 128 + 1)


def key(device: str) -> tuple[object, ...]:
    """Return what the answers here depend on, apart from their arguments."""
    return AVAILABLE, AMX, WORTH, LARGEST_K


def product(
    operands: Operands,
    activation: str = "none",
    to_scale: Tensor | None = None,
    to_zero_point: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return `(q - zero_point) @ (codes - weight_zero_point).T * scale + bias`: exact, rounded, then as written.

    Args:
        operands: uint8 codes, and a weight that `supports` takes; packed at the first call, and again once it changes.
        activation: what `requantizes` takes, applied before codes are made; "none" without `to_scale`.
        to_scale, to_zero_point: float32 and int32, one element each: the result is uint8 codes of them.
            oneDNN adds the zero point before it rounds, and has its own polynomials for activations: beside
            `functional_sq.quantize` a code differs by one where the value lies on the border of two, give
            or take a few units in the last place.
        dtype: what the result is rounded to, once, where it is no codes.

    Returns:
        `(M, N)` in `dtype`, or uint8 with `to_scale`.

    Example:
        >>> import torch
        >>> from functional_sq import onednn
        >>> from functional_sq.operands import Operands
        >>> q, w = torch.tensor([[10, 1]], dtype=torch.uint8), torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> z, scale = torch.tensor([1], dtype=torch.int32), torch.tensor([1.0, 0.5])
        >>> onednn.product(Operands(q, z, w, None, scale, torch.empty(0), None))
        tensor([[ 9.0000, 13.5000]])
    """
    if operands.weight_zero_point is not None:
        total = _corrected(operands, operands.weight_zero_point)
        return finish(total, operands.scale, operands.bias, activation, to_scale, to_zero_point, dtype)
    result: Tensor = torch.ops.functional_sq.onednn_product.default(
        *arguments(operands), activation, to_scale, to_zero_point, result_dtype(dtype)
    )
    return result if to_scale is not None else result.to(dtype)


def plus(residual: Tensor, operands: Operands) -> Tensor:
    """Return `product(operands) + residual`, rounded once to the residual's dtype.

    oneDNN adds to what lies in memory already. Here that is a copy of the residual; where nothing reads the residual
    later, as mostly in a network, Inductor leaves the copy out.

    Args:
        residual: `(..., N)`, in all M rows, of any real dtype; without a gradient.
        operands: as `product`.

    Example:
        >>> import torch
        >>> from functional_sq import onednn
        >>> from functional_sq.operands import Operands
        >>> q, w = torch.tensor([[10, 1]], dtype=torch.uint8), torch.tensor([[1, 2], [3, 4]], dtype=torch.int8)
        >>> z, scale = torch.tensor([1], dtype=torch.int32), torch.tensor([1.0, 0.5])
        >>> onednn.plus(torch.tensor([[0.5, 100.0]]), Operands(q, z, w, None, scale, torch.empty(0), None))
        tensor([[  9.5000, 113.5000]])
    """
    if operands.weight_zero_point is not None:
        total = _corrected(operands, operands.weight_zero_point).reshape(residual.shape)
        return apply_epilogue(total, operands.scale, operands.bias, residual.dtype, residual)
    taken = arguments(operands)
    # A batch of vmap cannot be written to. Inductor (torch 2.13) may leave the copy out, find that it needs one, and
    # then take it from the start of the storage.
    within = is_traced(residual) and not always(residual.storage_offset() == 0)
    alone = is_batched(residual, *taken) or result_dtype(residual.dtype) is not residual.dtype
    if alone or within:
        return (product(operands).reshape(residual.shape) + residual.to(torch.float32)).to(residual.dtype)
    y = residual.clone(memory_format=torch.contiguous_format)
    torch.ops.functional_sq.onednn_add_product.default(y.reshape(-1, operands.codes.shape[0]), *taken)
    return y


def _corrected(operands: Operands, weight_zero_point: Tensor) -> Tensor:
    """Return the exact product with a weight that has zero points, int32; a compiler sums a token as it makes it."""
    q, zero_point, codes, *_ = operands
    assert zero_point is not None
    product: Tensor = torch.ops.functional_sq.onednn_sums.default(q, zero_point, codes)
    token_sum = q.sum(1, keepdim=True, dtype=torch.int32) - codes.shape[1] * zero_point
    return subtract_product(product, weight_zero_point, token_sum)


def finish(
    total: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    to_scale: Tensor | None,
    to_zero_point: Tensor | None,
    dtype: torch.dtype,
    onto: Tensor | None = None,
) -> Tensor:
    """Return what oneDNN makes of exact sums `(B, N, ...)`, where it does not do so itself: as `exactly`."""
    along = (-1, *(1,) * (total.ndim - 2))
    bias = None if bias is None else bias.reshape(along)
    y = apply_epilogue(total, scale.reshape(along), bias, torch.float32, onto)
    if to_scale is None or to_zero_point is None:
        return y.to(dtype)
    return requantize(y, Requantization(_UINT8, QParams(to_scale, to_zero_point), activation))


def arguments(operands: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return the operands that oneDNN reads: codes, zero point, the weight's codes, scale, and the bias as float32."""
    q, zero_point, codes, _, scale, _, bias, *_ = operands
    assert zero_point is not None  # that of float8 is
    return q, zero_point, codes, scale, None if bias is None else bias.to(torch.float32)


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what oneDNN rounds to where `dtype` is wanted."""
    return dtype if dtype is torch.bfloat16 else torch.float32


def _product(
    q: Tensor,
    zero_point: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str,
    to_scale: Tensor | None,
    to_zero_point: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    multiply, largest = _multiply(codes)
    then = activation, to_scale, to_zero_point, dtype
    return exactly(multiply, q, int(zero_point), scale, bias, largest, *then)


def _add_product(y: Tensor, q: Tensor, zero_point: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    multiply, largest = _multiply(codes)
    result = exactly(multiply, q, int(zero_point), scale, bias, largest, dtype=y.dtype, onto=with_plain_strides(y))
    if result.data_ptr() != y.data_ptr():
        y.copy_(result)


def _sums(q: Tensor, zero_point: Tensor, codes: Tensor) -> Tensor:
    """Return `(q - zero_point) @ codes.T`, int32."""
    multiply, largest = _multiply(codes)
    return exact_sums(multiply, q, int(zero_point), torch.ones(codes.shape[0], dtype=torch.float32), largest)


def _multiply(codes: Tensor) -> tuple[Callable[..., Tensor], int]:
    """Return what `exactly` calls, and `largest_sum`."""
    packed, zero, largest = _pack(codes)

    def multiply(q: Tensor, z: int, scale: Tensor, bias: Tensor | None, tail: Tail, onto: Tensor | None) -> Tensor:
        known = with_plain_strides(q), 1.0, z, packed, scale, zero
        op = torch.ops.onednn.qlinear_pointwise
        y: Tensor
        if onto is None:
            y = op.default(*known, bias, *tail)
        else:
            y = op.binary(*known, onto, bias, *tail[:3], 1.0, 0, "sum", 1.0, *tail[3:])
        return y

    return multiply, largest


def _fake(q: Tensor, zero_point: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    *_, to_scale, _, dtype = rest
    return q.new_empty((q.shape[0], codes.shape[0]), dtype=dtype if to_scale is None else torch.uint8)


# Operators of their own: a compiled graph takes no packed weight, so its code must not see one.
define_operator(
    "onednn_product",
    "(Tensor q, Tensor zero_point, Tensor codes, Tensor scale, Tensor? bias, str activation, Tensor? to_scale, "
    "Tensor? to_zero_point, ScalarType dtype) -> Tensor",
    _product,
    _fake,
)
define_operator(
    "onednn_sums",
    "(Tensor q, Tensor zero_point, Tensor codes) -> Tensor",
    _sums,
    lambda q, _, codes: q.new_empty((q.shape[0], codes.shape[0]), dtype=torch.int32),
)
define_operator(
    "onednn_add_product",
    "(Tensor(a!) y, Tensor q, Tensor zero_point, Tensor codes, Tensor scale, Tensor? bias) -> ()",
    _add_product,
    lambda *_: None,
    has_vmap=False,
)


Tail = tuple[float, int, torch.dtype, str, list[float], str]
"""The last arguments of oneDNN's operators: scale, zero point and dtype of the result, and what is applied before."""

SUMS: Tail = (1.0, 0, torch.float32, "none", [], "")
"""Those for the sums themselves."""


def exactly(
    multiply: Callable[[Tensor, int, Tensor, Tensor | None, Tail, Tensor | None], Tensor],
    q: Tensor,
    z: int,
    scale: Tensor,
    bias: Tensor | None,
    largest: int,
    activation: str = "none",
    to_scale: Tensor | None = None,
    to_zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    onto: Tensor | None = None,
) -> Tensor:
    """Return `multiply(q, z, scale, bias, ..., onto)`, a call of oneDNN, such that its sum is exact.

    With AMX, oneDNN 3.12 rounds on the way where a zero point is subtracted from sums above 2**24. Where those of q
    could get there, its codes are cut into two parts of 4 bits, or four of 2, which cannot; their sums are integers,
    and are added as such. Normal weights, 4 deviations to each side, get there at K = 5000, uniform ones at 1900.
    With VNNI alone no sum was rounded, up to K = 33025 and 1.1e9.

    Args:
        multiply: takes codes, zero point, scale, bias, what an operator of oneDNN ends with, and what the result is
            added to, in place, or None.
        q, z: uint8 codes and the zero point.
        scale, bias: `(N,)`; given to `multiply` as oneDNN reads them, without strides.
        largest: `largest_sum` of the weight.
        activation, to_scale, to_zero_point, dtype: as `product`.
        onto: what the result is added to before the activation, or None.
    """
    scale, bias = scale.contiguous(), None if bias is None else bias.contiguous()
    bits = 8 if z == 0 or not AMX else _bits(largest)
    to: tuple[float, int, torch.dtype] = (1.0, 0, dtype)
    if to_scale is not None and to_zero_point is not None:
        to = to_scale.item(), int(to_zero_point.item()), torch.uint8
    if bits == 8:
        return multiply(q, z, scale, bias, (*to, *_POST_OPS[activation]), onto)
    product = exact_sums(multiply, q, z, torch.ones_like(scale), largest)
    return finish(product, scale, bias, activation, to_scale, to_zero_point, dtype, onto)


def _bits(largest: int) -> int:
    """Return how many bits of q at a time have sums of at most 2**24, which a float32 holds exactly."""
    return next(bits for bits in (8, 4, 2) if (2**bits - 1) * largest <= 2**24)


def exact_sums(multiply: Callable[..., Tensor], q: Tensor, z: int, one: Tensor, largest: int) -> Tensor:
    """Return the sums of `q - z`, int32, from products of as many bits of it at a time as are exact in float32.

    Args:
        multiply, q, z, largest: as `exactly`.
        one: the scale of the products, `(N,)` of 1.0.
    """
    bits = _bits(largest)
    if bits == 8:
        return _as_int32(multiply(q, z, one, None, SUMS, None))
    mask = 2**bits - 1
    cut = ((i, multiply(q >> i & mask, z >> i & mask, one, None, SUMS, None)) for i in range(0, 8, bits))
    return functools.reduce(torch.add, (_as_int32(part) << i for i, part in cut))


def _as_int32(y: Tensor) -> Tensor:
    """Return whole floats as integers, in the same memory."""
    return y.view(torch.int32).copy_(y)


def largest_sum(codes: Tensor) -> int:
    """Return the largest sum of a row's positive codes, or of its negative ones: what a step of all q adds at most."""
    rows = codes.flatten(1)
    return max(int(side.sum(1, dtype=torch.int64).max()) for side in (rows.clamp(min=0), -rows.clamp(max=0).short()))


def _pack(codes: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the packed weight, the zero point 0 that its product takes, and its `largest_sum`."""
    known = _PACKED.get(codes)
    if known is None or not is_unchanged(known[0], codes):
        with torch.inference_mode(False):  # what is kept serves calls outside of it too
            packed = torch.ops.onednn.qlinear_prepack(with_plain_strides(codes), None)
            known = version(codes), (packed, torch.zeros(1, dtype=torch.int32), largest_sum(codes))
        _PACKED[codes] = known
    return known[1]


def version(codes: Tensor) -> int | Tensor:
    """Return what shows later whether codes changed: their version, or a copy where inference mode gives them none."""
    return codes.clone() if codes.is_inference() else codes._version


def is_unchanged(known: int | Tensor, codes: Tensor) -> bool:
    """Whether codes are what they were when `version` gave `known`; a copy compares in a 20th of packing's time."""
    return torch.equal(known, codes) if isinstance(known, Tensor) else known == codes._version
