"""The short way from a float model to a quantized one: prepare_, calibrate, convert_."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import functional_sq as fsq
from bridge.config import StaticQuantConfig, is_observed, observed_layer, quantized_layer
from bridge.observed import ObservedLinear, ObserverModule, check_root, is_linear, swap_
from bridge.torchao import AOBaseConfig, torchao_quantize_

__all__ = ["calibrate", "convert_", "prepare_", "quantize_"]

Filter = Callable[[nn.Module, str], bool]


def prepare_(model: nn.Module, config: StaticQuantConfig, filter_fn: Filter | None = None) -> nn.Module:
    """Put observers into the linear layers of `model`, in place.

    Parameters and their names stay: the prepared model loads the float model's `state_dict`.

    Args:
        model: any module with linear layers inside; may be compiled already.
        config: how the layers will be quantized.
        filter_fn: `(module, name) -> bool`; default: every `torch.nn.Linear` that is called as such
            (not the output projection inside `torch.nn.MultiheadAttention`).

    Returns:
        `model`.

    Raises:
        ValueError: no layer matches, or one cannot be quantized so; nothing was changed.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        Sequential(
          (0): ObservedLinear(
            in_features=8, out_features=4, bias=True
            (act_obs): ObserverModule(QuantSpec(torch.int8, PerTensor(), mapping=MappingType.ASYMMETRIC))
            (weight_obs): ObserverModule(QuantSpec(torch.int8, PerAxis(axis=0)))
          )
        )
    """
    chosen = filter_fn or (lambda module, name: True)
    swap_(
        model,
        lambda module, name: is_linear(module, name) and chosen(module, _public(name)),
        lambda layer, name: observed_layer(config, layer),
        "a torch.nn.Linear",
    )
    return model


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Tensor] | None = None,
    max_batches: int | None = None,
) -> int:
    """Run batches through a prepared model, without gradients, so that its observers record them.

    Args:
        model: a prepared model.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments.
        mask: `batch -> bool tensor`, True where a position counts, for inputs whose leading axes
            have the mask's shape. Default: a batch's own `attention_mask`, if it has one.
        max_batches: stop after so many.

    Returns:
        the number of batches that ran.

    Raises:
        ValueError: there are no batches, or `model` is not prepared.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        >>> bridge.calibrate(model, torch.randn(3, 16, 8))
        3
    """
    observers = [module for module in model.modules() if isinstance(module, ObserverModule)]
    if not observers:
        raise ValueError(f"{type(model).__name__} has no observers; call prepare_(model, config) first")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches={max_batches}; it must be at least 1")
    done = 0
    with torch.inference_mode():
        for batch in batches:
            with _masked(observers, _mask_of(batch) if mask is None else mask(batch)):
                call(model, batch)
            done += 1
            if done == max_batches:
                break
    if done == 0:
        raise ValueError("there were no batches to calibrate with; give at least one (an iterator is used up once)")
    return done


def call(model: nn.Module, batch: Any) -> Any:
    """Call `model` with a batch: a tensor, positional arguments in a tuple or list, or keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def convert_(model: nn.Module, *, config: StaticQuantConfig | None = None, min_count: int = 1) -> nn.Module:
    """Quantize every observed layer of `model`, in place, or none.

    Args:
        model: a calibrated model.
        config: what form the layers take; None: QuantizedLinear modules. The quantization itself
            was given to `prepare_`.
        min_count: values that each scale must have seen.

    Returns:
        `model`.

    Raises:
        CalibrationError: layers saw nothing, too little, NaN or Inf; names each of them. The model
            is as it was.
        ValueError: the model has no observed layer.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> _ = bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        >>> _ = bridge.calibrate(model, torch.randn(3, 16, 8))
        >>> bridge.convert_(model)
        Sequential(
          (0): QuantizedLinear(in_features=8, out_features=4, bias=True, activation=int8 asymmetric PerTensor(), \
weight=int8 symmetric PerAxis(axis=0), int8 product)
        )
    """
    if min_count < 1:
        raise ValueError(f"min_count={min_count}; it must be at least 1")
    _check_coverage(model, is_observed, min_count)
    swap_(model, is_observed, lambda layer, name: quantized_layer(config, layer), "a prepared layer")
    return model


def quantize_(model: nn.Module, config: AOBaseConfig, filter_fn: Filter | None = None, **kwargs: Any) -> None:
    """Call torchao's `quantize_`, after the checks that a handler of single layers cannot make.

    torchao's own `quantize_` takes a StaticQuantConfig too; it meets a layer that saw nothing only
    when it has converted those before it.

    Args:
        model: changed in place.
        config: a StaticQuantConfig, or any other configuration, which is passed on.
        filter_fn: `(module, name) -> bool`; default: the layers that the step is for.
        kwargs: passed on (`device`).

    Raises:
        CalibrationError, ValueError: as `prepare_` and `convert_`; the model is as it was.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        >>> bridge.quantize_(model, bridge.StaticQuantConfig(torch.int8, step="prepare"))
        >>> _ = model(torch.randn(16, 8))
        >>> bridge.quantize_(model, bridge.StaticQuantConfig(torch.int8))
        >>> type(model[0]).__name__
        'QuantizedLinear'
    """
    if isinstance(config, StaticQuantConfig):
        takes = filter_fn or (lambda module, name: True)
        step = is_linear if config.step == "prepare" else is_observed
        filter_fn = lambda module, name: step(module, name) and takes(module, _public(name))  # noqa: E731
        what = "a torch.nn.Linear" if config.step == "prepare" else "a prepared layer"
        check_root(model, filter_fn, what)
        if not any(filter_fn(module, name) for name, module in model.named_modules()):
            raise ValueError(
                f"no layer of {type(model).__name__} is taken by step={config.step!r} and the filter; "
                f"nothing was changed"
            )
        if config.step == "convert":
            _check_coverage(model, filter_fn, 1)
    torchao_quantize_(model, config, filter_fn, **kwargs)


def _public(name: str) -> str:
    """Return a module's name in the model that the user compiled."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _check_coverage(model: nn.Module, wanted: Filter, min_count: int) -> None:
    """Raise CalibrationError that names every observed layer whose record is unfit."""
    faults = []
    for name, module in model.named_modules():
        if isinstance(module, ObservedLinear) and wanted(module, name):
            if fault := module.act_obs.fault(min_count):
                faults.append(f"{_public(name)}: {fault}")
            elif not bool(module.weight.isfinite().all()):
                faults.append(f"{_public(name)}: the weight has NaN or Inf; mend it, or leave the layer in float")
    if faults:
        raise fsq.CalibrationError(
            f"{len(faults)} layers cannot be converted, and the model is as it was:\n  " + "\n  ".join(faults)
        )


def _mask_of(batch: Any) -> Tensor | None:
    found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    # Hugging Face's mask is 1 for a token and 0 for padding; a mask of other rank is no padding mask.
    return None if found is None or found.ndim != 2 else found != 0


@contextmanager
def _masked(observers: list[ObserverModule], mask: Tensor | None) -> Iterator[None]:
    for observer in observers:
        observer.mask = mask
    try:
        yield
    finally:
        for observer in observers:
            observer.mask = None
