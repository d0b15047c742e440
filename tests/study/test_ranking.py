"""Ranking: intervals and tests against algebra and SciPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from graft.study.report.importance import importance
from graft.study.report.ranking import Entry, holm, interval, pareto, rank


def test_holm_by_hand() -> None:
    # Sorted: 0.01 times 4, 0.02 times 3, 0.03 times 2 = 0.06 (not below 0.06), 0.5 times 1.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_losses_of_seeds_are_compared_in_pairs() -> None:
    first = Entry("a", (1.0, 1.2, 1.1), (0, 1, 2))
    second = Entry("b", (1.3, 1.45, 1.5), (0, 1, 2))
    best, other = rank([second, first], high=False)
    assert (best.entry.name, other.entry.name) == ("a", "b")
    differences = np.array(second.scores) - np.array(first.scores)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert other.p_value == pytest.approx(2 * stats.t(2).sf(abs(t)))
    reach = stats.t(2).ppf(0.975) * np.std(first.scores, ddof=1) / math.sqrt(3)
    assert interval(first) == pytest.approx((1.1 - reach, 1.1 + reach))


def test_answers_of_one_seed_are_compared_question_by_question() -> None:
    first = Entry("a", (0.75,), answers=((True, True, True, False),))
    second = Entry("b", (0.25,), answers=((True, False, False, False),))
    other = rank([first, second], high=True)[1]
    assert other.p_value == pytest.approx(stats.binomtest(2, 2, 0.5).pvalue)
    assert other.test == "McNemar"


def test_counts_alone_are_compared_by_fishers_test() -> None:
    entries = [Entry("a", (0.6,), counts=(60, 100)), Entry("b", (0.4,), counts=(40, 100))]
    other = rank(entries, high=True)[1]
    _, p_value = stats.fisher_exact([[60, 40], [40, 60]])
    assert other.p_value == pytest.approx(p_value)


def test_one_number_has_neither_interval_nor_test() -> None:
    best, other = rank([Entry("a", (1.0,), (0,)), Entry("b", (2.0,), (0,))], high=False)
    assert best.interval is None and other.p_value is None and other.p_holm is None


def test_all_wrong_is_not_certainty() -> None:
    found = interval(Entry("a", (0.0, 0.0), (0, 1), answers=((False,) * 20, (False,) * 20)))
    assert (
        found is not None
        and found[0] == 0
        and found[1] == pytest.approx(stats.norm.ppf(0.975) ** 2 / (20 + stats.norm.ppf(0.975) ** 2))
    )


def test_pareto_against_every_pair() -> None:
    points = [tuple(map(float, each)) for each in itertools.product(range(3), repeat=2)] + [(0.5, 0.5)]
    assert [point for point, kept in zip(points, pareto(points), strict=True) if kept] == [(0.0, 0.0)]
    assert pareto([(1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (1.0, 2.0)]) == [True, True, False, True]


def test_importance_is_the_variance_between_values() -> None:
    # Score = 3 * a + b on a full grid: between values of a, 9 var(a) of 9 var(a) + var(b).
    settings = [{"a": a, "b": b} for a in (0, 1) for b in (0, 1)]
    found = importance(settings, [3 * each["a"] + each["b"] for each in settings])
    assert list(found) == ["a", "b"] and found == pytest.approx({"a": 0.9, "b": 0.1})


def test_every_column_of_the_report_has_a_cell_and_empty_ones_are_left_out() -> None:
    from graft.study.report.words import COLUMNS, ranking_table

    text = {key: key for key in ("setting", "shown", "interval_shown", "p_shown", "parameters_shown")}
    numbers = {"rank": 1, "pareto": True, "trials": 3, "test_accuracy": 0.5, "tokens": 7, "seconds": 2.0}
    columns, (cells,) = ranking_table({"ranking": [{**text, **numbers, "forgetting": 0.25}]})
    assert tuple(columns) == COLUMNS
    wanted = {"test accuracy": "50.0%", "tokens": "7", "forgetting": "+0.250"}.items()
    assert wanted <= dict(zip(columns, cells, strict=True)).items()
    columns, _ = ranking_table({"ranking": [{**text, **numbers, "forgetting": None}]})
    assert tuple(columns) == COLUMNS[:-1]


def test_pissa_trains_as_many_values_as_lora() -> None:
    from graft.config import load_run
    from graft.study.memory import MemoryPredictor

    data = {"base": {"model": "seedling"}, "data": {"train": "x"}}
    counts = [
        MemoryPredictor().trained(load_run({**data, "adapter": {"kind": kind, "rank": 8, "sites": "linear"}}))
        for kind in ("lora", "pissa")
    ]
    assert counts == [151552, 151552]
