"""A quantized model to one file and back, without calibrating again; the same bits.

The file is a safetensors file of the model's `state_dict`. Its metadata says what a `state_dict` does not:

    format     "bridge"
    version    "1"
    layers     JSON: a list with an entry for each quantized layer: its names, its kind, the specs of its
               input and weight, the dtype that its codes stand for, its constructor's arguments
    aliases    JSON: name -> the name under which the same tensor is written
    versions   JSON: module name -> version of its state_dict, where it is not 1

Nothing is pickled and nothing is imported by name: the code of the model comes from the caller, as a
function that builds the float model.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from bridge.aqt import AffineQuantizedTensor
from bridge.arguments import check_module
from bridge.kinds import float_reason, is_replaceable
from bridge.linear_activation_quantized import LinearActivationQuantizedTensor
from bridge.observed import check_plain
from bridge.observer import ObserverModule
from bridge.quantized import QUANTIZED, Quantized
from bridge.swapping import choose_paths, named, public_name, put
from functional_sq import safetensors
from functional_sq.formats import name_of
from functional_sq.serialize import spec_from_plain, spec_to_plain

__all__ = ["load", "save"]

_FORMAT: Final = "bridge"
_VERSION: Final = 1
_KINDS: Final = {kind.__name__: kind for kind in QUANTIZED.values()}
"""Name in a file: the quantized layer."""
_QUANTIZED: Final = tuple(_KINDS.values())


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model to a safetensors file, whole or not at all.

    Parameters and persistent buffers of every layer are written, quantized or not. A tensor that
    several names reach is written once. The same model gives the same bytes. An old file is replaced
    when the new one is complete, so it outlives a crash.

    Args:
        model: a converted model, on any device; may be compiled.
        path: the file.

    Raises:
        TypeError: `model` is not a module, or holds what the file cannot: each such layer is named.
        ValueError: the model still has observers, or no quantized layer.
        OSError: the file cannot be written; nothing is left behind.

    Example: see `load`.
    """
    check_module(model)
    modules = named(model)
    observed = {_where(name.rpartition(".")[0]) for name, m in modules.items() if isinstance(m, ObserverModule)}
    if observed:
        raise ValueError(
            f"the model still has observers, in {', '.join(sorted(observed))}; call convert_(model) first, "
            f"or save the calibration itself: functional_sq.serialize.save"
        )
    state: Any = model.state_dict()  # its versions are in an attribute of the dict
    faults = [f"{public_name(name)}: {fault}" for name, value in state.items() if (fault := _fault(value))]
    faults += [
        f"{_where(name)}: is a {type(m).__name__}, a class of your own; convert to one of {', '.join(_KINDS)}"
        for name, m in modules.items()
        if isinstance(m, _QUANTIZED) and type(m) not in _QUANTIZED
    ]
    if faults:
        raise TypeError("the model holds what the file cannot:\n  " + "\n  ".join(sorted(faults)))

    names: dict[int, list[str]] = {}
    for name, module in sorted(modules.items()):
        if isinstance(module, _QUANTIZED):
            names.setdefault(id(module), []).append(name)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no quantized layer; call prepare_, calibrate and convert_ first. "
            f"A float model is saved by torch.save(model.state_dict(), path)"
        )
    layers = [_record(same, modules[same[0]]) for same in names.values()]

    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[object, str] = {}
    for name, t in sorted(((public_name(name), t) for name, t in state.items()), key=lambda item: item[0]):
        first = seen.setdefault((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()), name) if t.numel() else name
        if first == name:
            tensors[name] = t
        else:
            aliases[name] = first
    known = getattr(state, "_metadata", {})  # a model may have a state_dict of its own, which gives a plain dict
    versions = {public_name(name): entry["version"] for name, entry in known.items() if entry["version"] != 1}
    metadata = {"layers": layers, "aliases": aliases, "versions": versions}
    text = {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()}
    safetensors.write(path, tensors, {"format": _FORMAT, "version": str(_VERSION), **text})


