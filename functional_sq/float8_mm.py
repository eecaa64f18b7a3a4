"""The bare product of float8 codes, summed in float32: `torch._scaled_mm` on CUDA, floats elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["float8_product"]


def float8_product(a: Tensor, b: Tensor, fast_accum: bool) -> Tensor:
    """Return `a @ b.T` of float8 codes `(M, K)` and `(N, K)`: exact products summed in float32."""
    if not a.is_cuda:
        # A bfloat16 product would round its sums to bfloat16, and torch._scaled_mm takes 1.3 to 4
        # times as long as this where the CPU has no AMX.
        return a.to(torch.float32) @ b.to(torch.float32).t()
    if _scaled_mm_takes(a, b):
        one = torch.ones((), dtype=torch.float32, device=a.device)
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32, use_fast_accum=fast_accum)
    # Every float8 value is a bfloat16 value, and a tensor core adds bfloat16 products in float32.
    return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16).t(), out_dtype=torch.float32)


def _scaled_mm_takes(a: Tensor, b: Tensor) -> bool:
    """Whether cuBLASLt multiplies these: two kinds of float8, not both e5m2, in multiples of 16."""
    kinds = {a.dtype, b.dtype}
    return (
        kinds <= {torch.float8_e4m3fn, torch.float8_e5m2}
        and kinds != {torch.float8_e5m2}
        and a.shape[0] > 0
        and a.shape[1] % 16 == 0
        and b.shape[0] % 16 == 0
        and torch.cuda.get_device_capability(a.device) >= (8, 9)
    )
