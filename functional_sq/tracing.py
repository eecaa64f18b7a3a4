"""What code asks that torch may trace, and how an operator of ours is defined for all that traces it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from functional_sq.compat import is_exporting

__all__ = [
    "always",
    "asked_once",
    "computed_once",
    "computed_together",
    "define_operator",
    "hide_from_dynamo",
    "is_among",
    "is_batched",
    "is_traced",
    "looped",
    "reaches",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def is_traced(x: Tensor) -> bool:
    """Whether operations on `x` are traced into a graph, where code that depends on one size is out of place.

    The type tells it where the compiler traces an operator of ours, which torch before 2.13 does not say.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether any of them has a batch of `torch.vmap`; a tensor without one then cannot take its result in place."""
    return any(t is not None and torch._C._functorch.is_batchedtensor(t) for t in tensors)


def hide_from_dynamo(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Keep Dynamo from compiling the kernel of an operator, and what it calls, when they run beside compiled code.

    As `torch.compiler.disable`, which imports Dynamo and whose wrapper takes 1 us of each call. Where torch has no such
    switch any more, the function is left as it is.
    """
    hook: Any = torch._C._dynamo.eval_frame
    if hasattr(hook, "set_code_exec_strategy"):
        skip = hook._FrameAction.SKIP
        hook.set_code_exec_strategy(function.__code__, hook._FrameExecStrategy(skip, skip))
    return function


def looped(call: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """Return the vmap rule of an operator without a batch: `call` for each element."""

    def rule(info: Any, in_dims: tuple[Any, ...], *operands: Any) -> tuple[Tensor, int]:
        def at(i: int) -> list[Any]:
            pairs = zip(operands, in_dims, strict=True)
            return [t.select(dim, i) if isinstance(t, Tensor) and dim is not None else t for t, dim in pairs]

        return torch.stack([call(*at(i)) for i in range(info.batch_size)]), 0

    return hide_from_dynamo(rule)


def define_operator(
    name: str,
    schema: str,
    kernel: Callable[..., Any] | None,
    fake: Callable[..., Any],
    *,
    device: str = "cpu",
    has_vmap: bool = True,
) -> None:
    """Define `torch.ops.functional_sq.name`: a call in a graph, into which no compiler looks.

    Not `torch.library.custom_op`, whose call takes 8 us where this takes 2: the whole product of one token takes 26.

    Args:
        name: of the operator.
        schema: its arguments and result, as `torch.library.define` takes them.
        kernel: computes it; None where code that is loaded later registers one.
        fake: returns an empty result, while a graph is traced.
        device: where the kernel runs; "default": anywhere.
        has_vmap: whether `torch.vmap` calls it for each element of a batch.
    """
    full = f"functional_sq::{name}"
    torch.library.define(full, schema)
    if kernel is not None:
        torch.library.impl(full, device, hide_from_dynamo(kernel))
    torch.library.register_fake(full, fake)
    if has_vmap:
        torch.library.register_vmap(full, looped(getattr(torch.ops.functional_sq, name).default))


def asked_once(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let Dynamo call a function while it traces, with constants, and take its result as a constant.

    As `torch.compiler.assume_constant_result`, which imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def computed_once(x: Tensor) -> Tensor:
    """Return `x`, which Inductor on a CPU then writes to memory before a loop reads it.

    Else it computes a statistic for each vector of the elements that it is broadcast to: the division of a scale's
    reciprocal makes a pass that quantizes 1.3 times as long, the root of a batch norm's variance one that scales 5
    times; and it writes codes again for each product that takes a view of them. On a GPU a statistic computed again
    costs less than another kernel.
    """
    if x.device.type != "cpu" or not is_traced(x) or is_exporting():
        return x
    return x.as_strided(x.shape, x.stride())


def computed_together(xs: list[Tensor]) -> list[Tensor]:
    """Return tensors, which Inductor on a GPU then writes by one kernel, or few; on a CPU each as `computed_once`.

    Of all functions of a list of tensors it makes one kernel for a whole list: here of a product that changes nothing.
    """
    if not any(x.is_cuda and is_traced(x) for x in xs) or is_exporting():
        return [computed_once(x) for x in xs]
    return list(torch._foreach_mul(xs, 1))


def reaches(rows: int, least: int) -> bool:
    """Whether `rows` is at least `least`, or not known yet; no number reaches `sys.maxsize`.

    In a graph for any number of rows it counts as reached: 40 us lost on few rows are less than what many gain, and
    with a guard on the number each layer would be compiled for either side of it.

    Example:
        >>> from functional_sq.tracing import reaches
        >>> reaches(3, 4)
        False
    """
    if not (torch.compiler.is_compiling() or isinstance(rows, torch.SymInt)):
        return rows >= least
    return least < sys.maxsize and not always(rows < least)


def always(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for all sizes that a graph is for; False where that is not known. Adds no guard.

    Example:
        >>> from functional_sq.tracing import always
        >>> always(3 == 3)
        True
    """
    if not (torch.compiler.is_compiling() or isinstance(condition, torch.SymBool)):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(condition)


def is_among(rows: int, those: range) -> bool:
    """Whether `rows` is in a range; a number not known yet is, if the range has no end (`sys.maxsize`).

    Example:
        >>> from functional_sq.tracing import is_among
        >>> is_among(3, range(1, 4)), is_among(4, range(1, 4))
        (True, False)
    """
    return reaches(rows, those.start) and not reaches(rows, those.stop)
