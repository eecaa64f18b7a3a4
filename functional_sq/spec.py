"""QuantSpec: everything about a quantization that is not a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from functional_sq.formats import REAL_DTYPES, Float8, Format, check_real_dtype, format_of, name_of
from functional_sq.granularity import Granularity
from functional_sq.observer import Observer, check_number
from functional_sq.observers.min_max import MinMax
from functional_sq.qparams import MappingType, fixed_zero_point

__all__ = ["QuantSpec", "check_codes", "check_spec"]


@dataclass(frozen=True)
class QuantSpec:
    """What to quantize to, which elements share a scale, and how the range is chosen.

    Static, frozen, hashable, picklable; prints as the call that makes it. Each function of the
    package takes it first. A combination that cannot work is refused here, not later.

    Args:
        dtype: the quantized dtype: `torch.uint1` ... `uint8`, `torch.int1` ... `int8`,
            `torch.int16`, or an 8-bit float. Codes of fewer than 8 bits are held one a byte.
        granularity: which elements share one scale.
        mapping: how the range is laid over the codes. Float8 takes SYMMETRIC only.
        quant_min: smallest code to use; default: the dtype's. Integers only.
        quant_max: largest code to use; default: the dtype's. Integers only.
        observer: what is recorded of the data and how it is read as a range.
        eps: lower limit of a scale, input units per step. The default is float32's, and it is
            always applied (torchao changed its own default in 0.18).
        scale_dtype: dtype of scales: float32, float64, bfloat16 or float16.
        zero_point_dtype: dtype of zero points, integer or float, that holds every code exactly.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: the arguments cannot go together; the message names the rule and a remedy.

    Source: the arguments of `torchao.quantization.choose_qparams_affine`.

    Example:
        >>> import torch, functional_sq as fsq
        >>> fsq.QuantSpec(torch.int8, fsq.PerAxis(0), quant_min=-127).bounds
        (-127, 127)
        >>> fsq.QuantSpec(torch.uint8, fsq.PerTensor()) == fsq.QuantSpec(torch.uint8, fsq.PerTensor())
        True
        >>> fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor(), mapping=fsq.MappingType.ASYMMETRIC)
        Traceback (most recent call last):
        ...
        ValueError: float8_e4m3fn with mapping=MappingType.ASYMMETRIC: a float format has no zero point; \
use MappingType.SYMMETRIC
    """

    dtype: torch.dtype
    granularity: Granularity
    mapping: MappingType = field(default=MappingType.SYMMETRIC, kw_only=True)
    quant_min: int | None = field(default=None, kw_only=True)
    quant_max: int | None = field(default=None, kw_only=True)
    observer: Observer = field(default=MinMax(), kw_only=True)
    eps: float = field(default=torch.finfo(torch.float32).eps, kw_only=True)
    scale_dtype: torch.dtype = field(default=torch.float32, kw_only=True)
    zero_point_dtype: torch.dtype = field(default=torch.int32, kw_only=True)

    def __post_init__(self) -> None:
        format = format_of(self.dtype)
        for name, kind in (("granularity", Granularity), ("mapping", MappingType), ("observer", Observer)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{name}={value!r} is not a functional_sq {kind.__name__}; {_meant(value, kind)}")
            try:
                if not torch.compiler.is_compiling():  # Dynamo of torch 2.11 hashes no object
                    hash(value)
            except TypeError:
                raise TypeError(
                    f"{name}={value!r} is not hashable; decorate its class @dataclass(frozen=True)"
                ) from None
        _check_bounds(self, format)
        _check_mapping(self, format)
        _check_dtypes(self, format)

    @property
    def format(self) -> Format:
        """The number format of `dtype`."""
        return format_of(self.dtype)

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest code in use: `quant_min`, `quant_max` or the format's."""
        low, high = self.format.bounds
        return (
            low if self.quant_min is None else self.quant_min,
            high if self.quant_max is None else self.quant_max,
        )

    def __repr__(self) -> str:
        shown = [repr(self.dtype), repr(self.granularity)]
        for name, f in self.__dataclass_fields__.items():
            value = getattr(self, name)
            if f.kw_only and value != f.default:
                shown.append(f"{name}={value!r}")
        return f"QuantSpec({', '.join(shown)})"


