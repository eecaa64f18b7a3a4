"""What functions of this package refuse before they look further: arguments of another kind."""

from __future__ import annotations

from torch import nn

__all__ = ["check_counts", "check_function", "check_module"]


def check_module(model: object) -> None:
    """Raise TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")


def check_function(name: str, given: object, what: str) -> None:
    """Raise TypeError unless an argument is a function, from one thing to another, or None."""
    if given is not None and not callable(given):
        raise TypeError(f"{name} is a {type(given).__name__}; give a function from {what}")


def check_counts(**given: object) -> None:
    """Raise ValueError unless these arguments are ints, at least 1."""
    for name, value in given.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}; give an int, at least 1")
