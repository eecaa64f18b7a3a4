"""Laws of backends: sums are exact, and rounded once, as `linear` and `conv` do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import functional_sq as fsq
from functional_sq.backends import Convolution, Product
from functional_sq.folded import backend_codes
from functional_sq.int_mm import INT32_TERMS
from functional_sq.operands import Operands
from functional_sq.qparams import QParams
from functional_sq.requantize import ACTIVATIONS, apply_epilogue
from functional_sq.testing.assertions import assert_same_bits, require
from functional_sq.windows import flatten_padding

__all__ = ["convolution_is_exact", "product_is_exact"]

_UINT8: Final = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)


def product_is_exact(
    backend: Product,
    *,
    rows: int,
    k: int,
    n: int,
    zero_point: int,
    fill: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = None,
    residual: bool = False,
    strided: bool = False,
    asymmetric: bool = False,
    real: torch.dtype | None = None,
    activation: str | None = None,
    step: float = 0.25,
    device: torch.device | str = "cpu",
) -> None:
    """Assert that a backend sums exactly, and then rounds as `linear` does.

    `sum_k (q - zero_point) (w - weight_zero_point)` is converted to float32 once, scaled, the bias and the residual
    are added, each rounded to float32, and the result is rounded to `dtype`. Codes that the backend makes are the
    nearest, or within a 32nd of the border of two. Weight, scale, bias and zero point are what they are at the call,
    also if they were written to after another. Nothing of that is written to by the backend, nor a result that it gave
    before. It supports int8 codes alone, and is asked without their values, as where a graph is traced.

    Args:
        backend: what is under test.
        rows, k, n: sizes; `(rows, k)` codes of `backend.CODES` meet `(n, k)` of int8.
        zero_point: that of the activations, as codes of uint8.
        fill: "all": codes are drawn among all, "ends": among the two at the ends, "far": near those that make the
            largest sums.
        seed: of what is drawn.
        dtype: of the result.
        bias: its dtype, if there is one.
        residual: whether there is one, in `dtype`; `(rows, n)`.
        strided: whether scale and bias are every second element of a tensor, and the residual is `(1, rows, n)`,
            transposed; that of a convolution has its channels first in memory.
        asymmetric: whether the weight has zero points, for a backend that supports them.
        real: dtype of the values that the codes are made of, where a backend is given these beside the codes.
        activation: a key of `ACTIVATIONS`; codes are compared too, if the backend makes them after it.
        step: their scale; a 32nd of it is one too.
        device: where the backend multiplies. What is right is computed on the CPU.

    Example:
        >>> from functional_sq import onednn
        >>> if onednn.AVAILABLE:
        ...     product_is_exact(onednn, rows=3, k=2000, n=5, zero_point=255, fill="far", seed=0, bias=torch.float32)
    """
    draw = torch.Generator().manual_seed(seed)
    q, w = (t.to(device) for t in _drawn_codes(draw, (rows, k), (n, k), fill, zero_point, seed))
    z = torch.tensor([zero_point], dtype=torch.int32, device=device)
    of_weight = _drawn_zero_points(draw, n, device) if asymmetric else None

    def sums() -> Tensor:
        return ((q.cpu().double() - z.cpu()) @ _real(w, of_weight).t()).long()  # exact below 2**53

    total = sums()
    scale, b = _drawn_epilogue(draw, n, bias, strided, device, _scale_divisor(activation, total))
    _assert_asked(backend, w, of_weight, backend.rows, range)
    results = []
    for written_to in ("nothing", "codes", "the rest"):
        _write(written_to, w, z, scale, b)
        total = sums()
        offset = _offset(z, w, of_weight)
        operands = _operands(backend, draw, q, z, real, w, of_weight, scale, offset, b)
        results.append(_assert_rounded(backend, backend.product, operands, total, dtype, activation, step))
        if residual:
            added = torch.randn(n, rows, generator=draw).t() if strided else torch.randn(rows, n, generator=draw)
            added = added.to(device, dtype)
            added = added[None] if strided else added
            before, of_scale, of_bias = _on_cpu(added, scale, b)
            right = apply_epilogue(total.reshape(added.shape), of_scale, of_bias, dtype, before)
            assert_same_bits("plus(residual, ...)", "exact", backend.plus(added, operands).cpu(), right)
            assert_same_bits("residual after the call", "residual", added.cpu(), before)
    _assert_kept(results)


def convolution_is_exact(
    backend: Convolution,
    *,
    images: int,
    size: Sequence[int],
    channels: int,
    outputs: int,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    zero_point: int,
    fill: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = None,
    strided: bool = False,
    asymmetric: bool = False,
    residual: bool = False,
    real: torch.dtype | None = None,
    last: bool = True,
    activation: str | None = None,
    step: float = 0.25,
    device: torch.device | str = "cpu",
) -> None:
    """Assert that a backend that is asked sums windows exactly, and then rounds as `conv` does: as `product_is_exact`.

    Args:
        backend: what is under test.
        images, size: how many images, and their height and width, or depth, height and width.
        channels, outputs, groups: of each group, and how many groups: `(images, groups * channels, *size)` codes of
            `backend.CODES` meet `(groups * outputs, channels, *kernel)` of int8.
        kernel: along all of `size`, or along the width alone.
        stride, dilation: along all of `size`.
        padding: above, below, left and right, before that in front and behind; what is there has the code `zero_point`.
        zero_point, fill, seed, dtype, bias, strided, asymmetric, real, activation, step, device: as `product_is_exact`.
        residual: whether one is added, in `dtype`, and what is positive of the sum is asked for too.
        last: whether the channels of the images lie last in memory, as those that `conv` gives.

    Example:
        >>> from functional_sq import onednn, onednn_conv
        >>> geometry = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 0, 1, 0), "dilation": (1, 1)}
        >>> layer = {"channels": 8, "outputs": 4, "groups": 2, **geometry}
        >>> if onednn.AVAILABLE:
        ...     convolution_is_exact(onednn_conv, images=2, size=(7, 6), **layer, zero_point=3, fill="all", seed=0)
    """
    draw = torch.Generator().manual_seed(seed)
    n = groups * outputs
    shapes = (images, groups * channels, *size), (n, channels, *kernel)
    q, w = (t.to(device) for t in _drawn_codes(draw, *shapes, fill, zero_point, seed))
    z = torch.tensor([zero_point], dtype=torch.int32, device=device)
    if last:
        q = q.movedim(1, -1).contiguous().movedim(-1, 1)
    of_weight = _drawn_zero_points(draw, n, device) if asymmetric else None
    rank = len(size)
    sides = flatten_padding([*zip(padding[::2], padding[1::2], strict=True)])

    def sums() -> Tensor:
        # Sums of float64 are exact below 2**53, in any order.
        wide = F.pad(q.cpu().double() - z.cpu(), sides)
        rows = _real(w, of_weight).reshape(*w.shape[:2], *(1 for _ in range(rank - len(kernel))), *kernel)
        op = F.conv2d if rank == 2 else F.conv3d
        return op(wide, rows, None, tuple(stride), 0, tuple(dilation), groups).long().movedim(1, -1)

    total = sums()
    scale, b = _drawn_epilogue(draw, n, bias, strided, device, _scale_divisor(activation, total))

    def windows(codes: Tensor, zero_point: Tensor | None) -> range:
        along = len(kernel)
        return backend.windows(codes, zero_point, stride[-along:], dilation[-along:], groups)

    def convolved(operands: Operands, *then: Any, **to: Any) -> Tensor:
        return backend.convolve(operands, stride, padding, dilation, groups, *then, **to).movedim(1, -1)

    _assert_asked(backend, w, of_weight, windows, range)
    if not windows(w, of_weight):
        return  # it is never asked
    results = []
    for written_to in ("nothing", "codes", "the rest"):
        _write(written_to, w, z, scale, b)
        offset = _offset(z, w, of_weight)
        operands = _operands(backend, draw, q, z, real, w, of_weight, scale, offset, b)
        total = sums()
        results.append(_assert_rounded(backend, convolved, operands, total, dtype, activation, step))
        if residual:
            added = torch.randn(total.shape, generator=draw).to(device, dtype)
            before, of_scale, of_bias = _on_cpu(added, scale, b)
            plain = apply_epilogue(total, of_scale, of_bias, dtype, before)
            images_of = added.movedim(-1, 1).contiguous() if strided else added.movedim(-1, 1)
            for name, exact in (("none", plain), ("relu", plain.relu())):
                y = convolved(operands, name, dtype=dtype, residual=images_of)
                assert_same_bits(f"convolve({name!r}, residual=...)", "exact", y.cpu(), exact)
            assert_same_bits("residual after the call", "residual", added.cpu(), before)
    _assert_kept(results)


def _operands(
    backend: Product | Convolution,
    draw: torch.Generator,
    q: Tensor,
    z: Tensor,
    real: torch.dtype | None,
    *of_weight: Any,
) -> Operands:
    """Return the operands of a call, with values that the codes are made of if `real` is their dtype."""
    operands = Operands(*_taken(backend, q, z), *of_weight)
    if real is None:
        return operands
    x, x_scale = _drawn_real(draw, q, z, real)
    return operands._replace(x=x, x_scale=x_scale)


def _drawn_real(draw: torch.Generator, q: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return values that have codes of uint8, near them or beyond the last ones, and their scale."""
    near = torch.randint(-1, 2, q.shape, generator=draw) / (1 if dtype is torch.bfloat16 else 4)
    codes = q.cpu().float()
    codes += torch.where(
        (codes + near.sign()).clamp(0, 255) == codes, 100 * near, 0 if dtype is torch.bfloat16 else near
    )
    x = (codes - z.cpu()) * 0.125
    layout = torch.empty_strided(q.shape, q.stride(), dtype=dtype, device=q.device)
    return layout.copy_(x), torch.tensor([0.125], device=q.device)


