"""The suite of observers: each law of states and codes with the cases that it is checked on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import functional_sq as fsq
from functional_sq.observer import Observer
from functional_sq.testing.code_laws import (
    a_constant_is_represented,
    codes_in_range_idempotent_monotone,
    each_block_is_represented,
    granularities_agree,
    scale_equivariance,
    zero_is_exact,
)
from functional_sq.testing.law import Law, check_law
from functional_sq.testing.state_laws import (
    compiled_equals_eager,
    large_is_its_pieces,
    masked_values_do_not_count,
    merge_is_a_commutative_monoid,
    observe_is_a_homomorphism,
    observe_is_pure,
    qparams_ignore_splits,
    round_trips,
    unfit_states_are_faulty,
    vmap_equals_loop,
)
from functional_sq.testing.strategies import cases, shapes, specs, tensors

__all__ = ["LAWS", "check_observer"]


def _nonfinite_cases(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    """Draw what `cases` draws, with NaN and Inf in the batches."""
    return cases(observer, nonfinite=True)


@st.composite
def _masked_cases(draw: st.DrawFn, observer: Observer) -> dict[str, Any]:
    case = draw(cases(observer, nonfinite=True))
    shape = case["batches"][0].shape
    leading = tuple(shape[: draw(st.integers(0, len(shape)))])
    n = math.prod(leading)
    keep = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return case | {"mask": torch.tensor(keep, dtype=torch.bool).reshape(leading)}


@st.composite
def _exponent_cases(draw: st.DrawFn, observer: Observer) -> dict[str, Any]:
    shape = draw(shapes())
    # Values and their multiples lie within 2**-24 ... 2**24, where the bins of a histogram end. Not
    # float16: that is outside it.
    batch = tensors(shape, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])), exponents=(-12, 12))
    return {
        "spec": draw(specs(shape, observer=observer)),
        "batches": (draw(batch), draw(batch), draw(batch)),
        "exponent": draw(st.integers(-11, 11)),
    }


def _large_cases(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    """Return a few fixed cases: less and more than what a cache, or a piece of an observer, holds."""
    granularities = fsq.PerTensor(), fsq.PerAxis(-1)
    specs = [fsq.QuantSpec(torch.int8, granularity, observer=observer) for granularity in granularities]
    return st.sampled_from([{"spec": spec, "rows": rows} for rows in (2_000, 40_000, 130_000) for spec in specs])


@st.composite
def _constant_cases(draw: st.DrawFn, observer: Observer) -> dict[str, Any]:
    kinds = [(torch.int8, fsq.MappingType.SYMMETRIC), (torch.uint8, fsq.MappingType.ASYMMETRIC)]
    kinds.append((torch.float8_e4m3fn, fsq.MappingType.SYMMETRIC))
    dtype, mapping = draw(st.sampled_from(kinds))
    value = draw(st.floats(2.0**-12, 2.0**12, width=32)) * draw(st.sampled_from([1.0, -1.0]))
    granularity = draw(st.sampled_from([fsq.PerTensor(), fsq.PerAxis(-1)]))
    return {
        "spec": fsq.QuantSpec(dtype, granularity, mapping=mapping, observer=observer),
        "batches": (torch.tensor([value]),),
    }


def _row_cases(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    """Return a few fixed cases, one for each kind of format and mapping."""
    kinds = [
        (torch.int8, fsq.MappingType.SYMMETRIC),
        (torch.uint8, fsq.MappingType.ASYMMETRIC),
        (torch.float8_e4m3fn, fsq.MappingType.SYMMETRIC),
    ]
    specs = [fsq.QuantSpec(dtype, fsq.PerAxis(0), mapping=mapping, observer=observer) for dtype, mapping in kinds]
    return st.sampled_from([{"spec": spec, "columns": 200} for spec in specs])


def _compiled_cases(observer: Observer) -> SearchStrategy[dict[str, Any]]:
    """Return a few fixed cases: a compilation takes too long for drawn ones."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 6, generator=generator)
    x[0, 0, 0] = -0.0
    return st.sampled_from(
        [
            {
                "spec": fsq.QuantSpec(
                    torch.uint8, fsq.PerAxis(-1), mapping=fsq.MappingType.ASYMMETRIC, observer=observer
                ),
                "batches": tuple(x),
                "backend": "inductor",
            },
            {
                "spec": fsq.QuantSpec(torch.int8, fsq.PerGroup(3), observer=observer),
                "batches": tuple(x.to(torch.bfloat16)),
                "backend": "aot_eager",
            },
            {
                "spec": fsq.QuantSpec(torch.float8_e4m3fn, fsq.PerTensor(), observer=observer),
                "batches": tuple(x.transpose(1, 2)),
                "dtype": torch.float64,
                "backend": "aot_eager",
            },
        ]
    )


LAWS: Final[Mapping[str, Law]] = MappingProxyType(
    {
        law.holds.__name__: law
        for law in (
            Law(merge_is_a_commutative_monoid, _nonfinite_cases),
            Law(observe_is_a_homomorphism, _nonfinite_cases),
            Law(masked_values_do_not_count, _masked_cases),
            Law(observe_is_pure, _nonfinite_cases),
            Law(vmap_equals_loop, _nonfinite_cases),
            Law(compiled_equals_eager, _compiled_cases, max_examples=3),
            Law(round_trips, _nonfinite_cases),
            Law(zero_is_exact, cases),
            Law(codes_in_range_idempotent_monotone, cases),
            Law(scale_equivariance, _exponent_cases),
            Law(granularities_agree, cases),
            Law(qparams_ignore_splits, cases),
            Law(large_is_its_pieces, _large_cases, max_examples=6),
            Law(unfit_states_are_faulty, cases),
            Law(a_constant_is_represented, _constant_cases),
            Law(each_block_is_represented, _row_cases, max_examples=3),
        )
    }
)
"""Every law by its name, with the cases it is checked on; read-only."""


def check_observer(observer: Observer, *, max_examples: int = 100) -> None:
    """Check every law on an observer.

    Cases are drawn from a fixed seed: two runs check the same. Nothing is printed, no example is stored, and no
    test runner is needed. hypothesis itself keeps constants of the sources that it read in `.hypothesis` of the
    working directory, or in the folder that the environment variable HYPOTHESIS_STORAGE_DIRECTORY names.

    Args:
        observer: the observer under test. Its class is importable, as pickle asks.
        max_examples: number of cases for each law.

    Raises:
        AssertionError: at least one law does not hold. The message names each, with the smallest
            case that was found, as a call, and what was wrong.

    Example:
        >>> check_observer(fsq.MinMax(), max_examples=5)
    """
    failures = {}
    for name, law in LAWS.items():
        try:
            check_law(law, observer, max_examples=max_examples)
        except AssertionError as error:
            failures[name] = str(error)
    if failures:
        text = "\n\n".join(failures.values())
        raise AssertionError(f"{observer!r} fails {len(failures)} of {len(LAWS)} laws: {', '.join(failures)}\n\n{text}")