# What is made in inference mode could not be loaded into outside of it.
@torch.inference_mode(False)
def load(
    path: str | os.PathLike[str],
    float_model_factory: Callable[[], nn.Module],
    *,
    device: torch.device | str | None = None,
    classes: Iterable[type] = (),
) -> nn.Module:
    """Build a quantized model from a file that `save` wrote; its outputs have the bits of the saved model's.

    No data is needed: the quantized layers come with their ranges. Non-persistent buffers, hooks and
    what else is not in a `state_dict` are what the factory gives.

    Args:
        path: the file.
        float_model_factory: called once; returns the float model that was quantized, new, and after
            `make_quantizable_` if that was called before `prepare_`. Its weights do not matter: they may be
            random, or on the meta device, where they take no memory.
        device: where the model goes; default: where the factory puts it, the CPU for what is on meta.
        classes: your own observer and granularity classes that the specs name.

    Returns:
        the model, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the factory is no function, or returns no module; or `classes` holds something that
            is no observer or granularity class.
        ValueError: the file is damaged, or was written by another program or by a newer version; or
            the factory's model does not fit it: names every such layer; or leaves something on meta.

    Example:
        >>> import pathlib, tempfile, torch, bridge
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4)).eval()
        >>> model, x = build(), torch.randn(3, 16, 8)
        >>> _ = bridge.prepare_(model, bridge.StaticQuantConfig(torch.int8))
        >>> _ = bridge.calibrate(model, x)
        >>> _ = bridge.convert_(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "model.safetensors")
        ...     bridge.save(model, path)
        ...     loaded = bridge.load(path, build)
        >>> torch.equal(loaded(x), model(x))
        True
    """
    if isinstance(float_model_factory, nn.Module) or not callable(float_model_factory):
        raise TypeError(
            f"float_model_factory is a {type(float_model_factory).__name__}; give a function that returns the float "
            f"model, such as lambda: build()"
        )
    try:
        tensors, metadata = safetensors.read(path)
        content = _content(tensors, metadata, tuple(classes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model = float_model_factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"float_model_factory returned a {type(model).__name__}; it must return the float model")

    model, faults, homes = _swap(model, content.layers)
    choose_paths(model)
    state = {public_name(name): (name, value) for name, value in model.state_dict().items()}
    expected = {name: value for name, (_, value) in state.items()}
    _compare(faults, expected, tensors, content.aliases)
    _compare_shared(faults, model, content.aliases)
    if faults:
        lines = [f"{_where(name)}: {'; '.join(why)}" for name, why in sorted(faults.items())]
        step = ", after make_quantizable_ if that was called: lambda: bridge.make_quantizable_(build())"
        raise ValueError(
            f"{path}: the model of the factory does not fit, in {len(lines)} places:\n  "
            + "\n  ".join(lines)
            + "\nmake the factory return the float model that was quantized, of the same classes, sizes and dtype"
            + (step if any(is_replaceable(m) and name in faults for name, m in named(model).items()) else "")
        )

    parameters = {public_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    values: dict[str, Tensor] = {}
    for name in list(tensors):
        home = device or homes.get(name.rpartition(".")[0], expected[name].device)
        # One at a time, so that a big model is not held on both devices.
        values[name] = tensors.pop(name).to("cpu" if torch.device(home).type == "meta" else home)
    shared: dict[str, nn.Parameter] = {}
    filled: OrderedDict[str, Tensor] = OrderedDict()
    for name, (own, _) in state.items():
        source = content.aliases.get(name, name)
        filled[own] = values[source]
        if name in parameters:
            # load_state_dict makes a parameter of each tensor, but takes one that is one, so what was tied stays tied.
            filled[own] = shared.setdefault(source, nn.Parameter(values[source], requires_grad=False))
    versions = {
        name: content.versions.get(public_name(name), 1) for name, _ in model.named_modules(remove_duplicate=False)
    }
    filled._metadata = {name: {"version": version} for name, version in versions.items()}  # type: ignore[attr-defined]
    try:
        model.load_state_dict(filled, strict=True, assign=True)
    except RuntimeError as error:  # a layer has refused what is its own
        raise ValueError(f"{path}: {str(error).partition(':')[2].strip()}") from error

    if left := sorted(_on_meta(model)):
        raise ValueError(
            f"{path}: not in the file, and on the meta device in the model of the factory: {', '.join(left)}; "
            f"make them on a real device in the factory"
        )
    return (model if device is None else model.to(device)).eval()


class _Layer(NamedTuple):
    """An entry of `layers`: the names that reach it, and its empty twin on the meta device."""

    names: list[str]
    twin: Quantized


class _Content(NamedTuple):
    """What the metadata of a file says."""

    layers: list[_Layer]
    aliases: dict[str, str]
    versions: dict[str, int | str]


def _where(name: str) -> str:
    return name or "the model itself"


def _fault(value: object) -> str | None:
    """Say what makes a value of a `state_dict` unfit for the file, or None."""
    if isinstance(value, (AffineQuantizedTensor, LinearActivationQuantizedTensor)):
        return (
            f"is a {type(value).__name__}, which has no place in the file; convert with form='module', and after "
            f"load make it so by as_linear()"
        )
    return safetensors.fault(value)


def _record(names: list[str], layer: Any) -> dict[str, object]:
    """Return the entry of a quantized layer in the metadata."""
    return {
        "names": names,
        "kind": type(layer).__name__,
        "act": spec_to_plain(layer.act_spec),
        "weight": spec_to_plain(layer.weight_spec),
        "dtype": name_of(layer.dtype),
        "arguments": layer.arguments(),
    }


def _content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], classes: tuple[type, ...]) -> _Content:
    """Read the metadata; ValueError if it is not that of a quantized model."""
    if metadata.get("format") == "functional_sq":
        raise ValueError("a calibration; read it with functional_sq.serialize.load, or give a file of bridge.save()")
    if metadata.get("format") != _FORMAT or not metadata.get("version", "").isdecimal():
        raise ValueError("a safetensors file, but not one that bridge.save() wrote; give a file that it wrote")
    if (version := int(metadata["version"])) > _VERSION:
        raise ValueError(f"written in version {version} of the format, and this is {_VERSION}; update functional_sq")
    try:
        records, aliases, versions = (json.loads(metadata[key]) for key in ("layers", "aliases", "versions"))
        names = [name for record in records for name in record["names"]]
        sound = len(set(names)) == len(names) and all(isinstance(name, str) for name in names)
        sound &= all(alias not in tensors and name in tensors for alias, name in aliases.items())
        sound &= all(isinstance(version, (int, str)) for version in versions.values())
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read ({error!r}); {safetensors.DAMAGED}") from error
    if not sound:
        raise ValueError(f"its metadata does not fit its tensors; {safetensors.DAMAGED}")
    return _Content([_layer(record, classes) for record in records], aliases, versions)


