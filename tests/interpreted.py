"""Run the laws of backends on Triton's kernels, interpreted on the CPU; a program, for Triton asks its environment.

TRITON_INTERPRET=1 python tests/interpreted.py product|convolution|float8
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from functional_sq import triton_conv, triton_mm
from functional_sq.testing import check_convolution, check_product


class Interpreted:
    """A backend whose kernels write float32: the interpreter cuts bfloat16 off, a GPU rounds it."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def product(self, *operands: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        y = self.backend.product(*operands)
        return y.to(dtype) if y.is_floating_point() else y

    def plus(self, residual: Tensor, *operands: Any) -> Tensor:
        return self.backend.plus(residual.float(), *operands).to(residual.dtype)

    def convolve(self, *operands: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        y = self.backend.convolve(*operands)
        return y.to(dtype) if y.is_floating_point() else y


def check_float8() -> None:
    """Sums of 272 products err by 2**-15 of what they add, and the epilogue by a few units more."""
    for rows, k, n in ((1, 16, 5), (16, 272, 40), (7, 256, 33)):
        q, w = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((rows, k), (n, k)))
        scale, bias = torch.rand(n), torch.randn(n)
        y = triton_mm.float8_product(q, w, scale, bias, torch.float32)
        assert y is not None
        right = (q.double() @ w.double().t()) * scale + bias
        bound = 2.0**-15 * ((q.double().abs() @ w.double().abs().t()) * scale + bias.abs())
        assert ((y - right).abs() <= bound).all()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.library.wrap_triton = lambda kernel: kernel
    triton_mm.DEVICE = "cpu"
    {
        "product": lambda: check_product(Interpreted(triton_mm), max_examples=12),
        "convolution": lambda: check_convolution(Interpreted(triton_conv), max_examples=25),
        "float8": check_float8,
    }[sys.argv[1]]()
    print(f"{sys.argv[1]}: right")
