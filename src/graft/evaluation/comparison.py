"""Paired statistics for the question whether one model is better than another that answered the same questions.

- Accuracy, one run each: McNemar's exact test (McNemar 1947, Psychometrika 12:153-157). It takes the questions that only one
  of the two answered correctly and asks whether they split as a fair coin would. The interval of the difference comes from a
  paired bootstrap.
- Scores that are not means over questions (F1, Matthews, correlations, BLEU): a paired bootstrap. Both sides are scored on the
  same resampled questions. p is the share of resampled differences that are as far from their mean as the difference is from
  0 (the shift method: Noreen 1989; Koehn 2004, EMNLP, for BLEU).
- Several seeds each: seeds and questions are both samples. In a crossed design of S seeds and N questions the variance of
  the grand mean is (MS_seeds + MS_questions - MS_rest) / (S N), with Satterthwaite's degrees of freedom (Biometrics
  2:110-114, 1946). Treating all answers as independent would make the intervals far too narrow. For scores that are not
  means, the bootstrap over questions yields the same components: the variance of the mean over seeds is questions + rest / S,
  and that of a single seed is questions + rest.

Legend: S seeds, N questions, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from graft.errors import require
from graft.evaluation.metrics import Places, Statistic, all_places
from graft.evaluation.statistics import bootstrap_interval, percentiles, resamples

FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions; differences are second minus first."""

    total: int
    both: int
    """Questions that both models answered correctly."""
    only_first: int
    """Questions that only the first model answered correctly."""
    only_second: int
    difference: float
    """Difference of the accuracies."""
    interval: tuple[float, float]
    p_value: float
    """Two-sided p-value of the hypothesis that there is no difference."""


