"""The backends: faster products and convolutions with a weight that is used again than torch has.

A backend is one file, or any object, with the functions of `Product` or `Convolution`, in front of `PRODUCTS` or
`CONVOLUTIONS`; `check_product_backend` and `check_convolution_backend` of `functional_sq.testing` say whether it is
right. `linear`, `conv` and the layers of the bridge take the first backend in the list that supports the weight and is
faster for so many rows. Without one the arithmetic is that of `functional_sq.int_mm` and `float8_mm`: the same bits.

All functions but the products themselves are called while a graph is traced: they see shapes, dtypes, devices and the
machine, never values. Operands may be written to between two products, and by none; scale and bias may have strides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from functional_sq import brgemm, onednn, onednn_conv, triton_conv, triton_mm
from functional_sq.operands import Operands
from functional_sq.spec import QuantSpec
from functional_sq.tracing import is_among

__all__ = [
    "CONVOLUTIONS",
    "PRODUCTS",
    "Convolution",
    "Product",
    "codes_dtype",
    "convolution_for",
    "fingerprint",
    "product_for",
    "sources",
]


class _Backend(Protocol):
    NAME: str
    """What `repr` of a layer and the report call it."""

    CODES: torch.dtype
    """Which codes of activations it takes and makes, with zero points that belong to them: torch.uint8 or int8."""

    def supports(self, codes: Tensor, zero_point: Tensor | None, /) -> bool:
        """Whether it takes a folded weight: its int8 codes, and its zero point, which is None where it is 0."""

    def requantizes(self, spec: QuantSpec, scale: Tensor, activation: str, /) -> bool:
        """Whether it applies a key of `ACTIVATIONS` and makes codes of the result: of all 8 bits, one scale."""

    def key(self, device: str, /) -> tuple[object, ...]:
        """What its answers for weights on a type of device depend on; its `repr` is part of `fingerprint`."""


class Product(_Backend, Protocol):
    """What `linear` asks; `functional_sq.onednn` is one, and says what the arguments are."""

    def rows(self, codes: Tensor, zero_point: Tensor | None, /) -> range:
        """For how many rows it is the faster one; up to `sys.maxsize`: for any number, known or not."""

    def product(
        self,
        operands: Operands,
        /,
        activation: str = "none",
        to_scale: Tensor | None = None,
        to_zero_point: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the product in `dtype`; with `to_scale` codes of it, after the activation."""

    def plus(self, residual: Tensor, operands: Operands, /) -> Tensor:
        """Return the product plus `residual`, which is `(..., N)` and has no gradient, rounded once to its dtype."""


class Convolution(_Backend, Protocol):
    """What `conv` asks; `functional_sq.onednn_conv` is one, and says what the arguments are.

    Of a weight in one dimension or two the images have two. `supports` is asked about weights in three dimensions too,
    which of those here `functional_sq.brgemm` takes.
    """

    def windows(
        self,
        codes: Tensor,
        zero_point: Tensor | None,
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        /,
    ) -> range:
        """For how many windows, of all images together, it is the faster one; as `Product.rows`."""

    def convolve(
        self,
        operands: Operands,
        /,
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
        """Return the sums over windows, scaled, in `dtype`; with `to_scale` codes of them, after the activation.

        A residual is of `dtype` and the result's shape, and has no gradient; the sum with it, or what "relu" leaves of
        that, is rounded once. The real values of `Operands` may be read, and need not be.
        """


PRODUCTS: list[Product] = [brgemm, onednn, triton_mm]
CONVOLUTIONS: list[Convolution] = [brgemm, onednn_conv, triton_conv]


def product_for(rows: int, codes: Tensor, zero_point: Tensor | None) -> Product | None:
    """Return the backend that multiplies so many rows with a folded weight; None: no backend.

    Example:
        >>> import torch
        >>> from functional_sq.backends import product_for
        >>> product_for(32, torch.zeros(4, 8), None) is None  # floats
        True
    """
    for each in PRODUCTS:
        if each.supports(codes, zero_point) and is_among(rows, each.rows(codes, zero_point)):
            return each
    return None


def convolution_for(
    windows: int,
    codes: Tensor,
    zero_point: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Convolution | None:
    """Return the backend that convolves so many windows with a folded weight; None: no backend.

    Example:
        >>> import torch
        >>> from functional_sq.backends import convolution_for
        >>> convolution_for(32, torch.zeros(4, 8, 3), None, (1,), (1,), 1) is None  # floats
        True
    """
    for each in CONVOLUTIONS:
        weight = codes, zero_point
        if each.supports(*weight) and is_among(windows, each.windows(*weight, stride, dilation, groups)):
            return each
    return None


def codes_dtype(codes: Tensor) -> torch.dtype:
    """Return the dtype in which codes are handed to the layer of a weight: that of the backend which takes the weight.

    Example:
        >>> import torch
        >>> from functional_sq.backends import codes_dtype
        >>> codes_dtype(torch.zeros(4, 16, dtype=torch.int8))
        torch.uint8
    """
    known: list[Product] | list[Convolution] = PRODUCTS if codes.ndim == 2 else CONVOLUTIONS
    return next((each.CODES for each in known if each.supports(codes, None)), torch.uint8)


def fingerprint(device: str) -> str:
    """Return what compiled code depends on beside its graph: this package's source, and what backends choose by.

    It must be part of the key of a compiler's cache on disk: a graph has operators of `functional_sq.chains` by name.

    Args:
        device: type of the device that the weight is on, as `tensor.device.type`.

    Example:
        >>> from functional_sq.backends import fingerprint
        >>> fingerprint("cpu") == fingerprint("cuda")
        False
    """
    keys = [(each.NAME, each.key(device)) for each in (*PRODUCTS, *CONVOLUTIONS)]
    return hashlib.sha256(f"{sources()} {keys}".encode()).hexdigest()


@cache
def sources(folder: Path = Path(__file__).parent) -> str:
    """Return what tells versions of the code in a folder apart; in this package's where none is given."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
