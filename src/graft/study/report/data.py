"""Everything that a report says, as JSON values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.errors import counted
from graft.runs.surroundings import surroundings
from graft.study.definition import Study
from graft.study.points import in_words, is_better_high, objectives
from graft.study.report.entries import Group, by_point, entry_of, groups_of, mean_of
from graft.study.report.importance import importance
from graft.study.report.ranking import Ranked, pareto, rank
from graft.study.store import Store, Trial


def report_of(study: Study, store: Store, out: Path) -> dict[str, Any]:
    """Return the report of a study as far as it has run."""
    trials = store.trials()
    names = objectives(study)
    groups = groups_of(study, trials)
    ranked = rank([entry_of(study, group, out) for group in groups], is_better_high(names[0]))
    front = _front(names, ranked)
    base = json.loads(store.fact("base") or "null")
    points = by_point(trials)
    means = {point: mean_of(own, names[0]) for point, own in points.items()}
    return {
        "name": study.name,
        "objective": names[0],
        "objectives": names,
        "high": is_better_high(names[0]),
        "seeds": study.config.seeds,
        "counts": store.counts(),
        "points": store.points(),
        "hits": int(store.fact("hits") or 0),
        "tune": study.config.tune,
        "tune_by": study.config.tune_by if study.config.tune else None,
        "ranking": [_row(each, names[0], front[at], study, base) for at, each in enumerate(ranked)],
        "base": base,
        "failed": [_lost(trial) for trial in trials if trial.state in ("failed", "infeasible")],
        "importance": importance([points[each][0].settings for each in points], list(means.values())),
        "tried": [
            {
                "settings": own[0].settings,
                "mean": means[point],
                "scores": [_score(each, names[0]) for each in own],
                "trial": own[0].id,
            }
            for point, own in points.items()
        ],
        "curves": _curves(ranked, groups),
        "cost": _cost(trials),
        "differs": _differing([trial.settings for trial in trials]),
        "run": study.base.data,
        "study": json.loads(study.config.model_dump_json(exclude={"run"})),
        "environment": surroundings(),
        "notes": _notes(study, store, ranked),
    }


def shown(value: float | None, name: str) -> str:
    """Put a score into words: accuracies in percent, others with four digits."""
    if value is None:
        return ""
    return f"{value:.4f}" if _is_loss(name) else f"{100 * value:.1f} %"


def _is_loss(name: str) -> bool:
    return name.endswith("loss") or name in ("parameters", "tokens", "seconds", "validation_margin")


def _row(each: Ranked, name: str, on_front: bool, study: Study, base: Any) -> dict[str, Any]:
    facts = each.entry.facts
    low_high = each.interval
    unrelated, of_base = facts["unrelated_loss"], (base or {}).get("unrelated_loss")
    return {
        "rank": each.rank,
        "setting": each.entry.name,
        "score": each.entry.mean,
        "scores": each.entry.scores,
        "shown": shown(each.entry.mean, name),
        "interval": low_high,
        "interval_shown": "" if low_high is None else f"{shown(low_high[0], name)} to {shown(low_high[1], name)}",
        "spread": each.spread,
        "difference": each.difference,
        "p_value": each.p_value,
        "p_holm": each.p_holm,
        "p_shown": "" if each.p_holm is None else "< 0.001" if each.p_holm < 0.001 else f"{each.p_holm:.3f}",
        "test": each.test,
        "pareto": on_front,
        "trials": len(facts["trials"]),
        "trial_ids": facts["trials"],
        "parameters": facts["parameters"],
        "parameters_shown": f"{facts['parameters']:,}",
        "settings": facts["settings"],
        "tuned": facts["tuned"],
        "values": facts["values"],
        "validation_loss": facts["validation_loss"],
        "test_accuracy": facts["test_accuracy"],
        "forgetting": None if unrelated is None or of_base is None else unrelated - of_base,
        "tokens": facts["tokens"],
        "seconds": facts["seconds"],
        "peak_bytes": facts["peak_bytes"],
        "adapters": [f"{folder}/adapters/{job}" for folder, job in zip(facts["folders"], facts["jobs"], strict=True)],
        "rerun": rerun(study, {**facts["settings"], **facts["tuned"]}),
    }


def rerun(study: Study, settings: dict[str, Any]) -> str:
    """Return the command that trains one setting alone, as a run, from the study's base run in run.yaml."""
    changes = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    quoted = " ".join(f"'{change}'" for change in (*changes, f"train.seed={study.config.seeds[0]}"))
    return f"graft train run.yaml {quoted} --out runs/again"


