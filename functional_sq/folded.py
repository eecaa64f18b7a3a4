"""What a product of codes needs of its operands, known before its input is: a folded weight, and an epilogue.

`functional_sq.linear` says what is folded, and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functional_sq.formats import Float8, check_real, check_real_dtype
from functional_sq.granularity import PerTensor, check_stats
from functional_sq.int_mm import INT32_TERMS
from functional_sq.qparams import QParams, check_qparams, fixed_zero_point
from functional_sq.spec import QuantSpec, check_codes, check_spec
from functional_sq.tracing import is_batched

__all__ = [
    "Epilogue",
    "FoldedWeight",
    "backend_codes",
    "check_bias",
    "check_epilogue",
    "check_folded",
    "check_product",
    "check_single",
    "check_zero_point",
    "epilogue",
    "fold",
    "is_readable",
    "operand",
    "unfold",
    "zero_point_of_rows",
]


class FoldedWeight(NamedTuple):
    """A quantized weight in the form that is multiplied; made once, by `fold`.

    Attributes:
        codes: `(N, K)`, of a convolution `(N, C / groups, *kernel)`, contiguous; int8, float8, or int16
            for the reference path alone.
        scale: output units per input unit and step; the statistics' shape, `(N, 1)` for PerAxis(0).
        zero_point: int32, the code of 0.0 in `codes`, shape of `scale`; None where the spec fixes it at 0.
        sum: `(N,)`, `codes` summed over all axes but the first; int32, of 2**24 codes of 8 bits or more int64; None for
            float8.

    Example: see `fold`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    sum: Tensor | None


def fold(spec: QuantSpec, q: Tensor, qp: QParams) -> FoldedWeight:
    """Compute once what depends on the weight alone.

    Reads the zero points of a symmetric spec; call it at conversion, not in a compiled forward.

    Args:
        spec: the weight's quantization.
        q: codes from `quantize(spec, weight, qp)`: `(N, K)`, or `(N, C / groups, *kernel)` for `conv`.
        qp: scale and zero point of `q`.

    Returns:
        the folded weight, which may share the memory of `q` and `qp`. `unfold(spec, ...)` gives them back. Some
        fields may be None, which a function mapped by `torch.vmap` cannot return: multiply inside it.

    Raises:
        TypeError: `q` is not in the spec's storage dtype, or `qp` is no QParams.
        ValueError: `q` is no weight of a linear layer or a convolution, `qp` does not fit it, or a
            symmetric spec has another zero point than its mapping gives.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0))
        >>> qp = fsq.QParams(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))
        >>> fsq.fold(spec, torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8), qp).sum
        tensor([ 6, 15], dtype=torch.int32)
    """
    check_spec(spec)
    check_codes(spec, q, "fold")
    qp = check_qparams(qp)
    if not 2 <= q.ndim <= 5:
        raise ValueError(
            f"fold got codes of shape {tuple(q.shape)}; the weight of a linear layer is (out, in), "
            f"that of a convolution (out, in / groups, *kernel) with one to three dimensions"
        )
    shape = check_stats(spec.granularity, "the weight's scale", qp.scale.shape, q.shape)
    codes, shift = operand(spec, q), _shift(spec)
    scale, zero_point = qp.scale.reshape(shape), qp.zero_point.to(torch.int32).reshape(shape) - shift
    if isinstance(spec.format, Float8):
        return FoldedWeight(codes.contiguous(), scale, None, None)
    check_zero_point(spec, qp.zero_point)
    largest = math.prod(codes.shape[1:]) * 2 ** (8 * codes.itemsize - 1)
    exact = torch.int32 if largest < 2**31 else torch.int64
    total = codes.flatten(1).sum(1, dtype=exact)
    return FoldedWeight(codes.contiguous(), scale, None if fixed_zero_point(spec) == shift else zero_point, total)


def unfold(spec: QuantSpec, weight: FoldedWeight) -> tuple[Tensor, QParams]:
    """Return the codes and qparams that `fold` took.

    Args:
        spec: the weight's quantization.
        weight: what `fold(spec, ...)` returned; the result may share its memory.

    Raises:
        TypeError: `weight` has codes of another kind than `spec`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.uint8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
        >>> qp = fsq.QParams(torch.ones(1, 1), torch.tensor([[7]], dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[0, 255]], dtype=torch.uint8), qp)
        >>> weight.codes, fsq.unfold(spec, weight)[0]
        (tensor([[-128,  127]], dtype=torch.int8), tensor([[  0, 255]], dtype=torch.uint8))
    """
    check_spec(spec)
    check_folded(weight)
    shift, storage, codes = _shift(spec), spec.format.storage, weight.codes
    held = torch.int8 if storage is torch.uint8 else storage
    if codes.dtype is not held:
        raise TypeError(f"a folded weight of {spec.dtype} has codes of {held}, this one {codes.dtype}; give its spec")
    if held is not storage:
        codes = codes.view(storage) ^ shift
    if weight.zero_point is None:
        zero_point = torch.full_like(weight.scale, shift, dtype=spec.zero_point_dtype)
    else:
        zero_point = (weight.zero_point + shift).to(spec.zero_point_dtype)
    return codes, QParams(weight.scale, zero_point)


