"""Run the laws of backends on Triton's kernels, interpreted on the CPU; a program, for Triton asks its environment.

TRITON_INTERPRET=1 python tests/interpreted.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import functional_sq as fsq
from functional_sq import backends, triton_conv, triton_mm
from functional_sq.operands import Operands
from functional_sq.testing import check_convolution_backend, check_product_backend, convolution_is_exact


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
    """A backend whose kernels write float32: the interpreter cuts bfloat16 off, a GPU rounds it.

    It takes weights of two tiles of outputs and of few steps, for each program of a kernel runs in turn.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def supports(self, codes: Tensor, zero_point: Tensor | None) -> bool:
        return codes.shape[0] <= 40 and codes[0].numel() < 4096 and self.backend.supports(codes, zero_point)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def product(self, *operands: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        y = self.backend.product(*operands)
        return y.to(dtype) if y.is_floating_point() else y

    def plus(self, residual: Tensor, *operands: Any) -> Tensor:
        return self.backend.plus(residual.float(), *operands).to(residual.dtype)

    def convolve(self, *operands: Any, dtype: torch.dtype = torch.float32, residual: Tensor | None = None) -> Tensor:
        y = self.backend.convolve(*operands, residual=None if residual is None else residual.float())
        return y.to(dtype) if y.is_floating_point() else y


def check_bare() -> None:
    """int8 is exact. Float8: sums of 272 products err by 2**-15 of what they add, and the epilogue by a few units."""
    for rows, k, n in ((1, 16, 5), (16, 272, 40), (7, 256, 33), (0, 16, 3)):
        a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((rows, k), (n, k)))
        assert torch.equal(triton_mm.bare_product(a, b).long(), a.long() @ b.long().t())
        q, w = (torch.randn(shape).to(torch.float8_e4m3fn) for shape in ((rows, k), (n, k)))
        scale, bias = torch.rand(n), torch.randn(n)
        y = triton_mm.float8_linear(q, w, scale, bias, torch.float32)
        assert y is not None
        right = (q.double() @ w.double().t()) * scale + bias
        bound = 2.0**-15 * ((q.double().abs() @ w.double().abs().t()) * scale + bias.abs())
        assert ((y - right).abs() <= bound).all()


GROUPS = [
    # channels and outputs of a group, groups, kernel, and stride and dilation along the width
    (4, 6, 16, (3, 3), 1, 2),  # 8 groups at once
    (1, 1, 24, (3, 2), 1, 2),  # all at once: 24 channels do not fill a step
    (40, 8, 2, (2, 2), 1, 2),  # one at a time, of more than a step
    (48, 20, 1, (1, 3), 1, 2),
    (3, 20, 1, (3, 7), 1, 1),  # a step is a row of the kernel; a zero beside three channels
    (1, 20, 1, (2, 12), 1, 1),  # two steps, the second one not full
    (3, 8, 2, (2, 3), 1, 1),  # so with groups
    (12, 20, 1, (2, 2), 1, 2),  # zeros, and a step is a pixel
    (10, 8, 2, (1, 1), 1, 1),
    (3, 20, 1, (3, 7), 2, 1),  # two pixels are one; the last of a row of the kernel has zeros
    (3, 20, 1, (2, 8), 4, 1),
    (3, 8, 2, (2, 3), 3, 1),
]


def check_groups() -> None:
    """Groups that are put together and steps that are not full, with the sums of an asymmetric weight and in float8."""
    for channels, outputs, groups, kernel, step, dilation in GROUPS:
        settings: Any = {"stride": (2, step), "padding": (1, 0, 2, 1), "dilation": (1, dilation), "groups": groups}
        size = 5, 6 + kernel[1]
        sizes: Any = {"images": 2, "size": size, "channels": channels, "outputs": outputs, "kernel": kernel}
        rest: Any = {"fill": "all", "seed": 0, "bias": torch.float32, "dtype": torch.float32}
        for zero_point, asymmetric, activation in ((3, True, None), (128, True, None), (128, False, "relu")):
            case: Any = {"zero_point": zero_point, "asymmetric": asymmetric, "activation": activation}
            convolution_is_exact(triton_conv, **case, **sizes, **settings, **rest)
        q, w = torch.randn(2, channels * groups, *size), torch.randn(outputs * groups, channels, *kernel)
        q, w = (t.to(torch.float8_e4m3fn) for t in (q, w))
        scale, bias = torch.rand(len(w)), torch.randn(len(w))
        kernel = triton_conv.float8_for(q, w, False)
        assert kernel is not None
        y = kernel.convolve(Operands(q, None, w, None, scale, None, bias), **settings)
        x, along = F.pad(q.double(), (2, 1, 1, 0)), (-1, 1, 1)
        right, most = (
            F.conv2d(a, b, None, (2, step), 0, (1, dilation), groups) * scale.double().reshape(along)
            for a, b in ((x, w.double()), (x.abs(), w.double().abs()))
        )
        bound = 2.0**-15 * (most + bias.abs().reshape(along))
        assert ((y - (right + bias.double().reshape(along))).abs() <= bound).all()


