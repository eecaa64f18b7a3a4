"""Arithmetic on codes: the product of quantized tensors, without dequantizing them.

With `x = s_x (q_x - z_x)` and `w = s_w (q_w - z_w)`, one output of a linear layer is

    s_x s_w sum_k (q_x - z_x) (q_w - z_w)
        = s_x s_w [ (sum_k q_x q_w - z_x sum_k q_w) - z_w (sum_k q_x - K z_x) ]

`sum_k q_x q_w` is an integer matrix product; `sum_k q_w` depends on the weight alone and is folded at
conversion. The bracket is exact: in int32, and grouped as written no intermediate leaves int32 while
`K <= 33025` (`K * 255**2 < 2**31`); a larger `K` is cut into pieces that are added in int64. Rounding
starts with the conversion of the bracket to float32.

Codes of uint8 are shifted by 128 to int8, together with their zero point, which changes no difference
`q - z`: int8 is what the devices multiply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functional_sq.formats import REAL_DTYPES, Float8, Integer
from functional_sq.granularity import check_stats
from functional_sq.qparams import MappingType, QParams
from functional_sq.quantize import dequantize

if TYPE_CHECKING:
    from functional_sq.spec import QuantSpec

__all__ = ["FoldedWeight", "fold", "linear", "linear_reference", "unfold"]

_INT32_TERMS = (2**31 - 1) // 255**2
"""The largest K for which the corrected product stays in int32: 33025."""

_INT32_PRODUCTS = (2**31 - 1) // 128**2
"""The largest K for which a bare int8 product stays in int32: 131071."""


class FoldedWeight(NamedTuple):
    """A quantized weight in the form that is multiplied; made once, by `fold`.

    Attributes:
        codes: `(N, K)`, contiguous; int8 or float8.
        scale: `(N,)`, output units per input unit and step.
        zero_point: `(N,)` int32, the code of 0.0 in `codes`; None if it is 0 for the spec.
        sum: `(N,)` int32, `codes` summed over K; None for float8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    sum: Tensor | None


def fold(spec: QuantSpec, q: Tensor, qp: QParams) -> FoldedWeight:
    """Compute once what depends on the weight alone.

    Args:
        spec: the weight's quantization: at most 8 bits, one scale for the tensor or for each row.
        q: codes `(N, K)` from `quantize(spec, weight, qp)`.
        qp: scale and zero point, `(1, 1)` or `(N, 1)`.

    Returns:
        the folded weight. `unfold(spec, ...)` gives `q` and `qp` back.

    Raises:
        ValueError: the weight cannot be multiplied as codes: 16 bits, groups along K, another rank.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0))
        >>> qp = fsq.QParams(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))
        >>> fsq.fold(spec, torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8), qp).sum
        tensor([ 6, 15], dtype=torch.int32)
    """
    if q.ndim != 2:
        raise ValueError(f"fold got codes of shape {tuple(q.shape)}; the weight of a linear layer is (out, in)")
    rows = q.shape[0]
    scale, zero_point = qp
    if check_stats(spec, "the weight's scale", scale.shape, q.shape) not in ((1, 1), (rows, 1)):
        raise ValueError(
            f"{spec.granularity} gives a weight of shape {tuple(q.shape)} scales of shape {tuple(scale.shape)}; a "
            f"product of codes needs one scale a row; use PerAxis(0) or PerTensor(), or linear_reference"
        )
    codes, shift = _operand(spec, q)
    scale = scale.reshape(-1).expand(rows)
    if isinstance(spec.format, Float8):
        return FoldedWeight(codes.contiguous(), scale, None, None)
    total = codes.sum(1, dtype=torch.int32)
    if _has_zero_point(spec):
        return FoldedWeight(codes.contiguous(), scale, _shifted(zero_point, shift).expand(rows), total)
    return FoldedWeight(codes.contiguous(), scale, None, total)


