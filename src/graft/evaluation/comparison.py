"""Is one model better than another? Both answered the same questions, so each question is compared with itself.

- One run each: McNemar's test in its exact form (McNemar 1947, Psychometrika 12:153-157): of the questions that only one of
  them answered rightly, is the split that of a fair coin? The interval of the difference is a paired bootstrap.
- Several seeds each: seeds and questions are both samples. The variance of the grand mean in a crossed design of S seeds and
  N questions is (MS_seeds + MS_questions - MS_rest) / (S N), with Satterthwaite's degrees of freedom (Biometrics 2:110-114,
  1946). Pooling all answers as if they were independent would make intervals far too narrow.

Legend: S seeds, N questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from graft.errors import require
from graft.evaluation.statistics import bootstrap_interval


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions; differences are second minus first."""

    total: int
    both: int
    """Questions that both answered rightly."""
    only_first: int
    only_second: int
    difference: float
    """Of the accuracies."""
    interval: tuple[float, float]
    p_value: float
    """Two-sided, of no difference."""


def paired(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> Paired:
    """Compare answers question by question. Raises `ValueError` for lists of unequal length, and for empty ones."""
    if len(first) != len(second) or not first:
        raise ValueError(f"paired answers are needed: {len(first)} and {len(second)} were given")
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
    """Two-sided p of as unequal a split. Without a question that tells them apart it is 1."""
    apart = only_first + only_second
    if not apart:
        return 1.0
    return float(require("scipy.stats", "eval").binomtest(only_first, apart, 0.5).pvalue)


@dataclass(frozen=True)
class Pooled:
    """The mean over seeds and questions."""

    mean: float
    per_seed: tuple[float, ...]
    spread: float
    """Standard deviation between the seeds' means."""
    error: float
    """Standard error of the mean, for new seeds and new questions."""
    interval: tuple[float, float]
    p_value: float
    """Two-sided, of a mean of zero: of no difference, where the values are differences."""


def pooled(values: ArrayLike, confidence: float = 0.95) -> Pooled:
    """Pool scores [S, N] of several seeds on the same questions, or their differences.

    Raises `ValueError` for fewer than two seeds or questions: there is then no spread to learn from.
    """
    values_SN = np.asarray(values, dtype=float)
    if values_SN.ndim != 2 or min(values_SN.shape) < 2:
        raise ValueError(f"at least two seeds and two questions are needed; given an array of shape {values_SN.shape}")
    num_seeds, num_questions = values_SN.shape
    mean, seeds_S, questions_N = values_SN.mean(), values_SN.mean(1), values_SN.mean(0)
    rest_SN = values_SN - seeds_S[:, None] - questions_N + mean
    free_S, free_N = num_seeds - 1, num_questions - 1
    by_seed = num_questions * seeds_S.var(ddof=1)
    by_question = num_seeds * questions_N.var(ddof=1)
    rest = (rest_SN**2).sum() / (free_S * free_N)
    # The estimate can fall below what either factor alone says, which it never does in truth.
    square = max(by_seed + by_question - rest, by_seed, by_question)
    error = math.sqrt(square / values_SN.size)
    if error == 0:
        same = float(mean)
        return Pooled(same, (same,) * num_seeds, 0.0, 0.0, (same, same), 0.0 if same else 1.0)
    free = square**2 / (by_seed**2 / free_S + by_question**2 / free_N + rest**2 / (free_S * free_N))
    t = require("scipy.stats", "eval").t(free)
    reach = float(t.ppf(0.5 + confidence / 2)) * error
    return Pooled(
        mean=float(mean),
        per_seed=tuple(map(float, seeds_S)),
        spread=float(seeds_S.std(ddof=1)),
        error=error,
        interval=(float(mean) - reach, float(mean) + reach),
        p_value=float(2 * t.sf(abs(mean) / error)),
    )
