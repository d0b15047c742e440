"""Metrics of classes and correlations, against their formulas."""

from __future__ import annotations

import math

import pytest

from graft.errors import GraftError
from graft.evaluation import tasks
from graft.evaluation.scoring import Output, output_protocol, score
from graft.evaluation.statistics import bootstrap_interval

pytest.importorskip("sklearn", reason="scikit-learn comes with graft-llm[eval]")


def scored(task: str, pairs: list[tuple[str, str]]) -> dict:
    chosen = tasks.get(task)
    return score(chosen, output_protocol("strict", chosen), [Output(text, gold) for gold, text in pairs])


def test_matthews_correlation_is_its_formula() -> None:
    """tp 3, tn 2, fp 1, fn 2: (6 - 2) / sqrt(4 * 5 * 3 * 4)."""
    yes, no = "acceptable", "unacceptable"
    pairs = [(yes, yes)] * 3 + [(no, no)] * 2 + [(no, yes)] + [(yes, no)] * 2
    found = scored("cola", pairs)
    assert found["matthews"] == pytest.approx(4 / math.sqrt(240))
    assert (found["correct"], found["total"], found["accuracy"]) == (5, 8, 5 / 8)


def test_f1_is_that_of_the_second_class_and_what_cannot_be_read_is_not_right() -> None:
    """tp 2, fp 1, fn 1 + 1 unreadable: 4 / (4 + 1 + 2)."""
    yes, no = "equivalent", "not equivalent"
    found = scored("mrpc", [(yes, yes), (yes, yes), (no, yes), (yes, no), (yes, "who knows"), (no, no)])
    assert found["f1"] == pytest.approx(4 / 7)
    assert found["unextractable"] == 1 and found["correct"] == 3


def test_classes_of_ones_own_are_compared_as_whole_texts_and_averaged() -> None:
    """F1 of a: 2 / 3, of b: 0, of c: 1."""
    found = scored("classification", [("a", "A "), ("b", "a"), ("c", "c.")])
    assert found["f1"] == pytest.approx((2 / 3 + 0 + 1) / 3) and found["correct"] == 2


def test_correlations_are_those_of_the_numbers_and_need_some() -> None:
    """x = 1 2 3 4, y = 1 2 3 8: Pearson 11 / sqrt(5 * 29), Spearman 1."""
    found = scored("stsb", [("1", "1"), ("2", "it is 2.0"), ("3", "3"), ("4", "8"), ("5", "none")])
    assert found["pearson"] == pytest.approx(11 / math.sqrt(5 * 29)) and found["spearman"] == pytest.approx(1)
    assert found["unextractable"] == 1 and "accuracy" not in found
    assert scored("stsb", [("1", "3"), ("2", "3")])["pearson"] is None


def test_bleu_of_one_output_is_that_of_its_formula() -> None:
    """5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples, equal lengths."""
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with graft-llm[eval]")
    task = tasks.get("e2e")
    output = Output("The cat sat on the mat", "", references=("the cat sat on my mat", "a dog"))
    found = score(task, output_protocol("bleu", task), [output])
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25) and found["interval"] is None


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(GraftError, match="nothing to score for 'gsm8k'"):
        scored("gsm8k", [])


def test_the_bootstrap_of_a_proportion_is_the_binomial() -> None:
    """Resampling zeros and ones draws from the binomial distribution, whose quantiles SciPy has in closed form."""
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with graft-llm[eval]")
    values = [True] * 70 + [False] * 130
    low, high = stats.binom.ppf([0.025, 0.975], 200, 0.35) / 200
    assert bootstrap_interval(values) == pytest.approx((low, high), abs=0.006)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval([1.0]) == (1.0, 1.0) and bootstrap_interval([0.0, 0.0]) == (0.0, 0.0)
    with pytest.raises(ValueError, match="list of values"):
        bootstrap_interval([])
