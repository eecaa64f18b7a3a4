"""The steps from a float model to a quantized one, other than calibration: prepare_, reread_, convert_."""

from __future__ import annotations

from copy import deepcopy
from typing import Final, Literal

import torch
from torch import nn

from bridge.arguments import check_counts, check_function, check_module
from bridge.checks import (
    Filter,
    check_config,
    check_memory,
    check_rules,
    counted,
    is_observed,
    listed,
    observed_layers,
    quantized_by,
    unfit,
)
from bridge.config import StaticQuantConfig
from bridge.kinds import float_reason, observed_type
from bridge.observed import LAYERS, Observed, ObservedLinear, check_plain
from bridge.observer import ObserverModule
from bridge.steps import check_reread, prepared_layer, quantized_layer, reread_layer
from bridge.swapping import named, swap_
from bridge.torchao import AOBaseConfig, torchao_quantize_

__all__ = ["convert_", "insert_observers_", "prepare_", "quantize_", "reread_", "unprepare_"]

_PREPARE: Final = "prepare_ makes them, and convert_ takes them all"


def prepare_(model: nn.Module, config: StaticQuantConfig, filter_fn: Filter | None = None) -> nn.Module:
    """Put observers into the linear and convolution layers of `model`, in place.

    Parameters and their names stay: the prepared model computes what the float model computes and
    loads its `state_dict`. `unprepare_` takes the observers out again.

    Modules that no one chose to leave in float and that yet must stay so, for they multiply parameters of
    their own and call no layer (recurrent ones; `torch.nn.MultiheadAttention`, unless `make_quantizable_` came
    before), are listed once, in one warning.

    Args:
        model: any module with such layers inside; may be compiled already.
        config: how the layers will be quantized, and by its `rules` which of them.
        filter_fn: `(module, name) -> bool`; False: the layer stays in float. Default: all.

    Returns:
        `model`.

    Raises:
        ValueError: no layer is left to quantize; a rule's pattern fits no name in the model, or a rule a part
            of it and no layer; a layer has two names, and two answers; layers cannot be quantized so, each of
            which is named. Nothing was changed.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        >>> bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        Sequential(
          (0): ObservedLinear(
            in_features=8, out_features=4, bias=True
            (act_obs): ObserverModule(QuantSpec(torch.int8, PerTensor(), mapping=MappingType.ASYMMETRIC))
            (weight_obs): ObserverModule(QuantSpec(torch.int8, PerAxis(axis=0)))
          )
        )
    """
    _prepare(model, config, filter_fn)
    return model


def _prepare(model: nn.Module, config: StaticQuantConfig, filter_fn: Filter | None) -> None:
    check_module(model)
    check_config(config)
    check_function("filter_fn", filter_fn, "a module and its name to a bool")
    check_rules(config, model)

    def asked(module: nn.Module, name: str) -> StaticQuantConfig | None:
        return config.of(module, name) if filter_fn is None or filter_fn(module, name) else None

    names = named(model)
    layers = {name: module for name, module in names.items() if observed_type(module) is not None}
    chosen = {name: own for name, layer in layers.items() if (own := asked(layer, name)) is not None}
    left: dict[str, list[str]] = {}
    for name, module in names.items():
        reason = float_reason(module)
        if reason is not None and asked(module, name) is not None:
            left.setdefault(reason, []).append(name)
    reasons = listed({", ".join(same): reason for reason, same in left.items()})
    swap_(
        model,
        lambda module, name: observed_type(module) is not None and name in chosen,
        lambda layer, name: prepared_layer(chosen[name], layer),
        f"one of {LAYERS}",
        "look at the filter and the rules; layers that are prepared or converted already stay what they are"
        + (f"; and some must stay in float:\n{reasons}" if left else ""),
        f"{counted(sum(map(len, left.values())), 'module')} left in float:\n{reasons}" if left else "",
    )


