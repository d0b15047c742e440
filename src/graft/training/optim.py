"""AdamW of torch and the schedules of transformers, with their state as tensors and plain numbers."""

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
    """Make AdamW as the config says, in its fused form (one kernel for all tensors, the same arithmetic) where the device has it.

    groups: parameter groups as `attaching.parameters.parameter_groups` makes them.
    """
    fused = all(parameter.device.type in ("cpu", "cuda", "mps") for group in groups for parameter in group["params"])
    return AdamW(
        groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused
    )


def build_schedule(optimizer: AdamW, config: TrainConfig, steps: int) -> LRScheduler:
    """Make the schedule of the learning rate over `steps` steps. A fractional `config.warmup` is a share of these steps.

    Raises `GraftError` for a warm-up that is longer than the run.
    """
    from transformers import get_scheduler

    warmup = math.ceil(config.warmup * steps) if isinstance(config.warmup, float) else config.warmup
    if warmup > steps:
        raise GraftError(f"train.warmup is {warmup} steps, but the run has only {steps}")
    return get_scheduler(config.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def optimizer_tensors(optimizer: AdamW, names: Sequence[str]) -> dict[str, Tensor]:
    """Return AdamW's state as {"<parameter>:<moment>": tensor}, which is empty before the first step.

    names: of the optimiser's parameters, in their order.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{name}:{moment}": optimizer.state[parameter][moment]
        for name, parameter in zip(names, parameters, strict=True)
        for moment in MOMENTS
        if parameter in optimizer.state
    }


def restore_optimizer(optimizer: AdamW, names: Sequence[str], stored: Mapping[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` returned. Moments go to the devices of their parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        moments = {moment: stored[f"{name}:{moment}"] for moment in MOMENTS if f"{name}:{moment}" in stored}
        if moments:
            # AdamW counts steps on the CPU, but on the parameter's device in its fused form.
            step_device = parameter.device if optimizer.param_groups[0]["fused"] else torch.device("cpu")
            optimizer.state[parameter] = {
                moment: tensor.to(step_device if moment == "step" else parameter.device)
                for moment, tensor in moments.items()
            }


def schedule_state(schedule: LRScheduler) -> dict[str, Any]:
    """Return where a schedule stands, as numbers."""
    state = schedule.state_dict()
    return {key: state[key] for key in ("last_epoch", "_step_count", "_last_lr")}


def restore_schedule(schedule: LRScheduler, state: Mapping[str, Any]) -> None:
    """Put a schedule, and the learning rate of its optimiser, back where `schedule_state` found them."""
    schedule.last_epoch, schedule._step_count = state["last_epoch"], state["_step_count"]  # type: ignore[attr-defined]
    schedule._last_lr = list(state["_last_lr"])
    for group, lr in zip(schedule.optimizer.param_groups, state["_last_lr"], strict=True):
        group["lr"] = lr
