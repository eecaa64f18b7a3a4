"""The bare product of int8 codes, exact, on every device, and what is subtracted from it.

By `torch._int_mm`; on CUDA by a kernel of Triton, where it is installed; in floats on a CPU where oneDNN saturates.
"""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq.compat import is_exporting
from functional_sq.tracing import always, define_operator, is_batched, is_traced

__all__ = [
    "INT32_TERMS",
    "as_written",
    "integer_product",
    "is_large",
    "subtract",
    "subtract_product",
    "whole_and_rest",
    "with_plain_strides",
]

INT32_TERMS = (2**31 - 1) // 255**2
"""The largest K for which the corrected product stays in int32: 33025."""

_INT32_PRODUCTS = (2**31 - 1) // 128**2
"""The largest K for which a bare int8 product stays in int32: 131071."""

_SATURATES = platform.machine() in ("x86_64", "AMD64") and (
    not torch.cpu._is_vnni_supported() or "ONEDNN_MAX_CPU_ISA" in os.environ
)
"""Whether oneDNN may multiply int8 without VNNI: it then adds pairs of products in int16, which saturates."""

_LARGE = 2**22
"""Bytes that an H100 copies in 2.5 us at 3.35 TB/s: about what a kernel takes to start."""


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of int8 codes `(M, K)` and `(N, K)`, exactly; int32, above K = 33025 int64."""
    k = a.shape[1]
    if k <= INT32_TERMS:
        return _int8_matmul(a, b)
    cuts = tuple(range(_INT32_PRODUCTS, k, _INT32_PRODUCTS))
    pieces = (t.tensor_split(cuts, 1) for t in (a, b))
    return torch.stack([_int8_matmul(a, b).to(torch.int64) for a, b in zip(*pieces, strict=True)]).sum(0)


def subtract(total: Tensor, offset: Tensor) -> Tensor:
    """Return `total - offset` of integers, in the memory of `total`, which is the caller's own, where that can be."""
    apart = is_traced(total) or is_batched(total, offset)
    return total - offset if apart else total.sub_(offset)


def subtract_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `total - a * b` of integers, as `subtract`: for 4096 x 1536 0.6 ms; 4.6 with two more matrices."""
    if is_traced(total) or is_batched(total, a, b):
        return total - a * b
    return total.addcmul_(a.to(total.dtype), b.to(total.dtype), value=-1)


def _int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of int8 codes `(M, K)` and `(N, K)`, exact in int32."""
    (m, k), n = a.shape, b.shape[0]
    if a.is_cuda:
        from functional_sq import triton_mm  # which imports this file

        inner = k + -k % 16
        if triton_mm.is_capable(b) and not is_exporting():
            return triton_mm.bare_product(_zeros_to(a, m, inner), _zeros_to(b, n, inner))
        return _in_eights(a, b)
    if _SATURATES:
        exact = torch.float32 if k * 128**2 <= 2**24 else torch.float64
        with as_written(a.device):
            return (a.to(exact) @ b.to(exact).t()).to(torch.int32)
    # oneDNN reads a pitch off the stride of an axis of size 1, which torch leaves undefined, and
    # then returns memory that nothing was written to (pytorch/pytorch#195066).
    rows = m
    if not always(m != 1):  # or it is not known, as a number of rows that depends on data
        if not is_exporting() and always(m == 1) and k > 1 and a.device.type == "cpu":
            if not is_traced(a) and not is_batched(a, b):
                return _row_product(a, b)  # at once: the operator takes 12 us more
            y: Tensor = torch.ops.functional_sq.row_product.default(a, b)
            return y
        rows = _at_least(m, 2)
    return _filled_up(a, b, rows, *(2 if size == 1 else size for size in (k or 1, n)))


def _row_product(a: Tensor, b: Tensor) -> Tensor:
    return torch._int_mm(with_plain_strides(a), with_plain_strides(b).t())


# An operator, as Inductor has strides of its own for a row. A second row of zeros takes 3 to 8 times as long.
define_operator(
    "row_product",
    "(Tensor a, Tensor b) -> Tensor",
    _row_product,
    lambda a, b: a.new_empty((1, b.shape[0]), dtype=torch.int32),
)


def _at_least(size: int, least: int) -> int:
    """Return the larger of a size and a number; a symbol where that is not known, for a comparison adds a guard."""
    if always(size >= least):
        return size
    # Dynamo of torch 2.11 takes no sym_max of two numbers.
    return least if always(size < least) else torch.sym_max(size, least)  # type: ignore[no-untyped-call]


def _in_eights(a: Tensor, b: Tensor) -> Tensor:
    """Return the product by what cuBLASLt takes: more than 16 rows, and K and N that are multiples of 8, not 0."""
    (m, k), n = a.shape, b.shape[0]
    rows, (inner, columns) = _at_least(m, 17), (size + -size % 8 or 8 for size in (k, n))
    if n != columns and k == inner and is_large(b):
        return torch.cat([_in_eights(a, piece) for piece in whole_and_rest(b, 8)], 1)
    return _filled_up(a, b, rows, inner, columns)


def with_plain_strides(x: Tensor) -> Tensor:
    """Return a matrix with the strides that its shape says: torch leaves those of an axis of size 1 undefined."""
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1))


def as_written(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which floats that hold codes are multiplied in their own dtype, under autocast too."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def is_large(b: Tensor) -> bool:
    """Whether the copy of a weight, read and written, takes a GPU longer than the start of another product."""
    return b.numel() >= _LARGE


def whole_and_rest(b: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """Return as many rows as make a multiple, where they lie, and those that are left."""
    n = b.shape[0]
    whole, rest = b.tensor_split((n - n % multiple,))
    return whole, rest


def _filled_up(a: Tensor, b: Tensor, rows: int, inner: int, columns: int) -> Tensor:
    """Return the product of operands that are filled up to these sizes, cut to the one that is asked for."""
    m, n = a.shape[0], b.shape[0]
    y = torch._int_mm(_zeros_to(a, rows, inner), _zeros_to(b, columns, inner).t())
    return y if columns == n and always(rows == m) else y.narrow(0, 0, m).narrow(1, 0, n)


def _zeros_to(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return `x` with rows and columns of zeros added, which change no sum; `x` itself if there are none."""
    m, k = x.shape
    return x if columns == k and always(rows == m) else F.pad(x, (0, columns - k, 0, rows - m))