def unfold(spec: QuantSpec, weight: FoldedWeight) -> tuple[Tensor, QParams]:
    """Return the codes and qparams that `fold` took, with one scale for each row.

    Args:
        spec: the weight's quantization.
        weight: what `fold(spec, ...)` returned.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerAxis(0), mapping=fsq.MappingType.ASYMMETRIC)
        >>> qp = fsq.QParams(torch.ones(1, 1), torch.tensor([[7]], dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[0, 255]], dtype=torch.uint8), qp)
        >>> weight.codes, fsq.unfold(spec, weight)[0]
        (tensor([[-128,  127]], dtype=torch.int8), tensor([[  0, 255]], dtype=torch.uint8))
    """
    shift = _shift(spec)
    codes = weight.codes
    if codes.dtype is not spec.format.storage:
        codes = codes.view(torch.uint8) ^ shift
    zero_point = torch.zeros_like(weight.scale, dtype=torch.int32) if weight.zero_point is None else weight.zero_point
    if not isinstance(spec.format, Float8):
        zero_point = zero_point + shift
    return codes, QParams(weight.scale.reshape(-1, 1), zero_point.to(spec.zero_point_dtype).reshape(-1, 1))


def linear(
    spec: QuantSpec,
    q: Tensor,
    qp: QParams,
    weight: FoldedWeight,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Multiply the codes of activations with a folded weight.

    Integers: exact in int32 (int64 above K = 33025), converted to float32 once, scaled, the bias
    added, rounded to `dtype`. Float8: products exact, accumulated in float32, then the same.

    Args:
        spec: the activations' quantization; at most 8 bits, one scale for the tensor or the token.
        q: codes `(..., K)` from `quantize(spec, x, qp)`; any number of leading axes, empty ones too.
        qp: scale and zero point of `q`.
        weight: `fold` of an `(N, K)` weight.
        bias: `(N,)` or None, output units.
        dtype: dtype of the result.

    Returns:
        `(..., N)` in `dtype`.

    Raises:
        TypeError: integer codes meet float8 codes.
        ValueError: shapes do not fit, or the activations have scales along K.

    Source: Jacob et al. 2018 (arXiv:1712.05877), equation 7.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), one)
        >>> fsq.linear(spec, torch.tensor([[10, 1]], dtype=torch.int8), one, weight)
        tensor([[12., 34.]])
    """
    lead, k = q.shape[:-1], q.shape[-1]
    if k != weight.codes.shape[1]:
        raise ValueError(
            f"activations of shape {tuple(q.shape)} meet a weight of shape {tuple(weight.codes.shape)}; "
            f"the last axes must be equal"
        )
    if dtype not in REAL_DTYPES:
        raise TypeError(f"linear to {dtype}; use one of {', '.join(map(str, REAL_DTYPES))}")
    codes, shift = _operand(spec, q.reshape(-1, k))
    if codes.dtype.is_floating_point != weight.codes.dtype.is_floating_point:
        raise TypeError(f"activations of {spec.dtype} meet a weight of {weight.codes.dtype}; quantize both alike")
    scale, zero_point = (_per_row(spec, value, q) for value in qp)
    if weight.sum is None:
        product = _float8_product(codes, weight.codes)
    else:
        product = _integer_product(codes, _shifted(zero_point, shift), weight)
    wide = torch.promote_types(dtype, torch.float32)
    y = product.to(wide) * (scale.to(wide) * weight.scale.to(wide))
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(dtype).reshape(*lead, -1)


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
        bias: `(N,)` or None.

    Returns:
        `(..., N)` in the dtype of `weight`; the bits of torchao's AffineQuantizedTensor, which
        computed so.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> one = fsq.QParams(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
        >>> fsq.linear_reference(spec, torch.tensor([[10, 1]], dtype=torch.int8), one, torch.tensor([[1.0, 2.0]]))
        tensor([[12.]])
    """
    return F.linear(dequantize(spec, q, qp, dtype=weight.dtype), weight, bias)


def _shift(spec: QuantSpec) -> int:
    """What is subtracted from the codes to make them int8."""
    return 128 if spec.format.bounds[1] == 255 else 0


