"""What the report compares: the settings of a study with the scores of their seeds, each at its best values of the keys it may tune."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from graft.study.definition import Study
from graft.study.points import in_words, is_better_high, objectives
from graft.study.report.ranking import Entry
from graft.study.store import Trial
from graft.utils.jsonl import JsonLines


@dataclass(frozen=True)
class Group:
    """The trials of one point, or of several points that differ in tuned keys alone."""

    settings: dict[str, Any]
    """What tells it from other groups."""
    trials: tuple[Trial, ...]
    """Those of the chosen point, one per seed."""
    tuned: dict[str, Any]
    """The values that were chosen for tuned keys."""
    tried: tuple[tuple[dict[str, Any], float], ...]
    """Each point of the group, with the mean that it was chosen by."""


def by_point(trials: Sequence[Trial]) -> dict[int, list[Trial]]:
    """Return the trials of each point that all have a result, by point."""
    found: dict[int, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.point, []).append(trial)
    return {point: own for point, own in found.items() if all(each.state == "done" for each in own)}


def groups_of(study: Study, trials: Sequence[Trial]) -> list[Group]:
    """Return what is compared. Points of which a trial has no result are left out."""
    tune, by = study.config.tune, study.config.tune_by
    groups: dict[str, list[list[Trial]]] = {}
    for own in by_point(trials).values():
        kept = {key: value for key, value in own[0].settings.items() if key not in tune}
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(own)
    found = []
    for points in groups.values():
        means = [mean_of(point, by) if tune else 0.0 for point in points]
        best = (max if is_better_high(by) else min)(range(len(points)), key=lambda at: means[at])
        settings = points[best][0].settings
        found.append(
            Group(
                {key: value for key, value in settings.items() if key not in tune},
                tuple(points[best]),
                {key: settings[key] for key in tune if key in settings},
                tuple((point[0].settings, mean) for point, mean in zip(points, means, strict=True)),
            )
        )
    return found


def mean_of(trials: Sequence[Trial], name: str) -> float:
    """Return the mean of a score over seeds."""
    return fmean(float((trial.result or {})[name]) for trial in trials)


def entry_of(study: Study, group: Group, out: Path) -> Entry:
    """Return a group with its scores and, where the objective is an accuracy over questions, its answers."""
    name = objectives(study)[0]
    answers = tuple(_answers(out, trial.result or {}, name) for trial in group.trials)
    complete = [each for each in answers if each is not None]
    first = group.trials[0].result or {}
    facts = {
        "settings": group.settings,
        "tuned": group.tuned,
        "parameters": first["parameters"],
        "tokens": sum((trial.result or {})["tokens"] for trial in group.trials),
        "seconds": sum((trial.result or {})["seconds"] for trial in group.trials),
        "peak_bytes": max((trial.result or {})["peak_bytes"] or 0 for trial in group.trials) or None,
        "trials": [trial.id for trial in group.trials],
        "folders": [f"packs/{(trial.result or {})['folder']}" for trial in group.trials],
        "jobs": [(trial.result or {})["job"] for trial in group.trials],
        "values": {each: mean_of(group.trials, each) for each in objectives(study)},
        "unrelated_loss": _mean_or_none(group.trials, "unrelated_loss"),
        "validation_loss": _mean_or_none(group.trials, "validation_loss"),
        "test_accuracy": _mean_or_none(group.trials, "test_accuracy"),
    }
    return Entry(
        in_words({**group.settings, **group.tuned}),
        tuple(float((trial.result or {})[name]) for trial in group.trials),
        tuple(trial.seed for trial in group.trials),
        tuple(complete) if len(complete) == len(answers) and len({len(each) for each in complete}) == 1 else None,
        facts=facts,
    )


def _mean_or_none(trials: Sequence[Trial], name: str) -> float | None:
    values = [(trial.result or {}).get(name) for trial in trials]
    return fmean(float(value) for value in values if value is not None) if all(v is not None for v in values) else None


def _answers(out: Path, result: Mapping[str, Any], name: str) -> tuple[bool, ...] | None:
    """Whether each question of the objective was answered correctly; None where the objective is not about questions."""
    kept = result.get("test_answers" if name == "test_accuracy" else f"{name}_answers")
    if kept is None or (name.startswith("test_") and name != "test_accuracy"):
        return None
    path = out / "packs" / str(result["folder"]) / "eval" / Path(kept).name / "answers.jsonl"
    lines = [line for line in JsonLines(path).read() if line.get("contestant") == result["job"]]
    return tuple(line["outcome"] == "correct" for line in sorted(lines, key=lambda line: line["number"])) or None
