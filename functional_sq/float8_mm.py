"""The bare product of float8 codes, summed in float32: `torch._scaled_mm` on CUDA, floats elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from functional_sq import triton_mm
from functional_sq.compat import is_exporting
from functional_sq.formats import as_float32
from functional_sq.int_mm import as_written, is_large, whole_and_rest
from functional_sq.tracing import always, define_operator, is_traced, reaches

__all__ = ["float8_linear", "float8_product"]

HAS_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def float8_product(a: Tensor, b: Tensor, fast_accum: bool) -> Tensor:
    """Return `a @ b.T` of float8 codes `(M, K)` and `(N, K)`: exact products summed in float32."""
    if not a.is_cuda:
        # A bfloat16 product would round its sums to bfloat16, and torch._scaled_mm takes 1.3 to 4
        # times as long as one of floats.
        a = as_float32(a)
        if a.device.type != "cpu" or not HAS_ONEDNN or is_exporting():
            with as_written(a.device):
                return a @ as_float32(b).t()
        # One of these numbers, and not a symbol that is among them: each row is a node of the graph.
        few = is_traced(a) and any(always(a.shape[0] == rows) for rows in range(1, 9))
        return _of_few(a, b) if few else _in_pieces(a, b)
    if b.shape[0] % 16 and is_large(b):
        pieces = whole_and_rest(b, 16)
        if _scaled_mm_takes(a, pieces[0]):  # It is not converted because of its last rows.
            return torch.cat([float8_product(a, piece, fast_accum) for piece in pieces], 1)
    if _scaled_mm_takes(a, b):
        one = torch.ones((), dtype=torch.float32, device=a.device)
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast_accum)
    # Every float8 value is a bfloat16 value, and a tensor core adds bfloat16 products in float32.
    return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16).t(), out_dtype=torch.float32)


def float8_linear(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor | None:
    """Return `float8_product(a, b) * scale + bias`, where one kernel of CUDA does all of it faster, or None.

    `scale` and `bias` are `(N,)`. By Triton for a few hundred rows at most; on Hopper by `torch._scaled_mm`, which
    rounds to bfloat16: no float32 matrix is written or read, and on an H200 that takes as long as the bare product
    where rows are many.
    """
    few = triton_mm.float8_linear(a, b, scale, bias, dtype, fast_accum)
    if few is not None:
        return few
    if not a.is_cuda or dtype is not torch.bfloat16 or (bias is not None and bias.dtype is not dtype):
        return None
    if (
        not _scaled_mm_takes(a, b)
        or torch.cuda.get_device_capability(a.device) < (9, 0)
        or not reaches(a.shape[0], 256)  # twice as long as the bare product for fewer
    ):
        return None
    ones = torch.ones((a.shape[0], 1), dtype=torch.float32, device=a.device)
    scales = ones, scale.reshape(1, -1).contiguous()
    return torch._scaled_mm(a, b.t(), *scales, bias=bias, out_dtype=dtype, use_fast_accum=fast_accum)


def _of_few(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of a few rows of float32 and float8 codes, for Inductor: one loop reads each code once.

    4096 x 4096 take 1.0 ms for a row, 2.4 for eight; as floats and by oneDNN 4 to 20.
    """
    # Inductor computes a matrix of its own for this, where it would compute each element anew for each of N.
    a, w = a.as_strided(a.shape, (a.shape[1], 1)), as_float32(b)
    return torch.stack([(w * row).sum(1) for row in a.unbind(0)])


def _in_pieces(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of float32 and float8 codes; a piece of the codes at a time is made floats.

    Eager pieces stay in the cache. A graph has few pieces, as each is a loop of its own; above 32 MiB, 2**23 floats,
    glibc takes new pages in each call: 20 ms for 4096 x 4096.
    """
    n, k = b.shape
    multiply = torch.ops.functional_sq.onednn_float_product.default
    floats: Iterable[Tensor]
    if is_traced(a):
        floats = map(as_float32, torch.split(b, max(1, 2**22 // max(k, 1), n // 16)))
    else:
        pieces = torch.split(b, max(1, 2**20 // max(k, 1)))
        memory = torch.empty_like(pieces[0], dtype=torch.float32)
        floats = (as_float32(piece, memory[: len(piece)]) for piece in pieces)
    parts = [multiply(a, piece) for piece in floats]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 0 or b.numel() == 0:
        return a @ b.t()
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(a.contiguous(), b.contiguous(), None, "none", [], "")
    return y


# torch multiplies floats by MKL, whose kernels for a CPU of AMD take 2.2 times as long as oneDNN's. An operator of
# its own, as Inductor takes torch's own for a weight that is constant.
define_operator(
    "onednn_float_product",
    "(Tensor a, Tensor b) -> Tensor",
    _product,
    lambda a, b: a.new_empty((a.shape[0], b.shape[0])),
)


def _scaled_mm_takes(a: Tensor, b: Tensor) -> bool:
    """Whether cuBLASLt multiplies these: two kinds of float8, not both e5m2, in multiples of 16, none of them 0."""
    kinds = {a.dtype, b.dtype}
    return (
        kinds <= {torch.float8_e4m3fn, torch.float8_e5m2}
        and kinds != {torch.float8_e5m2}
        and always(a.shape[0] > 0)
        and b.numel() > 0
        and a.shape[1] % 16 == 0
        and b.shape[0] % 16 == 0
        and torch.cuda.get_device_capability(a.device) >= (8, 9)
    )
