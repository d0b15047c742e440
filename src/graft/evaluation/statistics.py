"""How sure a score is. Wilson's interval for a proportion (Wilson 1927, JASA 22:209-212): right also near 0 and 1."""

from __future__ import annotations

import math
from statistics import NormalDist


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
