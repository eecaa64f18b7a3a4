"""A tensor seen as blocks, each of which has one statistic; and what code asks that torch may trace.

Shape work is plain Python on tuples; a split is a view and costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = [
    "align",
    "always",
    "asked_once",
    "blockwise",
    "hide_from_dynamo",
    "is_among",
    "is_batched",
    "is_traced",
    "looped",
    "reaches",
    "split",
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


def align(stat_shape: Sequence[int], rank: int) -> tuple[int, ...]:
    """Give a statistic's shape `rank` axes by adding or dropping leading axes of size 1.

    A per-tensor or per-last-axis statistic so fits tensors of any rank and any batch size. A leading
    axis that is not 1 stays, and the caller sees that the shapes differ.

        align((1, 1), 3)    -> (1, 1, 1)
        align((1, 1, 8), 2) -> (1, 8)
        align((4, 1), 1)    -> (4, 1)
    """
    shape = tuple(stat_shape)
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return (1,) * (rank - len(shape)) + shape


def split(x: Tensor, stat_shape: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """View `x` so that each of its blocks lies along axes of its own; return the view and those axes.

        x (4, 6), stat_shape (1, 1) -> (4, 6),       (0, 1)
        x (4, 6), stat_shape (4, 1) -> (4, 6),       (1,)
        x (4, 6), stat_shape (4, 2) -> (4, 2, 3),    (2,)
        x (4, 6), stat_shape (2, 2) -> (2, 2, 2, 3), (1, 3)

    Every size of `stat_shape` divides the size of `x` on the same axis; a granularity's
    `stat_shape` is so by construction.
    """
    sizes: list[int] = []
    dims: list[int] = []
    for n, s in zip(x.shape, stat_shape, strict=True):
        if s == n:
            sizes.append(n)
        elif s == 1:
            dims.append(len(sizes))
            sizes.append(n)
        else:
            sizes += [s, n // s]
            dims.append(len(sizes) - 1)
    return (x if len(sizes) == x.ndim else x.reshape(sizes)), tuple(dims)


def blockwise(op: Callable[..., Tensor], x: Tensor, *stats: Tensor) -> Tensor:
    """Apply the elementwise `op(x, *stats)`, each statistic standing for its whole block.

    The statistics have one shape, of the rank of `x`, or one element. Where they broadcast as they are (every
    granularity but groups and blocks), nothing is reshaped.
    """
    if stats[0].numel() == 1:
        return op(x, *stats)
    stat_shape = stats[0].shape
    view, dims = split(x, stat_shape)
    if view.ndim == x.ndim:
        return op(x, *stats)
    sizes = [1 if i in dims else n for i, n in enumerate(view.shape)]
    return op(view, *(s.reshape(sizes) for s in stats)).reshape(x.shape)


def asked_once(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let Dynamo call a function while it traces, with constants, and take its result as a constant.

    As `torch.compiler.assume_constant_result`, which imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def reaches(rows: int, least: int) -> bool:
    """Whether `rows` is at least `least`, or not known yet; no number reaches `sys.maxsize`.

    Example:
        >>> from functional_sq.blocks import reaches
        >>> reaches(3, 4)
        False

    In a graph for any number of rows it counts as reached: 40 us lost on few rows are less than what many gain, and
    with a guard on the number each layer would be compiled for either side of it.
    """
    if not (torch.compiler.is_compiling() or isinstance(rows, torch.SymInt)):
        return rows >= least
    return least < sys.maxsize and not always(rows < least)


def always(condition: bool | torch.SymBool) -> bool:
    """Whether a condition holds for all sizes that a graph is for; False where that is not known. Adds no guard.

    Example:
        >>> from functional_sq.blocks import always
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
        >>> from functional_sq.blocks import is_among
        >>> is_among(3, range(1, 4)), is_among(4, range(1, 4))
        (True, False)
    """
    return reaches(rows, those.start) and (those.stop == sys.maxsize or not reaches(rows, those.stop))
