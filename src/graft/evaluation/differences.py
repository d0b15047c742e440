"""Compare two evaluations: the difference of every score that both have, and the settings that differ.

Only answers to the same questions under the same protocol hash are compared, question by question (`comparison`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from graft.errors import GraftError
from graft.evaluation.answers import value_of
from graft.evaluation.comparison import paired, pooled, pooled_scores, resampled
from graft.evaluation.metrics import CLASS_METRICS, CORRELATIONS, Statistic, accuracy, all_places, bleu
from graft.evaluation.results import NO_ADAPTER, CandidateAnswers, Question, read_answers

METRICS = ("accuracy", "normalised", *CLASS_METRICS, *CORRELATIONS, "bleu", "text_bleu")
"""Scores that are compared if the results have them. normalised: accuracy of choices ranked by likelihood per character.
text_bleu: BLEU against the one answer that a data file has."""
MEANS = ("accuracy", "normalised")
"""Scores that are means over questions, each right or wrong."""

Side = Sequence[CandidateAnswers]
"""The answers of one side (one entry per seed) to one task under one protocol."""


def compare(first: str, second: str) -> dict[str, Any]:
    """Compare two sides, each "FOLDER", "FOLDER:NAME" or several seeds of one model, separated by commas.

    Returns the differences (second minus first) per task, protocol and score, the settings that differ, and what could not be
    compared, with the reason. Raises `GraftError` for folders without results, for different protocols, for different
    questions, and for sides with different numbers of seeds.
    """
    sides = [[read_answers(text.strip()) for text in side.split(",")] for side in (first, second)]
    if len(sides[0]) != len(sides[1]):
        raise GraftError(
            f"seeds are compared in pairs, but {first} names {len(sides[0])} and {second} {len(sides[1])}: give equally many of both"
        )
    for text, side in zip((first, second), sides, strict=True):
        _check_seeds(text, side)
    # An evaluation (task, protocol hash) is compared if every seed of both sides has it.
    keys = [set.intersection(*({one.key for one in seed} for seed in side)) for side in sides]
    shared = sorted(keys[0] & keys[1])
    if not shared:
        _refuse(sides, first, second)
    skipped = _unmatched(sides, keys, (first, second))
    chosen = [[[next(one for one in seed if one.key == key) for seed in side] for side in sides] for key in shared]
    found: list[dict[str, Any]] = []
    for a, b in chosen:
        metrics = [metric for metric in METRICS if all(metric in one.scores for one in (*a, *b))]
        if not metrics:
            reason = f"results have none of {', '.join(METRICS)}"
            skipped.append({"task": a[0].task, "protocol_hash": a[0].protocol_hash, "reason": reason})
        for each in (_compared(metric, a, b) for metric in metrics):
            (skipped if "reason" in each else found).append(each)
    return {
        "first": {"given": first, "contestants": [seed[0].candidate for seed in sides[0]]},
        "second": {"given": second, "contestants": [seed[0].candidate for seed in sides[1]]},
        "tasks": found,
        "settings": differing_settings(*([one for pair in chosen for one in pair[side]] for side in (0, 1))),
        "skipped": skipped,
    }


def _check_seeds(text: str, side: Sequence[Side]) -> None:
    """Raise `GraftError` if the seeds of one side have other adapters or bases, because their mean would be of unlike models."""
    found: dict[str, list[str]] = {}
    for seed in side:
        for name, value in seed[0].settings.items():
            if name.startswith(("adapter.", "base.", "evaluated.base")) and not name.endswith("seed"):
                found.setdefault(name, []).append(repr(value))
    for name, values in found.items():
        if len(values) < len(side) or len(set(values)) > 1:
            given = ", ".join(dict.fromkeys([*values, *(["none"] if len(values) < len(side) else [])]))
            raise GraftError(
                f"{text} names several models as seeds of one, but they differ in {name} ({given}): only seeds of the same adapter on "
                "the same base can be averaged. Compare the others one by one"
            )


def differing_settings(first: Side, second: Side) -> dict[str, list[Any]]:
    """Return the settings that have different values on the two sides: name -> [first, second].

    The same set of seeds on both sides is not a difference. If one side is the bare base, only the kind of the other side's
    adapter is listed, since the base has none of its settings.
    """
    bare = any(all(one.settings.get("adapter.kind") == NO_ADAPTER for one in side) for side in (first, second))
    found = {}
    for name in dict.fromkeys(name for one in (*first, *second) for name in one.settings):
        if bare and name.startswith(("adapter.", "data.", "train.", "eval.", "base.")) and name != "adapter.kind":
            continue
        values = [
            list({repr(one.settings.get(name)): one.settings.get(name) for one in side}.values())
            for side in (first, second)
        ]
        if sorted(map(repr, values[0])) != sorted(map(repr, values[1])):
            found[name] = [each[0] if len(each) == 1 else each for each in values]
    return found


def _compared(metric: str, first: Side, second: Side) -> dict[str, Any]:
    """Compare one score of one task under one protocol. If that is impossible, the result has a `reason`."""
    questions = _questions((*first, *second))
    sides = [[statistic(metric, one, questions) for one in side] for side in (first, second)]
    scores = [[one(all_places(len(questions))) for one in side] for side in sides]
    header = {
        "task": first[0].task,
        "metric": metric,
        "protocol": first[0].protocol["name"],
        "protocol_hash": first[0].protocol_hash,
    }
    if any(math.isnan(score) for side in scores for score in side):
        return {**header, "reason": f"{metric} is undefined for too few or equal numbers"}
    if metric in MEANS:
        found = _accuracy_difference(metric, first, second, questions)
    elif len(first) == 1:
        found = asdict(resampled(sides[0][0], sides[1][0], len(questions)))
    else:
        found = asdict(pooled_scores(sides[0], sides[1], len(questions)))
    if "mean" in found:
        found = {"seeds": len(first), "difference": found.pop("mean"), **found}
    means = {name: sum(side) / len(side) for name, side in zip(("first", "second"), scores, strict=True)}
    return {**header, "total": len(questions), **means, **found}


def _accuracy_difference(metric: str, first: Side, second: Side, questions: Sequence[Question]) -> dict[str, Any]:
    """Compare the shares of right answers."""
    rights = [[_right(metric, one, questions) for one in side] for side in (first, second)]
    if len(first) == 1:
        return asdict(paired(rights[0][0], rights[1][0]))
    return asdict(pooled([[b - a for a, b in zip(*pair, strict=True)] for pair in zip(*rights, strict=True)]))


def statistic(metric: str, answers: CandidateAnswers, questions: Sequence[Question]) -> Statistic:
    """Return the score as a function of the chosen questions. Raises `GraftError` for answers that lack a field it needs."""
    lines = [answers.lines[question] for question in questions]
    needed = {
        "accuracy": (),
        "normalised": ("normalised",),
        "bleu": ("answer", "references"),
        "text_bleu": ("answer", "reference"),
    }
    for name in needed.get(metric, ("expected", "extracted")):
        if any(name not in line for line in lines):
            raise GraftError(
                f"{answers.folder}: the answers have no '{name}', which is needed to compare {metric}: evaluate again with --overwrite"
            )
    if metric in MEANS:
        return accuracy(_right(metric, answers, questions))
    if metric in ("bleu", "text_bleu"):
        references = [line["references"] if metric == "bleu" else [line["reference"]] for line in lines]
        return bleu([line["answer"] for line in lines], references)
    gold, given = [line["expected"] for line in lines], [line["extracted"] for line in lines]
    if metric in CLASS_METRICS:
        return CLASS_METRICS[metric](
            gold, given, answers.protocol.get("labels") or answers.protocol.get("classes") or ()
        )
    numbers = [None if each is None else value_of(each) for each in given]
    return CORRELATIONS[metric]([float(each) for each in gold], numbers)


def _right(metric: str, answers: CandidateAnswers, questions: Sequence[Question]) -> list[bool]:
    lines = (answers.lines[question] for question in questions)
    return [(line["normalised"] if metric == "normalised" else line)["outcome"] == "correct" for line in lines]


def _questions(sides: Sequence[CandidateAnswers]) -> list[Question]:
    """Return the questions that all seeds answered. Raises `GraftError` if these differ, and if there are none."""
    one = sides[0]
    questions = list(one.lines)
    for other in sides:
        if other.lines.keys() != one.lines.keys():
            raise GraftError(
                f"{one.folder} and {other.folder} answered different questions ({len(questions)} and {len(other.lines)}, "
                f"{len(one.lines.keys() & other.lines.keys())} of them the same): evaluate both on the same rows"
            )
    if not questions:
        raise GraftError(f"{one.folder} holds no answers that are right or wrong")
    return questions


def _unmatched(
    sides: Sequence[Sequence[Side]], keys: Sequence[set[tuple[str, str]]], names: tuple[str, str]
) -> list[dict[str, str]]:
    """List the evaluations that only one side has, or that the other has under another protocol, with the reason."""
    found = []
    for mine, own, other in ((0, names[0], names[1]), (1, names[1], names[0])):
        for task, protocol_hash in sorted(keys[mine] - keys[1 - mine]):
            theirs = {one.named_protocol for seed in sides[1 - mine] for one in seed if one.task == task}
            reason = f"{other} has it under {', '.join(sorted(theirs))}" if theirs else f"only {own} has it"
            found.append({"task": task, "protocol_hash": protocol_hash, "reason": reason})
    return found


def _refuse(sides: Sequence[Sequence[Side]], first: str, second: str) -> None:
    """Raise `GraftError` for sides without a common evaluation; say whether tasks or protocols differ, and in what."""
    known = [{one.task: one for seed in side for one in seed} for side in sides]
    for task in sorted(known[0].keys() & known[1].keys()):
        a, b = known[0][task], known[1][task]
        parts = [name for name in {**a.protocol, **b.protocol} if a.protocol.get(name) != b.protocol.get(name)]
        raise GraftError(
            f"the scores of '{task}' are not comparable, because the protocols differ: {a.named_protocol} in {first}, "
            f"{b.named_protocol} in {second}" + (f"; they differ in {', '.join(parts)}" if parts else "")
        )
    raise GraftError(
        f"{first} and {second} have no task in common: {', '.join(sorted(known[0]))}; {', '.join(sorted(known[1]))}"
    )
