"""A tensor seen as blocks, each of which has one statistic.

Shape work is plain Python on tuples; a split is a view and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["align", "blockwise", "split"]


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
        if s == 1:
            dims.append(len(sizes))
            sizes.append(n)
        elif s == n:
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