def insert_observers_(
    model: nn.Module,
    act_obs: ObserverModule,
    weight_obs: ObserverModule,
    filter_fn: Filter | None = None,
) -> None:
    """Swap every linear layer of `model` for an ObservedLinear with copies of the two observers.

    Args:
        model: changed in place; may be compiled already.
        act_obs: copied for the input of each layer.
        weight_obs: copied for the weight of each layer.
        filter_fn: `(module, name) -> bool`, asked of each `torch.nn.Linear`; default: all of them.

    Raises:
        TypeError: `model` is no module, or `filter_fn` no function.
        ValueError: no layer matches. Nothing was changed.

    Example:
        >>> import torch
        >>> from bridge import AffineQuantizedMinMaxObserver, MappingType, PerTensor, insert_observers_
        >>> observer = AffineQuantizedMinMaxObserver(MappingType.SYMMETRIC, torch.int8, granularity=PerTensor())
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> insert_observers_(model, observer, observer); type(model[0]).__name__
        'ObservedLinear'
    """
    check_module(model)
    check_function("filter_fn", filter_fn, "a module and its name to a bool")
    swap_(
        model,
        lambda module, name: observed_type(module) is ObservedLinear and (filter_fn is None or filter_fn(module, name)),
        lambda layer, name: ObservedLinear.from_float(layer, deepcopy(act_obs), deepcopy(weight_obs)),
        "a torch.nn.Linear",
    )


