"""What the bridge takes from torchao: the only file that imports it. Works with 0.16 and newer."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Callable
from typing import Any

import functional_sq as fsq

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


def check_zero_point_domain(domain: Any) -> None:
    """Raise ValueError unless a zero point is a code, or there is none.

    Example:
        >>> from bridge.torchao import ZeroPointDomain, check_zero_point_domain
        >>> check_zero_point_domain(ZeroPointDomain.INT)
    """
    if domain not in (ZeroPointDomain.INT, ZeroPointDomain.NONE):
        raise ValueError(
            f"zero_point_domain={domain}: a zero point is a code here; use ZeroPointDomain.INT, or "
            f"ZeroPointDomain.NONE where there is none"
        )
