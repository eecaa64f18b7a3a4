"""Calibrations to a file and back: specs as readable JSON, states as safetensors; the same bits.

A file is a valid safetensors file, which any reader of that format opens; its tensors are called
`layer.key`, and its metadata holds `format`, `version` and `specs`. Nothing is pickled and nothing is
imported by name: a class that this package does not have is given by the caller.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

import functional_sq
from functional_sq import safetensors
from functional_sq.formats import name_of
from functional_sq.granularity import Granularity
from functional_sq.observer import Observer, State
from functional_sq.qparams import MappingType
from functional_sq.spec import QuantSpec, check_spec

__all__ = [
    "load",
    "own_classes",
    "save",
    "spec_from_json",
    "spec_from_plain",
    "spec_to_json",
    "spec_to_plain",
]

_FORMAT: Final = "functional_sq"
_VERSION: Final = 1
_DTYPE_FIELDS: Final = ("dtype", "scale_dtype", "zero_point_dtype")


def spec_to_json(spec: QuantSpec) -> str:
    """Write a spec as one line of JSON with every field, keys sorted.

    Args:
        spec: the quantization. The fields of its granularity and observer are None, bool, int,
            float, str, tuples of these, or another granularity or observer.

    Returns:
        text that `spec_from_json` reads as an equal spec.

    Raises:
        TypeError: a field has a value of another kind, or a class is no dataclass.
        ValueError: a class of your own has the name of one of this package.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.serialize import spec_to_json
        >>> print(spec_to_json(fsq.QuantSpec(torch.int4, fsq.PerGroup(32), eps=1e-6)))
        {"dtype": "int4", "eps": 1e-06, "granularity": {"class": "PerGroup", "group_size": 32}, \
"mapping": "SYMMETRIC", "observer": {"class": "MinMax"}, "quant_max": null, "quant_min": null, \
"scale_dtype": "float32", "zero_point_dtype": "int32"}
    """
    return json.dumps(spec_to_plain(spec), sort_keys=True)


def spec_to_plain(spec: QuantSpec) -> dict[str, object]:
    """Return a spec as what JSON has, a part of a larger JSON; arguments and errors as `spec_to_json`."""
    check_spec(spec)
    plain: dict[str, object] = {}
    for f in dataclasses.fields(spec):
        value = getattr(spec, f.name)
        if f.name in _DTYPE_FIELDS:
            plain[f.name] = name_of(value)
        elif isinstance(value, MappingType):
            plain[f.name] = value.name
        else:
            plain[f.name] = _plain(value, f.name)
    return plain


def spec_from_json(text: str, *, classes: Iterable[type] = ()) -> QuantSpec:
    """Read a spec that `spec_to_json` wrote.

    Args:
        text: the JSON. A field that has a default may be left out.
        classes: your own observer and granularity classes that `text` names.

    Returns:
        a spec equal to the one written.

    Raises:
        ValueError: `text` is not such JSON, or names a field or class that is not known; the
            message names it and those that are.
        TypeError: `classes` holds something that is no observer or granularity class.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from functional_sq.serialize import spec_from_json, spec_to_json
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerAxis(0), observer=fsq.Fixed(-1.0, 1.0))
        >>> spec_from_json(spec_to_json(spec)) == spec
        True
        >>> spec_from_json('{"dtype": "int8", "granularity": {"class": "PerMoon"}}')  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: granularity: class 'PerMoon' is not known; known: ...; give your own as classes=(PerMoon,)
    """
    try:
        plain = json.loads(text)
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"not the JSON of a spec ({e}); give what spec_to_json returned") from e
    return spec_from_plain(plain, classes=classes)


def spec_from_plain(plain: object, *, classes: Iterable[type] = ()) -> QuantSpec:
    """Read a spec that `spec_to_plain` gave; arguments and errors as `spec_from_json`."""
    return _spec(plain, _known(classes))


def own_classes(spec: QuantSpec) -> tuple[type, ...]:
    """Return the observer and granularity classes in a spec that this package does not have, at any depth.

    What `load` and `spec_from_json` take as `classes`, where the spec is known beforehand.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from dataclasses import dataclass
        >>> from functional_sq.serialize import own_classes
        >>> @dataclass(frozen=True)
        ... class Mine(fsq.MinMax):
        ...     pass
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor(), observer=fsq.SkipNonfinite(Mine()))
        >>> [cls.__name__ for cls in own_classes(spec)]
        ['Mine']
    """
    public = _known(()).values()
    return tuple(cls for cls in dict.fromkeys(_classes(spec)) if cls not in public)


def save(path: str | os.PathLike[str], calibration: Mapping[str, tuple[QuantSpec, State]]) -> None:
    """Write specs and states to a safetensors file, whole or not at all.

    The file is written beside `path`, flushed to the disk and renamed, so a reader sees the old
    file or the new one, also after a crash.

    Args:
        path: the file; one that exists is replaced.
        calibration: layer name to `(spec, state)`; a name may contain dots. A tensor is written as
            `name.key`, from whatever device it is on.

    Raises:
        TypeError: something in `calibration` is not of its kind, or a dtype that safetensors lacks.
        ValueError: a state is not one of its spec's observer, or a key contains a dot.
        OSError: the file cannot be written; nothing is left behind.

    Example:
        >>> import pathlib, tempfile, torch, functional_sq as fsq
        >>> from functional_sq.serialize import load, save
        >>> spec = fsq.QuantSpec(torch.int8, fsq.PerTensor())
        >>> state = fsq.observe(spec, fsq.init(spec, (2,)), torch.tensor([-1.0, 3.0]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "calibration.safetensors")
        ...     save(path, {"encoder.0.q": (spec, state)})
        ...     loaded = load(path)
        >>> loaded == {"encoder.0.q": (spec, state)}
        True
    """
    if not isinstance(calibration, Mapping):
        raise TypeError(f"calibration is a {type(calibration).__name__}; give a dict of name: (spec, state)")
    specs: dict[str, object] = {}
    tensors: dict[str, Tensor] = {}
    for layer, pair in calibration.items():
        if not isinstance(layer, str):
            raise TypeError(f"layer name {layer!r} is not a str")
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], QuantSpec)):
            raise TypeError(f"{layer!r}: the value is a {type(pair).__name__}; give the pair (spec, state)")
        spec, state = pair
        specs[layer] = spec_to_plain(spec)
        spec.observer.check_state(state)
        for key, value in state.items():
            if fault := safetensors.fault(value):
                raise TypeError(f"{layer!r}: {key!r} {fault}")
            if "." in key:
                raise ValueError(f"{layer!r}: the state key {key!r} contains a dot; use a bare noun")
            tensors[f"{layer}.{key}"] = value
    metadata = {"format": _FORMAT, "version": str(_VERSION), "specs": json.dumps(specs, sort_keys=True)}
    safetensors.write(path, tensors, metadata)


def load(path: str | os.PathLike[str], *, classes: Iterable[type] = ()) -> dict[str, tuple[QuantSpec, State]]:
    """Read a file that `save` wrote; the same bits, on the CPU.

    Args:
        path: the file.
        classes: your own observer and granularity classes that the file names. Nothing is ever
            imported because a file says so.

    Returns:
        layer name to `(spec, state)`; the tensors share no memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short or damaged, was written by another program or by a newer
            version, or names a class that is not known; the message has the path and the remedy.
        TypeError: `classes` holds something that is no observer or granularity class.

    Example: see `save`.
    """
    known = _known(classes)
    try:
        return _calibration(*safetensors.read(path), known)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _calibration(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], known: Mapping[str, type]
) -> dict[str, tuple[QuantSpec, State]]:
    if metadata.get("format") != _FORMAT or not metadata.get("version", "").isdecimal():
        other = metadata.get("format", _FORMAT)
        whose = "" if other == _FORMAT else f" (its format is {other!r})"
        raise ValueError(
            f"a safetensors file, but not one that functional_sq wrote{whose}; give a file written by save()"
        )
    if (version := int(metadata["version"])) > _VERSION:
        raise ValueError(f"written in version {version} of the format, and this is {_VERSION}; update functional_sq")
    try:
        specs = json.loads(metadata["specs"])
        items = list(specs.items())
    except (KeyError, ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f"its specs cannot be read; {safetensors.DAMAGED}") from e
    calibration: dict[str, tuple[QuantSpec, State]] = {}
    for layer, plain in items:
        try:
            calibration[layer] = (_spec(plain, known), {})
        except ValueError as e:
            raise ValueError(f"layer {layer!r}: {e}") from e
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        if layer not in calibration:
            raise ValueError(f"tensor {name!r} belongs to no layer; {safetensors.DAMAGED}")
        calibration[layer][1][key] = tensor
    for layer, (spec, state) in calibration.items():
        try:
            spec.observer.check_state(state)
        except ValueError as e:
            raise ValueError(f"layer {layer!r}: {e}") from e
    return calibration


def _plain(value: object, where: str) -> object:
    """Return `value` as what JSON has; a granularity or observer as its fields and its class's name."""
    if isinstance(value, (Granularity, Observer)):
        cls = type(value)
        if not dataclasses.is_dataclass(value):
            raise TypeError(f"{where}={value!r}: {cls.__name__} is no dataclass; decorate it @dataclass(frozen=True)")
        _known((cls,))
        fields = {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
        return {"class": cls.__name__} | fields
    if isinstance(value, tuple):
        return [_plain(v, where) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{where}={value!r} has no JSON; use None, a bool, an int, a float, a str, or a tuple, granularity or "
        f"observer of these"
    )


def _classes(value: object) -> Iterator[type]:
    """Yield the classes of what `_plain` writes with a class."""
    if isinstance(value, tuple):
        for each in value:
            yield from _classes(each)
    elif isinstance(value, (QuantSpec, Granularity, Observer)):
        if not isinstance(value, QuantSpec):
            yield type(value)
        for f in dataclasses.fields(value):  # type: ignore[arg-type]
            yield from _classes(getattr(value, f.name))


def _value(plain: object, where: str, known: Mapping[str, type]) -> Any:
    """Return the value that `_plain` wrote."""
    if isinstance(plain, list):
        return tuple(_value(v, where, known) for v in plain)
    if not isinstance(plain, dict):
        return plain
    name = plain.get("class")
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"{where}: class {name!r} is not known; known: {', '.join(sorted(known))}; "
            f"give your own as classes=({name},)"
        )
    return _call(known[name], {k: _value(v, f"{where}.{k}", known) for k, v in plain.items() if k != "class"})


def _spec(plain: object, known: Mapping[str, type]) -> QuantSpec:
    """Return the spec that `plain` is; ValueError if it is none."""
    try:
        return _spec_of(plain, known)
    except RecursionError as e:  # JSON may be nested deeper than Python calls.
        raise ValueError("no spec is nested so deeply; give what spec_to_json returned") from e


def _spec_of(plain: object, known: Mapping[str, type]) -> QuantSpec:
    if not isinstance(plain, dict):
        raise ValueError(f"not the JSON of a spec: a {type(plain).__name__}; give what spec_to_json returned")
    values: dict[str, Any] = {}
    for name, v in plain.items():
        if name in _DTYPE_FIELDS:
            values[name] = getattr(torch, v, None) if isinstance(v, str) else None
            if not isinstance(values[name], torch.dtype):
                raise ValueError(f"{name}: {v!r} is not the name of a torch dtype, such as 'int8'")
        elif name == "mapping":
            if not isinstance(v, str) or v not in MappingType.__members__:
                raise ValueError(f"mapping: {v!r} is not one of {', '.join(MappingType.__members__)}")
            values[name] = MappingType[v]
        else:
            values[name] = _value(v, name, known)
    spec: QuantSpec = _call(QuantSpec, values)
    return spec


def _call(cls: type, values: Mapping[str, Any]) -> Any:
    """Make a `cls` of its fields; ValueError if it does not take them."""
    fields = [f.name for f in dataclasses.fields(cls)]
    if unknown := sorted(values.keys() - fields):
        raise ValueError(
            f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
            f"its fields: {', '.join(fields) or 'none'}; update functional_sq or your class"
        )
    try:
        return cls(**values)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{cls.__name__}: {e}") from e


def _known(classes: Iterable[type]) -> dict[str, type]:
    """Return the observers and granularities that a file may name: the package's public ones and `classes`."""
    public = (getattr(functional_sq, name) for name in functional_sq.__all__)
    known = {cls.__name__: cls for cls in public if _is_value_class(cls)}
    for cls in classes:
        if not _is_value_class(cls) or not dataclasses.is_dataclass(cls):
            raise TypeError(f"classes has {cls!r}; give observer and granularity classes that are frozen dataclasses")
        if known.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"two classes are called {cls.__name__}: {known[cls.__name__]!r} and {cls!r}; rename one")
    return known


def _is_value_class(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, (Granularity, Observer)) and not inspect.isabstract(cls)
