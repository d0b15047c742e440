"""Rank settings by a score, with intervals and tests against the best one, corrected for the number of tests.

What a score is known by decides its interval and its test:

- answers to the same questions, of several seeds: seeds and questions are both samples (`graft.evaluation.comparison.pooled`);
- answers of one seed: Wilson's interval, and McNemar's exact test;
- numbers of several seeds, such as losses: Student's t over the seeds, and the paired t-test where both sides have the same seeds;
- counts alone, as in tables of others: Wilson's interval, and Fisher's exact test;
- one number: neither.

The tests against the best are corrected by Holm's step-down method (Holm 1979), which holds under any dependence between them. The best is
chosen by the same scores, so its own advantage is overestimated: a p-value below 0.05 is the least that can be asked, not a proof.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graft.errors import require
from graft.evaluation.comparison import paired, pooled
from graft.evaluation.statistics import wilson


@dataclass(frozen=True)
class Entry:
    """One setting with its scores."""

    name: str
    scores: tuple[float, ...]
    """One per seed."""
    seeds: tuple[int, ...] = ()
    """The seed of each score, where they are known."""
    answers: tuple[tuple[bool, ...], ...] | None = None
    """Per seed, whether each question was answered correctly."""
    counts: tuple[int, int] | None = None
    """(correct, questions), where nothing else is known."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Whatever else the report says of it."""

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Ranked:
    """An entry with its place."""

    rank: int
    entry: Entry
    interval: tuple[float, float] | None
    spread: float | None
    """Standard deviation over the seeds."""
    difference: float | None
    """Its score less the best one's; None for the best."""
    p_value: float | None
    p_holm: float | None
    test: str | None


def rank(entries: Sequence[Entry], high: bool) -> list[Ranked]:
    """Rank entries, best first. high: whether a higher score is better."""
    order = sorted(entries, key=lambda each: -each.mean if high else each.mean)
    if not order:
        return []
    best = order[0]
    tests = [tested_against(best, each) for each in order[1:]]
    corrected = iter(holm([p for p, _ in tests if p is not None]))
    found = [Ranked(1, best, interval(best), _spread(best), None, None, None, None)]
    for place, (entry, (p_value, name)) in enumerate(zip(order[1:], tests, strict=True), start=2):
        adjusted = next(corrected) if p_value is not None else None
        found.append(
            Ranked(place, entry, interval(entry), _spread(entry), entry.mean - best.mean, p_value, adjusted, name)
        )
    return found


def interval(entry: Entry, confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the bounds of an entry's mean score; None where one number is all that is known."""
    seeds = len(entry.scores)
    if entry.answers is not None and seeds > 1:
        low, high = pooled(np.array(entry.answers, dtype=float), confidence).interval
        questions = len(entry.answers[0])
        if low == high:  # all right or all wrong: no spread, but a share of finitely many questions
            return wilson(round(entry.mean * questions), questions, confidence)
        return max(0.0, low), min(1.0, high)
    if entry.answers is not None:
        return wilson(sum(entry.answers[0]), len(entry.answers[0]), confidence)
    if entry.counts is not None:
        return wilson(*entry.counts, confidence)
    if seeds < 2:
        return None
    reach = float(require("scipy.stats", "eval").t(seeds - 1).ppf(0.5 + confidence / 2)) * _error(entry.scores)
    return entry.mean - reach, entry.mean + reach


def tested_against(best: Entry, other: Entry) -> tuple[float | None, str | None]:
    """Return the two-sided p-value of no difference from the best, and the name of the test; None where there is none."""
    stats = require("scipy.stats", "eval")
    if best.answers is not None and other.answers is not None and len(best.answers[0]) == len(other.answers[0]):
        if len(best.answers) == len(other.answers) > 1:
            difference = np.array(other.answers, dtype=float) - np.array(best.answers, dtype=float)
            return pooled(difference).p_value, "seeds and questions, paired"
        if len(best.answers) == len(other.answers) == 1:
            return paired(best.answers[0], other.answers[0]).p_value, "McNemar"
    if best.counts is not None and other.counts is not None:
        table = [[correct, total - correct] for correct, total in (best.counts, other.counts)]
        return float(stats.fisher_exact(table).pvalue), "Fisher"
    if min(len(best.scores), len(other.scores)) < 2:
        return None, None
    if best.seeds == other.seeds and len(best.scores) == len(other.scores):
        differences = [b - a for a, b in zip(best.scores, other.scores, strict=True)]
        if max(differences) == min(differences):  # no spread to judge by
            return (1.0 if differences[0] == 0 else None), "t, paired by seed"
        return float(stats.ttest_rel(other.scores, best.scores).pvalue), "t, paired by seed"
    return float(stats.ttest_ind(other.scores, best.scores, equal_var=False).pvalue), "Welch's t"


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's corrected p-values, in the order given: the k-th smallest of m times m - k + 1, and never below a smaller one's."""
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    found, least = [0.0] * len(p_values), 0.0
    for place, at in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[at]))
        found[at] = least
    return found


def pareto(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Return which points no other one beats: at least as small in every value, and smaller in one."""
    return [
        not any(all(b <= a for a, b in zip(one, other, strict=True)) and other != one for other in points)
        for one in points
    ]


def _spread(entry: Entry) -> float | None:
    return float(np.std(entry.scores, ddof=1)) if len(entry.scores) > 1 else None


def _error(scores: Sequence[float]) -> float:
    return float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
