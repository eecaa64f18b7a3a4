"""The short way from a float model to a quantized one: prepare_, calibrate, convert_."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import functional_sq as fsq
from bridge.buffers import check_module, write
from bridge.config import (
    PRESETS,
    StaticQuantConfig,
    check_reread,
    fits,
    observed_layer,
    quantized_layer,
    reread_layer,
    rules_of,
    written,
)
from bridge.observed import (
    LAYERS,
    Observed,
    ObserverModule,
    check_plain,
    choose_paths,
    float_reason,
    observed_type,
    public_name,
    swap_,
    weight_of,
)
from bridge.quantized import Quantized
from bridge.torchao import AOBaseConfig, torchao_quantize_
from functional_sq import serialize
from functional_sq.distributed import all_merge

__all__ = ["calibrate", "convert_", "prepare_", "quantize_", "reread_", "unprepare_"]

Filter = Callable[[nn.Module, str], bool]


def prepare_(model: nn.Module, config: StaticQuantConfig, filter_fn: Filter | None = None) -> nn.Module:
    """Put observers into the linear and convolution layers of `model`, in place.

    Parameters and their names stay: the prepared model computes what the float model computes and
    loads its `state_dict`. `unprepare_` takes the observers out again.

    Modules that no one chose to leave in float and that yet must stay so, for they multiply parameters of
    their own and call no layer (`torch.nn.MultiheadAttention`, recurrent ones), are listed once, in one warning.

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
    check_kinds(model, config)
    check_function("filter_fn", filter_fn, "a module and its name to a bool")
    check_rules(config, model)

    def own(module: nn.Module, name: str) -> StaticQuantConfig | None:
        return config.of(module, name) if filter_fn is None or filter_fn(module, name) else None

    names = _named(model)
    chosen = _chosen(names, own)
    left: dict[str, list[str]] = {}
    for name, module in names.items():
        reason = float_reason(module)
        if reason is not None and own(module, name) is not None:
            left.setdefault(reason, []).append(name)
    listed = _listed({", ".join(same): reason for reason, same in left.items()})
    swap_(
        model,
        lambda module, name: id(module) in chosen,
        lambda layer, name: observed_layer(chosen[id(layer)], layer),
        f"one of {LAYERS}",
        "look at the filter and the rules; layers that are prepared or converted already stay what they are"
        + (f"; and some must stay in float:\n{listed}" if left else ""),
    )
    if left:
        warnings.warn(f"{_count(sum(map(len, left.values())), 'module')} left in float:\n{listed}", stacklevel=2)
    return model


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by every name that they have in the model that the user made."""
    return {public_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def _chosen(
    names: Mapping[str, nn.Module], own: Callable[[nn.Module, str], StaticQuantConfig | None]
) -> dict[int, StaticQuantConfig]:
    """Return by `id` how layers are to be quantized; ValueError where one has two names and two answers."""
    first: dict[int, tuple[str, StaticQuantConfig | None]] = {}
    for name, module in names.items():
        if observed_type(module) is None:
            continue
        config = own(module, name)
        known, before = first.setdefault(id(module), (name, config))
        if config != before:
            raise ValueError(
                f"{known!r} and {name!r} are one layer, and by rule or filter it is {before or 'to stay in float'} as "
                f"the one, and {config or 'to stay in float'} as the other; let both names say the same"
            )
    return {key: config for key, (_, config) in first.items() if config is not None}


def check_rules(config: StaticQuantConfig, model: nn.Module) -> None:
    """Raise ValueError where a rule's pattern fits no name in the model, or a rule a part of it but no layer there."""
    names = _named(model)
    layers = {name for name, module in names.items() if _is_layer(module)}
    for key, _ in rules_of(config):
        found = [name for name, module in names.items() if fits(key, module, name)]
        if isinstance(key, str) and not found:
            near = get_close_matches(key, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else "a pattern is matched against the whole name"
            raise ValueError(f"the rule for {key!r} fits no module of {type(model).__name__}; {hint}")
        inside = [f"{name}.*" for name in found if any(layer.startswith(f"{name}.") for layer in layers)]
        if inside and layers.isdisjoint(found):
            pattern = f"{key}.*" if isinstance(key, str) else inside[0]
            raise ValueError(
                f"the rule for {written(key)} fits {inside[0][:-2]!r}, which is no layer, and says nothing of those in "
                f"it; use {pattern!r}"
            )


def _is_layer(module: nn.Module) -> bool:
    """Whether a rule can say how a module is quantized."""
    return isinstance(module, (Observed, Quantized)) or observed_type(module) is not None or bool(float_reason(module))


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
    check_kinds(model)
    swap_(model, is_observed, lambda layer, name: layer.to_float(), "a prepared layer", _PREPARE)
    return model


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mask: Callable[[Any], Tensor | None] | None = None,
    max_batches: int | None = None,
    until_stable: float | None = None,
    window: int = 8,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 64,
    group: dist.ProcessGroup | None = None,
) -> int:
    """Run batches through a prepared model, without gradients, so that its observers record them.

    A batch is recorded whole or not at all: if the model raises, or the user interrupts, the
    observers hold what the batches before it gave. A progress bar is shown on a terminal where tqdm
    is installed.

    Where `torch.distributed` is initialised, each rank runs its own batches, perhaps none, and at
    the end every rank has the record of all of them, in the same bits as one process. Of what was
    recorded before, that of rank 0 counts.

    Args:
        model: a prepared model in eval mode.
        batches: each a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments.
        mask: `batch -> bool tensor`, True where a position counts, for inputs whose leading axes
            have the mask's shape, or its axes flattened into one; or None, for a batch without
            padding. Default: a batch's own `attention_mask`, if it has one; where `decoder_input_ids`, or
            the `labels` of an encoder-decoder, have its shape, the positions of either sequence. Other
            inputs (pooled ones) are recorded whole.
        max_batches: stop after so many, those of the checkpoint included.
        until_stable: stop when in the last `window` batches no layer's scale moved by more than this
            share of itself, and no zero point by more than this share of the codes. Where the
            batches end before that, a warning says which layers still moved.
        window: batches that `until_stable` looks back on.
        checkpoint: a file. What was recorded is saved to it after every `save_every` batches, at the
            end, and on an interruption; if the file is there, its record is taken and as many batches
            are skipped as it has seen. The same batches, in the same order, so give the same bits as
            one run. A record of layers with other weights is refused. With several ranks each has a file
            of its own, `checkpoint` with `.rank0` added.
        save_every: batches between two savings.
        group: ranks to merge; default: all.

    Returns:
        the number of batches that the record holds, of this rank.

    Raises:
        ValueError: there are no batches; the model is not prepared, or not in eval mode; the
            checkpoint is of other layers or weights; `mask` gives positions that no layer's input has; an argument is
            outside its range; this rank is not in `group`.
        TypeError: an observer whose states do not merge (a moving average), with several ranks;
            `mask` gives no bool tensor.

    Example:
        >>> import torch, bridge
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        >>> _ = bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        >>> bridge.calibrate(model, torch.randn(3, 16, 8))
        3
    """
    check_kinds(model)
    check_memory(model)
    choose_paths(model)
    observers = _observers(model)
    rank, ranks = _rank(group)
    _check_calibration(model, observers, max_batches, until_stable, window, save_every, ranks)
    check_batches(batches)
    check_function("mask", mask, "a batch to a bool tensor")
    path = None if checkpoint is None else _rank_path(Path(checkpoint), rank, ranks)
    if path is not None and not path.absolute().parent.is_dir():
        # Not when the first batches have run.
        raise FileNotFoundError(f"checkpoint={str(path)!r}: there is no folder {path.absolute().parent}; make it first")
    file = None if path is None else _Checkpoint(path, model, observers)
    saved = None if file is None else file.load()
    before = None
    if saved is not None:
        _restore(observers, saved.states)
    elif rank > 0:
        # The first rank alone goes on from what was there already, so that it is not counted once a rank.
        before = _states(observers)
        _restore(observers, {name: observer.nothing() for name, observer in observers.items()})
    record = _Record(0, _states(observers), ()) if saved is None else saved
    done = record.batches
    stability = None if until_stable is None else _Stability(observers, until_stable, window, record.recent)
    if stability is not None and stability.reached():
        return done
    try:
        # Not in inference mode: what the model makes and keeps, a cache or a table of angles, would stay unusable.
        with torch.no_grad():
            for batch in _progress(itertools.islice(batches, done, max_batches), done, max_batches):
                given = mask_of(model, batch, mask)
                with _masked(observers.values(), given):
                    call(model, batch)
                if mask is not None:
                    check_fitted(given, any(observer.masked for observer in observers.values()))
                recent = () if stability is None else stability.look()
                record = _Record(record.batches + 1, _states(observers), recent)
                if file is not None and record.batches % save_every == 0:
                    file.save(record)
                if stability is not None and stability.reached():
                    break
    except BaseException:
        _restore(observers, record.states if before is None else _merged(observers, before, record.states))
        if file is not None:
            file.save(record)
        raise
    if file is not None and record.batches > done:
        file.save(record)
    if ranks > 1:
        all_ranks = {name: all_merge(o.spec, record.states[name], group=group) for name, o in observers.items()}
        _restore(observers, all_ranks)
    elif record.batches == 0:
        raise ValueError("there were no batches to calibrate with; give at least one (an iterator is used up once)")
    if stability is not None:
        stability.warn()
    return record.batches