def _layer(record: Mapping[str, Any], classes: tuple[type, ...]) -> _Layer:
    """Make the empty twin of a layer of the file."""
    where = f"layer {_where(', '.join(record['names']))!r}"
    try:
        kind, dtype = str(record["kind"]), getattr(torch, record["dtype"])
        arguments: dict[str, Any] = {name: _tuples(value) for name, value in record["arguments"].items()}
        written = {which: record[which] for which in ("act", "weight")}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} cannot be read ({error!r}); {safetensors.DAMAGED}") from error
    if kind not in _KINDS:
        raise ValueError(f"{where} is a {kind}, known: {', '.join(_KINDS)}; update functional_sq")
    specs: dict[str, Any] = {}
    for which, plain in written.items():
        try:
            specs[which] = spec_from_plain(plain, classes=classes)
        except ValueError as error:
            raise ValueError(f"{where}: {which}: {error}") from error
    try:
        twin = _KINDS[kind](**specs, **arguments, device="meta", dtype=torch.empty(0, dtype=dtype).dtype)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{where} cannot be made ({error}); {safetensors.DAMAGED}") from error
    return _Layer(record["names"], twin)


def _tuples(value: object) -> object:
    """Return a value of JSON with the tuples that were written as lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


Faults = dict[str, list[str]]
"""Layer name: what does not fit."""


def _swap(model: nn.Module, layers: list[_Layer]) -> tuple[nn.Module, Faults, dict[str, torch.device]]:
    """Put the twins in their places; return the model, what did not fit, and where each float layer was.

    Not by `swap_`: it stops at the first fault, and makes one layer of one float layer, where the file may
    have two.
    """
    # A compiled model is its own child; the later name is the one to replace.
    found = {public_name(name): (name, module) for name, module in model.named_modules(remove_duplicate=False)}
    faults: Faults = {}
    homes: dict[str, torch.device] = {}
    for layer in layers:
        for name in layer.names:
            own, module = found.get(name, ("", None))
            if why := _misfit(layer.twin, module):
                faults[name] = why
                continue
            homes[name] = module.weight.device
            if own:
                put(model, own, layer.twin)
            else:
                model = layer.twin
    return model, faults, homes


def _misfit(twin: Quantized, module: nn.Module | None) -> list[str]:
    """Say why a layer of the file cannot take the place of `module`."""
    float_type = twin.observed.float_type
    kind, wanted = type(twin).__name__, f"torch.nn.{float_type.__name__}"
    if module is None:
        return [f"no such layer; in the file a {kind}, made of a {wanted}"]
    if not isinstance(module, float_type):
        return [f"a {type(module).__name__}; in the file a {kind}, made of a {wanted}"]
    if reason := float_reason(module):
        return [f"{reason}; in the file a {kind}, made of a {wanted}"]
    try:
        check_plain(module)
    except ValueError as error:
        return [str(error)]
    why = []
    for name, value in sorted(twin.arguments().items()):
        # The switches are of the quantized layer alone, and `bias` is a tensor in the float one.
        own = module.bias is not None if name == "bias" else getattr(module, name, value)
        if own != value:
            why.append(f"{name}={own}, in the file {value}")
    if module.weight.dtype is not twin.dtype:
        why.append(f"weight of {module.weight.dtype}, in the file {twin.dtype}")
    return why


def _compare(
    faults: Faults, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], aliases: Mapping[str, str]
) -> None:
    """Add to `faults` the tensors that are missing, too many, or of another shape or dtype."""
    known = set(faults)
    found = {**tensors, **{alias: tensors[name] for alias, name in aliases.items()}}
    for name in sorted(expected.keys() | found.keys()):
        layer, _, key = name.rpartition(".")
        if layer in known:
            continue  # Said already, once for all its tensors.
        if name not in found:
            why = f"{key} is not in the file"
        elif name not in expected:
            why = f"no {key}; in the file {_summary(found[name])}"
        elif _summary(expected[name]) != _summary(found[name]):
            why = f"{key} is {_summary(expected[name])}, in the file {_summary(found[name])}"
        else:
            continue
        faults.setdefault(layer, []).append(why)


def _compare_shared(faults: Faults, model: nn.Module, aliases: Mapping[str, str]) -> None:
    """Add to `faults` the modules that are one in the model and several in the file: the last would win."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(public_name(name))
    for module, same in names.items():
        if len(same) == 1:
            continue
        for key in (key for key in module.state_dict() if "." not in key):
            if len({aliases.get(f"{name}.{key}", f"{name}.{key}") for name in same}) > 1:
                faults.setdefault(same[-1], []).append(f"the same module as {same[0]}; in the file one of its own")
                break


def _summary(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _on_meta(model: nn.Module) -> Iterable[str]:
    """Yield the names of tensors without values: parameters, buffers, and attributes that are neither."""
    for name, module in model.named_modules():
        for held in (module._parameters, module._buffers, vars(module)):
            for key, value in held.items():
                if isinstance(value, Tensor) and value.is_meta:
                    yield public_name(f"{name}.{key}".removeprefix("."))
