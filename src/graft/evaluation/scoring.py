"""Score outputs against right answers, for `graft score` and for the results of benchmarks.

The kind of answer decides the scores. All of them have a bootstrap interval.

- Right or wrong: the number of correct outputs and the accuracy, also with Wilson's interval.
- Classes: besides these, F1 and Matthews correlation (scikit-learn).
- Numbers that are to be correlated: Pearson and Spearman (SciPy).
- Free text: BLEU (sacrebleu).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graft.errors import GraftError, require
from graft.evaluation import protocols
from graft.evaluation.answers import value_of
from graft.evaluation.metrics import (
    CLASS_METRICS,
    CORRELATIONS,
    Statistic,
    bleu,
    bleu_metric,
    compared,
    counted_classes,
)
from graft.evaluation.protocols import Judgement, OutputProtocol
from graft.evaluation.protocols.rank import Ranking
from graft.evaluation.statistics import bootstrap_interval, score_interval, wilson
from graft.evaluation.tasks import Task


@dataclass(frozen=True)
class Output:
    """The output of a model with the right answer."""

    text: str
    gold: str
    references: tuple[str, ...] = ()
    """All right texts, if answers are free text."""


def output_protocol(name: str, task: Task) -> OutputProtocol:
    """Return the protocol if it judges outputs. Raises `GraftError` for one that needs a model, and as `protocols.get` does."""
    protocol = protocols.get(name, task)
    if not isinstance(protocol, OutputProtocol):
        raise GraftError(
            f"protocol '{name}' scores the likelihood of choices, not outputs: run graft eval --protocol {name} with a model"
        )
    return protocol


def score(task: Task, protocol: OutputProtocol, outputs: Sequence[Output]) -> dict[str, Any]:
    """Judge and score outputs; the result names task and protocol too. Raises `GraftError` if there are no outputs."""
    judgements = [protocol.judge(task, output.gold, output.text) for output in outputs]
    return {
        "task": task.name,
        "protocol": protocol.name,
        "protocol_hash": protocol.digest(task),
        **summary(task, outputs, judgements),
    }


def summary(task: Task, outputs: Sequence[Output], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Score judged outputs as the task's kind of answer requires. Raises `GraftError` if there are none."""
    if not outputs:
        raise GraftError(f"there is nothing to score for '{task.name}'")
    return {"text": score_bleu, "score": score_correlations}.get(task.answer, score_correct)(task, outputs, judgements)


def require_libraries(task: Task) -> None:
    """Import the libraries that the score of a task needs, so that a missing one shows before an evaluation, not after it."""
    libraries = {"text": ["sacrebleu"], "score": ["scipy.stats"]}.get(task.answer, ["scipy.stats"])
    for library in [*libraries, *(["sklearn.metrics"] if set(task.metrics) & set(CLASS_METRICS) else [])]:
        require(library, "eval")


def score_correct(task: Task, outputs: Sequence[Output], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Count the correct outputs and compute the task's further metrics."""
    gold, given = [output.gold for output in outputs], [judgement.extracted for judgement in judgements]
    right, predicted = compared(gold), compared(given)
    found: dict[str, Any] = {}
    for name in task.metrics:
        library = require("sklearn.metrics", "eval")
        if name == "f1":
            wanted = counted_classes(gold, task.labels)
            found[name] = float(library.f1_score(right, predicted, labels=wanted, average="macro", zero_division=0))
        else:
            found[name] = float(library.matthews_corrcoef(right, predicted))
        found |= _interval(name, CLASS_METRICS[name](gold, given, task.labels), len(outputs))
    return {**_accuracy_scores(judgements), **found}


def _interval(name: str, score: Statistic, total: int) -> dict[str, Any]:
    """Return the entry with the bootstrap interval of a score; None if the score is undefined in all resamples."""
    found = score_interval(score, total)
    return {f"{name}_interval": None if found is None else list(found)}


def count_outcomes(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Count the outcomes, and return the counts with the accuracy and Wilson's interval."""
    found = Counter(judgement.outcome for judgement in judgements)
    correct, total = found["correct"], len(judgements)
    return {
        **{name: found[name] for name in ("correct", "wrong", "unextractable", "no_room")},
        "total": total,
        "accuracy": correct / total,
        "interval": list(wilson(correct, total)),
    }


def _accuracy_scores(judgements: Sequence[Judgement]) -> dict[str, Any]:
    right = [judgement.outcome == "correct" for judgement in judgements]
    return {**count_outcomes(judgements), "bootstrap_interval": list(bootstrap_interval(right))}


def majority(golds: Sequence[str]) -> dict[str, Any]:
    """Return the most frequent right answer and the accuracy of always giving it, to compare a classifier with."""
    label, count = Counter(golds).most_common(1)[0]
    return {"label": label, "accuracy": count / len(golds)}


def score_rankings(rankings: Sequence[Ranking]) -> dict[str, Any]:
    """Score choices that were ranked by likelihood: by their summed log-likelihood and, as `normalised`, by length."""
    return {
        **_accuracy_scores([each.raw for each in rankings]),
        "normalised": _accuracy_scores([each.normalised for each in rankings]),
    }


def score_correlations(task: Task, outputs: Sequence[Output], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Correlate the outputs that hold a number with the right ones; None if there are too few. Also count those without one."""
    gold = [float(output.gold) for output in outputs]
    given = [None if judgement.extracted is None else value_of(judgement.extracted) for judgement in judgements]
    pairs = [pair for pair in zip(gold, given, strict=True) if pair[1] is not None]
    varied = len(pairs) > 1 and all(len(set(side)) > 1 for side in zip(*pairs, strict=True))
    library = require("scipy.stats", "eval")
    functions = {"pearson": library.pearsonr, "spearman": library.spearmanr}
    found: dict[str, Any] = {}
    for name in task.metrics:
        found[name] = float(functions[name](*zip(*pairs, strict=True)).statistic) if varied else None
        found |= _interval(name, CORRELATIONS[name](gold, given), len(outputs)) if varied else {}
    return {**found, "unextractable": given.count(None), "total": len(outputs)}


def score_bleu(task: Task, outputs: Sequence[Output], judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Return BLEU of the whole set in percent, its bootstrap interval (1,000 resamples of the outputs), and sacrebleu's signature."""
    metric = bleu_metric()
    most = max(len(output.references) for output in outputs)
    # sacrebleu takes one list per reference. References [a, b] and [c] of two outputs become the lists [a, c], [b, None].
    streams = [[dict(enumerate(output.references)).get(place) for output in outputs] for place in range(most)]
    texts = [output.text.strip() for output in outputs]
    found = metric.corpus_score(texts, streams)
    statistic = bleu(texts, [output.references for output in outputs])
    interval = score_interval(statistic, len(outputs)) if len(outputs) > 1 else None
    return {
        "bleu": found.score,
        "interval": None if interval is None else list(interval),
        "signature": str(metric.get_signature()),
        "unextractable": sum(judgement.outcome == "unextractable" for judgement in judgements),
        "total": len(outputs),
    }
