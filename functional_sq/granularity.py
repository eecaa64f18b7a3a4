"""Granularities: which elements of a tensor share one scale.

A granularity maps the shape of a tensor to the shape of its statistics, which has the same rank:
an axis of size `n` with `s` statistics is cut into `s` blocks of `n // s` neighbours. So the shape
of a scale alone says what it belongs to, and no function takes a block size.

    PerTensor()          (4, 6) -> (1, 1)
    PerAxis(0)           (4, 6) -> (4, 1)      one per output channel of a Linear weight
    PerRow(-1)           (4, 6) -> (4, 1)      reduce one axis, keep the others
    PerToken()        (2, 4, 6) -> (2, 4, 1)   one per vector along the last axis
    PerGroup(3)          (4, 6) -> (4, 2)
    PerBlock((2, 3))     (4, 6) -> (2, 2)

The names and meanings are those of `torchao.quantization.granularity`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from functional_sq.blocks import align

__all__ = ["Granularity", "PerAxis", "PerBlock", "PerGroup", "PerRow", "PerTensor", "PerToken", "check_stats"]


class Granularity(abc.ABC):
    """Which elements share one scale. For one of your own, derive a frozen dataclass.

    Example:
        >>> import torch, functional_sq as fsq
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Parts(fsq.Granularity):
        ...     number: int
        ...     def stat_shape(self, shape):
        ...         return (self.number, *(1 for _ in shape[1:]))
        >>> spec = fsq.QuantSpec(torch.int8, Parts(2))
        >>> fsq.observe(spec, fsq.init(spec, (4, 2)), torch.arange(8.0).reshape(4, 2))["max"]
        tensor([[3.],
                [7.]])
    """

    @abc.abstractmethod
    def stat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the statistics of a tensor of `shape`, of the same rank.

        Raises:
            ValueError: the granularity does not apply to `shape`.
        """


def _axis(granularity: Granularity, axis: int, shape: Sequence[int]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{granularity} does not apply to shape {tuple(shape)}: "
            f"a tensor of rank {len(shape)} has no axis {axis}; "
            f"use an axis from {-len(shape)} to {len(shape) - 1}"
            if shape
            else f"{granularity} does not apply to a scalar; use PerTensor()"
        )
    return axis % len(shape)


def _integer(granularity: Granularity, name: str, value: object, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{granularity}: {name} is {value!r}; it must be an int")
    if least is not None and value < least:
        raise ValueError(f"{granularity}: {name} is {value}; it must be at least {least}")


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor.

    Example:
        >>> PerTensor().stat_shape((4, 6))
        (1, 1)
    """

    def stat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (1,) * len(shape)


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale per index of `axis`; reduced over all other axes.

    Example:
        >>> PerAxis(0).stat_shape((4, 6)), PerAxis(-1).stat_shape((2, 4, 6))
        ((4, 1), (1, 1, 6))
    """

    axis: int

    def __post_init__(self) -> None:
        _integer(self, "axis", self.axis)

    def stat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        kept = _axis(self, self.axis, shape)
        return tuple(n if i == kept else 1 for i, n in enumerate(shape))


@dataclass(frozen=True)
class PerRow(Granularity):
    """Reduced over `dim` alone; one scale for each index of all other axes.

    Example:
        >>> PerRow().stat_shape((4, 6)), PerRow(1).stat_shape((2, 4, 6))
        ((4, 1), (2, 1, 6))
    """

    dim: int = -1

    def __post_init__(self) -> None:
        _integer(self, "dim", self.dim)

    def stat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        reduced = _axis(self, self.dim, shape)
        return tuple(1 if i == reduced else n for i, n in enumerate(shape))


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale for each vector along the last axis.

    Example:
        >>> PerToken().stat_shape((2, 4, 6))
        (2, 4, 1)
    """

    def stat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        _axis(self, -1, shape)
        return (*shape[:-1], 1)


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each `group_size` neighbours along the last axis.

    Example:
        >>> PerGroup(3).stat_shape((4, 6))
        (4, 2)
        >>> PerGroup(7).stat_shape((2, 16))
        Traceback (most recent call last):
        ...
        ValueError: PerGroup(group_size=7) does not divide axis 1 of shape (2, 16); use a divisor of 16
    """

    group_size: int

    def __post_init__(self) -> None:
        _integer(self, "group_size", self.group_size, least=1)

    def stat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        last = _axis(self, -1, shape)
        return (*shape[:-1], _blocks(self, shape, last, self.group_size))


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for each block of `block_size` elements; one entry for each axis of the tensor.

    Example:
        >>> PerBlock((2, 3)).stat_shape((4, 6))
        (2, 2)
    """

    block_size: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.block_size, (tuple, list)):
            raise TypeError(f"block_size={self.block_size!r}; give a tuple with a size for each axis, such as (1, 32)")
        # A list would make the granularity unhashable; torchao's own examples pass lists.
        object.__setattr__(self, "block_size", tuple(self.block_size))
        for size in self.block_size:
            _integer(self, "a block size", size, least=1)

    def stat_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        if len(self.block_size) != len(shape):
            raise ValueError(
                f"{self} has {len(self.block_size)} axes and shape {tuple(shape)} has {len(shape)}; "
                f"give one block size for each axis (1 to share no scale along it)"
            )
        return tuple(_blocks(self, shape, i, size) for i, size in enumerate(self.block_size))


def _blocks(granularity: Granularity, shape: Sequence[int], axis: int, size: int) -> int:
    if shape[axis] % size != 0:
        raise ValueError(
            f"{granularity} does not divide axis {axis} of shape {tuple(shape)}; use a divisor of {shape[axis]}"
        )
    return shape[axis] // size


def check_stats(
    granularity: Granularity, what: str, stat_shape: Sequence[int], shape: Sequence[int]
) -> tuple[int, ...]:
    """Return `stat_shape` with the rank of `shape`, or raise ValueError if the two do not belong together."""
    expected = granularity.stat_shape(shape)
    aligned = align(stat_shape, len(shape))
    if aligned != expected:
        raise ValueError(
            f"{what} has shape {tuple(stat_shape)}, but {granularity} of a tensor of shape {tuple(shape)} "
            f"needs {expected}; use the granularity and the sizes it was made with, or reshape it"
        )
    return aligned
