"""Every law on every observer. A new observer joins with one row."""

from __future__ import annotations

import pytest

import functional_sq as fsq
from functional_sq.testing import LAWS, Law, check_law

OBSERVERS = (
    fsq.MinMax(),
    fsq.Fixed(-1.0, 2.0),
    fsq.MovingAverage(0.1),
    fsq.MovingAverage(1.0),
    fsq.MeanRange(),
    fsq.SkipNonfinite(fsq.MinMax()),
    fsq.SkipNonfinite(fsq.Fixed(-1.0, 2.0)),
    fsq.SkipNonfinite(fsq.MovingAverage(0.3)),
    fsq.Histogram(),
    fsq.Percentile(99.0),
    fsq.Mse(),
    fsq.Entropy(),
)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
def test_law_holds(observer: fsq.Observer, law: Law) -> None:
    check_law(law, observer, max_examples=25)
