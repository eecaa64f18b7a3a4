"""Arithmetic on codes: the product of quantized tensors, without dequantizing them.

With `x = s_x (q_x - z_x)` and `w = s_w (q_w - z_w)`, one output of a linear layer is

    s_x s_w sum_k (q_x - z_x) (q_w - z_w)
        = s_x s_w [ (sum_k q_x q_w - z_w sum_k q_x) - (z_x sum_k q_w - K z_x z_w) ]

`sum_k q_x q_w` is an integer matrix product; the second parenthesis, the offset, is known before the
input is. The bracket is exact: in int32, and grouped as written no intermediate leaves int32 while
`K <= 33025` (`K * 255**2 < 2**31`); a larger `K` is cut into pieces that are added in int64. Rounding
starts with the conversion of the bracket to float32.

Codes of uint8 are shifted by 128 to int8, together with their zero point, which changes no difference
`q - z`: int8 is what the devices multiply.

What multiplies is in other files: `int_mm.py` and `float8_mm.py` give the bare product of any codes on any
device; the backends of `functional_sq.backends` give the result itself, for a weight that is used again, where
they support it and are faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq import brgemm, folded
from functional_sq.backends import Product, product_for
from functional_sq.compat import is_exporting
from functional_sq.float8_mm import float8_linear, float8_product
from functional_sq.folded import (
    Epilogue,
    FoldedWeight,
    backend_codes,
    check_bias,
    check_epilogue,
    check_folded,
    operand,
    zero_point_of_rows,
)
from functional_sq.formats import Float8, check_real, check_real_dtype
from functional_sq.granularity import PerTensor, check_stats
from functional_sq.int_mm import as_written, integer_product, subtract, subtract_product
from functional_sq.operands import Operands
from functional_sq.qparams import QParams, check_qparams
from functional_sq.quantize import dequantize, quantize
from functional_sq.requantize import Requantization, apply_epilogue, check_requantization, requantize, requantize_by
from functional_sq.spec import QuantSpec, check_codes, check_spec
from functional_sq.tracing import computed_once

__all__ = [
    "bracket",
    "check_operands",
    "check_origin",
    "check_residual",
    "direct_product",
    "fits_operator",
    "linear",
    "linear_reference",
    "quantized_linear",
    "with_origin",
]


def linear(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    epilogue: Epilogue | None = None,
    residual: Tensor | None = None,
    then: Requantization | None = None,
    fast_accum: bool = False,
    x: Tensor | None = None,
) -> Tensor:
    """Multiply the codes of activations with a folded weight.

    Integers: exact in int32 (int64 above K = 33025), converted to float32 once, scaled, bias and residual
    added, rounded to `dtype`. Float8: products exact, accumulated in float32, then the same.

    Args:
        spec: the activations' quantization; at most 8 bits, one scale for the tensor or the token.
        q: codes `(..., K)` from `quantize(spec, x, qp)`; any number of leading axes, empty ones too.
        qp: scale and zero point of `q`; the zero point is a code.
        weight: `fold` of an `(N, K)` weight.
        bias: `(N,)` or None, output units.
        dtype: dtype of the result.
        epilogue: `epilogue(spec, qp, weight)`, if it was computed before, for the same bits; for
            `dtype=torch.float64` computed with that dtype. It also says that the weight is used again, so a
            backend may take it. On a CPU it is packed at the first call, one byte an element more, of float8 two,
            for as long as `weight.codes` live.
        residual: `(..., N)` in `dtype`, or None: what is added to the result before it is rounded to `dtype`.
        then: return the next layer's codes, `requantize(linear(...), then)`. Where a backend makes them, the
            result is not rounded to `dtype` before, and a code may differ by one where a value lies on the
            border of two.
        fast_accum: let a CUDA device add float8 products with fewer bits than float32 has: faster on
            Hopper, less exact. Integers are not affected.
        x: what `q` are the codes of, real values `(..., K)`, or None. A kernel that quantizes as it loads reads these
            instead.

    Returns:
        `(..., N)` in `dtype`; with `then`, in the storage dtype of `then.spec`.

    Raises:
        TypeError: integer codes meet float8 codes, `dtype` or `x` holds no real values, or `residual` or `epilogue`
            has another dtype.
        ValueError: shapes do not fit, the activations have scales along K, or `then` names no known activation.

    Source: Jacob et al. 2018 (arXiv:1712.05877), equation 7.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), one)
        >>> fsq.linear(spec, torch.tensor([[10, 1]], dtype=torch.int8), one, weight)
        tensor([[12., 34.]])
    """
    qp = check_operands(spec, q, qp, weight)
    lead, n, k = q.shape[:-1], weight.codes.shape[0], weight.codes.shape[-1]
    _check_inner(q, weight.codes)
    if not isinstance(spec.granularity, PerTensor):
        check_stats(spec.granularity, "the activations' scale", qp.scale.shape, q.shape)
    check_real_dtype(dtype, "linear to ")
    if then is not None:
        then = check_requantization(then)
    check_residual(residual, (*lead, n), dtype)
    check_origin(x, q.shape)
    wide = torch.promote_types(dtype, torch.float32)
    check_epilogue(epilogue, bias, weight, wide)
    scale, offset = folded.epilogue(spec, qp, weight, dtype=wide) if epilogue is None else epilogue
    # Computed once: of a view Inductor writes a copy for each layer that shares the codes. Contiguous: oneDNN takes
    # rows that overlap or repeat for rows apart, and reads past them.
    flat = computed_once(q).reshape(math.prod(lead), k).contiguous()
    if scale.ndim == 2 and scale.shape[0] != flat.shape[0]:
        raise ValueError(
            f"{scale.shape[0]} tokens have scales and activations of shape {tuple(q.shape)} have {flat.shape[0]} "
            f"tokens; quantize and multiply with the same qp"
        )
    per_output = scale.ndim == 1 and fits_operator(scale, bias, wide)
    backend: Product | brgemm.Float8Kernels | None = None
    if per_output and epilogue is not None:
        of_weight = weight.codes, weight.zero_point
        backend = brgemm.float8_for(weight.codes) if offset is None else product_for(flat.shape[0], *of_weight)
    y: Tensor | None = None
    if backend is not None:
        taken = (flat, None) if offset is None else backend_codes(backend.CODES, spec, flat, qp)
        operands = Operands(*taken, weight.codes, zero_point_of_rows(weight), scale, offset, bias)
        if x is not None:
            operands = with_origin(operands, x.reshape(flat.shape), spec, qp)
        if residual is not None and residual.requires_grad:  # which an operator of a backend would not hand on
            y = (backend.product(operands).reshape(residual.shape) + residual.to(torch.float32)).to(dtype)
        elif residual is not None:
            y = backend.plus(residual, operands)
        elif then is not None and backend.requantizes(then.spec, then.qp.scale, then.activation):
            y, then = requantize_by(partial(backend.product, operands), then, backend.CODES), None
        else:
            y = backend.product(operands, dtype=dtype)
    elif per_output and offset is None and residual is None:
        y = float8_linear(flat, weight.codes, scale, bias, dtype, fast_accum)
    if y is None:
        added = None if residual is None else residual.reshape(flat.shape[0], n)
        product = bracket(operand(spec, flat), weight, offset, fast_accum)
        y = apply_epilogue(product, scale, bias, dtype, added)
    y = y.reshape(*lead, n)
    return y if then is None else requantize(y, then)


def quantized_linear(
    spec: QuantSpec,
    x: Tensor,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None = None,
    *,
    epilogue: Epilogue | None = None,
    fast_accum: bool = False,
) -> Tensor:
    """Return `linear` of `quantize(spec, x, qp)` in the dtype of `x`: by one operator in eager mode, where one can.

    The steps of `quantize` take 25 us, whatever they are called for; the product of 32 rows with 384 x 384 takes 15.

    Args:
        spec: the activations' quantization.
        x: real values `(..., K)`.
        qp: scale and zero point of the activations.
        weight, bias, epilogue, fast_accum: as `linear`.

    Raises:
        TypeError, ValueError: as `quantize` and `linear`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.linear import quantized_linear
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), one)
        >>> quantized_linear(spec, torch.tensor([[10.2, 0.9]]), one, weight)
        tensor([[12., 34.]])
    """
    check_spec(spec)
    check_real(x, "quantized_linear")
    if epilogue is not None and brgemm.reads(x):
        multiply = direct_product(spec, qp, weight, bias, epilogue)
        if multiply is not None:
            return multiply(x)
    q = quantize(spec, x, qp)
    return linear(spec, q, qp, weight, bias, dtype=x.dtype, epilogue=epilogue, fast_accum=fast_accum)


def direct_product(
    spec: QuantSpec, qp: QParams, weight: FoldedWeight, bias: Tensor | None, epilogue: Epilogue
) -> Callable[[Tensor], Tensor] | None:
    """Return what makes codes of real values that `brgemm.reads` and multiplies them, by one operator; or None.

    Python takes as long to find it as a small product takes. It may be called again while these are the operands, have
    a gradient where they had one, and the list of backends is the same; their values may change.

    Args:
        spec, qp, weight, bias, epilogue: as `quantized_linear`.

    Raises:
        TypeError, ValueError: as `linear`; when called, as that for activations.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.linear import direct_product
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), one)
        >>> multiply = direct_product(spec, one, weight, None, fsq.epilogue(spec, one, weight))
        >>> if multiply is not None:
        ...     assert multiply(torch.tensor([[10.2, 0.9]])).tolist() == [[12.0, 34.0]]
    """
    qp = check_qparams(qp)
    check_folded(weight)
    check_epilogue(epilogue, bias, weight, torch.float32)
    codes, floats = weight.codes, isinstance(spec.format, Float8)
    if epilogue.scale.ndim > 1 or not fits_operator(epilogue.scale, bias, torch.float32):
        return None
    if floats is not codes.is_floating_point() or not brgemm.quantizes(spec, qp.scale):
        return None
    # One row of a large weight too: what another saves there is less than what `quantize` takes.
    if brgemm.float8_for(codes) is None if floats else product_for(2, codes, weight.zero_point) is not brgemm:
        return None
    multiply = brgemm.product_of_reals(spec, qp, codes, zero_point_of_rows(weight), epilogue.scale, bias)
    inner = codes.shape[1]

    def checked(x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != inner:  # what is called takes 1 us
            _check_inner(x, codes)
        return multiply(x)

    return checked


def _check_inner(x: Tensor, weight: Tensor) -> None:
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"activations of shape {tuple(x.shape)} meet a weight of shape {tuple(weight.shape)}; "
            f"the last axes must be equal"
        )


def bracket(codes: Tensor, weight: FoldedWeight, offset: Tensor | None, fast_accum: bool) -> Tensor:
    """Return what the scales multiply, `(M, N)`: the bracket above, or for float8 the bare product."""
    if offset is None:
        return float8_product(codes, weight.codes, fast_accum)
    product = integer_product(codes, weight.codes)
    if weight.zero_point is not None:
        row_sums = codes.sum(1, keepdim=True, dtype=product.dtype)
        product = subtract_product(product, row_sums, weight.zero_point.reshape(-1))
    return subtract(product, offset)


def linear_reference(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Dequantize the activations and multiply floats: slow, for any format and granularity.

    Args:
        spec: the activations' quantization.
        q: codes `(..., K)`.
        qp: scale and zero point of `q`.
        weight: real values `(N, K)`: a dequantized weight. Its dtype is the result's.
        bias: `(N,)` in the dtype of `weight`, or None.

    Returns:
        `(..., N)` in the dtype of `weight`; the bits of torchao's AffineQuantizedTensor, which
        computed so.

    Raises:
        TypeError, ValueError: as `dequantize`; the weight or the bias does not fit.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
        >>> fsq.linear_reference(spec, torch.tensor([[10, 1]], dtype=torch.int8), one, torch.tensor([[1.0, 2.0]]))
        tensor([[12.]])
    """
    check_real(weight, "linear_reference (weight)")
    x = dequantize(spec, q, qp, dtype=weight.dtype)
    _check_inner(x, weight)
    check_bias(bias, weight.shape[0], weight.dtype)
    with as_written(x.device):
        return F.linear(x, weight, bias)


