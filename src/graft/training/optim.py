"""AdamW of torch and the schedules of transformers, and their state as tensors and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from graft.config.train import TrainConfig
from graft.errors import GraftError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def build_optimizer(groups: Sequence[dict[str, Any]], config: TrainConfig) -> AdamW:
    """AdamW as the config says, in its fused form (one kernel for all tensors, the same arithmetic).

    groups: as `graft.parameter_groups` gives them.
    """
    fused = all(parameter.device.type in ("cpu", "cuda", "mps") for group in groups for parameter in group["params"])
    return AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused
    )


def build_schedule(optimizer: AdamW, config: TrainConfig, steps: int) -> LRScheduler:
    """The learning rate's course over a run of `steps` steps. A warm-up below 1 is a fraction of them."""
    from transformers import get_scheduler

    warmup = math.ceil(config.warmup * steps) if isinstance(config.warmup, float) else config.warmup
    if warmup > steps:
        raise GraftError(f"train.warmup is {warmup} steps, but the run has only {steps}")
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def optimizer_tensors(optimizer: AdamW, names: Sequence[str]) -> dict[str, Tensor]:
    """ "<parameter>:<moment>" -> tensor; names in the order of the optimiser's parameters. Empty before the first step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{name}:{moment}": optimizer.state[parameter][moment]
        for name, parameter in zip(names, parameters, strict=True)
        for moment in MOMENTS
        if parameter in optimizer.state
    }


def restore_optimizer(optimizer: AdamW, names: Sequence[str], stored: Mapping[str, Tensor]) -> None:
    """Take back what `optimizer_tensors` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        moments = {moment: stored[f"{name}:{moment}"] for moment in MOMENTS if f"{name}:{moment}" in stored}
        if moments:
            place = {"step": moments["step"].device if optimizer.param_groups[0]["fused"] else torch.device("cpu")}
            optimizer.state[parameter] = {
                moment: tensor.to(place.get(moment, parameter.device)) for moment, tensor in moments.items()
            }
            if optimizer.param_groups[0]["fused"]:
                optimizer.state[parameter]["step"] = moments["step"].to(parameter.device)


def schedule_state(schedule: LRScheduler) -> dict[str, Any]:
    """Where a schedule is, as numbers."""
    state = schedule.state_dict()
    return {key: state[key] for key in ("last_epoch", "_step_count", "_last_lr")}


def restore_schedule(schedule: LRScheduler, state: Mapping[str, Any]) -> None:
    """Put a schedule, and the learning rate it rules, where it was."""
    schedule.last_epoch, schedule._step_count = state["last_epoch"], state["_step_count"]  # type: ignore[attr-defined]
    schedule._last_lr = list(state["_last_lr"])
    for group, lr in zip(schedule.optimizer.param_groups, state["_last_lr"], strict=True):
        group["lr"] = lr