def _write(what: str, codes: Tensor, zero_point: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Write to what a backend was given before, as `load_state_dict` does."""
    if what == "codes":
        codes.bitwise_not_()
    elif what == "the rest":
        zero_point.neg_().add_(255)
        scale.mul_(0.75)
        if bias is not None:
            bias.neg_()


def _drawn_zero_points(draw: torch.Generator, n: int, device: torch.device | str) -> Tensor:
    """Return those of a weight."""
    points = torch.randint(-128, 128, (n,), generator=draw).to(device, torch.int32)
    return points[:1].expand(n) if int(points[0]) % 4 == 0 else points  # one for all has no stride


def _real(codes: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return a weight's codes less its zero points, in float64 on the CPU."""
    zero = 0 if zero_point is None else zero_point.cpu().reshape(-1, *(1 for _ in codes.shape[1:]))
    return codes.cpu().double() - zero


def _offset(z: Tensor, codes: Tensor, zero_point: Tensor | None) -> Tensor:
    """Return what `epilogue` subtracts from the sums of codes less 128: int64 for many products."""
    total = (z.cpu().long() - 128) * _real(codes, zero_point).flatten(1).sum(1).long()
    return total.to(codes.device, torch.int32 if codes[0].numel() <= INT32_TERMS else torch.int64)


def _assert_asked(
    backend: Product | Convolution, codes: Tensor, zero_point: Tensor | None, ask: Callable[..., Any], kind: type
) -> None:
    """Assert that a backend says what it takes: int8 alone, and by shapes, dtypes and devices alone."""
    floats = codes.to(torch.float8_e4m3fn)
    require(not backend.supports(floats, None), "codes of float8 are not supported", shape=floats.shape)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = mode.from_tensor(codes), None if zero_point is None else mode.from_tensor(zero_point)
        try:
            traced = (backend.supports(*given), ask(*given))
        except Exception as error:
            raise AssertionError("not so: it is asked without values, as where a graph is traced") from error
    answers = (backend.supports(codes, zero_point), ask(codes, zero_point))
    require(isinstance(answers[1], kind), f"the least work is told by a {kind.__name__}", answer=str(answers[1]))
    require(answers == traced, "the answers are those without values", answers=answers, without=traced)


def _assert_kept(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Assert that no call wrote to the result of one before."""
    for i, (y, right) in enumerate(results):
        assert_same_bits(f"result of call {i} after the others", "exact", y.cpu(), right)


def _taken(backend: Product | Convolution, q: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return codes of uint8, and their zero point, as `linear` and `conv` give them to a backend; 128 as known."""
    spec = dataclasses.replace(_UINT8, mapping=fsq.MappingType.SYMMETRIC) if int(z) == 128 else _UINT8
    return backend_codes(backend.CODES, spec, q, QParams(torch.ones(1), z))


def _drawn_codes(
    draw: torch.Generator, of_q: tuple[int, ...], of_w: tuple[int, ...], fill: str, zero_point: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return codes of activations and of a weight."""

    def codes(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype, *, upper: bool) -> Tensor:
        if fill == "ends":
            return torch.where(torch.rand(shape, generator=draw) < 0.5, low, high).to(dtype)
        if fill == "far":
            low, high = (high - 63, high) if upper else (low, low + 63)
        return torch.randint(low, high + 1, shape, generator=draw).to(dtype)

    q = codes(0, 255, of_q, torch.uint8, upper=zero_point < 128)
    return q, codes(-128, 127, of_w, torch.int8, upper=seed % 2 > 0)


def _drawn_epilogue(
    draw: torch.Generator, n: int, bias: torch.dtype | None, strided: bool, device: torch.device | str, divisor: float
) -> tuple[Tensor, Tensor | None]:
    """Return scales, with which a sum of `divisor` is 1/4 to 16, and a bias of some dtype, or none."""
    step = 2 if strided else 1
    scale = (torch.exp2(torch.rand(n * step, generator=draw) * 6 - 2) / divisor).to(device)[::step]
    return scale, None if bias is None else torch.randn(n * step, generator=draw).to(device, bias)[::step]


def _scale_divisor(activation: str | None, sums: Tensor) -> float:
    """Return what scales are divided by: with an activation the largest of them, so that they lie where it bends."""
    return 1024.0 if activation is None or sums.numel() == 0 else max(1.0, float(sums.abs().max()))


def _on_cpu(*tensors: Tensor | None) -> list[Any]:
    """Return copies that nothing writes to."""
    return [None if t is None else t.detach().cpu().clone() for t in tensors]


def _assert_rounded(
    backend: Product | Convolution,
    call: Callable[..., Tensor],
    operands: Operands,
    total: Tensor,
    dtype: torch.dtype,
    activation: str | None,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Assert that `call(operands, ...)` is the epilogue of exact sums `(..., N)`, and nearest codes of an activation.

    Return the result in `dtype` as it came, and what is right.
    """
    device, before = operands.scale.device, _on_cpu(*operands)
    scale, bias = _on_cpu(operands.scale, operands.bias)

    def called(*then: Any, **to: Any) -> Tensor:
        y = call(operands, *then, **to)
        for name, after, old in zip(operands._fields, _on_cpu(*operands), before, strict=True):
            assert_same_bits(f"operands.{name} after the call", f"operands.{name}", after, old)
        return y

    y, right = called(dtype=dtype), apply_epilogue(total, scale, bias, dtype)
    assert_same_bits("result", "exact", y.cpu(), right)
    if activation is None:
        return y, right
    to_scale = torch.tensor([step])
    for other, scales in (
        (fsq.QuantSpec(torch.int8, fsq.PerTensor(), quant_min=-127), to_scale),
        (dataclasses.replace(_UINT8, quant_max=15), to_scale),
        (_UINT8, torch.ones(2)),
        (_UINT8, to_scale.double()),
    ):
        asked = backend.requantizes(other, scales, activation)
        require(not asked, "codes are made of one scale in float32 and all 8 bits alone", spec=other, scale=scales)
    if not backend.requantizes(_UINT8, to_scale, activation):
        return y, right
    exact = ACTIVATIONS[activation](apply_epilogue(total, scale, bias, torch.float32).double())
    shift = 0 if backend.CODES is torch.uint8 else 128
    for each, zero in ((to_scale, 100), (to_scale / 32, 255), (to_scale, 0)):
        to_zero_point = torch.tensor([zero - shift], dtype=torch.int32, device=device)
        codes = called(activation, each.to(device), to_zero_point).cpu()
        require(codes.dtype is backend.CODES, "codes have the backend's dtype", dtype=str(codes.dtype))
        steps = (exact / each + zero).clamp(0, 255)
        require(codes.shape == steps.shape, "the result has its shape", shape=codes.shape, right=steps.shape)
        # A sum of terms of up to 20, each rounded to float32, is off by less than 2**-7 of the smallest step, and
        # polynomials in place of activations by as much.
        off = (codes.double() + shift - steps).abs()
        near = bool((off <= 0.5 + 2**-5).all())
        require(near, "codes are the nearest, or at the border of two", codes=codes, steps=steps - shift)
    return y, right