def check_product(act: QuantSpec, weight: QuantSpec, shape: Sequence[int]) -> None:
    """Raise ValueError unless `linear` or `conv` can multiply the codes of two specs.

    Args:
        act: the activations' quantization.
        weight: the weight's quantization.
        shape: shape of the weight: `(N, K)`, or `(N, C / groups, *kernel)` for `conv`.

    Raises:
        TypeError: `act` or `weight` is no QuantSpec.
        ValueError: integers meet float8, codes have 16 bits, or a scale is not constant along what is summed.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> fsq.check_product(spec, fsq.QuantSpec(torch.int8, fsq.PerGroup(8)), (4, 16))
        Traceback (most recent call last):
        ...
        ValueError: PerGroup(group_size=8) gives several scales along the axis that a product sums over; \
use PerAxis(0) or PerTensor() for the weight, or the reference path
    """
    check_spec(act)
    check_spec(weight)
    if len(shape) < 2:
        raise ValueError(f"a weight of shape {tuple(shape)}; give (N, K), or (N, C / groups, *kernel)")
    kinds = {isinstance(spec.format, Float8) for spec in (act, weight)}
    if len(kinds) > 1:
        raise ValueError(
            f"activations of {act.dtype} and a weight of {weight.dtype} have no common product; "
            f"use integers or float8 for both, or the reference path"
        )
    for spec in (act, weight):
        if spec.format.storage is torch.int16:
            raise ValueError(f"{spec.dtype} codes have no integer product; use at most 8 bits, or the reference path")
    if _several(weight.granularity.stat_shape(shape)):
        raise ValueError(
            f"{weight.granularity} gives several scales along the axis that a product sums over; "
            f"use PerAxis(0) or PerTensor() for the weight, or the reference path"
        )
    if len(shape) > 2:
        if not isinstance(act.granularity, PerTensor):
            raise ValueError(
                f"{act.granularity} gives the activations of a convolution several scales, and its windows mix them; "
                f"use PerTensor() for the activations"
            )
    elif _several(act.granularity.stat_shape((1, shape[1]))):
        raise ValueError(
            f"{act.granularity} gives several scales along the axis that a product sums over; "
            f"use PerTensor() for the activations, or the reference path"
        )


class Epilogue(NamedTuple):
    """What turns a bare product of codes into real values, and is known before the activations are.

    Attributes:
        scale: `s_x s_w`, output units per unit of the product; `(N,)`, or `(M, N)` for a scale a token.
        offset: `z_x sum_k q_w - K z_x z_w`, what is subtracted from the product, shape of `scale`;
            int32, above K = 33025 int64; None for float8.

    Example: see `epilogue`.
    """

    scale: Tensor
    offset: Tensor | None


def epilogue(spec: QuantSpec, qp: QParams, weight: FoldedWeight, *, dtype: torch.dtype = torch.float32) -> Epilogue:
    """Fold the activations' scale and zero point, which static quantization knows before its input.

    Args:
        spec: the activations' quantization.
        qp: scale and zero point of the activations, one for the tensor or for each token.
        weight: `fold` of an `(N, K)` weight, or of a convolution's: K is then what one window holds.
        dtype: dtype of `Epilogue.scale`.

    Returns:
        what `linear(..., epilogue=)` and `conv(..., epilogue=)` take.

    Raises:
        TypeError: `dtype` holds no real values.
        ValueError: a scale is not constant along K.

    Example:
        >>> import torch, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
        >>> qp = fsq.QParams(torch.tensor([[0.5]]), torch.tensor([[10]], dtype=torch.int32))
        >>> weight = fsq.fold(spec, torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), qp)
        >>> fsq.epilogue(spec, qp, weight)
        Epilogue(scale=tensor([0.2500, 0.2500]), offset=tensor([-170, -130], dtype=torch.int32))
    """
    check_spec(spec)
    qp = check_qparams(qp)
    check_folded(weight)
    check_real_dtype(dtype, "epilogue in ")
    n, k = weight.codes.shape[0], math.prod(weight.codes.shape[1:])
    check_single(weight)
    s_x, z_x = (_per_token(spec, value, k) for value in qp)
    scale = s_x.to(dtype) * weight.scale.reshape(-1).to(dtype)
    if weight.sum is None:
        return Epilogue(scale.expand(*scale.shape[:-1], n), None)
    exact = torch.int32 if k <= INT32_TERMS else torch.int64
    z_x = z_x.to(exact) - _shift(spec)
    offset = z_x * weight.sum.to(exact)
    if weight.zero_point is not None:
        offset = offset - weight.zero_point.reshape(-1) * (k * z_x)
    return Epilogue(scale.expand(*scale.shape[:-1], n), offset)


