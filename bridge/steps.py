"""What each step does to one layer, as its config says; torchao's `quantize_` asks for a step layer by layer."""

from __future__ import annotations

from torch import nn

import functional_sq as fsq
from bridge.config import StaticQuantConfig, default_specs, rules_of
from bridge.kinds import observed_type
from bridge.observed import LAYERS, Observed, check_plain, settings_of, weight_of
from bridge.observer import ObserverModule
from bridge.quantized import QUANTIZED, SWITCHES, QuantizedLinear
from bridge.torchao import register_quantize_module_handler

__all__ = ["check_reread", "prepared_layer", "quantized_layer", "reread_layer"]


def prepared_layer(config: StaticQuantConfig, layer: nn.Module) -> Observed:
    """Return `layer` with the observers of `config`, sharing its parameters; raise if it cannot be so."""
    kind = observed_type(layer)
    if kind is None:
        raise TypeError(f"a {type(layer).__name__} cannot be observed; give one of {LAYERS}")
    if not config.reference:
        fsq.check_product(config.activation, config.weight, weight_of(layer).shape)
    observed = kind.from_float(layer, ObserverModule(config.activation), ObserverModule(config.weight))
    observed.config = config
    return observed


def check_reread(config: StaticQuantConfig, observed: Observed) -> None:
    """Raise ValueError unless what `observed` recorded can be read as `config` says."""
    spec, observer = config.activation, observed.act_obs
    if spec.granularity != observer.spec.granularity:
        raise ValueError(
            f"recorded for {observer.spec.granularity}, which cannot be read as {spec.granularity}; calibrate again"
        )
    shape = weight_of(observed).shape
    if not config.reference:
        fsq.check_product(spec, config.weight, shape)
    spec.observer.check_state(observer.state, exact=False)
    config.weight.granularity.stat_shape(shape)


def reread_layer(config: StaticQuantConfig, observed: Observed) -> None:
    """Make `observed` read what it recorded as `config` says; `check_reread` has allowed it."""
    observed.act_obs.spec = config.activation
    observed.weight_obs = ObserverModule(config.weight).train(observed.training)
    observed.observe_weight()
    observed.config = config


def quantized_layer(config: StaticQuantConfig | None, observed: Observed) -> nn.Module:
    """Return the quantized layer that `observed` becomes; None: as it was prepared.

    The observers say how it is quantized; a config that says another dtype is refused.
    """
    config = observed.config if config is None else config
    kind = QUANTIZED[type(observed)]
    if config is None:
        return kind.from_observed(observed)
    defaults = default_specs(config.dtype)
    for what, spec, default, observer in (
        ("activations", config.activation, defaults["activation"], observed.act_obs),
        ("weight", config.weight, defaults["weight"], observed.weight_obs),
    ):
        if spec.dtype is not observer.spec.dtype:
            raise ValueError(
                f"the config quantizes the {what} to {spec.dtype}, but they were observed for {observer.spec.dtype}; "
                f"use the dtype that the observers were made with, or call reread_(model, config) before"
            )
        # A default says nothing: the tutorial's config knows the dtype alone.
        if spec not in (observer.spec, default):
            raise ValueError(
                f"the config quantizes the {what} as {spec}, but they were observed for {observer.spec}; "
                f"call reread_(model, config) before, which reads the record so"
            )
    quantized = kind.from_observed(observed, **settings_of(config, SWITCHES))
    if config.form == "module":
        return quantized
    if not isinstance(quantized, QuantizedLinear):
        raise ValueError(
            f"form='tensor' is for linear layers, and this is a {type(observed).__name__}; "
            f"use form='module', or leave the layer in float by a rule"
        )
    return quantized.as_linear()


@register_quantize_module_handler(StaticQuantConfig)
def _apply(module: nn.Module, config: StaticQuantConfig) -> nn.Module:
    """Apply one step to one layer, as torchao's `quantize_` asks.

    A layer that the step is not for stays as it is: torchao's default filter takes every
    `torch.nn.Linear`, observed or not.
    """
    if config.step == "convert":
        if not isinstance(module, Observed):
            return module
        check_plain(module)
        return quantized_layer(config, module)
    if observed_type(module) is None:
        return module
    if patterns := [key for key, _ in rules_of(config) if isinstance(key, str)]:
        raise ValueError(
            f"torchao's quantize_ tells a config no names, so the rule for {patterns[0]!r} cannot be applied; "
            f"use bridge.quantize_ or bridge.prepare_"
        )
    chosen = config.of(module, "")
    return module if chosen is None else prepared_layer(chosen, module)