def _front(names: list[str], ranked: Sequence[Ranked]) -> list[bool]:
    """Which settings are on the Pareto front: of the objectives or, where there is one, of it and the number of parameters."""
    used = names if len(names) > 1 else [names[0], "parameters"]

    def values(each: Ranked) -> tuple[float, ...]:
        own = {**each.entry.facts["values"], "parameters": each.entry.facts["parameters"]}
        return tuple(-own[name] if is_better_high(name) else own[name] for name in used)

    return pareto([values(each) for each in ranked])


def _lost(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.id,
        "setting": in_words(trial.settings),
        "seed": trial.seed,
        "state": trial.state,
        "error": trial.error,
    }


def _score(trial: Trial, name: str) -> float:
    return float((trial.result or {})[name])


def _curves(ranked: Sequence[Ranked], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The learning curves of the first seed of each setting, in the order of the ranking."""
    by_trial = {group.trials[0].id: group.trials[0].result or {} for group in groups}
    return [
        {"setting": each.entry.name, "loss": own["curve"], "validation_loss": own["validations"]}
        for each in ranked
        for own in [by_trial[each.entry.facts["trials"][0]]]
    ]


def _cost(trials: Sequence[Trial]) -> dict[str, Any]:
    done = [trial.result for trial in trials if trial.result is not None]
    packs = {each["folder"]: each["joint_seconds"] for each in done}
    return {
        "joint_runs": len(packs),
        "tokens": sum(each["tokens"] for each in done),
        "seconds": sum(packs.values()),
        "peak_bytes": max((each["peak_bytes"] or 0 for each in done), default=0) or None,
    }


def _differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the keys that differ between trials, each with its values."""
    found: dict[str, dict[str, Any]] = {}
    for each in settings:
        for key, value in each.items():
            found.setdefault(key, {})[json.dumps(value, sort_keys=True)] = value
    return {key: list(values.values()) for key, values in found.items()}


def _notes(study: Study, store: Store, ranked: Sequence[Ranked]) -> list[str]:
    counts = store.counts()
    said = [f"{counts.get('done', 0)} of {sum(counts.values())} trials are done"]
    words = {"failed": "failed", "infeasible": "would not fit into memory"}
    said += [f"{counts[state]} {word}" for state, word in words.items() if counts.get(state)]
    notes = ["; ".join(said) + "."]
    left = counts.get("waiting", 0) + counts.get("running", 0)
    if left and study.config.tune:
        notes.append(
            f"Tuning is not complete: {counted(left, 'trial')} still to run, so settings may still change their "
            f"{', '.join(study.config.tune)}, and with it their place in the ranking."
        )
    elif left:
        notes.append(f"The ranking is not final: {counted(left, 'trial')} still to run.")
    if len(study.config.seeds) == 1:
        notes.append(
            "Each setting has one seed, so nothing is known of the spread between seeds: give several under seeds."
        )
    better = [each for each in ranked if each.p_holm is not None and each.p_holm < 0.05]
    tested = [each for each in ranked if each.p_holm is not None]
    if tested:
        notes.append(
            f"{'So far, after' if left else 'After'} Holm's correction, the best setting differs from {len(better)} of the "
            f"{len(tested)} others (p < 0.05)."
        )
    halved = sum((trial.result or {}).get("ended") in ("halved", "median") for trial in store.trials("done"))
    if halved:
        notes.append(
            f"{halved} trials were ended early by the pruner; their scores are those of the step where they ended."
        )
    return notes
