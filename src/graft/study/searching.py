"""Ask a search's sampler for points, and tell it what is known: the mean over seeds, failures, and what would not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from graft.errors import GraftError
from graft.study.definition import Settings, Study
from graft.study.points import is_better_high, objectives
from graft.study.samplers.base import Known
from graft.study.samplers.choosing import sampler_of
from graft.study.samplers.space import Codes, Space
from graft.study.store import Store, Trial

Obstacle = Callable[[Mapping[str, Any]], str | None]
START = "train.init_from"
"""The key of the run by which a trial starts from another one's adapter."""
TRIES = 50
"""Most times that a sampler may propose points that are known before the search counts as exhausted."""


def ask(study: Study, store: Store, obstacle: Obstacle) -> None:
    """Add points to the store until a batch waits or the budget is used up. Called inside a transaction."""
    search = study.config.search
    assert search is not None
    space, seeds = Space.of(search), study.config.seeds
    if not store.points():
        for start in search.start[: search.budget]:
            codes = space.encoded(start, study.document.where(("search", "start")))
            store.add_point(space.settings(codes), seeds, codes)
    sampler = sampler_of(search.sampler, space, len(objectives(study)), search.seed)
    waiting = len(store.trials("waiting")) // len(seeds)
    tries = 0
    while (room := min(search.budget - store.points(), search.batch - waiting)) > 0 and tries < TRIES:
        known = told(study, store)
        for codes in sampler.ask(known, room):
            settings = space.settings(codes)
            if search.warm_start and (adapter := best_adapter(study, store, settings)) is not None:
                settings[START] = adapter
            if store.add_point(settings, seeds, codes):
                waiting += 1
                if (reason := obstacle(settings)) is not None:  # costs no training, and counts as a point
                    waiting -= 1
                    for trial in store.trials("waiting"):
                        if trial.settings == settings:
                            store.refuse(trial, reason)
            else:
                store.set_fact("hits", str(int(store.fact("hits") or 0) + 1))
        tries += 1


def best_adapter(study: Study, store: Store, settings: Settings) -> str | None:
    """Return the folder of the best trial's adapter among those that are done and whose `adapter` says the same; None if there is none."""
    wanted, (name, *_) = study.config_of(settings).adapter, objectives(study)
    done = [
        trial
        for trial in store.trials("done")
        if trial.result is not None and trial.result.get(name) is not None and trial.pack is not None
        if study.config_of(trial.settings).adapter == wanted
    ]
    if not done:
        return None
    best = (max if is_better_high(name) else min)(done, key=lambda trial: float((trial.result or {})[name]))
    job = (best.result or {}).get("job", best.job)
    return str((store.path.parent / "packs" / f"{best.pack:04d}" / "adapters" / job).resolve())


def told(study: Study, store: Store) -> list[Known]:
    """Return what is known of each point, in the order in which points were added. Every value is to be minimised."""
    by_point: dict[int, list[Trial]] = {}
    for trial in store.trials():
        by_point.setdefault(trial.point, []).append(trial)
    return [_known(study, trials) for trials in by_point.values()]


def _known(study: Study, trials: list[Trial]) -> Known:
    codes: Codes = trials[0].codes or {}
    states = {trial.state for trial in trials}
    if states & {"waiting", "running"}:
        return Known(codes, "pending")
    if "infeasible" in states:
        return Known(codes, "infeasible")
    if "failed" in states:
        return Known(codes, "failed")
    values = []
    for name in objectives(study):
        scores = [(trial.result or {}).get(name) for trial in trials]
        if any(score is None for score in scores):
            raise GraftError(f"trial {trials[0].id} has no {name}, which the search goes by")
        mean = fmean(float(score) for score in scores if score is not None)
        values.append(-mean if is_better_high(name) else mean)
    return Known(codes, "done", tuple(values))
