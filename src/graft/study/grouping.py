"""Which trials may share passes of the base, and the joint run that they make together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from graft.config import RunConfig, load_run
from graft.config.jobs import SHARED
from graft.config.study import PrunerConfig


def group_of(config: RunConfig) -> str:
    """Return what all trials of one joint run have in common: base, task and classes, and the settings that jobs share.

    A trial that trains the base itself, or has the base's own dropout, shares with no other seed of itself either: "" is no group.
    """
    if config.train.method.parts is not None or config.base.dropout:
        return ""
    common = config.model_dump(mode="json")
    labelled = config.data.base_task in ("classification", "regression")
    return json.dumps(
        {
            "base": common["base"],
            "train": {key: common["train"][key] for key in sorted(SHARED)},
            "task": config.data.base_task,
            "data": common["data"] if labelled else None,
        }
    )


def joint_run(configs: Mapping[str, RunConfig], pruner: PrunerConfig, memory: float | None, history: Any = None) -> Any:
    """Return one run with these trials as its jobs, or the trial's own run where it can share with none.

    history: of the pruner median, the validation losses of earlier trials by step.
    """
    first = next(iter(configs.values()))
    scheduler = _scheduler(pruner, memory, history)
    if not group_of(first):
        return load_run({**first.model_dump(mode="json"), "scheduler": scheduler})
    top = first.model_dump(mode="json")
    jobs = {}
    for name, config in configs.items():
        own = config.model_dump(mode="json")
        train = {key: value for key, value in own["train"].items() if key not in SHARED}
        jobs[name] = {"adapter": own["adapter"], "data": own["data"], "train": train, "eval": own["eval"]}
    shared = {key: top["train"][key] for key in SHARED}
    # One checkpoint is enough to go on from, and a trial's best weights are kept beside it.
    return load_run({"base": top["base"], "train": {**shared, "keep": 1}, "scheduler": scheduler, "jobs": jobs})


def _scheduler(pruner: PrunerConfig, memory: float | None, history: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"memory": memory}
    if pruner.kind == "halving":
        found["halving"] = {"rungs": list(pruner.rungs), "keep": pruner.keep}
    if pruner.kind == "median":
        found["median"] = {"after": pruner.after, "least": pruner.least, "history": history or {}}
    return found
