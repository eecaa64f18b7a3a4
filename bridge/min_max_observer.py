"""The min/max observer of torchao's static quantization, with its arguments and attributes."""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

import functional_sq as fsq
from bridge.observer import ObserverModule
from bridge.torchao import ZeroPointDomain, adopt, check_preserve_zero, check_zero_point_domain

__all__ = ["AffineQuantizedMinMaxObserver"]


class AffineQuantizedMinMaxObserver(ObserverModule):
    """torchao's min/max observer: the same arguments, the same qparams.

    Differs where torchao's loses something: statistics are buffers (in `state_dict`, moved by `to`),
    they are float32 for a bfloat16 model too, and tensors of another rank or batch size than the
    first are taken.

    Args:
        mapping_type: `MappingType`, functional_sq's or torchao's.
        target_dtype: quantized dtype, such as `torch.uint8` or `torch.float8_e4m3fn`.
        granularity: which elements share one scale, functional_sq's or torchao's.
        quant_min: smallest code; default: the dtype's.
        quant_max: largest code; default: the dtype's.
        eps: lower limit of a scale; default: float32's eps.
        scale_dtype: default float32.
        zero_point_dtype: default int32.
        preserve_zero: True: every range is made to contain 0.
        zero_point_domain: torchao's `ZeroPointDomain.INT`: zero points are codes; or `NONE`, for a mapping that is
            symmetric around the code 0: `calculate_qparams` then gives None in place of zeros.
        keepdim: whether `min_val` and `max_val` keep the axes that are reduced; scales always do.

    Attributes:
        mapping_type, target_dtype, granularity, quant_min, quant_max, eps, scale_dtype, zero_point_dtype: those of
            `spec`, read-only.
        min_val, max_val: what was seen, float32; there are none before.

    Raises:
        ValueError: `preserve_zero` or `zero_point_domain` is another, or what a QuantSpec refuses.

    Source: `torchao.quantization.observer.AffineQuantizedMinMaxObserver`.

    Example:
        >>> import torch
        >>> from bridge import AffineQuantizedMinMaxObserver, MappingType, PerTensor
        >>> observer = AffineQuantizedMinMaxObserver(MappingType.ASYMMETRIC, torch.uint8, granularity=PerTensor())
        >>> _ = observer(torch.tensor([-1.0, 1.55]))
        >>> observer.calculate_qparams().scale
        tensor([0.0100])
    """

    def __init__(
        self,
        mapping_type: fsq.MappingType,
        target_dtype: torch.dtype,
        granularity: fsq.Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
        keepdim: bool = False,
    ) -> None:
        given: dict[str, Any] = {"eps": eps, "scale_dtype": scale_dtype, "zero_point_dtype": zero_point_dtype}
        spec = fsq.QuantSpec(
            target_dtype,
            adopt(granularity),
            mapping=adopt(mapping_type),
            quant_min=quant_min,
            quant_max=quant_max,
            **{name: value for name, value in given.items() if value is not None},
        )
        check_preserve_zero(preserve_zero)
        check_zero_point_domain(zero_point_domain, spec)
        super().__init__(spec)
        self.preserve_zero = preserve_zero
        self.zero_point_domain = zero_point_domain
        self.keepdim = keepdim

    @classmethod
    def with_args(cls, *args: Any, **kwargs: Any) -> _Factory:
        """Return what makes such observers: a call with the remaining arguments, or none, makes a new one.

        Example:
            >>> import torch
            >>> from bridge import AffineQuantizedMinMaxObserver, MappingType, PerTensor
            >>> int8 = AffineQuantizedMinMaxObserver.with_args(MappingType.SYMMETRIC, torch.int8)
            >>> int8(granularity=PerTensor())
            AffineQuantizedMinMaxObserver(QuantSpec(torch.int8, PerTensor()))
        """
        return _Factory(cls, *args, **kwargs)

    def calculate_qparams(self) -> fsq.QParams:
        """Return scale and zero point, which is None for `ZeroPointDomain.NONE`.

        Raises:
            CalibrationError: nothing was seen, or NaN or Inf was.
        """
        qp = super().calculate_qparams()
        return qp if self.zero_point_domain is ZeroPointDomain.INT else qp._replace(zero_point=None)  # type: ignore[arg-type]

    mapping_type = property(attrgetter("spec.mapping"), doc="How a range is mapped to codes.")
    target_dtype = property(attrgetter("spec.dtype"), doc="The quantized dtype.")
    granularity = property(attrgetter("spec.granularity"), doc="Which elements share one scale.")
    quant_min = property(attrgetter("spec.quant_min"), doc="The smallest code; None: the dtype's.")
    quant_max = property(attrgetter("spec.quant_max"), doc="The largest code; None: the dtype's.")
    eps = property(attrgetter("spec.eps"), doc="The lower limit of a scale.")
    scale_dtype = property(attrgetter("spec.scale_dtype"), doc="The dtype of scales.")
    zero_point_dtype = property(attrgetter("spec.zero_point_dtype"), doc="The dtype of zero points.")

    @property
    def min_val(self) -> Tensor:
        """The smallest value that was seen; AttributeError while nothing was."""
        return self._seen("min")

    @property
    def max_val(self) -> Tensor:
        """The largest value that was seen; AttributeError while nothing was."""
        return self._seen("max")

    def __getattr__(self, name: str) -> Any:
        # Python comes here after a property's AttributeError, and torch would say that there is no such attribute.
        if name in ("min_val", "max_val"):
            raise AttributeError(f"{name}: nothing was seen; run data through the observer first")
        return super().__getattr__(name)

    def _seen(self, name: str) -> Tensor:
        if not self._buffers or not bool(self.state["count"].any()):
            raise AttributeError(name)
        value, granularity = self.state[name], self.spec.granularity
        if self.keepdim:
            return value
        sizes = tuple(value.shape)
        if isinstance(granularity, (fsq.PerAxis, fsq.PerRow, fsq.PerToken)):
            # An axis that is kept may have one element.
            sizes = granularity.stat_shape([2] * value.ndim)
        return value.squeeze([axis for axis, size in enumerate(sizes) if size == 1])


class _Factory(partial[AffineQuantizedMinMaxObserver]):
    """A call that is not made yet, as torchao's `with_args` returns."""

    def with_args(self, *args: Any, **kwargs: Any) -> _Factory:
        """Return one with more arguments; a keyword that is there already is replaced."""
        return _Factory(self, *args, **kwargs)