def reread_(model: nn.Module, config: StaticQuantConfig) -> nn.Module:
    """Read what a calibrated model recorded as another config says: no second pass over the data.

    The range rule, the dtype, the mapping and the quantization of weights may all be other ones, as
    far as the record has what the rule reads: a histogram is read by every rule, a min and max by
    `MinMax` alone. `report` and `convert_` then follow the new config.

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
    check_kinds(model, config)
    observed = {public_name(name): module for name, module in model.named_modules() if isinstance(module, Observed)}
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
        what = _count(len(faults), "layer")
        raise ValueError(f"{what} cannot be read so, and nothing was changed:\n{_listed(faults)}")
    for name, own in chosen.items():
        reread_layer(own, observed[name])
    return model


def convert_(
    model: nn.Module,
    *,
    config: StaticQuantConfig | None = None,
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
        CalibrationError, ValueError: as `prepare_` and `convert_`; the model is as it was.

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
    if device is not None:
        model.to(device)
    if config.step == "prepare":
        prepare_(model, config, filter_fn)
    else:
        _convert(model, config, lambda m, name: is_observed(m, name) and (filter_fn is None or filter_fn(m, name)))


def call(model: nn.Module, batch: Any) -> Any:
    """Call `model` with a batch: a mapping of keyword arguments, positional arguments, or one tensor.

    Raises:
        TypeError: the model does not take these arguments; the message says what a batch is.
    """
    given = batch if isinstance(batch, (tuple, list, Mapping)) else (batch,)
    args, kwargs = ((), given) if isinstance(given, Mapping) else (given, {})
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        try:
            inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError:
            raise TypeError(
                f"{error}; a tuple or list holds the positional arguments of the model, a mapping those by keyword: "
                f"give them alone, without labels, such as (batch[0] for batch in batches)"
            ) from error
        raise


def check_batches(batches: object) -> None:
    """Raise TypeError unless `batches` may be batches; one mapping is one of them."""
    if isinstance(batches, Mapping):
        raise TypeError(f"batches is one {type(batches).__name__}; give an iterable of batches: [batch]")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches is a {type(batches).__name__}; give an iterable of batches, such as a DataLoader")


def is_observed(module: nn.Module, name: str) -> bool:
    """Say whether `module` is a layer with observers in."""
    return isinstance(module, Observed)


def quantized_by(config: StaticQuantConfig | None, wanted: Filter = is_observed) -> Filter:
    """Return which of the wanted layers a config quantizes: all that its rules do not leave in float."""
    return lambda module, name: wanted(module, name) and (config is None or config.of(module, name) is not None)


_PREPARE = "prepare_ makes them, and convert_ takes them all"


def unfit(model: nn.Module, wanted: Filter, min_rows: int = 1) -> dict[str, str]:
    """Return, by name, why observed layers cannot be converted."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Observed) and wanted(module, public_name(name)):
            if fault := module.act_obs.fault():
                found[public_name(name)] = fault
            elif (rows := module.rows) < min_rows:
                found[public_name(name)] = f"ran on {rows} rows, at least {min_rows} needed; calibrate with more data"
            elif not all(bool(torch.isfinite(p).all()) for p in module.parameters(recurse=False)):
                found[public_name(name)] = "weight or bias has NaN or Inf; mend it, or leave the layer in float"
    return found