def check_floats() -> None:
    """Codes that the kernel makes as it loads, with rows and columns past the end and steps that are not full."""
    geometry: Any = {"kernel": (1, 1), "stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 1), "groups": 1}
    for channels, asymmetric, real in ((48, True, torch.float32), (64, False, torch.float16), (8, True, torch.float32)):
        layer: Any = {"images": 2, "size": (5, 6), "channels": channels, "outputs": 20, "asymmetric": asymmetric}
        rest: Any = {"zero_point": 100, "fill": "ends", "seed": 0, "residual": True, "activation": "relu"}
        convolution_is_exact(triton_conv, real=real, **layer, **geometry, **rest)
    # Values of codes, for the interpreter cuts float8 off too, and some beyond the largest.
    scale, w = torch.tensor([0.5]), torch.randn(20, 48, 1, 1).to(torch.float8_e4m3fn)
    q = (200 * torch.randn(2, 48, 5, 6)).clamp(-448, 448).to(torch.float8_e4m3fn)
    x = torch.where(q.float().abs() == 448, 2.0, 0.5) * q.float()
    x, q = (each.contiguous(memory_format=torch.channels_last) for each in (x, q))
    settings: Any = {"stride": (2, 1), "padding": (1, 0, 2, 1), "dilation": (1, 1), "groups": 1}
    one = torch.ones(20)
    codes, floats = (
        triton_conv.convolve(Operands(each, None, w, None, one, None, None, given, scale), **settings)
        for each, given in ((q, None), (torch.zeros_like(q), x))
    )
    assert torch.equal(codes, floats)


def check_compiled() -> None:
    """Dynamo sees one graph of the functions that ask the backends, for any number of rows."""
    backends.PRODUCTS[:], backends.CONVOLUTIONS[:] = [triton_mm], [triton_conv]
    spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
    qp = fsq.QParams(torch.tensor([0.02]), torch.zeros(1, dtype=torch.int32))
    asymmetric, symmetric = fsq.MappingType.ASYMMETRIC, fsq.MappingType.SYMMETRIC
    for function, mapping, shape, *sizes in (
        (fsq.linear, asymmetric, (20, 32), (2, 32), (70, 32)),
        (partial(fsq.conv, groups=8), asymmetric, (24, 4, 3, 3), (2, 32, 5, 5), (3, 32, 4, 8)),
        (partial(fsq.conv, stride=2, padding=1), symmetric, (24, 3, 3, 3), (2, 3, 5, 5), (3, 3, 4, 8)),
    ):
        scale = torch.rand(shape[0], *(1 for _ in shape[1:]))
        zero_point = torch.randint_like(scale, -128, 128, dtype=torch.int32)
        of_weight = fsq.QParams(scale, zero_point if mapping is asymmetric else torch.zeros_like(zero_point))
        codes = torch.randint(-128, 128, shape, dtype=torch.int8)
        weight = fsq.fold(fsq.QuantSpec(torch.int8, fsq.PerAxis(0), mapping=mapping), codes, of_weight)
        known = fsq.epilogue(spec, qp, weight)
        compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
        for size in sizes:
            q = torch.randint(-128, 128, size, dtype=torch.int8)
            assert torch.equal(compiled(spec, q, qp, weight, epilogue=known), function(spec, q, qp, weight))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.library.wrap_triton = Kernel
    triton_mm.DEVICE = "cpu"
    check_product_backend(Interpreted(triton_mm), max_examples=6)
    check_convolution_backend(Interpreted(triton_conv), max_examples=9)
    check_bare()
    check_groups()
    check_floats()
    check_compiled()
    print("right")