def paired(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> Paired:
    """Compare answers question by question; True is a correct answer. Raises `ValueError` for empty or unequally long lists."""
    if len(first) != len(second) or not first:
        raise ValueError(f"paired answers are needed, equally many of both: {len(first)} and {len(second)} were given")
    cells = [(bool(a), bool(b)) for a, b in zip(first, second, strict=True)]
    only_first, only_second = cells.count((True, False)), cells.count((False, True))
    return Paired(
        total=len(cells),
        both=cells.count((True, True)),
        only_first=only_first,
        only_second=only_second,
        difference=(only_second - only_first) / len(cells),
        interval=bootstrap_interval([float(b) - float(a) for a, b in cells], confidence),
        p_value=mcnemar(only_first, only_second),
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of a split that is at least as unequal. Without any differing answers it is 1."""
    total = only_first + only_second
    if not total:
        return 1.0
    return float(require("scipy.stats", "eval").binomtest(only_first, total, 0.5).pvalue)


@dataclass(frozen=True)
class Pooled:
    """The mean over seeds and questions with its uncertainty."""

    mean: float
    per_seed: tuple[float, ...]
    spread: float
    """Standard deviation of the seeds' means."""
    error: float
    """Standard error of the mean, for new seeds and new questions."""
    interval: tuple[float, float]
    p_value: float
    """Two-sided p-value of the hypothesis that the mean is zero, which means no difference if the values are differences."""


def pooled(values: ArrayLike, confidence: float = 0.95) -> Pooled:
    """Pool scores [S, N] of several seeds on the same questions, or their differences.

    Raises `ValueError` for fewer than two seeds or two questions, from which no variance can be estimated.
    """
    values_SN = np.asarray(values, dtype=float)
    if values_SN.ndim != 2 or min(values_SN.shape) < 2:
        raise ValueError(f"at least two seeds and two questions are needed; given an array of shape {values_SN.shape}")
    num_seeds, num_questions = values_SN.shape
    mean, seeds_S, questions_N = values_SN.mean(), values_SN.mean(1), values_SN.mean(0)
    # Two-way analysis of variance with one value per cell: the residual is what seed and question effects leave over.
    rest_SN = values_SN - seeds_S[:, None] - questions_N + mean
    free = (num_seeds - 1) * (num_questions - 1)
    by_question = questions_N.var(ddof=1) / num_questions
    return _crossed(seeds_S, num_questions, by_question, (rest_SN**2).sum() / free / values_SN.size, confidence)


def _crossed(seeds_S: FloatArray, num_questions: int, by_question: float, rest: float, confidence: float) -> Pooled:
    """Pool the scores of seeds in a crossed design.

    by_question, rest: components of the variance of their mean, MS_questions / (S N) and MS_rest / (S N).
    """
    mean, num_seeds = float(seeds_S.mean()), len(seeds_S)
    free_S, free_N = num_seeds - 1, num_questions - 1
    by_seed = seeds_S.var(ddof=1) / num_seeds
    # The estimated variance can fall below that of seeds or questions alone, though the true variance cannot.
    square = max(by_seed + by_question - rest, by_seed, by_question)
    error = math.sqrt(square)
    if error == 0:
        return Pooled(mean, (mean,) * num_seeds, 0.0, 0.0, (mean, mean), 0.0 if mean else 1.0)
    free = square**2 / (by_seed**2 / free_S + by_question**2 / free_N + rest**2 / (free_S * free_N))
    t = require("scipy.stats", "eval").t(free)
    reach = float(t.ppf(0.5 + confidence / 2)) * error
    return Pooled(
        mean=mean,
        per_seed=tuple(map(float, seeds_S)),
        spread=float(seeds_S.std(ddof=1)),
        error=error,
        interval=(mean - reach, mean + reach),
        p_value=float(2 * t.sf(abs(mean) / error)),
    )


@dataclass(frozen=True)
class Resampled:
    """The difference of two scores of whole sets of answers, second minus first, with its bootstrap interval."""

    difference: float
    interval: tuple[float, float] | None
    """Percentiles of the bootstrap; None if the score is undefined in all resamples."""
    p_value: float | None
    """Two-sided p-value of the hypothesis that there is no difference."""


def resampled(first: Statistic, second: Statistic, total: int, confidence: float = 0.95) -> Resampled:
    """Compare two scores of answers to the same questions. Resamples in which a score is undefined are left out."""
    everyone = all_places(total)
    difference = second(everyone) - first(everyone)
    found = np.array([second(places) - first(places) for places in resamples(total)])
    found = found[~np.isnan(found)]
    if not found.size:
        return Resampled(difference, None, None)
    # Shift the resampled differences to a mean of 0, the hypothesis, and count those as far from 0 as the observed one.
    # Adding 1 to both counts keeps p above 0.
    as_far = int((np.abs(found - found.mean()) >= abs(difference)).sum()) if difference else found.size
    return Resampled(difference, percentiles(found, confidence), (as_far + 1) / (found.size + 1))


def pooled_scores(
    first: Sequence[Statistic], second: Sequence[Statistic], total: int, confidence: float = 0.95
) -> Pooled:
    """Pool the differences of scores (second minus first) of several seeds on the same questions.

    Raises `ValueError` for fewer than two seeds, and for scores that are undefined in almost all resamples.
    """
    if len(first) != len(second) or len(first) < 2 or total < 2:
        raise ValueError(
            f"at least two seeds of each, and two questions, are needed; given {len(first)}, {len(second)}, {total}"
        )

    def differences(places: Places) -> list[float]:
        return [b(places) - a(places) for a, b in zip(first, second, strict=True)]

    found_RS = np.array([differences(places) for places in resamples(total)])
    found_RS = found_RS[~np.isnan(found_RS).any(1)]
    if len(found_RS) < 2:
        raise ValueError("the scores do not exist in resamples of these answers: too few answers, or all the same")
    # Var(mean over seeds) = questions + rest / S and Var(one seed) = questions + rest, so their difference divided by
    # S - 1 is rest / S.
    by_question = float(found_RS.mean(1).var(ddof=1))
    rest = max(0.0, (float(found_RS.var(0, ddof=1).mean()) - by_question) / (len(first) - 1))
    return _crossed(np.array(differences(all_places(total))), total, by_question, rest, confidence)
