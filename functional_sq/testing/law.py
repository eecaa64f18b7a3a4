"""A law with its cases, and the search for the smallest case where it does not hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from functional_sq.testing.assertions import as_text

__all__ = ["Law", "check_law"]

_PHASES: Final = (Phase.generate, Phase.shrink)


@dataclass(frozen=True)
class Law:
    """A law and how to draw its arguments.

    Attributes:
        holds: the function that raises AssertionError where the law does not hold.
        cases: from what is under test, an observer or a backend, to the strategy of the keyword arguments of `holds`.
        max_examples: limit on the number of cases, for a law that is slow to check.

    Example: see `check_law`.
    """

    holds: Callable[..., None]
    cases: Callable[[Any], SearchStrategy[dict[str, Any]]]
    max_examples: int | None = None


def check_law(law: Law, subject: Any, *, max_examples: int = 100) -> None:
    """Check one law, such as those of `LAWS`, on an observer or a backend.

    Args:
        law: the law, with its cases.
        subject: the observer, or what else the law is of.
        max_examples: number of cases to draw.

    Raises:
        AssertionError: the law does not hold; the message has the smallest case that was found, as
            a call, and what was wrong.

    Example:
        >>> import functional_sq as fsq
        >>> from functional_sq.testing import LAWS
        >>> check_law(LAWS["zero_is_exact"], fsq.MinMax(), max_examples=5)
    """
    failures: list[tuple[dict[str, Any], Exception]] = []

    @settings(
        max_examples=min(max_examples, law.max_examples or max_examples),
        derandomize=True,
        database=None,
        deadline=None,
        phases=_PHASES,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    @given(law.cases(subject))
    def run(case: dict[str, Any]) -> None:
        try:
            law.holds(**case)
        except Exception as error:
            failures.append((case, error))
            raise

    try:
        run()
    except Exception as error:
        # Whatever a law raises is a failure of what it is of, and one that comes and goes (Flaky) is
        # too. What the strategies raise is none and goes on as it is.
        if not failures or not (isinstance(error, Flaky) or error is failures[-1][1]):
            raise
        smallest = failures[-1][0]  # hypothesis runs it last
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        arguments = "".join(f"    {name}={as_text(value)},\n" for name, value in smallest.items())
        raise AssertionError(f"{law.holds.__name__}(\n{arguments})\n{kind}{error}") from error
