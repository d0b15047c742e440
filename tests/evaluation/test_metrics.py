"""Scores of resampled answers against the libraries on the same resampled answers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graft.evaluation.metrics import accuracy, all_places, bleu, f1, matthews, pearson, spearman

sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with graft-llm[eval]")
stats = pytest.importorskip("scipy.stats", reason="SciPy comes with graft-llm[eval]")
sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu comes with graft-llm[eval]")

TOTAL = 40


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_a_share_counts_answers_as_often_as_they_are_named() -> None:
    assert accuracy([True, False, False, True])(np.array([0, 0, 1, 3])) == 0.75


@pytest.mark.parametrize("labels", [("no", "Yes"), ("A", "b", "C")])
def test_class_scores_are_those_of_scikit_learn_on_any_resample(
    labels: tuple[str, ...], rng: np.random.Generator
) -> None:
    gold = [str(rng.choice(labels)) for _ in range(TOTAL)]
    given = [None if rng.random() < 0.1 else str(rng.choice(labels)).lower() for _ in range(TOTAL)]
    for places in (all_places(TOTAL), *(rng.integers(TOTAL, size=TOTAL) for _ in range(20))):
        right = [gold[place].lower() for place in places]
        said = [given[place] or "(none)" for place in places]
        counted = ["yes"] if len(labels) == 2 else sorted({each.lower() for each in gold})
        options = {"labels": counted, "average": "macro", "zero_division": 0}
        assert f1(gold, given, labels)(places) == pytest.approx(sklearn.f1_score(right, said, **options))
        assert matthews(gold, given, labels)(places) == pytest.approx(sklearn.matthews_corrcoef(right, said))


def test_equal_answers_correlate_with_nothing() -> None:
    assert matthews(["a", "b"], ["a", "a"], ())(all_places(2)) == 0.0
    assert math.isnan(pearson([1.0, 2.0], [3.0, 3.0])(all_places(2)))
    assert math.isnan(spearman([1.0, 2.0, 3.0], [None, 3.0, None])(all_places(3)))


def test_correlations_are_those_of_scipy_over_the_answers_that_hold_a_number(rng: np.random.Generator) -> None:
    gold = rng.integers(0, 6, TOTAL).astype(float).tolist()  # with equal ranks
    given = [None if rng.random() < 0.2 else value + float(rng.normal()) for value in gold]
    for places in (all_places(TOTAL), *(rng.integers(TOTAL, size=TOTAL) for _ in range(20))):
        pairs = [(gold[place], given[place]) for place in places if given[place] is not None]
        for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
            assert ours(gold, given)(places) == pytest.approx(theirs(*zip(*pairs, strict=True)).statistic)


def test_bleu_of_a_resample_is_sacrebleus_of_the_same_outputs(rng: np.random.Generator) -> None:
    words = ["the", "a", "river", "stands", "by", "cheap", "coffee", "shop", "near", "city", "centre", "and"]

    def text() -> str:
        return " ".join(rng.choice(words, int(rng.integers(1, 12))))

    references = [tuple(text() for _ in range(int(rng.integers(1, 4)))) for _ in range(TOTAL)]
    texts = [f"{own[0]} {text()}" if rng.random() < 0.9 else "" for own in references]
    score = bleu(texts, references)
    metric = sacrebleu.BLEU(lowercase=True, tokenize="13a")
    for places in (all_places(TOTAL), *(rng.integers(TOTAL, size=TOTAL) for _ in range(5))):
        streams = [[dict(enumerate(references[at])).get(number) for at in places] for number in range(3)]
        assert score(places) == pytest.approx(metric.corpus_score([texts[at] for at in places], streams).score)