def unprepare_(model: nn.Module) -> nn.Module:
    """Take the observers out: the float model again, in place, with the parameters that it has now.

    Args:
        model: a prepared model, calibrated or not.

    Returns:
        `model`; its layers are the very modules that `prepare_` replaced.

    Raises:
        ValueError: the model has no observed layer, or one got hooks or a parametrization, which would be lost.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        >>> bridge.unprepare_(bridge.prepare_(model, bridge.PRESETS["int8"]))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    check_module(model)
    swap_(model, is_observed, lambda layer, name: layer.to_float(), "a prepared layer", _PREPARE)
    return model


def reread_(model: nn.Module, config: StaticQuantConfig) -> nn.Module:
    """Read what a calibrated model recorded as another config says: no second pass over the data.

    The range rule, the dtype, the mapping and the quantization of weights may all be other ones, as
    far as the record has what the rule reads: a histogram is read by every rule, a min and max by
    those that need no histogram. `report` and `convert_` then follow the new config.

    Args:
        model: a calibrated model.
        config: how its layers are to be quantized; by its `rules`, layer by layer. A layer for which
            it says float keeps its record and what it was prepared for.

    Returns:
        `model`.

    Raises:
        ValueError: the model has no observed layer, a rule fits none, or records do not have what the config
            reads; names each such layer. Nothing was changed.

    Example:
        >>> import dataclasses, torch, bridge, functional_sq as fsq
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Histogram())
        >>> config = bridge.StaticQuantConfig(torch.int8, activation=spec)
        >>> model = bridge.prepare_(torch.nn.Sequential(torch.nn.Linear(8, 4)).eval(), config)
        >>> _ = bridge.calibrate(model, torch.randn(3, 16, 8))
        >>> mse = dataclasses.replace(config, activation=dataclasses.replace(spec, observer=fsq.Mse()))
        >>> bridge.reread_(model, mse)[0].act_obs.spec.observer
        Mse()
    """
    check_module(model)
    check_config(config)
    observed = observed_layers(model)
    if not observed:
        raise ValueError(f"{type(model).__name__} has no observed layer; call prepare_ and calibrate first")
    check_rules(config, model)
    chosen = {name: own for name, layer in observed.items() if (own := config.of(layer, name)) is not None}
    faults: dict[str, str] = {}
    for name, own in chosen.items():
        try:
            check_reread(own, observed[name])
        except ValueError as error:
            faults[name] = str(error)
    if faults:
        what = counted(len(faults), "layer")
        raise ValueError(f"{what} cannot be read so, and nothing was changed:\n{listed(faults)}")
    for name, own in chosen.items():
        reread_layer(own, observed[name])
    return model


def convert_(
    model: nn.Module,
    config: StaticQuantConfig | None = None,
    *,
    min_rows: int = 1,
    on_unfit: Literal["refuse", "float"] = "refuse",
) -> nn.Module:
    """Quantize every observed layer of `model`, in place, or none.

    Args:
        model: a calibrated model.
        config: what form the layers take; None: as they were prepared. The quantization itself was
            given to `prepare_`, or to `reread_`. What its rules leave in float need have seen nothing.
        min_rows: rows (vectors along the input's features: tokens, pixels) that each layer must
            have seen.
        on_unfit: what becomes of layers that never ran, ran on too little, or saw NaN, Inf or
            nothing but zeros: `"refuse"` raises and names all of them; `"float"` leaves them in
            float and warns, once, with the list.

    Returns:
        `model`.

    Raises:
        CalibrationError: layers are unfit, each with its reason; all layers are, for `"float"`. The
            model is as it was.
        ValueError: the model has no observed layer, one got hooks or a parametrization, which would be lost, or an
            argument is outside its range.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        >>> _ = bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        >>> _ = bridge.calibrate(model, torch.randn(3, 16, 8))
        >>> bridge.convert_(model)  # doctest: +ELLIPSIS
        Sequential(
          (0): QuantizedLinear(in_features=8, out_features=4, bias=True, activation=int8 asymmetric PerTensor(), \
weight=int8 symmetric PerAxis(axis=0), int8 product...)
        )
    """
    _convert(model, config, is_observed, min_rows, on_unfit)
    return model


def quantize_(
    model: nn.Module,
    config: AOBaseConfig,
    filter_fn: Filter | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Call torchao's `quantize_`; for a StaticQuantConfig, `prepare_` or `convert_` by its `step`.

    torchao's own `quantize_` takes a StaticQuantConfig too, layer by layer: it meets a layer that saw
    nothing only when it has converted those before it, and knows no names for `rules`.

    Args:
        model: changed in place.
        config: a StaticQuantConfig, or any other configuration, which is passed on.
        filter_fn: `(module, name) -> bool`; default: the layers that the step is for.
        device: where the model is moved to first; default: it stays.

    Raises:
        CalibrationError, TypeError, ValueError: as `prepare_` and `convert_`; the model is as it was, but for its
            device.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        >>> bridge.quantize_(model, bridge.StaticQuantConfig(torch.int8, step="prepare"))
        >>> _ = model(torch.randn(16, 8))
        >>> bridge.quantize_(model, bridge.StaticQuantConfig(torch.int8))
        >>> type(model[0]).__name__
        'QuantizedLinear'
    """
    if not isinstance(config, StaticQuantConfig):
        torchao_quantize_(model, config, filter_fn, device=device)
        return
    check_module(model)
    check_function("filter_fn", filter_fn, "a module and its name to a bool")
    if device is not None:
        model.to(device)
    if config.step == "prepare":
        _prepare(model, config, filter_fn)
    else:
        _convert(model, config, lambda m, name: is_observed(m, name) and (filter_fn is None or filter_fn(m, name)))


def _convert(
    model: nn.Module,
    config: StaticQuantConfig | None,
    wanted: Filter,
    min_rows: int = 1,
    on_unfit: str = "refuse",
) -> None:
    check_module(model)
    if config is not None:
        check_config(config)
    check_counts(min_rows=min_rows)
    check_memory(model)
    if config is not None:
        check_rules(config, model)
    quantizes = quantized_by(config, wanted)
    chosen = {name: layer for name, layer in observed_layers(model).items() if quantizes(layer, name)}
    faults, warning = unfit(chosen, min_rows, on_unfit)

    def converted(layer: Observed, name: str) -> nn.Module:
        own = None if config is None else config.of(layer, name)
        if name in faults or (config is not None and own is None):
            return layer.to_float()
        check_plain(layer)
        return quantized_layer(own, layer)

    swap_(model, wanted, converted, "a prepared layer", _PREPARE, warning)
