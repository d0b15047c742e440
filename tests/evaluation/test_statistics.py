"""Intervals against SciPy's."""

from __future__ import annotations

import pytest

from graft.evaluation.statistics import wilson


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (1, 10), (7, 13), (10, 10), (0, 1), (523, 1319)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_wilsons_interval_is_scipys(correct: int, total: int, confidence: float) -> None:
    scipy = pytest.importorskip("scipy.stats", reason="SciPy comes with graft-llm[eval]")
    reference = scipy.binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert wilson(correct, total, confidence) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_half_of_a_hundred_lies_between_40_and_60_percent() -> None:
    """z = 1.95996: 0.5 -+ z sqrt(0.25 / n + z^2 / 4 n^2) / (1 + z^2 / n) = 0.40383, 0.59617."""
    assert wilson(50, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


def test_nothing_measured_is_nothing_known_and_nonsense_is_refused() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(3, 2)