def _operand(spec: QuantSpec, q: Tensor) -> tuple[Tensor, int]:
    """Return codes as a device multiplies them, and what was subtracted from them."""
    format = spec.format
    if isinstance(format, Integer) and format.bits > 8:
        raise ValueError(f"{spec.dtype} codes have no integer product; use at most 8 bits, or linear_reference")
    if q.dtype is not format.storage:
        raise TypeError(f"got codes of {q.dtype}; those of {spec.dtype} are held as {format.storage}")
    if q.dtype is not torch.uint8:
        return q, 0
    # Flipping the top bit subtracts 128 and reads the byte as two's complement.
    return (q ^ 128 if _shift(spec) else q).view(torch.int8), _shift(spec)


def _shifted(zero_point: Tensor, shift: int) -> Tensor:
    return zero_point.reshape(-1).to(torch.int32) - shift


def _has_zero_point(spec: QuantSpec) -> bool:
    """Whether codes shifted to int8 can have a zero point other than 0; known without the data."""
    qmin, qmax = spec.bounds
    return spec.mapping is MappingType.ASYMMETRIC or int((qmax + qmin + 1) / 2) != _shift(spec)


def _per_row(spec: QuantSpec, value: Tensor, q: Tensor) -> Tensor:
    """Return a statistic of the activations as a scalar or as `(M, 1)`."""
    if value.numel() == 1:
        return value.reshape(1, 1)
    if check_stats(spec, "the activations' scale", value.shape, q.shape) != (*q.shape[:-1], 1):
        raise ValueError(
            f"{spec.granularity} gives activations of shape {tuple(q.shape)} scales of shape {tuple(value.shape)}; a "
            f"product of codes needs one for the tensor or for each token; use PerTensor(), or linear_reference"
        )
    return value.reshape(-1, 1)


def _integer_product(codes: Tensor, zero_point: Tensor, weight: FoldedWeight) -> Tensor:
    """Return sum_k (q_x - z_x) (q_w - z_w), exactly; `(M, N)` int32 or int64."""
    k = codes.shape[1]
    z_x = zero_point.reshape(-1, 1)
    row_sum = weight.sum
    assert row_sum is not None
    if k <= _INT32_TERMS:
        product = _int8_matmul(codes, weight.codes)
    else:
        pieces = (t.tensor_split(range(_INT32_PRODUCTS, k, _INT32_PRODUCTS), 1) for t in (codes, weight.codes))
        product = torch.stack([_int8_matmul(a, b).to(torch.int64) for a, b in zip(*pieces, strict=True)]).sum(0)
    product = product - z_x * row_sum.to(product.dtype)
    if weight.zero_point is not None:
        token_sum = codes.sum(1, keepdim=True, dtype=product.dtype)
        product = product - weight.zero_point * (token_sum - k * z_x)
    return product


def _int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of int8 codes `(M, K)` and `(N, K)`, exact in int32."""
    if not a.is_cuda:
        return torch._int_mm(a, b.t())
    # cuBLASLt takes more than 16 rows, and K and N that are multiples of 8; zeros change no sum.
    m, k, n = a.shape[0], a.shape[1], b.shape[0]
    a = F.pad(a, (0, -k % 8, 0, max(0, 17 - m)))
    b = F.pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a, b.t())[:m, :n]


def _float8_product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of float8 codes `(M, K)` and `(N, K)`: exact products summed in float32."""
    if _scaled_mm_takes(a, b):
        one = torch.ones((), dtype=torch.float32, device=a.device)
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    if a.is_cuda:
        # Every float8 value is a bfloat16 value, and a tensor core adds bfloat16 products in float32.
        return torch.mm(a.to(torch.bfloat16), b.to(torch.bfloat16).t(), out_dtype=torch.float32)
    return a.to(torch.float32) @ b.to(torch.float32).t()


def _scaled_mm_takes(a: Tensor, b: Tensor) -> bool:
    kinds = {a.dtype, b.dtype}
    if not kinds <= {torch.float8_e4m3fn, torch.float8_e5m2} or a.shape[0] == 0:
        return False
    if not a.is_cuda:
        return True
    return (
        kinds != {torch.float8_e5m2}
        and torch.cuda.get_device_capability(a.device) >= (8, 9)
        and a.shape[1] % 16 == 0
        and b.shape[0] % 16 == 0
    )
