"""Run the laws of backends on Triton's kernels, interpreted on the CPU; a program, for Triton asks its environment.

TRITON_INTERPRET=1 python tests/interpreted.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import functional_sq as fsq
from functional_sq import backends, triton_conv, triton_mm
from functional_sq.testing import check_convolution_backend, check_product_backend


class Kernel:
    """What `torch.library.wrap_triton` returns here: nothing runs on fake tensors."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*operands: Any, **settings: Any) -> None:
            if not any(isinstance(each, FakeTensor) for each in operands):
                self.kernel[grid](*operands, **settings)

        return run


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


def check_bare() -> None:
    """int8 is exact. Float8: sums of 272 products err by 2**-15 of what they add, and the epilogue by a few units."""
    for rows, k, n in ((1, 16, 5), (16, 272, 40), (7, 256, 33), (0, 16, 3)):
        a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((rows, k), (n, k)))
        assert torch.equal(triton_mm.bare_product(a, b).long(), a.long() @ b.long().t())
        q, w = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((rows, k), (n, k)))
        scale, bias = torch.rand(n), torch.randn(n)
        y = triton_mm.float8_product(q, w, scale, bias, torch.float32)
        assert y is not None
        right = (q.double() @ w.double().t()) * scale + bias
        bound = 2.0**-15 * ((q.double().abs() @ w.double().abs().t()) * scale + bias.abs())
        assert ((y - right).abs() <= bound).all()


def check_compiled() -> None:
    """Dynamo sees one graph of the functions that ask the backends, for any number of rows."""
    backends.PRODUCTS[:], backends.CONVOLUTIONS[:] = [triton_mm], [triton_conv]
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
    qp = fsq.QParams(torch.tensor([0.02]), torch.zeros(1, dtype=torch.int32))
    for shape, *sizes in (((20, 32), (2, 32), (300, 32)), ((20, 32, 3, 3), (2, 32, 5, 5), (3, 32, 4, 8))):
        scale = torch.rand(shape[0], *(1 for _ in shape[1:]))
        of_weight = fsq.QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
        codes = torch.randint(-128, 128, shape, dtype=torch.int8)
        weight = fsq.fold(fsq.QuantSpec(torch.int8, fsq.PerAxis(0)), codes, of_weight)
        known = fsq.epilogue(spec, qp, weight)
        function = fsq.linear if len(shape) == 2 else fsq.conv
        compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
        for size in sizes:
            q = torch.randint(-128, 128, size, dtype=torch.int8)
            assert torch.equal(compiled(spec, q, qp, weight, epilogue=known), function(spec, q, qp, weight))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.library.wrap_triton = Kernel
    triton_mm.DEVICE = "cpu"
    check_product_backend(Interpreted(triton_mm), max_examples=6)
    check_convolution_backend(Interpreted(triton_conv), max_examples=15)
    check_bare()
    check_compiled()
    print("right")