def check_bias(bias: Tensor | None, n: int, dtype: torch.dtype | None = None) -> None:
    """Raise unless a bias is None or has a real value for each of `n` outputs, in `dtype` where one is given."""
    if bias is None:
        return
    check_real(bias, "a product (bias)")
    if dtype is not None and bias.dtype is not dtype:
        raise TypeError(f"bias is {bias.dtype}, and the weight {dtype}; cast one of them")
    if bias.shape != (n,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, and the weight {n} outputs; give one entry for each")


def check_epilogue(epilogue: Epilogue | None, bias: Tensor | None, weight: FoldedWeight, wide: torch.dtype) -> None:
    """Raise unless what follows a product has one entry for each of its columns; a backend reads as many."""
    n = weight.codes.shape[0]
    check_bias(bias, n)
    if epilogue is None:
        return
    if not isinstance(epilogue, Epilogue):
        raise TypeError(f"epilogue is a {type(epilogue).__name__}; give what epilogue(spec, qp, weight) returns")
    scale, offset = epilogue
    if scale.dtype is not wide:
        raise TypeError(
            f"the epilogue's scale is {scale.dtype}, and this result is scaled in {wide}; "
            f"compute it with epilogue(..., dtype={wide})"
        )
    fits = weight.codes.is_floating_point() if offset is None else offset.shape == scale.shape
    if scale.shape[-1:] != (n,) or not fits:
        shapes = [None if part is None else tuple(part.shape) for part in epilogue]
        raise ValueError(
            f"the epilogue has shapes {shapes[0]} and {shapes[1]}, and the weight {n} outputs of "
            f"{weight.codes.dtype}; compute it with epilogue(spec, qp, weight) of this weight"
        )


def operand(spec: QuantSpec, q: Tensor) -> Tensor:
    """Return codes as a device multiplies them: less `_shift(spec)`."""
    if q.dtype is not torch.uint8:
        return q
    # Flipping the top bit subtracts 128 and reads the byte as two's complement.
    return (q ^ 128 if _shift(spec) else q).view(torch.int8)


def backend_codes(dtype: torch.dtype, spec: QuantSpec, q: Tensor, qp: QParams) -> tuple[Tensor, Tensor | None]:
    """Return codes of at most 8 bits in the dtype of a backend, and the int32 zero point of one element for them; None
    where the spec fixes it at 0."""
    zero_point = qp.zero_point.reshape(1).to(torch.int32)
    if dtype is torch.int8:
        shift = _shift(spec)
        # Not less 0, which is a kernel of its own on a GPU.
        shifted = zero_point - shift if shift else zero_point
        return operand(spec, q), None if fixed_zero_point(spec) == shift else shifted
    return (q, zero_point) if q.dtype is torch.uint8 else ((q ^ -128).view(torch.uint8), zero_point + 128)


def zero_point_of_rows(weight: FoldedWeight) -> Tensor | None:
    """Return a weight's zero point as `Operands` has it: `(N,)`; None where it is 0."""
    return None if weight.zero_point is None else weight.zero_point.reshape(-1).expand(weight.codes.shape[0])


def check_folded(weight: object) -> None:
    """Raise TypeError unless `weight` is a FoldedWeight."""
    if not isinstance(weight, FoldedWeight):
        raise TypeError(f"weight is a {type(weight).__name__}; give the FoldedWeight that fold(spec, q, qp) returns")


def check_single(weight: FoldedWeight) -> None:
    """Raise ValueError unless a weight has one scale for each output."""
    if _several(weight.scale.shape):
        raise ValueError(
            f"the weight has scales of shape {tuple(weight.scale.shape)}; a product of codes needs one a row: "
            f"use PerAxis(0) or PerTensor() for the weight, or linear_reference"
        )


def _several(stats: Sequence[int]) -> bool:
    """Whether a weight's scale changes along what a product sums over: any axis but the first."""
    return any(size != 1 for size in stats[1:])


def _shift(spec: QuantSpec) -> int:
    """What is subtracted from the codes to make them int8."""
    return 128 if spec.format.bounds[1] == 255 else 0


def check_zero_point(spec: QuantSpec, zero_point: Tensor) -> None:
    """Raise ValueError unless zero points are those that a symmetric spec fixes; what cannot be read passes."""
    fixed = fixed_zero_point(spec)
    if fixed is not None and is_readable(zero_point) and bool((zero_point != fixed).any()):
        raise ValueError(
            f"{spec} has the zero point {fixed}, got {zero_point.flatten()[:4].tolist()} ...; "
            f"use MappingType.ASYMMETRIC for other zero points"
        )


def is_readable(x: Tensor) -> bool:
    """Whether values can be looked at: not while they are traced or mapped, nor on meta."""
    return not (torch.compiler.is_compiling() or x.is_meta or is_batched(x))


def _per_token(spec: QuantSpec, value: Tensor, k: int) -> Tensor:
    """Return a statistic of the activations as `(1,)` or `(M, 1)`."""
    if value.numel() == 1:
        return value.reshape(1)
    if value.shape[-1] != 1 or spec.granularity.stat_shape((*value.shape[:-1], k)) != value.shape:
        raise ValueError(
            f"{spec.granularity} gives the activations scales of shape {tuple(value.shape)}; a product of codes "
            f"needs one for the tensor or for each token; use PerTensor(), or linear_reference"
        )
    return value.reshape(-1, 1)
