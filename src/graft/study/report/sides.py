"""Several evaluations of runs side by side, as entries of a ranking: those on the same questions under the same protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graft.errors import GraftError
from graft.evaluation.results import CandidateAnswers, read_answers
from graft.study.report.ranking import Entry, Ranked, rank


def rank_sides(sides: Sequence[str]) -> list[dict[str, Any]]:
    """Rank several sides, each as `graft compare` names them: "FOLDER", "FOLDER:NAME", or seeds separated by commas.

    Returns, per task and protocol that all of them have, the ranking by accuracy. Raises `GraftError` where they share none, or where
    the questions differ.
    """
    read = {text: [read_answers(one.strip()) for one in text.split(",")] for text in sides}
    keys = set.intersection(*({one.key for one in seed} for seeds in read.values() for seed in seeds))
    if not keys:
        raise GraftError(
            f"{', '.join(sides)} have no task under the same protocol in common: evaluate them alike first"
        )
    found = []
    for key in sorted(keys):
        chosen = {text: [next(one for one in seed if one.key == key) for seed in seeds] for text, seeds in read.items()}
        first = next(iter(chosen.values()))[0]
        if any("accuracy" not in one.scores for seeds in chosen.values() for one in seeds):
            continue
        _check_questions(chosen, first)
        ranked = rank([_entry(text, seeds, list(first.lines)) for text, seeds in chosen.items()], high=True)
        found.append({"task": first.task, "protocol": first.named_protocol, "ranking": [row(each) for each in ranked]})
    if not found:
        raise GraftError("none of the tasks that they share has an accuracy to rank by")
    return found


def row(each: Ranked) -> dict[str, Any]:
    """Return a place of a ranking as JSON values."""
    return {
        "rank": each.rank,
        "name": each.entry.name,
        "accuracy": each.entry.mean,
        "seeds": len(each.entry.scores),
        "interval": each.interval,
        "difference": each.difference,
        "p_value": each.p_value,
        "p_holm": each.p_holm,
        "test": each.test,
        **each.entry.facts,
    }


def _check_questions(chosen: dict[str, list[CandidateAnswers]], first: CandidateAnswers) -> None:
    for text, seeds in chosen.items():
        if any(set(one.lines) != set(first.lines) for one in seeds):
            raise GraftError(
                f"{text} and {first.folder} answered other questions of {first.task}: evaluate them on the same rows"
            )


def _entry(text: str, seeds: Sequence[CandidateAnswers], order: Sequence[Any]) -> Entry:
    answers = tuple(tuple(one.lines[question]["outcome"] == "correct" for question in order) for one in seeds)
    return Entry(text, tuple(sum(each) / len(each) for each in answers), answers=answers)