def unfit_error(faults: Mapping[str, str], layers: int) -> fsq.CalibrationError:
    """Return the error that names every unfit layer, of so many that were asked for."""
    remedy = ""
    if len(faults) < layers:
        remedy = " (a rule, or convert_(..., on_unfit='float'), leaves them in float)"
    elif all(fault.startswith("nothing was seen") for fault in faults.values()):
        remedy = ": call calibrate(model, batches) first"
    return fsq.CalibrationError(
        f"{_count(len(faults), 'layer')} cannot be converted, and the model is as it was{remedy}:\n{_listed(faults)}"
    )


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _convert(
    model: nn.Module,
    config: StaticQuantConfig | None,
    wanted: Filter,
    min_rows: int = 1,
    on_unfit: str = "refuse",
) -> None:
    check_kinds(model, *(() if config is None else (config,)))
    _check_counts(min_rows=min_rows)
    if on_unfit not in ("refuse", "float"):
        raise ValueError(f"on_unfit={on_unfit!r}; use 'refuse' or 'float'")
    check_memory(model)
    if config is not None:
        check_rules(config, model)
    quantizes = quantized_by(config, wanted)
    chosen = [m for name, m in model.named_modules() if quantizes(m, public_name(name))]
    faults = unfit(model, quantizes, min_rows)
    if faults and (on_unfit == "refuse" or len(faults) == len(chosen)):
        raise unfit_error(faults, len(chosen))

    def converted(layer: Observed, name: str) -> nn.Module:
        own = None if config is None else config.of(layer, public_name(name))
        if public_name(name) in faults or (config is not None and own is None):
            return layer.to_float()
        check_plain(layer)
        return quantized_layer(own, layer)

    swap_(model, lambda module, name: wanted(module, public_name(name)), converted, "a prepared layer", _PREPARE)
    if faults:
        warnings.warn(f"{_count(len(faults), 'layer')} left in float:\n{_listed(faults)}", stacklevel=3)


