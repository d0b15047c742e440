"""Confidence intervals of a single score.

Wilson's interval for a proportion (Wilson 1927, JASA 22:209-212) also holds near 0 and 1. The bootstrap interval (Efron 1979,
percentile form) is for any score: SciPy computes it for means; other scores are computed again for every resample.

Legend: R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from graft.errors import require
from graft.evaluation.metrics import Places, Statistic

RESAMPLES, RESAMPLES_OF_SCORES = 9999, 1000
"""Number of resamples of means, and of other scores, of which each takes about a millisecond."""
_AT_ONCE = 2**20
"""Most resampled values that are in memory at the same time."""


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the lower and upper bound of the share of correct answers. Without any answers these are 0 and 1."""
    if not 0 <= correct <= total or not 0 < confidence < 1:
        raise ValueError(f"{correct} correct of {total} at confidence {confidence} is not a proportion")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, square = correct / total, z * z / total
    centre = share + square / 2
    spread = math.sqrt(square * (share * (1 - share) + square / 4))
    low, high = (centre - spread) / (1 + square), (centre + spread) / (1 + square)
    return (low if correct else 0.0), (high if correct < total else 1.0)


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Return the lower and upper bound of the mean by resampling the values. Both are the mean if all values are equal.

    The same values and seed give the same bounds.
    """
    sample = np.asarray(values, dtype=float)
    if sample.ndim != 1 or not sample.size:
        raise ValueError(f"a bootstrap needs a list of values; given an array of shape {sample.shape}")
    if (sample == sample[0]).all():
        return float(sample[0]), float(sample[0])
    found = require("scipy.stats", "eval").bootstrap(
        (sample,), np.mean, vectorized=True, n_resamples=resamples, batch=max(1, _AT_ONCE // sample.size),
        confidence_level=confidence, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def score_interval(score: Statistic, total: int, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the lower and upper bound of a score of `total` answers.

    Resamples in which the score is undefined are left out. None: it is undefined in all of them.
    """
    return percentiles([score(places) for places in resamples(total)], confidence)


def resamples(total: int, seed: int = 0) -> Iterator[Places]:
    """Yield resamples: the places of `total` answers drawn with repetition. The same total and seed give the same resamples."""
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES_OF_SCORES):
        yield rng.integers(total, size=total)


def percentiles(values_R: ArrayLike, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the bounds of the central share of the values, leaving out nan; None if all are nan."""
    found = np.asarray(values_R, dtype=float)
    found = found[~np.isnan(found)]
    if not found.size:
        return None
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