def check_operands(spec: QuantSpec, q: Tensor, qp: QParams, weight: FoldedWeight) -> QParams:
    """Return `qp`; raise unless the codes of activations and those of a weight have a common product."""
    check_spec(spec)
    check_codes(spec, q, "a product")
    qp = check_qparams(qp)
    check_folded(weight)
    if torch.int16 in (q.dtype, weight.codes.dtype):
        raise ValueError("16-bit codes have no integer product; use at most 8 bits, or linear_reference")
    if q.dtype.is_floating_point != weight.codes.dtype.is_floating_point:
        raise TypeError(f"activations of {spec.dtype} meet a weight of {weight.codes.dtype}; quantize both alike")
    return qp


def fits_operator(scale: Tensor, bias: Tensor | None, wide: torch.dtype) -> bool:
    """Whether an operator of ours may apply the epilogue: it has no gradient, and an exported program has only torch's
    operators."""
    learned = scale.requires_grad or (bias is not None and bias.requires_grad)
    return scale.dtype is wide is torch.float32 and not learned and not is_exporting()


def check_residual(residual: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise unless what is added to a result has its shape and dtype."""
    if residual is None:
        return
    check_real(residual, "a product (residual)")
    if residual.shape != tuple(shape):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}, and the result {tuple(shape)}; expand it to the result's"
        )
    if residual.dtype is not dtype:
        raise TypeError(
            f"residual is {residual.dtype}, and the result {dtype}; cast it, or ask for dtype={residual.dtype}"
        )


def check_origin(x: Tensor | None, shape: Sequence[int]) -> None:
    """Raise unless what codes are made of has their shape, and holds real values."""
    if x is None:
        return
    check_real(x, "a product (x)")
    if x.shape != tuple(shape):
        raise ValueError(f"x has shape {tuple(x.shape)}, and its codes {tuple(shape)}; give what they are the codes of")


def with_origin(operands: Operands, x: Tensor, spec: QuantSpec, qp: QParams) -> Operands:
    """Return operands with what `q` are the codes of, if a kernel that reads real values makes such codes."""
    if not brgemm.quantizes(spec, qp.scale):
        return operands
    return operands._replace(x=x.detach(), x_scale=qp.scale.reshape(1))