def check_kinds(model: object, *configs: object) -> None:
    """Raise TypeError unless these are a module and StaticQuantConfigs."""
    check_module(model)
    for config in configs:
        if not isinstance(config, StaticQuantConfig):
            name = config if isinstance(config, str) and config in PRESETS else "int8"
            raise TypeError(f"config is {config!r}; give a StaticQuantConfig, such as bridge.PRESETS[{name!r}]")


def check_memory(model: nn.Module) -> None:
    """Raise ValueError if observed layers are on meta, where there are no values."""
    empty = [name for name, m in _named(model).items() if isinstance(m, Observed) and m.weight.is_meta]
    if empty:
        raise ValueError(
            f"{_count(len(empty), 'layer')} of the model, such as {empty[0]!r}, are on the device meta, which holds no "
            f"values; load weights first: load_state_dict(..., assign=True)"
        )


def _listed(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())


# What calibrate records, saves and takes up again.

_States = dict[str, fsq.State]


class _Record(NamedTuple):
    """So many batches, what observers saw in them, and the qparams after each of the last ones, if someone asks."""

    batches: int
    states: _States
    recent: tuple[list[fsq.QParams], ...]


def _observers(model: nn.Module) -> dict[str, ObserverModule]:
    """Return the observers that data reaches, by name; a weight is observed when it is converted."""
    weights = {id(module.weight_obs) for module in model.modules() if isinstance(module, Observed)}
    return {
        public_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, ObserverModule) and id(module) not in weights
    }


def _check_calibration(
    model: nn.Module,
    observers: Mapping[str, ObserverModule],
    max_batches: int | None,
    until_stable: float | None,
    window: int,
    save_every: int,
    ranks: int,
) -> None:
    if not observers:
        raise ValueError(f"{type(model).__name__} has no observers; call prepare_(model, config) first")
    if any(module.training for module in model.modules()):
        raise ValueError(
            "the model is in training mode, in which dropout and batch norm change what is recorded; "
            "call model.eval() first"
        )
    _check_counts(window=window, save_every=save_every, **({} if max_batches is None else {"max_batches": max_batches}))
    if until_stable is not None:
        if not isinstance(until_stable, (int, float)) or not 0 < until_stable < 1:
            raise ValueError(f"until_stable={until_stable!r}; it is a share between 0 and 1, such as 0.01")
        if ranks > 1:
            raise ValueError(
                "until_stable with several ranks: each would stop at another batch; use max_batches, or one rank"
            )
    if ranks > 1:
        for observer in observers.values():
            observer.spec.observer.merge(observer.state, observer.state)  # the TypeError of a moving average


def _check_counts(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}; give an int, at least 1")


def _states(observers: Mapping[str, ObserverModule]) -> _States:
    return {name: {k: v.clone() for k, v in observer.state.items()} for name, observer in observers.items()}


def _merged(observers: Mapping[str, ObserverModule], a: _States, b: _States) -> _States:
    return {name: fsq.merge(observer.spec, a[name], b[name]) for name, observer in observers.items()}


