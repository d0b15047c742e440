"""Fast scores of resampled answers, for bootstrap intervals.

Each function returns a `Statistic`, which maps the places of the answers in a resample to their score. F1, Matthews, the
correlations and BLEU are not means over answers, so their bootstrap has to score a thousand resamples. Therefore class
metrics are computed from a confusion matrix (Matthews for several classes: Gorodkin 2004, Comput. Biol. Chem. 28:367),
Spearman as Pearson of ranks, and BLEU from the sums of sacrebleu's n-gram counts per output. The reported score itself comes
from the library (`scoring`).

Legend: N answers, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.errors import require
from graft.evaluation.answers import normalised

Places = NDArray[np.integer]
"""Indices of the answers that are counted, in any order and with repetition: [0, 0, 2] counts the first answer twice."""
Statistic = Callable[[Places], float]
"""Returns the score of the answers at these places; nan if it is undefined."""

NOTHING = "(none)"
"""Stands for the class of an output in which no class was found. It is never right."""


def accuracy(right: Sequence[bool]) -> Statistic:
    """Return the statistic: share of right answers."""
    right_N = np.asarray(right, dtype=float)
    return lambda places: float(right_N[places].mean())


def f1(gold: Sequence[str], given: Sequence[str | None], labels: Sequence[str]) -> Statistic:
    """Return the statistic: F1 of the second of two classes, as in GLUE; else the mean F1 over the classes that occur."""
    count, names = _classes(gold, given)
    wanted = [names.index(name) for name in counted_classes(gold, labels) if name in names]

    def score(places: Places) -> float:
        table_CC = count(places)
        both_C = (table_CC.sum(0) + table_CC.sum(1))[wanted]
        right_C = 2 * table_CC.diagonal()[wanted]
        return float(np.divide(right_C, both_C, out=np.zeros(len(wanted)), where=both_C > 0).mean()) if wanted else 0.0

    return score


def counted_classes(gold: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the classes that F1 averages over, in the form in which they are compared."""
    return [normalised(labels[1])] if len(labels) == 2 else sorted(set(map(normalised, gold)))


def matthews(gold: Sequence[str], given: Sequence[str | None], labels: Sequence[str]) -> Statistic:
    """Return the statistic: Matthews correlation of the right and the given classes; 0 if one of them does not vary."""
    count, _ = _classes(gold, given)

    def score(places: Places) -> float:
        table_CC = count(places)
        total, said_C, right_C = table_CC.sum(), table_CC.sum(0), table_CC.sum(1)
        spread = float(total**2 - said_C @ said_C) * float(total**2 - right_C @ right_C)
        return float(table_CC.trace() * total - said_C @ right_C) / math.sqrt(spread) if spread else 0.0

    return score


def pearson(gold: Sequence[float], given: Sequence[float | None]) -> Statistic:
    """Return the statistic: Pearson correlation over the answers that hold a number; nan for too few or equal numbers."""
    return _correlation(gold, given, lambda values: values)


def spearman(gold: Sequence[float], given: Sequence[float | None]) -> Statistic:
    """Return the statistic: Spearman correlation, which is `pearson` of ranks."""
    return _correlation(gold, given, require("scipy.stats", "eval").rankdata)


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """Return the statistic: BLEU of the whole set in percent. texts: the outputs. references: all right texts of each."""
    counter = bleu_metric(effective_order=True)  # scores single outputs, of which only the n-gram counts are used
    scores = [counter.sentence_score(text.strip(), list(own)) for text, own in zip(texts, references, strict=True)]
    lengths_N2 = np.array([(each.sys_len, each.ref_len) for each in scores])
    counts_N = np.array([each.counts for each in scores])
    totals_N = np.array([each.totals for each in scores])

    def score(places: Places) -> float:
        written, wanted = lengths_N2[places].sum(0).tolist()
        counts, totals = counts_N[places].sum(0).tolist(), totals_N[places].sum(0).tolist()
        return float(counter.compute_bleu(counts, totals, written, wanted, smooth_method="exp").score)

    return score


def bleu_metric(**options: Any) -> Any:
    """Return sacrebleu's metric with the settings of the protocol `bleu`: lower case, tokenizer 13a."""
    return require("sacrebleu", "eval").BLEU(lowercase=True, tokenize="13a", **options)


def all_places(total: int) -> Places:
    """Return the places of all answers, each once."""
    return np.arange(total)


CLASS_METRICS = {"f1": f1, "matthews": matthews}
CORRELATIONS = {"pearson": pearson, "spearman": spearman}


def compared(names: Sequence[str | None]) -> list[str]:
    """Return the classes in the form in which they are compared, without case and superfluous white space."""
    return [NOTHING if each is None else normalised(each) for each in names]


def _classes(gold: Sequence[str], given: Sequence[str | None]) -> tuple[Callable[[Places], NDArray[Any]], list[str]]:
    """Return a function from places to the confusion matrix [C (right), C (given)], and the names of the classes."""
    right, predicted = compared(gold), compared(given)
    names = sorted({*right, *predicted})
    number, size = {name: place for place, name in enumerate(names)}, len(names)
    # Number the cells of the matrix, so that one bincount of an answer's cell fills it.
    cells_N = np.array([number[a] * size + number[b] for a, b in zip(right, predicted, strict=True)])
    return lambda places: np.bincount(cells_N[places], minlength=size**2).reshape(size, size), names


def _correlation(
    gold: Sequence[float], given: Sequence[float | None], form: Callable[[NDArray[Any]], NDArray[Any]]
) -> Statistic:
    gold_N = np.array(gold, dtype=float)
    given_N = np.array([np.nan if each is None else each for each in given], dtype=float)

    def score(places: Places) -> float:
        held = places[~np.isnan(given_N[places])]
        sides = gold_N[held], given_N[held]
        varied = held.size > 1 and all(bool((side != side[0]).any()) for side in sides)
        return float(np.corrcoef(form(sides[0]), form(sides[1]))[0, 1]) if varied else float("nan")

    return score
