"""Modules of a model by name, and others in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from bridge.buffers import Buffers

__all__ = ["choose_paths", "module_names", "named", "public_name", "put", "swap_"]


def public_name(name: str) -> str:
    """Return a module's name in the model that the user compiled.

    Example:
        >>> public_name("_orig_mod.encoder.0")
        'encoder.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Return the public names of a model's modules; one that has several is under its first."""
    return {module: public_name(name) for name, module in model.named_modules()}


def named(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by every name that they have in the model that the user made."""
    return {public_name(name): module for name, module in model.named_modules(remove_duplicate=False)}


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of this name, which `torch.compile` may have wrapped.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.compile(torch.nn.Linear(2, 3), backend="eager"))
        >>> put(model, "0._orig_mod", torch.nn.Linear(2, 4))
        >>> model(torch.ones(1, 2)).shape
        torch.Size([1, 4])
    """
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, child, module)
    if child == "_orig_mod":
        # What a wrapper calls was bound when it was made, and is again when it is read; what is compiled of it when it
        # is compiled once more is not.
        holder.__setstate__(holder.__getstate__())
        vars(holder).update(_torchdynamo_orig_callable=module.forward)


def swap_(
    model: nn.Module,
    wanted: Callable[[nn.Module, str], bool],
    make: Callable[[Any, str], nn.Module],
    what: str,
    remedy: str = "look at the filter",
    warning: str = "",
) -> None:
    """Replace every module that `wanted(module, name)` by `make(module, name)`, or none of them.

    All are made before the first is put in place. A module with two names is made once, and refused if it is wanted by
    one of them alone. Where none is wanted, the error says that none is `what`, and the `remedy`. The `warning` is
    given before, so that nothing is changed where it is an error.
    """
    if wanted(model, ""):
        raise ValueError(f"the model is itself {what} and cannot be replaced in place; wrap it: nn.Sequential(model)")
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {name: module for name, module in modules.items() if wanted(module, public_name(name))}
    if not found:
        raise ValueError(f"no module of {type(model).__name__} is {what} to replace, and nothing was changed; {remedy}")
    others = {id(module): public_name(name) for name, module in modules.items() if name not in found}
    for name, module in found.items():
        if id(module) in others:
            raise ValueError(
                f"{public_name(name)!r} and {others[id(module)]!r} are one module, which the filter picks as the one "
                f"and not as the other; let it say the same of both"
            )
    made: dict[int, nn.Module] = {}
    errors: dict[str, ValueError | TypeError] = {}
    for name, module in found.items():
        if id(module) not in made:
            try:
                made[id(module)] = make(module, public_name(name))
            except (ValueError, TypeError) as error:
                errors[public_name(name)] = error
    if errors:
        first = next(iter(errors.values()))
        told = [f"{name}: {error}" for name, error in errors.items()]
        if told[1:]:
            told = [f"{len(told)} layers cannot be replaced, and nothing was changed:", *told]
        raise type(first)("\n  ".join(told)) from first
    if warning:
        warnings.warn(warning, stacklevel=4)  # who called prepare_ or convert_, which have a function between
    for name, module in found.items():
        put(model, name, made[id(module)])
    choose_paths(model)


_FAST_PATHS = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""What torch's encoder looks at before it hands the parameters of its layers, in eval mode, to one fused
operator; the layers themselves are then not called."""


def choose_paths(model: nn.Module) -> None:
    """Switch torch's fused path off in encoders that hold layers of this package, and on again where none is left."""
    for module in model.modules():
        flag = next((flag for kind, flag in _FAST_PATHS.items() if isinstance(module, kind)), None)
        if flag is None:
            continue
        ours, kept = any(isinstance(m, Buffers) for m in module.modules()), f"_float_{flag}"
        if ours and not hasattr(module, kept):
            setattr(module, kept, getattr(module, flag))
            setattr(module, flag, False)
        elif not ours and hasattr(module, kept):
            setattr(module, flag, getattr(module, kept))
            delattr(module, kept)