def _restore(observers: Mapping[str, ObserverModule], states: _States) -> None:
    for name, state in states.items():
        write(observers[name], state)


class _Checkpoint:
    """The file that a calibration is saved to and goes on from: a calibration, and numbers under names of no observer.

    Args:
        path: where it is.
        model: by whose weights the file is known again.
        observers: whose states it holds.

    Raises:
        TypeError: a spec has no JSON.
    """

    NUMBERS: Final = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.Fixed(0.0, 0.0))
    """Integers are the `count` of a state of this."""
    BATCHES: Final = ""
    WEIGHTS: Final = ".weights"
    RECENT: Final = ".recent."
    """And an observer's name: scales and zero points after each of the last batches, as bits of float64."""

    def __init__(self, path: Path, model: nn.Module, observers: Mapping[str, ObserverModule]) -> None:
        for observer in observers.values():
            serialize.spec_to_json(observer.spec)
        self.path, self.observers, self.weights = path, observers, _fingerprint(model)

    def save(self, record: _Record) -> None:
        numbers = {self.BATCHES: torch.tensor([record.batches]), self.WEIGHTS: torch.tensor([self.weights])}
        for name, over_time in zip(self.observers, zip(*record.recent, strict=True), strict=False):
            values = torch.stack([torch.stack([value.double() for value in qp]) for qp in over_time])
            numbers[self.RECENT + name] = values.view(torch.int64)
        states = {name: (observer.spec, record.states[name]) for name, observer in self.observers.items()}
        serialize.save(self.path, {k: (self.NUMBERS, {"count": v}) for k, v in numbers.items()} | states)

    def load(self) -> _Record | None:
        """Return what the file holds; None if there is none, ValueError if it is of another calibration."""
        if not self.path.exists():
            return None
        specs = {name: observer.spec for name, observer in self.observers.items()}
        own = {kind for spec in specs.values() for kind in serialize.own_classes(spec)}
        saved = serialize.load(self.path, classes=own)
        names = self.BATCHES, self.WEIGHTS, *(self.RECENT + name for name in specs)
        numbers = {name: saved.pop(name)[1]["count"] for name in names if name in saved}
        found = {name: spec for name, (spec, _) in saved.items()}
        differ = sorted(name for name in found.keys() | specs.keys() if found.get(name) != specs.get(name))
        fault = None
        if differ:
            fault = f"{', '.join(differ[:8])} differ{'...' if differ[8:] else ''}"
        elif not {self.BATCHES, self.WEIGHTS} <= numbers.keys():
            fault = "it counts no batches"
        elif int(numbers[self.WEIGHTS]) != self.weights:
            fault = "the layers had other weights"
        if fault is not None:
            raise ValueError(
                f"{self.path} is no checkpoint of this calibration: {fault}; "
                f"use the model and the config that it was made with, or another file"
            )
        recent = [numbers[self.RECENT + name].view(torch.float64) for name in specs if self.RECENT + name in numbers]
        over_time = zip(*([fsq.QParams(*qp) for qp in values] for values in recent), strict=True)
        states = {name: state for name, (_, state) in saved.items()}
        return _Record(int(numbers[self.BATCHES]), states, tuple(map(list, over_time)))


