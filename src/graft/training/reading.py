"""Read the data of a job, as they suit the base and the other jobs of the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from graft.attaching.attach import attach
from graft.bases import own_classes
from graft.bases.context import context_length
from graft.bases.loading import own_task
from graft.bases.skeleton import load_skeleton
from graft.config import AnyRun, RunConfig
from graft.data.preparing import Prepared, prepare
from graft.errors import GraftError


def cache_folder() -> Path:
    """Folder of tokenised data: in $GRAFT_CACHE, else in the user's cache folder."""
    root = os.environ.get("GRAFT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "graft"
    return Path(root) / "tokens"


def data_of(own: RunConfig, tokenizer: Any, config: AnyRun, task: str, first: Prepared | None) -> Prepared:
    """Read a job's data. Raises `GraftError` where they do not suit the base that the job shares with the others, or their data."""
    if own.data.base_task != task:
        raise GraftError(
            f"data.task is {own.data.task}, but the base of this run is loaded for {task}: one run has one task"
        )
    if own.data.task == "preference" and own_task(own.base) == "seq2seq":
        raise GraftError(
            f"data.task is preference, but {own.base.model} is an encoder-decoder: preferences need a causal model"
        )
    classes = own_classes(own.base) if task == "classification" else None
    data = prepare(own.data, tokenizer, cache_folder(), classes=classes, room=lambda: room_of(own))
    if first is not None and data.classes != first.classes:
        raise GraftError(f"its classes are {data.classes}, but those of the run's other jobs are {first.classes}")
    for rule in ("halving", "median"):
        if getattr(config.scheduler, rule) is not None and data.validation is None:
            raise GraftError(f"scheduler.{rule} compares validation losses: set data.validation")
    return data


def room_of(own: RunConfig) -> int | None:
    """Return how many tokens a sample of a job may have, from the base's config alone; None if there is no limit."""
    model = load_skeleton(own.base, own.data.base_task)
    if own.adapter is None:
        return context_length(model)
    try:
        attach(model, {"adapter": own.adapter})
    except (
        GraftError,
        NotImplementedError,
        RuntimeError,
    ):  # a mistake that shows later, or a start that needs the base's weights
        return context_length(model)
    return context_length(model, "adapter")
