"""How far two lists of log-probabilities are apart."""

from __future__ import annotations

from collections.abc import Sequence

MOST = 10.0
"""A difference counts as at most this, in nats, so that no single token decides."""
Scores = Sequence[Sequence[float]]


def distance(first: Scores, second: Scores) -> float:
    """Return the mean difference of log-probabilities in nats over all tokens; infinity where the numbers of tokens differ."""
    if [len(each) for each in first] != [len(each) for each in second]:
        return float("inf")
    apart = [
        min(abs(a - b), MOST) for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    ]
    return sum(apart) / len(apart) if apart else float("inf")
