"""Paired tests and pooled seeds, against SciPy's own and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graft.evaluation.comparison import mcnemar, paired, pooled, pooled_scores, resampled
from graft.evaluation.metrics import accuracy, bleu, pearson

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


def test_a_score_that_is_a_mean_has_the_interval_and_p_of_means() -> None:
    """Paired differences of mean 0.2 and deviation 0.6 over 100 questions: t-test and normal interval."""
    rng = np.random.default_rng(1)
    first, second = rng.random(100) < 0.4, rng.random(100) < 0.6
    found = resampled(accuracy(list(first)), accuracy(list(second)), 100)
    values = second.astype(float) - first.astype(float)
    reference = stats.ttest_1samp(values, 0)
    assert found.difference == pytest.approx(values.mean())
    assert found.interval == pytest.approx(tuple(reference.confidence_interval(0.95)), abs=0.02)
    assert found.p_value == pytest.approx(reference.pvalue, abs=0.01)


def test_the_difference_of_bleu_is_as_sure_as_sacrebleus_randomization_says() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu comes with graft-llm[eval]")
    from sacrebleu.significance import PairedTest

    rng = np.random.default_rng(0)
    words = ["the", "a", "river", "stands", "by", "cheap", "coffee", "shop", "near", "city", "centre", "and"]
    references = [" ".join(rng.choice(words, 12)) for _ in range(60)]

    def noisy(share_of_words: float) -> list[str]:
        return [
            " ".join(str(rng.choice(words)) if rng.random() < share_of_words else word for word in text.split())
            for text in references
        ]

    systems = [("first", noisy(0.3)), ("second", noisy(0.25))]
    metric = sacrebleu.BLEU(lowercase=True, tokenize="13a")
    _, scores = PairedTest(systems, {"BLEU": metric}, [references], "ar", n_samples=2000)()
    theirs = scores["BLEU"]
    found = resampled(*(bleu(texts, [(each,) for each in references]) for _, texts in systems), 60)
    assert found.difference == pytest.approx(theirs[1].score - theirs[0].score, abs=1e-6)
    assert 0.02 < theirs[1].p_value < 0.98 and found.p_value == pytest.approx(theirs[1].p_value, abs=0.05)
    low, high = found.interval or (1, 0)
    assert low < found.difference < high


def test_seeds_pooled_by_resampling_are_those_pooled_by_their_squares() -> None:
    rng = np.random.default_rng(5)
    questions = rng.normal(0, 0.6, 120)
    first, second = (
        [questions + seed + rng.normal(0, 0.8, 120) + shift > 0 for seed in rng.normal(0, 0.1, 4)]
        for shift in (0.0, 0.4)
    )
    exact = pooled([b.astype(float) - a.astype(float) for a, b in zip(first, second, strict=True)])
    found = pooled_scores([accuracy(list(each)) for each in first], [accuracy(list(each)) for each in second], 120)
    assert (found.mean, found.per_seed, found.spread) == (
        pytest.approx(exact.mean), pytest.approx(exact.per_seed), pytest.approx(exact.spread),
    )  # fmt: skip
    assert found.error == pytest.approx(exact.error, rel=0.1)
    assert found.interval == pytest.approx(exact.interval, abs=0.02)


def test_scores_that_do_not_exist_are_not_resampled() -> None:
    nothing = pearson([1.0, 2.0, 3.0], [None, None, 1.0])
    assert resampled(nothing, nothing, 3).interval is None
    with pytest.raises(ValueError, match="do not exist"):
        pooled_scores([nothing] * 2, [nothing] * 2, 3)
    with pytest.raises(ValueError, match="at least two seeds"):
        pooled_scores([nothing], [nothing], 3)
