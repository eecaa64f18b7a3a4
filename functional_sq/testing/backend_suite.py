"""The suite of backends: the law of products and that of convolutions, with the cases that they are checked on."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, Final

import torch
from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from functional_sq.backends import Convolution, Product
from functional_sq.requantize import ACTIVATIONS
from functional_sq.testing.backend_laws import convolution_is_exact, product_is_exact
from functional_sq.testing.law import Law, check_law

__all__ = ["check_convolution_backend", "check_product_backend"]

_WIDE: Final = 120_000
"""So many products, all near the largest, have a sum that int32 does not hold."""


@st.composite
def _products(draw: st.DrawFn, backend: Product, device: str) -> dict[str, Any]:
    whole = st.integers(1, 8).map(lambda i: 16 * i)  # all that some backends take
    k = draw(st.one_of(st.integers(1, 70), whole, st.sampled_from([384, 513, 1025, 2048, 4999, 9001, 9008, _WIDE])))
    n = draw(st.one_of(st.integers(1, 40), st.sampled_from([100, 300])))
    rows = draw(st.one_of(st.integers(0, 40), st.sampled_from([65, 130, 257, 600])))
    if k == _WIDE:
        n, rows = min(n, 3), min(rows, 3)
    if not backend.supports(torch.empty(n, k, dtype=torch.int8, device=device), None):
        reject()
    zero_points = torch.empty(n, 1, dtype=torch.int32, device=device)
    asymmetric = backend.supports(torch.empty(n, k, dtype=torch.int8, device=device), zero_points)
    return {
        "backend": backend,
        "asymmetric": asymmetric and draw(st.booleans()),
        "rows": rows,
        "k": k,
        "n": n,
        **_roundings(draw, device, k),
        "residual": draw(st.booleans()),
    }


@st.composite
def _convolutions(draw: st.DrawFn, backend: Convolution, device: str, *, alone: bool) -> dict[str, Any]:
    rows = not alone and draw(st.sampled_from([False, False, False, True]))  # of a matrix, where they lie
    if alone:
        channels, outputs, groups = 1, 1, draw(st.sampled_from([65, 2, 17, 33, 64, 130]))
    else:
        channels = draw(st.one_of(st.integers(1, 8), st.sampled_from([1, 32, 65, 96, 128, 900, 5000])))
        outputs = draw(st.one_of(st.integers(1, 12), st.integers(33, 80)))
        several = channels * outputs < 100 and not rows
        groups = draw(st.one_of(st.integers(1, 6), st.sampled_from([9, 17]))) if several else 1
    weight = groups * outputs, channels
    has_depth = backend.supports(torch.empty((*weight, 1, 1, 1), dtype=torch.int8, device=device), None)
    rank = draw(st.sampled_from([1, 2, 3] if has_depth else [1, 2]))
    sides = st.just(1) if rows else st.integers(1, 4 if rank < 3 else 3)
    kernel = draw(st.tuples(*(sides for _ in range(rank))))
    codes = torch.empty((*weight, *kernel), dtype=torch.int8, device=device)
    if not backend.supports(codes, None):
        reject()
    zero_points = torch.empty((len(codes), *(1 for _ in codes.shape[1:])), dtype=torch.int32, device=device)
    asymmetric = backend.supports(codes, zero_points)
    size, stride, dilation = [], [], []
    padding: list[int] = []
    few = st.integers(0, 6 if rank < 3 else 3)
    more_or_far = st.one_of(few, st.sampled_from([33])) if channels < 100 and rank < 3 else few
    for k in kernel if rank > 1 else (1, *kernel):
        gap, around = draw(st.integers(1, 3)), draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
        around = (0, 0) if rows else around
        extent = gap * (k - 1) + 1
        size.append(max(1, extent - sum(around)) + draw(more_or_far))
        stride.append(1 if rows else draw(st.integers(1, 4)))
        padding += around
        dilation.append(gap)
    asymmetric = asymmetric and draw(st.booleans())
    along = len(kernel)
    if not backend.windows(codes, zero_points if asymmetric else None, stride[-along:], dilation[-along:], groups):
        reject()  # it is never asked
    return {
        "backend": backend,
        "asymmetric": asymmetric,
        "images": draw(st.sampled_from([1, 2, 3, 0])),
        "size": tuple(size),
        "channels": channels,
        "outputs": outputs,
        "groups": groups,
        "kernel": kernel,
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "last": draw(st.booleans()),
        "residual": draw(st.booleans()),
        **_roundings(draw, device, channels * math.prod(kernel)),
    }


def _roundings(draw: st.DrawFn, device: str, k: int) -> dict[str, Any]:
    """Return what the laws of backends have in common, for sums of `k` products."""
    # Above 2**24 sums in float32 are wrong in their last bits, which a float32 alone shows.
    largest = k == _WIDE or (k > 2**24 // (192 * 64) and draw(st.booleans()))
    ends = st.sampled_from([0, 128, 255])
    return {
        "device": device,
        "zero_point": draw(ends if largest else st.one_of(st.integers(0, 255), ends)),
        "fill": "far" if largest else draw(st.sampled_from(["far", "ends", "all"])),
        "seed": draw(st.integers(0, 2**16)),
        "dtype": torch.float32 if largest else draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "bias": draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16])),
        "strided": draw(st.booleans()),
        "step": draw(st.sampled_from([0.25, 0.01])),
        "activation": draw(st.one_of(st.none(), st.sampled_from(sorted(ACTIVATIONS)))),
        "real": draw(st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16])),
    }


def check_product_backend(backend: Product, *, device: torch.device | str = "cpu", max_examples: int = 300) -> None:
    """Check that a backend multiplies exactly and rounds as `linear` does.

    Args:
        backend: what may join `functional_sq.backends.PRODUCTS`.
        device: where it multiplies.
        max_examples: number of cases to draw, among the weights that it supports.

    Raises:
        AssertionError: it does not; the message has the smallest case that was found, as a call, and what
            was wrong.
        TypeError: it lacks a part of the protocol, or its `key` is no function that returns a tuple.

    Example:
        >>> from functional_sq import onednn
        >>> if onednn.AVAILABLE:
        ...     check_product_backend(onednn, max_examples=5)
    """
    _check_backend(backend, Product, Law(product_is_exact, lambda b: _products(b, str(device))), max_examples)


def check_convolution_backend(
    backend: Convolution, *, device: torch.device | str = "cpu", max_examples: int = 300
) -> None:
    """Check that a backend convolves exactly and rounds as `conv` does: any geometry, groups, and images of any size.

    Args:
        backend: what may join `functional_sq.backends.CONVOLUTIONS`.
        device: where it convolves.
        max_examples: number of cases to draw, among the weights that it supports; and a third of it of channels that
            are convolved each alone, if it supports such.

    Raises:
        AssertionError, TypeError: as `check_product_backend`.

    Example:
        >>> from functional_sq import onednn, onednn_conv
        >>> if onednn.AVAILABLE:
        ...     check_convolution_backend(onednn_conv, max_examples=5)
    """
    law = Law(convolution_is_exact, lambda b: _convolutions(b, str(device), alone=False))
    _check_backend(backend, Convolution, law, max_examples)
    # Drawn among all they would be few, and alike.
    law = Law(convolution_is_exact, lambda b: _convolutions(b, str(device), alone=True))
    with suppress(Unsatisfiable):
        check_law(law, backend, max_examples=math.ceil(max_examples / 3))


def _check_backend(backend: Product | Convolution, protocol: type, law: Law, max_examples: int) -> None:
    parts = {name for c in protocol.__mro__ for name in (*vars(c), *vars(c).get("__annotations__", ()))}
    missing = sorted(name for name in parts if not name.startswith("_") and not hasattr(backend, name))
    if missing:
        raise TypeError(
            f"{backend!r} has no {', '.join(missing)}; "
            f"give an object with all that functional_sq.backends.{protocol.__name__} has"
        )
    if not callable(backend.key) or not isinstance(backend.key("cpu"), tuple):
        raise TypeError(f"{backend!r}.key is no function that returns a tuple; give what its answers depend on, or ()")
    try:
        check_law(law, backend, max_examples=max_examples)
    except Unsatisfiable as error:
        raise AssertionError(
            f"{backend!r} is asked for none of the weights that were drawn: it supports none, or says no windows; "
            f"nothing is known"
        ) from error
