"""What the bridge takes from torchao: the only file that imports it. Works with 0.16 and newer."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Callable
from typing import Any

import functional_sq as fsq
from functional_sq.qparams import fixed_zero_point

with warnings.catch_warnings():
    # On import, torchao 0.16 warns of its own moved modules.
    warnings.simplefilter("ignore")
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import quantize_ as torchao_quantize_
    from torchao.quantization.quant_primitives import ZeroPointDomain
    from torchao.quantization.transform_module import register_quantize_module_handler
    from torchao.quantization.utils import compute_error

__all__ = [
    "AOBaseConfig",
    "ZeroPointDomain",
    "adopt",
    "check_preserve_zero",
    "check_zero_point_domain",
    "compute_error",
    "register_quantize_module_handler",
    "torchao_quantize_",
]


def adopt(value: Any) -> Any:
    """Return functional_sq's twin of a torchao granularity or mapping; anything else as it is.

    Example:
        >>> from torchao.quantization import PerAxis
        >>> from bridge.torchao import adopt
        >>> adopt(PerAxis(0)).stat_shape((2, 3))
        (2, 1)
    """
    if not type(value).__module__.startswith("torchao."):
        return value
    if isinstance(value, enum.Enum):
        return fsq.MappingType[value.name]
    twin: Callable[..., Any] | None = getattr(fsq, type(value).__name__, None)
    if twin is None or not dataclasses.is_dataclass(value):
        raise TypeError(f"{value!r} has no twin in functional_sq; use one of functional_sq's granularities")
    return twin(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})


def check_preserve_zero(preserve_zero: Any) -> None:
    """Raise ValueError for a range that need not contain 0.

    Example:
        >>> from bridge.torchao import check_preserve_zero
        >>> check_preserve_zero(True)
    """
    if preserve_zero is not True:
        raise ValueError(f"preserve_zero={preserve_zero}: 0.0 always has a code; leave it out")


def check_zero_point_domain(domain: Any, spec: fsq.QuantSpec | None = None) -> None:
    """Raise ValueError unless a zero point is a code, or there is none; for a spec, none where it would be 0.

    Example:
        >>> from bridge.torchao import ZeroPointDomain, check_zero_point_domain
        >>> check_zero_point_domain(ZeroPointDomain.INT)
    """
    if domain not in (ZeroPointDomain.INT, ZeroPointDomain.NONE):
        raise ValueError(
            f"zero_point_domain={domain}: a zero point is a code here; use ZeroPointDomain.INT, or "
            f"ZeroPointDomain.NONE where there is none"
        )
    if spec is not None and domain is ZeroPointDomain.NONE and fixed_zero_point(spec) != 0:
        raise ValueError(
            f"zero_point_domain=ZeroPointDomain.NONE with {spec}: its zero point is not 0; use ZeroPointDomain.INT"
        )
