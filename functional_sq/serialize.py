"""Calibrations to a file and back: specs as readable JSON, states as safetensors; the same bits.

A file is a valid safetensors file, which any reader of that format opens:

    8 bytes      length of the header, little-endian
    header       JSON: "layer.key" -> dtype, shape, data_offsets; "__metadata__" -> strings
    data         the tensors' bytes, little-endian, without gaps

`__metadata__` holds `format`, `version` and `specs`. Nothing is pickled and nothing is imported by
name: a class that this package does not have is given by the caller.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import functional_sq
from functional_sq.granularity import Granularity
from functional_sq.observer import Observer, State
from functional_sq.qparams import MappingType
from functional_sq.spec import QuantSpec

__all__ = ["load", "save", "spec_from_json", "spec_to_json"]

_FORMAT: Final = "functional_sq"
_VERSION: Final = 1
_DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
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
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"spec is a {type(spec).__name__}; give a QuantSpec")
    plain: dict[str, object] = {}
    for f in dataclasses.fields(spec):
        value = getattr(spec, f.name)
        if f.name in _DTYPE_FIELDS:
            plain[f.name] = str(value).removeprefix("torch.")
        elif isinstance(value, MappingType):
            plain[f.name] = value.name
        else:
            plain[f.name] = _plain(value, f.name)
    return json.dumps(plain, sort_keys=True)


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
    known = _known(classes)
    try:
        plain = json.loads(text)
    except (TypeError, ValueError, RecursionError) as e:
        raise ValueError(f"not the JSON of a spec ({e}); give what spec_to_json returned") from e
    if not isinstance(plain, dict):
        raise ValueError(f"not the JSON of a spec: a {type(plain).__name__}; give what spec_to_json returned")
    return _spec(plain, known)


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
        specs[layer] = json.loads(spec_to_json(spec))
        spec.observer.stat_shape(state)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{layer!r}: {key!r} is a {type(value).__name__}; a state holds tensors")
            if value.dtype not in _NAMES:
                raise TypeError(f"{layer!r}: {key!r} is {value.dtype}; safetensors holds {', '.join(map(str, _NAMES))}")
            if "." in key:
                raise ValueError(f"{layer!r}: the state key {key!r} contains a dot; use a bare noun")
            tensors[f"{layer}.{key}"] = value
    metadata = {"format": _FORMAT, "version": str(_VERSION), "specs": json.dumps(specs, sort_keys=True)}
    _write(Path(path), tensors, metadata)


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
    path = Path(path)
    raw = path.read_bytes()
    try:
        return _calibration(*_parse(raw), known)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e


def _calibration(
    tensors: dict[str, Tensor], metadata: Mapping[str, str], known: Mapping[str, type]
) -> dict[str, tuple[QuantSpec, State]]:
    if metadata.get("format") != _FORMAT or not metadata.get("version", "").isdecimal():
        raise ValueError("a safetensors file, but not one that functional_sq wrote; give a file written by save()")
    if (version := int(metadata["version"])) > _VERSION:
        raise ValueError(f"written in version {version} of the format, and this is {_VERSION}; update functional_sq")
    try:
        specs = json.loads(metadata["specs"])
        items = list(specs.items())
    except (KeyError, ValueError, AttributeError, RecursionError) as e:
        raise ValueError(f"its specs cannot be read; {_DAMAGED}") from e
    calibration: dict[str, tuple[QuantSpec, State]] = {}
    for layer, plain in items:
        try:
            calibration[layer] = (_spec(plain, known), {})
        except ValueError as e:
            raise ValueError(f"layer {layer!r}: {e}") from e
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        if layer not in calibration:
            raise ValueError(f"tensor {name!r} belongs to no layer; {_DAMAGED}")
        calibration[layer][1][key] = tensor
    for layer, (spec, state) in calibration.items():
        try:
            spec.observer.stat_shape(state)
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
    if not isinstance(plain, dict):
        raise ValueError(f"a spec is {plain!r}; it must be a JSON object")
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


# The safetensors format.

_DAMAGED: Final = "the file is damaged: copy it again, or record and save again"


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    # Wide elements first, so that each tensor lies at a multiple of its element size.
    placed = sorted(tensors, key=lambda name: -tensors[name].itemsize)
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in placed:
        offsets[name] = (end, end + tensors[name].nbytes)
        end = offsets[name][1]
    for name, t in tensors.items():
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": offsets[name]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    path = Path(os.path.realpath(path))  # a rename would replace a link, not the file it points to
    # Not tempfile: it makes files that only their owner can read, and the rename would keep that.
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name in placed:
                f.write(_to_bytes(tensors[name]))
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _parse(raw: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file; ValueError if it is not one."""
    if raw[8:9] not in (b"{", b""):
        raise ValueError("not a safetensors file; give a file written by save()")
    start = 8 + int.from_bytes(raw[:8], "little")
    if len(raw) < max(start, 9):
        raise ValueError(f"cut short: {len(raw)} bytes, and the header alone needs {max(start, 9)}; {_DAMAGED}")
    try:
        header = json.loads(raw[8:start])
    except (ValueError, RecursionError) as e:
        raise ValueError(f"the header is not JSON ({e}); {_DAMAGED}") from e
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"__metadata__ is not a map of strings; {_DAMAGED}")

    spans = {name: _span(name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, (first, last)) in sorted(spans.items(), key=lambda item: item[1][2]):
        if first != end:
            raise ValueError(f"tensor {name!r} starts at byte {first} of the data, expected {end}; {_DAMAGED}")
        end = last
    if len(raw) - start != end:
        kind = "cut short" if len(raw) - start < end else "too long"
        raise ValueError(f"{kind}: {len(raw) - start} bytes of data, and the header describes {end}; {_DAMAGED}")
    data = memoryview(raw)[start:]
    return {name: _from_bytes(data[slice(*at)], dtype, shape) for name, (dtype, shape, at) in spans.items()}, metadata


def _span(name: str, entry: Any) -> tuple[torch.dtype, list[int], tuple[int, int]]:
    """Check one entry of the header; return dtype, shape and first and last byte."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"tensor {name!r} is described as {entry!r}; {_DAMAGED}") from None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, known: {', '.join(_DTYPES)}; update functional_sq")
    # 2**63: what torch takes as a size.
    if not all(type(n) is int and 0 <= n < 2**63 for n in sizes) or math.prod(n or 1 for n in shape) >= 2**63:
        raise ValueError(f"tensor {name!r} has shape {shape} at bytes {first} to {last}; {_DAMAGED}")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if last - first != needed:
        raise ValueError(f"tensor {name!r} has {last - first} bytes, and its shape {shape} needs {needed}; {_DAMAGED}")
    return _DTYPES[dtype], list(shape), (first, last)


def _to_bytes(t: Tensor) -> bytes:
    if t.numel() == 0:
        return b""
    raw = _little_endian(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8), t.itemsize)
    return ctypes.string_at(raw.data_ptr(), raw.numel())  # Tensor.numpy() needs numpy, which torch does not


def _from_bytes(raw: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    if not raw:
        return torch.empty(shape, dtype=dtype)
    # A bytearray for each tensor: writable, aligned, and shared with no other.
    return (
        _little_endian(torch.frombuffer(bytearray(raw), dtype=torch.uint8), dtype.itemsize).view(dtype).reshape(shape)
    )


def _little_endian(raw: Tensor, itemsize: int) -> Tensor:
    """Exchange the machine's byte order and the file's, either way."""
    return raw if sys.byteorder == "little" else raw.reshape(-1, itemsize).flip(1).reshape(-1)
