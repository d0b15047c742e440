"""Choose the trials of the next joint run: the first one that waits, and those after it that may share a pass and fit with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graft.config import RunConfig
from graft.config.study import StudyConfig
from graft.study.grouping import group_of
from graft.study.memory import MemoryPredictor
from graft.study.store import Trial


def next_pack(
    waiting: Sequence[Trial],
    config_of: Callable[[Trial], RunConfig],
    config: StudyConfig,
    predictor: MemoryPredictor,
) -> list[Trial]:
    """Return the trials that run together next, from those that wait, in their order; none if none waits."""
    if not waiting:
        return []
    chosen, first = [waiting[0]], config_of(waiting[0])
    group = group_of(first)
    if waiting[0].alone or not group:
        return chosen
    limit = None if config.memory is None else config.memory * 1e9
    held = 0 if limit is None else predictor.base_bytes(first) + predictor.own_bytes(first)
    for trial in waiting[1:]:
        if len(chosen) == config.together:
            break
        own = config_of(trial)
        if trial.alone or group_of(own) != group:
            continue
        more = 0 if limit is None else predictor.own_bytes(own)
        if limit is not None and held + more > limit:
            continue
        chosen.append(trial)
        held += more
    return chosen
