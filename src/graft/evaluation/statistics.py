"""How sure a score is: intervals of one score.

Wilson's interval for a proportion (Wilson 1927, JASA 22:209-212) is right also near 0 and 1. The bootstrap interval (Efron 1979,
percentile form, by SciPy) holds for any mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from graft.errors import require

RESAMPLES = 9999
_AT_ONCE = 2**20
"""Numbers of resamples that are held in memory together."""


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Lower and upper bound of the share of correct answers. Nothing measured, nothing known: (0, 1)."""
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
    """Lower and upper bound of the mean, by resampling the values. One value, or equal ones: they have no spread to resample.

    Reproducible: the same values and seed give the same bounds.
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
