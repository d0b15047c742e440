"""Paired tests and pooled seeds, against SciPy's own and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graft.evaluation.comparison import mcnemar, paired, pooled

stats = pytest.importorskip("scipy.stats", reason="SciPy comes with graft-llm[eval]")


def test_mcnemars_exact_p_is_the_tails_of_a_fair_coin() -> None:
    """1 against 7: 2 * (C(8,0) + C(8,1)) / 2^8 = 18 / 256."""
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(18 / 256)
    assert mcnemar(0, 0) == 1.0 and mcnemar(4, 4) == 1.0
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)


def test_pairs_are_counted_and_their_difference_has_an_interval() -> None:
    first = [True] * 50 + [False] * 10 + [True] * 4 + [False] * 36
    second = [True] * 50 + [True] * 10 + [False] * 4 + [False] * 36
    found = paired(first, second)
    assert (found.both, found.only_first, found.only_second, found.total) == (50, 4, 10, 100)
    assert found.difference == pytest.approx(0.06)
    assert found.p_value == pytest.approx(sum(math.comb(14, k) for k in range(5)) * 2 / 2**14)
    # Normal approximation of the paired difference: variance (b + c - (b - c)^2 / n) / n^2.
    reach = 1.96 * math.sqrt(14 - 36 / 100) / 100
    assert found.interval == pytest.approx((0.06 - reach, 0.06 + reach), abs=0.01)


def test_the_same_answers_twice_differ_in_nothing() -> None:
    found = paired([True, False, True], [True, False, True])
    assert (found.difference, found.interval, found.p_value) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="2 and 1 were given"):
        paired([True, False], [True])


def test_seeds_that_all_agree_leave_the_t_interval_over_questions() -> None:
    questions = np.array([1.0, 0, 0, 1, 1, 0, 1, 1])
    found = pooled(np.stack([questions] * 3))
    reference = stats.ttest_1samp(questions, 0)
    low, high = reference.confidence_interval(0.95)
    assert found.interval == pytest.approx((low, high)) and found.p_value == pytest.approx(reference.pvalue)
    assert found.spread == 0.0 and found.per_seed == (0.625,) * 3


def test_questions_that_all_agree_leave_the_t_interval_over_seeds() -> None:
    seeds = np.array([0.2, 0.5, 0.35, 0.6])
    found = pooled(np.repeat(seeds[:, None], 50, 1))
    reference = stats.ttest_1samp(seeds, 0)
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert found.spread == pytest.approx(seeds.std(ddof=1)) and found.p_value == pytest.approx(reference.pvalue)


def test_the_pooled_interval_holds_the_truth_as_often_as_it_says() -> None:
    """True mean 0; seeds, questions and rest of comparable weight. Answers taken for independent would miss far more often."""
    rng = np.random.default_rng(0)
    hits, naive = 0, 0
    for _ in range(400):
        seeds, questions, rest = rng.normal(0, 0.3, (4, 1)), rng.normal(0, 1, (1, 40)), rng.normal(0, 1, (4, 40))
        values = seeds + questions + rest
        low, high = pooled(values).interval
        hits += low <= 0 <= high
        naive += abs(values.mean()) <= 1.96 * values.std(ddof=1) / math.sqrt(values.size)
    assert 0.91 <= hits / 400 <= 0.99
    assert naive / 400 < 0.80


def test_one_seed_is_not_several_and_equal_values_have_no_error() -> None:
    with pytest.raises(ValueError, match=r"two seeds.*shape \(1, 4\)"):
        pooled([[0, 1, 0, 1]])
    assert pooled([[0, 0], [0, 0]]).p_value == 1.0
    assert pooled([[1, 1], [1, 1]]).interval == (1.0, 1.0)
