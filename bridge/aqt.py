"""The removed torchao API, alive: AffineQuantizedTensor and what was written on it.

torchao held a quantized tensor as a `torch.Tensor` subclass with integer codes, a scale and a zero
point inside and a real shape and dtype outside. It removed the class (integers last in 0.17, float8
last in 0.16); code that was written on it runs here, with two differences:

* `F.linear` of two of them multiplies the codes (`functional_sq.linear`) where the scales allow it:
  one for the tensor or the token on the left, one for the tensor or the row on the right. torchao
  dequantized both and multiplied floats. That is what happens here for all other granularities.
* `F.linear` of a float input and the rows of `F.embedding` are computed on dequantized values too; every other
  operation works on codes, and one that is not listed here raises.

The codes, scales and zero points are those of `functional_sq`: a scale has the rank of its tensor,
and the block size is read off the two shapes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import functional_sq as fsq
from bridge.torchao import ZeroPointDomain, adopt, check_preserve_zero, check_zero_point_domain
from bridge.wrapper import Wrapper, each
from functional_sq.formats import Float8, Integer, check_real, format_of

__all__ = [
    "AffineQuantizedTensor",
    "Float8Layout",
    "Float8MMConfig",
    "PlainLayout",
    "TensorImpl",
    "to_affine_quantized_floatx_static",
    "to_affine_quantized_intx",
    "to_affine_quantized_intx_static",
]

aten = torch.ops.aten


class TensorImpl(NamedTuple):
    """The tensors inside an AffineQuantizedTensor, under the names that torchao's `tensor_impl` had.

    Attributes:
        int_data: codes, in their storage dtype.
        scale: input units per step.
        zero_point: the code of 0.0, or None.
    """

    int_data: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @property
    def data(self) -> Tensor:
        """The codes, under the name that is also right for float8."""
        return self.int_data

    @property
    def float8_data(self) -> Tensor:
        """The codes, under the name that they have where they are 8-bit floats; AttributeError for integers."""
        if not self.int_data.is_floating_point():
            raise AttributeError(f"float8_data: the codes are {self.int_data.dtype}; use int_data")
        return self.int_data

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the codes are held."""
        return self.int_data.dtype

    @property
    def shape(self) -> torch.Size:
        """The shape of the codes, which is that of the tensor."""
        return self.int_data.shape

    def get_plain(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes, scale and zero point.

        Example:
            >>> import torch
            >>> from bridge.aqt import to_affine_quantized_intx_static
            >>> scale, zero_point = torch.tensor([0.5]), torch.tensor([2])
            >>> q = to_affine_quantized_intx_static(torch.tensor([0.0, 1.0]), scale, zero_point, (2,), torch.int8)
            >>> q.tensor_impl.get_plain()
            (tensor([2, 4], dtype=torch.int8), tensor([0.5000]), tensor([2]))
        """
        return self.int_data, self.scale, self.zero_point


class AffineQuantizedTensor(Wrapper):
    """A tensor of codes that has the shape, dtype and device of the real values it stands for.

    Made by `to_affine_quantized_intx_static` and `to_affine_quantized_floatx_static`. A real value
    is `(code - zero_point) * scale`.

    Invariants:
        * `int_data` has the outer shape, strides and device, and the format's storage dtype;
        * `scale` has the rank of `int_data`, and each of its sizes divides the size of `int_data`;
        * `zero_point` has the shape of `scale`, or is None: always for float8, where it is 0.

    Defined operations: `F.linear`, `torch.mm`, `torch.addmm` and `torch.matmul` with such a weight,
    `F.embedding`, which gives real values, detach, clone, contiguous, `to`, t, transpose, permute,
    indexing by slice, int or one index tensor, view, reshape, and `copy_` between equals. It is a
    `torch.nn.Parameter`, which never requires a gradient, and it is copied, pickled, saved and loaded;
    with `weights_only=True` too, where this module has been imported.

    Args:
        int_data: codes.
        scale: real values of the statistics' shape, input units per step.
        zero_point: whole numbers of the shape of `scale`, or None.
        target_dtype: the quantized dtype as the user names it: `torch.uint4`.
        quant_min: smallest code in use; None: the dtype's.
        quant_max: largest code in use; None: the dtype's.
        dtype: the outer dtype.
        use_fast_accum: what `Float8MMConfig` says.

    Source: `torchao.dtypes.AffineQuantizedTensor` of torchao 0.16.

    Example:
        >>> import torch
        >>> from bridge.aqt import to_affine_quantized_intx_static
        >>> w = torch.tensor([[-1.0, 0.0, 1.0], [-4.0, 2.0, 4.0]])
        >>> to_affine_quantized_intx_static(
        ...     w, torch.tensor([0.5, 1.0]), torch.tensor([128, 128]), (1, 3), torch.uint8
        ... )
        AffineQuantizedTensor(
            int_data=tensor([[126, 128, 130],
                             [124, 130, 132]], dtype=torch.uint8),
            scale=tensor([0.5000, 1.0000]).reshape(2, 1),
            zero_point=tensor([128, 128]).reshape(2, 1),
            target_dtype=torch.uint8, block_size=(1, 3), shape=(2, 3), device=cpu, dtype=torch.float32)
    """

    int_data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    target_dtype: torch.dtype
    quant_min: int | None
    quant_max: int | None
    use_fast_accum: bool

    remedy = "use x.dequantize() for real values or x.int_data for codes"

    @staticmethod
    def __new__(
        cls,
        int_data: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        target_dtype: torch.dtype,
        *,
        quant_min: int | None = None,
        quant_max: int | None = None,
        dtype: torch.dtype,
        use_fast_accum: bool = False,
    ) -> AffineQuantizedTensor:
        made: AffineQuantizedTensor = Tensor._make_wrapper_subclass(
            cls, int_data.shape, strides=int_data.stride(), dtype=dtype, device=int_data.device
        )
        return made

    def __init__(
        self,
        int_data: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        target_dtype: torch.dtype,
        *,
        quant_min: int | None = None,
        quant_max: int | None = None,
        dtype: torch.dtype,
        use_fast_accum: bool = False,
    ) -> None:
        self.int_data = int_data
        self.scale = scale
        self.zero_point = zero_point
        self.target_dtype = target_dtype
        self.quant_min = quant_min
        self.quant_max = quant_max
        self.use_fast_accum = use_fast_accum

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, torch.dtype]]:
        names = ["int_data", "scale"] if self.zero_point is None else ["int_data", "scale", "zero_point"]
        return names, ((self.target_dtype, self.quant_min, self.quant_max, self.use_fast_accum), self.dtype)

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: Mapping[str, Tensor], context: tuple[Any, torch.dtype], size: Any, stride: Any
    ) -> AffineQuantizedTensor:
        (target_dtype, quant_min, quant_max, use_fast_accum), dtype = context
        return cls(
            tensors["int_data"],
            tensors["scale"],
            tensors.get("zero_point"),
            target_dtype,
            quant_min=quant_min,
            quant_max=quant_max,
            dtype=dtype,
            use_fast_accum=use_fast_accum,
        )

    def _map(self, fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> AffineQuantizedTensor:
        zero_point = None if self.zero_point is None else fn(self.zero_point)
        return self._like(fn(self.int_data), fn(self.scale), zero_point, dtype)

    def _like(
        self, int_data: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype | None = None
    ) -> AffineQuantizedTensor:
        """Return a tensor of the same format with other tensors inside."""
        with self._mode():
            return AffineQuantizedTensor(
                int_data,
                scale,
                zero_point,
                self.target_dtype,
                quant_min=self.quant_min,
                quant_max=self.quant_max,
                dtype=dtype or self.dtype,
                use_fast_accum=self.use_fast_accum,
            )

    @property
    def tensor_impl(self) -> TensorImpl:
        """The tensors inside, as old code reads them."""
        return TensorImpl(self.int_data, self.scale, self.zero_point)

    @property
    def zero_point_domain(self) -> ZeroPointDomain:
        """Torchao's word for what a zero point is: `INT`, a code; `NONE` for integers without one."""
        without = self.zero_point is None and not self.target_dtype.is_floating_point
        return ZeroPointDomain.NONE if without else ZeroPointDomain.INT

    @property
    def _layout(self) -> PlainLayout | Float8Layout:
        """How the codes are held, in torchao's terms; a Float8Layout has the options of the product."""
        if not self.target_dtype.is_floating_point:
            return PlainLayout()
        return Float8Layout(Float8MMConfig(use_fast_accum=True) if self.use_fast_accum else None)

    @property
    def block_size(self) -> tuple[int, ...]:
        """How many elements along each axis share a scale; the whole shape for one scale."""
        sizes = zip(self.int_data.shape, self.scale.shape, strict=True)
        # Not n // s for both: compiled, a size not known yet would make a block size not known.
        return tuple(n if s == 1 else 1 if s == n else n // s for n, s in sizes)

    @property
    def spec(self) -> fsq.QuantSpec:
        """The quantization in the terms of functional_sq; integers are ASYMMETRIC: any zero point."""
        granularity = _granularity(tuple(self.int_data.shape), tuple(self.scale.shape), self.block_size)
        return _spec(self.target_dtype, self.quant_min, self.quant_max, granularity)

    @property
    def qparams(self) -> fsq.QParams:
        """Scale and zero point in the terms of functional_sq."""
        return _qparams(self.scale, self.zero_point)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """Return the real values that the codes stand for.

        Args:
            output_dtype: dtype of the result, in which the zero point is subtracted; None: the
                outer dtype.

        Raises:
            TypeError: `output_dtype` holds no real values.

        Example:
            >>> import torch
            >>> from bridge.aqt import to_affine_quantized_intx_static
            >>> scale, zero_point = torch.tensor([0.5]), torch.tensor([128])
            >>> x = torch.tensor([0.3, -1.0, 2.2])
            >>> to_affine_quantized_intx_static(x, scale, zero_point, x.shape, torch.uint8).dequantize()
            tensor([ 0.5000, -1.0000,  2.0000])
        """
        return _dequantize(self, output_dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        def shown(name: str, value: Tensor | None) -> str:
            return f"    {name}=" + repr(value).replace("\n", "\n" + " " * (len(name) + 5))

        def shown_flat(name: str, value: Tensor | None) -> str:
            # One scale a row would take one line each.
            if value is None or value.ndim < 2:
                return shown(name, value)
            return f"{shown(name, value.reshape(-1))}.reshape{tuple(value.shape)}"

        options = [
            f"{name}={value}, "
            for name, default in (("quant_min", None), ("quant_max", None), ("use_fast_accum", False))
            if (value := getattr(self, name)) is not default
        ]
        lines = [
            shown("int_data", self.int_data),
            shown_flat("scale", self.scale),
            shown_flat("zero_point", self.zero_point),
            f"    target_dtype={self.target_dtype}, {''.join(options)}block_size={self.block_size}, "
            f"shape={tuple(self.shape)}, device={self.device}, dtype={self.dtype})",
        ]
        return f"{type(self).__name__}(\n" + ",\n".join(lines)

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `input @ weight.T + bias`; on codes where both have them and their scales are constant along K."""
        if not isinstance(weight, AffineQuantizedTensor):
            raise NotImplementedError(
                f"a quantized input meets a weight that is a {type(weight).__name__} of {weight.dtype}; "
                f"quantize the weight too, or multiply input.dequantize()"
            )
        if not isinstance(input, AffineQuantizedTensor):
            return F.linear(input, weight.dequantize(), bias)
        if input.dtype != weight.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(
                f"an input that stands for {input.dtype} meets a weight that stands for {weight.dtype}; "
                f"convert one of them, as weight.to({input.dtype})"
            )
        x, qp = input.int_data, input.qparams
        if not _codes_multiply(input, weight):
            own = None if bias is None else bias.to(input.dtype)
            return fsq.linear_reference(input.spec, x, qp, weight.dequantize().to(input.dtype), own)
        folded = fsq.fold(weight.spec, weight.int_data, weight.qparams)
        return fsq.linear(input.spec, x, qp, folded, bias, dtype=input.dtype, fast_accum=weight.use_fast_accum)


# Constructing.


@dataclass(frozen=True)
class PlainLayout:
    """What torchao's integer functions take as `_layout`: codes, scale and zero point as they are; there is no other.

    Source: `torchao.dtypes.PlainLayout`.

    Example:
        >>> PlainLayout()
        PlainLayout()
    """


def to_affine_quantized_intx_static(
    input_float: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
    _layout: PlainLayout | None = None,
) -> AffineQuantizedTensor:
    """Quantize real values to integers with a scale and zero point that are known.

    Args:
        input_float: real values; their dtype becomes the outer dtype.
        scale: one real value for each block, input units per step, in any shape: `()`, `(N,)`, `(N, 1)`.
        zero_point: one whole number for each block, the code of 0.0, of any dtype and shape; None: 0.
        block_size: how many elements along each axis share a scale: `x.shape` for one scale,
            `(1, K)` for one a row.
        target_dtype: `torch.uint1` ... `uint8`, `torch.int1` ... `int8`, `torch.int16`.
        quant_min: smallest code to use; None: the dtype's.
        quant_max: largest code to use; None: the dtype's.
        zero_point_domain: torchao's `ZeroPointDomain.INT`, or `NONE` for a zero point of None.
        _layout: a PlainLayout, the bridge's or torchao's, or None.

    Raises:
        TypeError: `input_float` or `scale` holds no real values, `target_dtype` no integers, or `_layout` is
            another.
        ValueError: `block_size` does not divide the shape, or there is not one scale and one zero
            point for each block, or `zero_point_domain` is another, or NONE with a zero point.

    Source: the function of the same name in `torchao.dtypes` 0.16; the same bits.

    Example:
        >>> import torch
        >>> from bridge.aqt import to_affine_quantized_intx_static
        >>> x = torch.tensor([[-1.0, 0.0, 1.5]])
        >>> q = to_affine_quantized_intx_static(x, torch.tensor(0.5), torch.tensor(100), x.shape, torch.uint8)
        >>> q.int_data, q.block_size
        (tensor([[ 98, 100, 103]], dtype=torch.uint8), (1, 3))
    """
    if not isinstance(format_of(target_dtype), Integer):
        raise TypeError(f"target_dtype={target_dtype} is no integer dtype; use to_affine_quantized_floatx_static")
    check_zero_point_domain(zero_point_domain)
    if zero_point_domain is ZeroPointDomain.NONE and zero_point is not None:
        raise ValueError("a zero point is given with zero_point_domain=ZeroPointDomain.NONE; give None, or use INT")
    if _layout is not None and type(_layout).__name__ != "PlainLayout":  # torchao's own is gone in 0.18
        raise TypeError(f"_layout is a {type(_layout).__name__}; give a PlainLayout, or None")
    return _quantized(input_float, scale, zero_point, block_size, target_dtype, quant_min, quant_max)


def to_affine_quantized_intx(
    input_float: Tensor,
    mapping_type: fsq.MappingType,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: int | None = None,
    quant_max: int | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = None,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
    _layout: PlainLayout | None = None,
) -> AffineQuantizedTensor:
    """Quantize real values to integers with the scale and zero point of their own smallest and largest.

    Args:
        input_float: real values; their dtype becomes the outer dtype, and scales are computed in it.
        mapping_type: `MappingType`, functional_sq's or torchao's.
        block_size, target_dtype, quant_min, quant_max, _layout: as of `to_affine_quantized_intx_static`.
        eps: lower limit of a scale; default: that of the dtype of `input_float`.
        scale_dtype: default: the dtype of `input_float`.
        zero_point_dtype: default int32.
        preserve_zero: True: every range is made to contain 0.
        zero_point_domain: torchao's `ZeroPointDomain.INT`, or `NONE` for a mapping that is symmetric around the code 0.

    Raises:
        TypeError, ValueError: as of `to_affine_quantized_intx_static`; or `preserve_zero` is another, or a zero point
            is not 0 with `NONE`.

    Source: the function of the same name in `torchao.dtypes` 0.16; the same bits.

    Example:
        >>> import torch
        >>> from bridge import MappingType, to_affine_quantized_intx
        >>> w = torch.tensor([[-1.27, 0.5], [2.54, 0.0]])
        >>> to_affine_quantized_intx(w, MappingType.SYMMETRIC, (1, 2), torch.int8, -127).int_data
        tensor([[-127,   50],
                [ 127,    0]], dtype=torch.int8)
    """
    check_real(input_float, "quantize")
    check_preserve_zero(preserve_zero)
    scale, zero_point = _chosen(
        input_float,
        tuple(block_size),
        target_dtype,
        zero_point_domain,
        mapping=adopt(mapping_type),
        quant_min=quant_min,
        quant_max=quant_max,
        eps=torch.finfo(input_float.dtype).eps if eps is None else eps,
        scale_dtype=scale_dtype or input_float.dtype,
        zero_point_dtype=zero_point_dtype or torch.int32,
    )
    return to_affine_quantized_intx_static(
        input_float, scale, zero_point, block_size, target_dtype, quant_min, quant_max, zero_point_domain, _layout
    )


@dataclass(frozen=True)
class Float8MMConfig:
    """Options of the float8 product.

    Args:
        emulate: not supported.
        use_fast_accum: let the device add with fewer bits, where its float8 product offers that.
        pad_inner_dim: not supported, and not needed.

    Raises:
        ValueError: an option is set that is not supported; none is ignored.

    Source: `torchao.float8.inference.Float8MMConfig`.

    Example:
        >>> Float8MMConfig(use_fast_accum=True)
        Float8MMConfig(emulate=False, use_fast_accum=True, pad_inner_dim=False)
    """

    emulate: bool = False
    use_fast_accum: bool = False
    pad_inner_dim: bool = False

    def __post_init__(self) -> None:
        if self.emulate:
            raise ValueError(
                "Float8MMConfig(emulate=True): the product of codes is not emulated; leave it out (a device "
                "without float8 products multiplies exactly in wider floats), or multiply x.dequantize()"
            )
        if self.pad_inner_dim:
            raise ValueError("Float8MMConfig(pad_inner_dim=True): any inner size is multiplied as it is; leave it out")


@dataclass(frozen=True)
class Float8Layout:
    """What torchao's float8 functions take as `_layout`: the options of the product, or none.

    Args:
        mm_config: the options, in a Float8MMConfig of the bridge or of torchao; None: the defaults.

    Raises:
        TypeError: `mm_config` is neither.
        ValueError: an option is set that is not supported, as for the bridge's Float8MMConfig.

    Source: `torchao.dtypes.Float8Layout`.

    Example:
        >>> Float8Layout(mm_config=None)
        Float8Layout(mm_config=None)
    """

    mm_config: Float8MMConfig | None = None

    def __post_init__(self) -> None:
        given = self.mm_config
        if given is None:
            return
        if type(given).__name__ != "Float8MMConfig":  # torchao's may be imported from several places
            raise TypeError(f"mm_config is a {type(given).__name__}; give a Float8MMConfig, or None")
        Float8MMConfig(given.emulate, given.use_fast_accum, given.pad_inner_dim)


def to_affine_quantized_floatx_static(
    input_float: Tensor,
    scale: Tensor,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    _layout: Float8Layout | None = None,
    scale_dtype: torch.dtype | None = None,
) -> AffineQuantizedTensor:
    """Quantize real values to 8-bit floats with a scale that is known.

    Args:
        input_float: real values; their dtype becomes the outer dtype.
        scale: one real value for each block, input units per code unit, in any shape.
        block_size: how many elements along each axis share a scale.
        target_dtype: `torch.float8_e4m3fn`, `float8_e5m2` or one of their FNUZ variants.
        _layout: options of the product, in a Float8Layout of the bridge or of torchao; those of the weight count.
        scale_dtype: the dtype of `scale`, which is kept; None: not compared.

    Raises:
        TypeError: `input_float` or `scale` holds no real values, `target_dtype` no 8-bit floats,
            `_layout` is no Float8Layout, or `scale_dtype` is another than that of `scale`.
        ValueError: `block_size` does not divide the shape, or there is not one scale for each block.

    Source: the function of the same name in `torchao.dtypes` 0.16; the same bits.

    Example:
        >>> import torch
        >>> from bridge.aqt import to_affine_quantized_floatx_static
        >>> x = torch.tensor([-1.0, 0.3, 2.0])
        >>> q = to_affine_quantized_floatx_static(x, torch.tensor(0.5), x.shape, torch.float8_e4m3fn)
        >>> q.int_data.float(), q.dequantize()
        (tensor([-2.0000,  0.6250,  4.0000]), tensor([-1.0000,  0.3125,  2.0000]))
    """
    if not isinstance(format_of(target_dtype), Float8):
        raise TypeError(f"target_dtype={target_dtype} is no 8-bit float; use to_affine_quantized_intx_static")
    if _layout is not None and type(_layout).__name__ != "Float8Layout":  # torchao's own is gone in 0.18
        raise TypeError(f"_layout is a {type(_layout).__name__}; give a Float8Layout of bridge.aqt, or None")
    if scale_dtype is not None and isinstance(scale, Tensor) and scale_dtype is not scale.dtype:
        raise TypeError(f"scale_dtype={scale_dtype}, but scale is {scale.dtype}, and is kept so; give it in that dtype")
    config = None if _layout is None else Float8Layout(_layout.mm_config).mm_config
    use_fast_accum = config is not None and config.use_fast_accum
    return _quantized(input_float, scale, None, block_size, target_dtype, None, None, use_fast_accum)


def _quantized(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: int | None,
    quant_max: int | None,
    use_fast_accum: bool = False,
) -> AffineQuantizedTensor:
    check_real(x, "quantize")
    check_real(scale, "scale")
    shape = tuple(x.shape)
    stat_shape = _stat_shape(tuple(block_size), shape)
    scale = _fitted("scale", scale, stat_shape, block_size)
    if zero_point is not None:
        zero_point = _fitted("zero_point", zero_point, stat_shape, block_size)
    spec = _spec(target_dtype, quant_min, quant_max, _granularity(shape, stat_shape, tuple(block_size)))
    return AffineQuantizedTensor(
        fsq.quantize(spec, x, _qparams(scale, zero_point)),
        scale,
        zero_point,
        target_dtype,
        quant_min=quant_min,
        quant_max=quant_max,
        dtype=x.dtype,
        use_fast_accum=use_fast_accum,
    )


def _chosen(
    x: Tensor, block_size: tuple[int, ...], dtype: torch.dtype, domain: ZeroPointDomain, **options: Any
) -> fsq.QParams:
    """Return the qparams of the smallest and the largest value of each block, computed in the dtype of `x`."""
    shape = tuple(x.shape)
    spec = fsq.QuantSpec(dtype, _granularity(shape, _stat_shape(block_size, shape), block_size), **options)
    check_zero_point_domain(domain, spec)
    state = fsq.observe(spec, fsq.init(spec, shape, dtype=x.dtype, device=x.device), x.detach())
    qp = fsq.calc_qparams(spec, state)
    return qp._replace(zero_point=None) if domain is ZeroPointDomain.NONE else qp  # type: ignore[arg-type]


def _stat_shape(block_size: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(block_size) != len(shape):
        raise ValueError(
            f"block_size={block_size} has {len(block_size)} axes and the tensor of shape {shape} has {len(shape)}; "
            f"give one size for each axis"
        )
    stat_shape = []
    for axis, (block, n) in enumerate(zip(block_size, shape, strict=True)):
        # First of all the whole axis, which may be empty and, compiled, of a size not known yet.
        if block == n:
            stat_shape.append(1)
        elif block >= 1 and n % block == 0:
            stat_shape.append(n // block)
        else:
            raise ValueError(
                f"block_size={block_size} does not divide axis {axis} of shape {shape}; use a divisor of {n}"
            )
    return tuple(stat_shape)


def _fitted(name: str, value: Tensor, stat_shape: tuple[int, ...], block_size: Sequence[int]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give a tensor")
    if value.numel() != math.prod(stat_shape):
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} has {value.numel()} values, and block_size={tuple(block_size)} "
            f"makes {math.prod(stat_shape)} blocks; give one for each block, or the block size it was made with"
        )
    # A copy: tensors that are made with one scale are loaded apart.
    return value.detach().clone().reshape(stat_shape)


def _granularity(shape: tuple[int, ...], stat_shape: tuple[int, ...], block_size: tuple[int, ...]) -> fsq.Granularity:
    kept = [axis for axis, s in enumerate(stat_shape) if s != 1]
    if not kept:
        return fsq.PerTensor()
    if len(kept) == 1 and stat_shape[kept[0]] == shape[kept[0]]:
        return fsq.PerAxis(kept[0])
    if stat_shape == (*shape[:-1], 1):
        return fsq.PerToken()
    # int: compiled, a size may be symbolic, and what is in a spec is static.
    return fsq.PerBlock(tuple(int(n) for n in block_size))


@functools.cache
def _spec(
    dtype: torch.dtype, quant_min: int | None, quant_max: int | None, granularity: fsq.Granularity
) -> fsq.QuantSpec:
    float8 = isinstance(format_of(dtype), Float8)
    mapping = fsq.MappingType.SYMMETRIC if float8 else fsq.MappingType.ASYMMETRIC
    return fsq.QuantSpec(dtype, granularity, mapping=mapping, quant_min=quant_min, quant_max=quant_max)


def _qparams(scale: Tensor, zero_point: Tensor | None) -> fsq.QParams:
    return fsq.QParams(scale, torch.zeros_like(scale, dtype=torch.int32) if zero_point is None else zero_point)


# Computing.


def _dequantize(q: AffineQuantizedTensor, dtype: torch.dtype | None) -> Tensor:
    return fsq.dequantize(q.spec, q.int_data, q.qparams, dtype=dtype or q.dtype)


def _codes_multiply(x: AffineQuantizedTensor, weight: AffineQuantizedTensor) -> bool:
    formats = [format_of(t.target_dtype) for t in (x, weight)]
    return (
        (all(isinstance(f, Integer) and f.bits <= 8 for f in formats) or all(isinstance(f, Float8) for f in formats))
        and weight.ndim == 2
        and tuple(weight.scale.shape) in ((1, 1), (weight.int_data.shape[0], 1))
        and (x.scale.numel() == 1 or tuple(x.scale.shape) == (*x.int_data.shape[:-1], 1))
    )


# Operations of AffineQuantizedTensor: the operator, then its arguments.


def _taken(q: AffineQuantizedTensor, codes: Tensor, scales: Callable[[Tensor], Tensor]) -> AffineQuantizedTensor:
    """Return `codes` with what `scales` takes of the scale and the zero point."""
    return q._map(lambda t: codes if t is q.int_data else scales(t))


def _have_scales(q: AffineQuantizedTensor, dim: int) -> bool:
    """Whether elements along `dim` have a scale each, and not one for all; ValueError where some of them share one."""
    n, s = q.int_data.shape[dim], q.scale.shape[dim]
    if s not in (1, n):
        raise _cut(q, dim)
    return s != 1


def _cut(q: AffineQuantizedTensor, dim: int) -> ValueError:
    block = q.block_size[dim]
    return ValueError(
        f"an index along axis {dim} of shape {tuple(q.shape)} cuts blocks of {block} (block_size={q.block_size}); "
        f"slice at multiples of {block}, or index x.dequantize()"
    )


def _slice(
    func: Any, q: AffineQuantizedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> AffineQuantizedTensor:
    codes = func(q.int_data, dim, start, end, step)
    if q.scale.shape[dim] == 1:
        return _taken(q, codes, lambda t: t)
    block = q.block_size[dim]
    if block > 1:
        start, end, _ = slice(start, end).indices(q.int_data.shape[dim])
        if step != 1 or start % block or end % block:
            raise _cut(q, dim)
        start, end = start // block, end // block
    return _taken(q, codes, lambda t: func(t, dim, start, end, step))


def _select(func: Any, q: AffineQuantizedTensor, dim: int, index: int) -> AffineQuantizedTensor:
    own = _have_scales(q, dim)
    return _taken(q, func(q.int_data, dim, index), lambda t: func(t, dim, index if own else 0))


def _index(func: Any, q: AffineQuantizedTensor, indices: Sequence[Tensor | None]) -> AffineQuantizedTensor:
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].ndim != 1:
        raise NotImplementedError(
            f"indexing with tensors of shapes {[tuple(index.shape) for _, index in given]}; "
            f"use one index tensor of rank 1, or index x.dequantize()"
        )
    own = _have_scales(q, given[0][0])
    return _taken(q, _picked(func, q, indices), lambda t: func(t, indices) if own else t)


def _embedding(func: Any, q: AffineQuantizedTensor, rows: Tensor, *options: Any) -> Tensor:
    each = rows if _have_scales(q, 0) else torch.zeros_like(rows)
    return _taken(q, _picked(func, q, rows), lambda t: func(t, each)).dequantize()


def _picked(func: Any, q: AffineQuantizedTensor, indices: Any) -> Tensor:
    # Read as bytes, for CUDA indexes no float8.
    codes = q.int_data.view(torch.uint8) if isinstance(format_of(q.target_dtype), Float8) else q.int_data
    return func(codes, indices).view(q.int_data.dtype)


def _view(func: Any, q: AffineQuantizedTensor, size: Sequence[int]) -> AffineQuantizedTensor:
    codes = func(q.int_data, size)
    shape, stat_shape = tuple(q.int_data.shape), tuple(q.scale.shape)
    if q.scale.numel() == 1:
        stat_shape = (1,) * codes.ndim
    elif stat_shape == (*shape[:-1], 1) and codes.ndim and codes.shape[-1] == shape[-1]:
        stat_shape = (*codes.shape[:-1], 1)
    elif tuple(codes.shape) != shape:
        raise ValueError(
            f"a view of shape {tuple(codes.shape)} does not keep the blocks of shape {shape} with "
            f"block_size={q.block_size}; only one scale for the tensor or for each vector along the last axis "
            f"can be viewed; use x.dequantize()"
        )
    return _taken(q, codes, lambda t: t.view(stat_shape))


AffineQuantizedTensor.operations = Wrapper.operations | {
    aten.t.default: each,
    aten.transpose.int: each,
    aten.permute.default: each,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.embedding.default: _embedding,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}

# Compiled, these stay calls in the graph: a QuantSpec cannot be built where Dynamo traces Python, and
# what they call is traced one level below, on the tensors inside.
for _function in (_chosen, _quantized, _dequantize, AffineQuantizedTensor.linear):
    torch.compiler.allow_in_graph(_function)

# What torch.load(weights_only=True) may make.
torch.serialization.add_safe_globals([AffineQuantizedTensor])