def _fingerprint(model: nn.Module) -> int:
    """Return a number by which the weights of observed layers are known again: their bits are added up, exactly."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, Observed):
            w = weight_of(module).detach()
            bits = w.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.itemsize])
            total = None if w.is_meta else int(bits.sum(dtype=torch.int64))
            digest.update(f"{public_name(name)} {w.dtype} {tuple(w.shape)} {total}\n".encode())
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def _rank(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return which rank of `group` this is, and of how many."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this rank is not in the group; call calibrate on the ranks of the group only")
    return rank, dist.get_world_size(group)


def _rank_path(path: Path, rank: int, ranks: int) -> Path:
    return path if ranks == 1 else path.with_name(f"{path.name}.rank{rank}")


class _Stability:
    """How far the qparams of each layer moved within the last batches; `recent` are those of batches before."""

    def __init__(
        self,
        observers: Mapping[str, ObserverModule],
        tolerance: float,
        window: int,
        recent: tuple[list[fsq.QParams], ...],
    ) -> None:
        self.observers, self.tolerance = observers, tolerance
        self.last: deque[list[fsq.QParams]] = deque(recent, maxlen=window + 1)
        self.moving: dict[str, float] = {}

    def look(self) -> tuple[list[fsq.QParams], ...]:
        """Take note of the qparams of now; return those of the last batches."""
        self.last.append([fsq.calc_qparams(o.spec, o.state) for o in self.observers.values()])
        return tuple(self.last)

    def reached(self) -> bool:
        """Say whether none moved by more than the tolerance."""
        self.moving = {}
        for (name, observer), over_time in zip(self.observers.items(), zip(*self.last, strict=True), strict=False):
            scales = torch.stack([qp.scale.double() for qp in over_time])
            points = torch.stack([qp.zero_point.double() for qp in over_time])
            low, high = observer.spec.bounds
            moved = max(
                float((scales.amax(0) / scales.amin(0) - 1).max()),
                float((points.amax(0) - points.amin(0)).max()) / (high - low),
            )
            if not moved <= self.tolerance:
                self.moving[name] = moved
        return len(self.last) == self.last.maxlen and not self.moving

    def warn(self) -> None:
        """Warn if the batches ended before the qparams stood still."""
        if len(self.last) < (self.last.maxlen or 0):
            seen, needed = len(self.last), self.last.maxlen
            warnings.warn(f"until_stable: {seen} batches ran, at least {needed} are needed to tell", stacklevel=3)
        elif self.moving:
            worst = dict(sorted(self.moving.items(), key=lambda item: -item[1])[:8])
            listed = _listed({name: f"{100 * moved:.2g} %" for name, moved in worst.items()})
            warnings.warn(
                f"until_stable={self.tolerance}: {len(self.moving)} observers still moved in the last "
                f"{len(self.last) - 1} batches, most of all\n{listed}",
                stacklevel=3,
            )


def _progress(batches: Iterator[Any], done: int, total: int | None) -> Iterable[Any]:
    """Show a bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, "calibrate", total, initial=done, unit="batch", disable=None)
    return bar


def check_function(name: str, given: object, what: str) -> None:
    """Raise TypeError unless an argument is a function, from one thing to another, or None."""
    if given is not None and not callable(given):
        raise TypeError(f"{name} is a {type(given).__name__}; give a function from {what}")


def mask_of(model: nn.Module, batch: Any, mask: Callable[[Any], Tensor | None] | None = None) -> Tensor | None:
    """Return what `mask` gives for a batch, or the batch's own mask; None where every position counts."""
    if mask is not None:
        given = mask(batch)
        if given is not None and (not isinstance(given, Tensor) or given.dtype is not torch.bool):
            found = given.dtype if isinstance(given, Tensor) else type(given).__name__
            raise TypeError(f"mask(batch) is a {found}; return a bool tensor, True where a position counts, or None")
        return given
    keep = _of_tokens(batch, "attention_mask")
    if keep is None:
        return None
    # Of labels an encoder-decoder makes the decoder's input; for others they are no input.
    of_labels = any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in model.modules())
    for decoder in ("decoder_input_ids", "decoder_inputs_embeds", *(("labels",) if of_labels else ())):
        tokens = batch.get(decoder)
        if isinstance(tokens, Tensor) and tokens.shape[:2] == keep.shape:
            # Positions of the encoder and of the decoder look alike: those of both count, so that no token is lost.
            other = _of_tokens(batch, "decoder_attention_mask")
            return None if other is None else keep | other
    return keep


def _of_tokens(batch: Any, name: str) -> Tensor | None:
    """Return where a batch's own mask has tokens: 1 there, as Hugging Face has it, and 0 at padding.

    A mask of other rank is no padding mask. One of floats, none of which is above 0, is what is added to scores: 0 for
    a token, and far below for padding.
    """
    found = batch.get(name) if isinstance(batch, Mapping) else None
    if not isinstance(found, Tensor) or found.ndim != 2:
        return None
    return found >= 0 if found.is_floating_point() and not bool((found > 0).any()) else found != 0


def check_fitted(mask: Tensor | None, fitted: bool) -> None:
    """Raise ValueError where a user's mask fitted no layer's input."""
    if mask is not None and not fitted:
        raise ValueError(
            f"mask(batch) has shape {tuple(mask.shape)}, and no layer's input has these axes in front, or all of them "
            f"as one: nothing was masked; return an entry for each position, as (batch, tokens)"
        )


@contextmanager
def _masked(observers: Iterable[ObserverModule], mask: Tensor | None) -> Iterator[None]:
    for observer in observers:
        observer.mask, observer.masked = mask, False
    try:
        yield
    finally:
        for observer in observers:
            observer.mask = None