def check_spec(spec: object) -> None:
    """Raise TypeError unless `spec` is a QuantSpec: the first argument of every function."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec is {spec!r}; give a QuantSpec, such as QuantSpec(torch.int8, PerTensor())")


def check_codes(spec: QuantSpec, q: object, verb: str) -> None:
    """Raise TypeError unless `q` is a tensor in the storage dtype of `spec`; `verb` names the caller."""
    found = q.dtype if isinstance(q, Tensor) else type(q).__name__
    if found is not spec.format.storage:
        raise TypeError(f"{verb} got {found}; the codes of {spec.dtype} are a tensor of {spec.format.storage}")


def _meant(value: object, kind: type) -> str:
    if type(value).__module__.startswith("torchao."):
        return f"that is torchao's; use functional_sq.{value}"
    if kind is MappingType:
        return f"use one of {', '.join(map(repr, MappingType))}"
    if isinstance(value, type) and issubclass(value, kind):
        return f"did you mean {value.__name__}()?"
    return f"use an instance of {'PerTensor' if kind is Granularity else 'MinMax'}, or of another one"


def _check_bounds(spec: QuantSpec, format: Format) -> None:
    short = name_of(spec.dtype)
    given = {"quant_min": spec.quant_min, "quant_max": spec.quant_max}
    low, high = format.bounds
    for name, value in given.items():
        if value is None:
            continue
        if isinstance(format, Float8):
            raise ValueError(f"{short} with {name}={value}: a float format uses all its codes; leave {name} out")
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r} is not an int; codes are integers")
        if not low <= value <= high:
            raise ValueError(f"{name}={value} is not a code of {short}; use a value from {low} to {high}")
    low, high = spec.bounds
    if low >= high:
        raise ValueError(f"quant_min={low} is not below quant_max={high}; at least two codes are needed")


def _check_mapping(spec: QuantSpec, format: Format) -> None:
    short = name_of(spec.dtype)
    if isinstance(format, Float8) and spec.mapping is not MappingType.SYMMETRIC:
        raise ValueError(
            f"{short} with mapping={spec.mapping}: a float format has no zero point; use MappingType.SYMMETRIC"
        )
    low, high = spec.bounds
    if spec.mapping is MappingType.SYMMETRIC_NO_CLIPPING_ERR and (not low < 0 < high or fixed_zero_point(spec) != 0):
        # torchao divides by an end that is 0, or clips what it promises not to.
        raise ValueError(
            f"{short} with codes {low} to {high} and mapping={spec.mapping}: it needs quant_min < 0 < quant_max with "
            f"0 in the middle, as -128 to 127 or -127 to 127; use MappingType.SYMMETRIC"
        )


def _check_dtypes(spec: QuantSpec, format: Format) -> None:
    check_real_dtype(spec.scale_dtype, "scale_dtype=")
    check_number(spec, "eps", "give the smallest scale, such as 1e-6")
    tiny, huge = torch.finfo(spec.scale_dtype).tiny, torch.finfo(spec.scale_dtype).max
    if not tiny <= spec.eps <= huge:
        raise ValueError(
            f"eps={spec.eps!r} with scale_dtype={spec.scale_dtype}: the smallest scale and its reciprocal must be "
            f"finite; use an eps from {tiny!r} to {huge!r}"
        )
    if format.storage is torch.int16 and torch.finfo(spec.scale_dtype).eps > 2**-16:
        raise ValueError(
            f"int16 with scale_dtype={spec.scale_dtype}: 16-bit codes are not exact in it; use torch.float32"
        )
    zp = spec.zero_point_dtype
    if not isinstance(zp, torch.dtype) or zp.is_complex or zp is torch.bool:
        raise TypeError(f"zero_point_dtype={zp!r} is not an integer or float dtype; use torch.int32")
    low, high = (0, 0) if isinstance(format, Float8) else format.bounds
    if zp.is_floating_point:
        exact = zp in REAL_DTYPES and max(-low, high) <= 2 / torch.finfo(zp).eps
    else:
        exact = zp in _INTEGERS and torch.iinfo(zp).min <= low and high <= torch.iinfo(zp).max
    if not exact:
        raise ValueError(
            f"zero_point_dtype={zp} is no float, and none of int8, uint8, int16, int32 and int64, that holds every "
            f"code from {low} to {high}; use torch.int32"
        )


_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
