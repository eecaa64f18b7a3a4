"""One configuration of static quantization, and what torchao's `quantize_` does with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

import functional_sq as fsq
from bridge.observed import LAYERS, Observed, ObserverModule, observed_type
from bridge.quantized import QUANTIZED, QuantizedLinear
from bridge.torchao import AOBaseConfig, register_quantize_module_handler

__all__ = ["StaticQuantConfig"]


@dataclass(frozen=True)
class StaticQuantConfig(AOBaseConfig):
    """How the linear layers and convolutions of a model are quantized; frozen and reusable.

    Used by `prepare_` and `convert_`, and by `quantize_` (torchao's or the bridge's), which applies
    one step of it to each layer that its filter takes.

    Args:
        dtype: quantized dtype. It gives the defaults of `activation` and `weight`: per-tensor
            activations and one weight scale for each output channel; both asymmetric for unsigned
            integers (the scheme of torchao's tutorial), asymmetric activations with symmetric weights
            for signed integers, both symmetric for float8.
        step: what `quantize_` does: `"prepare"` puts observers in, `"convert"` quantizes what was
            observed.
        activation: quantization of inputs, in place of the default.
        weight: quantization of weights, in place of the default.
        form: what a converted layer is: `"module"`, a QuantizedLinear or QuantizedConv2d, or `"tensor"`,
            for linear layers alone: a `torch.nn.Linear` whose weight is a tensor subclass.
        reference: dequantize and multiply floats, as AffineQuantizedTensor did; slow, and takes any
            format and granularity.

    Raises:
        TypeError, ValueError: an argument is not of its kind, or the combination cannot work.

    Example:
        >>> import torch
        >>> from bridge import StaticQuantConfig
        >>> StaticQuantConfig(torch.uint8).activation
        QuantSpec(torch.uint8, PerTensor(), mapping=MappingType.ASYMMETRIC)
    """

    dtype: torch.dtype
    step: Literal["prepare", "convert"] = field(default="convert", kw_only=True)
    activation: fsq.QuantSpec = field(default=None, kw_only=True)  # type: ignore[assignment]
    weight: fsq.QuantSpec = field(default=None, kw_only=True)  # type: ignore[assignment]
    form: Literal["module", "tensor"] = field(default="module", kw_only=True)
    reference: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        unsigned = fsq.QuantSpec(self.dtype, fsq.PerTensor()).bounds[0] == 0
        integer = not self.dtype.is_floating_point
        asymmetric, symmetric = fsq.MappingType.ASYMMETRIC, fsq.MappingType.SYMMETRIC
        for name, default in (
            ("activation", fsq.QuantSpec(self.dtype, fsq.PerTensor(), mapping=asymmetric if integer else symmetric)),
            ("weight", fsq.QuantSpec(self.dtype, fsq.PerAxis(0), mapping=asymmetric if unsigned else symmetric)),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            elif not isinstance(getattr(self, name), fsq.QuantSpec):
                raise TypeError(f"{name}={getattr(self, name)!r} is not a QuantSpec")
        for name, choices in (("step", ("prepare", "convert")), ("form", ("module", "tensor"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; use one of {', '.join(map(repr, choices))}")
        if self.form == "tensor" and self.reference:
            raise ValueError(
                "form='tensor' with reference=True: the tensor subclass multiplies codes; use form='module'"
            )


def is_observed(module: nn.Module, name: str) -> bool:
    """Say whether `module` is a layer with observers in."""
    return isinstance(module, Observed)


def observed_layer(config: StaticQuantConfig, layer: nn.Module) -> Observed:
    """Return `layer` with the observers of `config`, sharing its parameters."""
    kind = observed_type(layer)
    if kind is None:
        raise TypeError(f"a {type(layer).__name__} cannot be observed; give one of {LAYERS}")
    if not config.reference:
        fsq.check_product(config.activation, config.weight, layer.weight.shape)
    return kind.from_float(layer, ObserverModule(config.activation), ObserverModule(config.weight))


def quantized_layer(config: StaticQuantConfig | None, observed: Observed) -> nn.Module:
    """Return the quantized layer that `observed` becomes; None: a module that multiplies codes.

    The observers say how it is quantized; a config that says another dtype is refused.
    """
    kind = QUANTIZED[type(observed)]
    if config is None:
        return kind.from_observed(observed)
    for what, spec, observer in (
        ("activations", config.activation, observed.act_obs),
        ("weight", config.weight, observed.weight_obs),
    ):
        if spec.dtype is not observer.spec.dtype:
            raise ValueError(
                f"the config quantizes the {what} to {spec.dtype}, but they were observed for {observer.spec.dtype}; "
                f"use the dtype that the observers were made with"
            )
    quantized = kind.from_observed(observed, reference=config.reference)
    if config.form == "module":
        return quantized
    if not isinstance(quantized, QuantizedLinear):
        raise ValueError(
            f"form='tensor' is for linear layers, and this is a {type(observed).__name__}; "
            f"use form='module', or leave the layer out by filter_fn"
        )
    return quantized.as_linear()


@register_quantize_module_handler(StaticQuantConfig)
def _apply(module: nn.Module, config: StaticQuantConfig) -> nn.Module:
    """Apply one step to one layer, as torchao's `quantize_` asks.

    A layer that the step is not for stays as it is: torchao's default filter takes every
    `torch.nn.Linear`, observed or not.
    """
    if config.step == "prepare":
        return module if observed_type(module) is None else observed_layer(config, module)
    return quantized_layer(config, module) if isinstance(module, Observed) else module
