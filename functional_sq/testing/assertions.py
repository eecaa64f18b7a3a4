"""How a failure reads: the expression that does not hold, and the values in it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_text", "assert_same_bits", "bits", "require"]


def assert_same_bits(left: str, right: str, a: object, b: object) -> None:
    """Raise AssertionError unless two values have the same structure, dtypes, shapes and bits.

    A NaN equals any NaN; 0.0 differs from -0.0.

    Args:
        left: the expression that gave `a`.
        right: the expression that gave `b`.
        a: a tensor, or a dict or tuple of such; anything else is compared by `==`.
        b: what it is compared with.

    Example:
        >>> assert_same_bits("min(x)", "min(y)", torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
        Traceback (most recent call last):
        ...
        AssertionError: min(x) is not min(y), in 1 of 2 elements, first at (0,): 0.0 and -0.0
          min(x) = tensor([0.0, 1.0])
          min(y) = tensor([-0.0, 1.0])
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        _assert_same_tensor(left, right, a, b)
    elif isinstance(a, dict) and isinstance(b, dict):
        require(a.keys() == b.keys(), f"{left} has the keys of {right}", **{left: sorted(a), right: sorted(b)})
        for key in a:
            assert_same_bits(f"{left}[{key!r}]", f"{right}[{key!r}]", a[key], b[key])
    elif isinstance(a, tuple) and type(a) is type(b) and len(a) == len(b):
        names = getattr(a, "_fields", None)
        for i, pair in enumerate(zip(a, b, strict=True)):
            field = f".{names[i]}" if names else f"[{i}]"
            assert_same_bits(left + field, right + field, *pair)
    else:
        require(type(a) is type(b) and a == b, f"{left} == {right}", **{left: a, right: b})


def _assert_same_tensor(left: str, right: str, a: Tensor, b: Tensor) -> None:
    if (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and torch.equal(bits(a), bits(b)):
        return
    for what in ("dtype", "shape", "device"):
        ours, theirs = getattr(a, what), getattr(b, what)
        require(
            ours == theirs,
            f"{left} has the {what} of {right}",
            **{f"{left}.{what}": as_text(ours), f"{right}.{what}": as_text(theirs)},
        )
    differ = bits(a) != bits(b)
    if a.is_floating_point():
        differ &= ~(a.isnan() & b.isnan())
    if not bool(differ.any()):
        return
    where = tuple(differ.nonzero()[0].tolist())
    first = f"first at {where}: {a[where].item()!r} and {b[where].item()!r}"
    raise AssertionError(
        f"{left} is not {right}, in {int(differ.sum())} of {differ.numel()} elements, {first}\n"
        f"  {left} = {as_text(a)}\n  {right} = {as_text(b)}"
    )


def bits(x: Tensor) -> Tensor:
    """Return the integers whose bytes are those of `x`."""
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(same_size[x.element_size()])


def as_text(value: object) -> str:
    """Return a value as text: tensors with all their digits, so that the text makes the same bits."""
    if isinstance(value, Tensor):
        dtype = "" if value.dtype in (torch.float32, torch.int64) else f", dtype={value.dtype}"
        return f"tensor({value.tolist()}{dtype})"
    if isinstance(value, torch.Size):
        return str(tuple(value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {as_text(v)}" for k, v in value.items()) + "}"
    if type(value) is tuple:
        return "(" + ", ".join(map(as_text, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def require(holds: bool, expression: str, **values: object) -> None:
    """Raise AssertionError with the expression and the values in it, unless it holds."""
    if not holds:
        lines = [f"not so: {expression}"]
        lines += [f"  {name} = {value if isinstance(value, str) else as_text(value)}" for name, value in values.items()]
        raise AssertionError("\n".join(lines))
