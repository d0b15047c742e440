"""The schedules of transformers for a learning rate, with their state as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from graft.config.train import TrainConfig
from graft.errors import GraftError
from graft.utils.bits import without_kernels


def build_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """Make the schedule of the learning rate over `steps` steps. A fractional `config.warmup` is a share of these steps, never all.

    Raises `GraftError` for a warm-up that does not end before the run does.
    """
    with without_kernels():
        from transformers import get_scheduler

    share = isinstance(config.warmup, float)
    warmup = min(math.ceil(config.warmup * steps), steps - 1) if share else int(config.warmup)
    if warmup and warmup >= steps:
        raise GraftError(
            f"train.warmup is {warmup} steps, but the run has only {steps}, so the learning rate would never reach train.lr: set "
            "train.warmup lower, or train longer"
        )
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def schedule_state(schedule: LRScheduler) -> dict[str, Any]:
    """Return where a schedule stands, as numbers."""
    state = schedule.state_dict()
    return {key: state[key] for key in ("last_epoch", "_step_count", "_last_lr")}


def restart_schedule(schedule: LRScheduler) -> None:
    """Give the optimiser the learning rate that this schedule has for the step that it stands at."""
    assert isinstance(schedule, LambdaLR)
    schedule._last_lr = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, lr in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = lr


def restore_schedule(schedule: LRScheduler, state: Mapping[str, Any]) -> None:
    """Put a schedule, and the learning rate of its optimiser, back where `schedule_state` found them."""
    schedule.last_epoch, schedule._step_count = state["last_epoch"], state["_step_count"]  # type: ignore[attr-defined]
    schedule._last_lr = list(state["_last_lr"])
    for group, lr in zip(schedule.optimizer.param_groups, state["_last_lr"], strict=True):
        group["lr"] = lr
