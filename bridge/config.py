"""One configuration of static quantization: which layers, how, and what torchao's `quantize_` does with it."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal, cast

import torch
from torch import nn

import functional_sq as fsq
from bridge.observed import settings_of
from bridge.quantized import SWITCHES
from bridge.torchao import AOBaseConfig
from functional_sq.formats import name_of
from functional_sq.serialize import spec_from_plain, spec_to_plain

__all__ = ["PRESETS", "StaticQuantConfig", "default_specs", "fits", "rules_of", "written"]

Rules = tuple[tuple["str | type[nn.Module]", "StaticQuantConfig | None"], ...]
"""What a config holds."""


@dataclass(frozen=True, repr=False)
class StaticQuantConfig(AOBaseConfig):
    """How the layers of a model are quantized; frozen and reusable.

    Used by `prepare_` and `convert_`, and by `quantize_` (torchao's or the bridge's), which applies
    one step of it to each layer that its filter takes. Prints as the call that makes it.

    Args:
        dtype: quantized dtype. It gives the defaults of `activation` and `weight`: per-tensor
            activations and one weight scale for each output channel; both asymmetric for unsigned
            integers (the scheme of torchao's tutorial), asymmetric activations with symmetric weights
            for signed integers, both symmetric for float8.
        step: what `quantize_` does: `"prepare"` puts observers in, `"convert"` quantizes what was
            observed.
        activation: quantization of inputs, in place of the default.
        weight: quantization of weights, in place of the default.
        form: what a converted layer is: `"module"`, such as a QuantizedLinear or QuantizedConv2d, or `"tensor"`,
            for linear layers alone: a `torch.nn.Linear` whose weight is a tensor subclass.
        reference: dequantize and multiply floats, as AffineQuantizedTensor did; slow, and takes any
            format and granularity.
        hand_on: whether a compiled layer may hand codes on: make those of the next layer in place of floats,
            or take those of the one before. `chains` shows where it does.
        fast_accum: on CUDA, add float8 products with fewer bits than float32 has: faster on Hopper, less exact.
        rules: exceptions, a dict or pairs; the first that fits a layer decides. A key is a name
            pattern (`fnmatch`: `"encoder.*.query"`, `"lm_head"`), or the class, of layers; a value is
            another StaticQuantConfig without rules, or None: the layer stays in float.

    Raises:
        TypeError, ValueError: an argument is not of its kind, or the combination cannot work.

    Example:
        >>> import torch
        >>> from bridge import StaticQuantConfig
        >>> StaticQuantConfig(torch.uint8).activation
        QuantSpec(torch.uint8, PerTensor(), mapping=MappingType.ASYMMETRIC)
        >>> StaticQuantConfig(torch.int8, rules={"lm_head": None, "*.fc2": StaticQuantConfig(torch.float8_e4m3fn)})
        StaticQuantConfig(torch.int8, rules={'lm_head': None, '*.fc2': StaticQuantConfig(torch.float8_e4m3fn)})
    """

    dtype: torch.dtype
    step: Literal["prepare", "convert"] = field(default="convert", kw_only=True)
    activation: fsq.QuantSpec = field(default=None, kw_only=True)  # type: ignore[assignment]
    weight: fsq.QuantSpec = field(default=None, kw_only=True)  # type: ignore[assignment]
    form: Literal["module", "tensor"] = field(default="module", kw_only=True)
    reference: bool = field(default=False, kw_only=True)
    hand_on: bool = field(default=True, kw_only=True)
    fast_accum: bool = field(default=False, kw_only=True)
    rules: Rules | Mapping[str | type[nn.Module], StaticQuantConfig | None] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for name, default in default_specs(self.dtype).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            elif not isinstance(getattr(self, name), fsq.QuantSpec):
                raise TypeError(f"{name}={getattr(self, name)!r} is not a QuantSpec")
        for name, choices in (("step", ("prepare", "convert")), ("form", ("module", "tensor"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; use one of {', '.join(map(repr, choices))}")
        for name, value in settings_of(self, SWITCHES).items():
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r}; use True or False")
        if self.form == "tensor" and self.reference:
            raise ValueError(
                "form='tensor' with reference=True: the tensor subclass multiplies codes; use form='module'"
            )
        # Pairs, not the dict: a config is hashable, and the caller may change the dict.
        pairs = self.rules.items() if isinstance(self.rules, Mapping) else self.rules
        if not isinstance(pairs, Iterable):
            raise TypeError(f"rules={pairs!r}; give a dict of pattern or module class to config or None")
        object.__setattr__(self, "rules", tuple(_rule(pair) for pair in pairs))

    def of(self, module: nn.Module, name: str) -> StaticQuantConfig | None:
        """Return the config of one layer: that of the first rule that fits it, or this one.

        Args:
            module: the layer; a rule's class fits its subclasses too.
            name: its name in the model.

        Returns:
            a config without rules, or None for a layer that stays in float.

        Example:
            >>> import torch, bridge
            >>> config = bridge.StaticQuantConfig(torch.int8, rules={"head.*": None})
            >>> config.of(torch.nn.Linear(2, 2), "body.0"), config.of(torch.nn.Linear(2, 2), "head.0")
            (StaticQuantConfig(torch.int8), None)
        """
        for key, config in rules_of(self):
            if fits(key, module, name):
                return config
        return dataclasses.replace(self, rules=()) if self.rules else self

    def __repr__(self) -> str:
        default = StaticQuantConfig(self.dtype)
        shown = [repr(self.dtype)]
        for f in dataclasses.fields(self)[1:]:
            value = getattr(self, f.name)
            if value == getattr(default, f.name):
                continue
            text = repr(value)
            if f.name == "rules":
                text = "{" + ", ".join(f"{written(key)}: {config!r}" for key, config in value) + "}"
            shown.append(f"{f.name}={text}")
        return f"StaticQuantConfig({', '.join(shown)})"

    def to_json(self) -> str:
        """Write the config as one line of JSON, keys sorted; `from_json` reads an equal one.

        Raises:
            TypeError: a spec has no JSON, as in `functional_sq.serialize.spec_to_json`.

        Example:
            >>> import torch, bridge
            >>> config = bridge.StaticQuantConfig(torch.int8, rules={torch.nn.Conv2d: None})
            >>> bridge.StaticQuantConfig.from_json(config.to_json()) == config
            True
        """
        return json.dumps(_plain(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, *, classes: Iterable[type] = ()) -> StaticQuantConfig:
        """Read a config that `to_json` wrote.

        Args:
            text: the JSON.
            classes: your own module, observer and granularity classes that `text` names. Nothing is
                imported because a text says so; those of `torch.nn` are known.

        Raises:
            TypeError: `classes` has what is no class.
            ValueError: `text` is not such JSON, or names what is not known.
        """
        classes = tuple(classes)
        if bad := [c for c in classes if not isinstance(c, type)]:
            raise TypeError(f"classes has {bad[0]!r}, which is no class; give the classes themselves")
        modules = {written(c): c for c in classes if issubclass(c, nn.Module)}
        values = tuple(c for c in classes if not issubclass(c, nn.Module))
        try:
            return _config(json.loads(text), modules, values)
        except (TypeError, KeyError, AttributeError, RecursionError, json.JSONDecodeError) as e:
            raise ValueError(f"not the JSON of a StaticQuantConfig ({e!r}); give what to_json() returned") from e


def default_specs(dtype: torch.dtype) -> dict[str, fsq.QuantSpec]:
    """Return the specs of a dtype where a config names none: `activation` and `weight`."""
    asymmetric, symmetric = fsq.MappingType.ASYMMETRIC, fsq.MappingType.SYMMETRIC
    unsigned = fsq.QuantSpec(dtype, fsq.PerTensor()).bounds[0] == 0
    act = symmetric if dtype.is_floating_point else asymmetric
    return {
        "activation": fsq.QuantSpec(dtype, fsq.PerTensor(), mapping=act),
        "weight": fsq.QuantSpec(dtype, fsq.PerAxis(0), mapping=asymmetric if unsigned else symmetric),
    }


def rules_of(config: StaticQuantConfig) -> Rules:
    """Return the rules as a config holds them, whatever it was given."""
    return cast(Rules, config.rules)


def fits(key: str | type[nn.Module], module: nn.Module, name: str) -> bool:
    """Whether a rule's key is for a module of this name."""
    if isinstance(key, str):
        return name == key or fnmatch.fnmatchcase(name, key)  # a name may have brackets
    return isinstance(module, key)


def _rule(pair: Any) -> tuple[str | type[nn.Module], StaticQuantConfig | None]:
    """Return a rule, or raise for what is none."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"rules has {pair!r}; give a dict of pattern or module class to config or None")
    key, config = pair
    if not (isinstance(key, str) or (isinstance(key, type) and issubclass(key, nn.Module))):
        raise TypeError(f"rules has the key {key!r}; give a name pattern such as 'encoder.*', or a module class")
    if config is not None and not isinstance(config, StaticQuantConfig):
        raise TypeError(f"rules has {config!r} for {written(key)}; give a StaticQuantConfig, or None for float")
    if config is not None and config.rules:
        raise ValueError(f"the rule for {written(key)} has rules itself; put them into the outer ones, before it")
    return key, config


def written(key: str | type) -> str:
    """Return a rule's key as one writes it."""
    if isinstance(key, str):
        return repr(key)
    short = f"torch.nn.{key.__name__}"
    return short if getattr(nn, key.__name__, None) is key else f"{key.__module__}.{key.__qualname__}"


def _plain(config: StaticQuantConfig | None) -> dict[str, Any] | None:
    if config is None:
        return None
    return {
        "dtype": name_of(config.dtype),
        "step": config.step,
        "activation": spec_to_plain(config.activation),
        "weight": spec_to_plain(config.weight),
        "form": config.form,
        **settings_of(config, SWITCHES),
        "rules": [
            [{"name": key} if isinstance(key, str) else {"class": written(key)}, _plain(rule)]
            for key, rule in rules_of(config)
        ],
    }


def _config(plain: Any, modules: Mapping[str, type], classes: tuple[type, ...]) -> StaticQuantConfig:
    given = dict(plain)
    dtype = getattr(torch, given.pop("dtype"))
    for name in ("activation", "weight"):
        given[name] = spec_from_plain(given[name], classes=classes)
    rules = []
    for key, config in given.pop("rules"):
        where = key["name"] if "name" in key else _module_class(key["class"], modules)
        rules.append((where, None if config is None else _config(config, modules, classes)))
    return StaticQuantConfig(dtype, rules=tuple(rules), **given)


def _module_class(name: str, known: Mapping[str, type]) -> type[nn.Module]:
    found = known.get(name) or getattr(nn, name.removeprefix("torch.nn."), None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"the module class {name} is not known; give it as classes=({name.rpartition('.')[2]},)")
    return found


PRESETS: Final = MappingProxyType(
    {
        "int8": StaticQuantConfig(torch.int8),
        "int8_symmetric": StaticQuantConfig(torch.int8, activation=fsq.QuantSpec(torch.int8, fsq.PerTensor())),
        "uint8": StaticQuantConfig(torch.uint8),
        "float8": StaticQuantConfig(torch.float8_e4m3fn),
    }
)
"""The common cases by name; read-only.

| name | activations | weights |
|---|---|---|
| `int8` | int8, asymmetric | int8, symmetric, one scale a row |
| `int8_symmetric` | int8, symmetric | int8, symmetric, one scale a row |
| `uint8` | uint8, asymmetric | uint8, asymmetric, one scale a row: torchao's tutorial |
| `float8` | float8_e4m3fn | float8_e4m3fn, one scale a row |
"""
