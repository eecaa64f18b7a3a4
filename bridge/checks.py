"""What the steps and the report refuse: arguments, rules and layers that cannot be, each named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches

from torch import nn

import functional_sq as fsq
from bridge.config import PRESETS, StaticQuantConfig, fits, rules_of, written
from bridge.kinds import float_reason, observed_type
from bridge.observed import Observed
from bridge.quantized import Quantized
from bridge.swapping import named, public_name

__all__ = [
    "Filter",
    "check_config",
    "check_memory",
    "check_rules",
    "counted",
    "is_observed",
    "listed",
    "observed_layers",
    "quantized_by",
    "unfit",
]

Filter = Callable[[nn.Module, str], bool]
"""From a module and its name to whether it is wanted."""


def check_config(config: object) -> None:
    """Raise TypeError unless `config` is a StaticQuantConfig."""
    if not isinstance(config, StaticQuantConfig):
        name = config if isinstance(config, str) and config in PRESETS else "int8"
        raise TypeError(f"config is {config!r}; give a StaticQuantConfig, such as bridge.PRESETS[{name!r}]")


def check_memory(model: nn.Module) -> None:
    """Raise ValueError if observed layers are on meta, where there are no values."""
    empty = [name for name, m in named(model).items() if isinstance(m, Observed) and m.weight.is_meta]
    if empty:
        raise ValueError(
            f"{counted(len(empty), 'layer')} of the model, such as {empty[0]!r}, are on the device meta, which holds "
            f"no values; load weights first: load_state_dict(..., assign=True)"
        )


def check_rules(config: StaticQuantConfig, model: nn.Module) -> None:
    """Raise ValueError where rules miss a layer, or say two things of one.

    A pattern fits no name in the model; a rule fits a part of it, but no layer there; or a layer has two names.
    """
    names = named(model)
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
    first: dict[int, tuple[str, StaticQuantConfig | None]] = {}
    for name, module in names.items():
        if isinstance(module, Observed) or observed_type(module) is not None:
            own = config.of(module, name)
            known, before = first.setdefault(id(module), (name, own))
            if own != before:
                raise ValueError(
                    f"{known!r} and {name!r} are one layer, and by the rules it is {before or 'to stay in float'} as "
                    f"the one, and {own or 'to stay in float'} as the other; let both names say the same"
                )


def _is_layer(module: nn.Module) -> bool:
    """Whether a rule can say how a module is quantized."""
    return isinstance(module, (Observed, Quantized)) or observed_type(module) is not None or bool(float_reason(module))


def is_observed(module: nn.Module, name: str) -> bool:
    """Say whether `module` is a layer with observers in."""
    return isinstance(module, Observed)


def quantized_by(config: StaticQuantConfig | None, wanted: Filter = is_observed) -> Filter:
    """Return which of the wanted layers a config quantizes: all that its rules do not leave in float."""
    return lambda module, name: wanted(module, name) and (config is None or config.of(module, name) is not None)


def unfit(layers: Mapping[str, Observed], min_rows: int, on_unfit: str) -> tuple[set[str], str]:
    """Return which of the layers cannot be converted, by name, and a warning that they stay in float.

    Raises:
        CalibrationError: there are such, and on_unfit is "refuse", or all are.
        ValueError: on_unfit is another value.
    """
    if on_unfit not in ("refuse", "float"):
        raise ValueError(f"on_unfit={on_unfit!r}; use 'refuse' or 'float'")
    faults = {name: fault for name, layer in layers.items() if (fault := _fault(layer, min_rows))}
    if not faults:
        return set(), ""
    if on_unfit == "float" and len(faults) < len(layers):
        return {*faults}, f"{counted(len(faults), 'layer')} left in float:\n{listed(faults)}"
    remedy = ""
    if len(faults) < len(layers):
        remedy = " (a rule, or on_unfit='float', leaves them in float)"
    elif all(fault.startswith("nothing was seen") for fault in faults.values()):
        remedy = ": call calibrate(model, batches) first"
    raise fsq.CalibrationError(
        f"{counted(len(faults), 'layer')} cannot be converted, and the model is as it was{remedy}:\n{listed(faults)}"
    )


def _fault(layer: Observed, min_rows: int) -> str | None:
    if fault := layer.act_obs.fault():
        return fault
    if layer.rows < min_rows:
        return f"ran on {layer.rows} rows, at least {min_rows} needed; calibrate with more data"
    if not all(bool(p.detach().isfinite().all()) for p in layer.parameters(recurse=False)):
        return "weight or bias has NaN or Inf; mend it, or leave the layer in float"
    return None


def observed_layers(model: nn.Module) -> dict[str, Observed]:
    """Return the layers with observers in, by the names that they have in the model that the user made."""
    return {public_name(name): module for name, module in model.named_modules() if isinstance(module, Observed)}


def counted(n: int, what: str) -> str:
    """Return `"1 layer"` or `"2 layers"`."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def listed(reasons: Mapping[str, str]) -> str:
    """Return a line for each name, with its reason."""
    return "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
