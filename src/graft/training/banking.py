"""Who trains from now on: gradients, modes and places in banks, decided when jobs come or go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.walk import CONTAINER, base_modules
from graft.attaching.active import set_trainable
from graft.injection.container import AdapterContainer
from graft.injection.state import state_of, unwrapped
from graft.ops.low_rank_stack import StackedFactors
from graft.ops.low_rank_update import LowRankUpdate
from graft.routing.context import AdapterContext
from graft.training.forward.modes import set_training
from graft.training.job import Job
from graft.training.updates.bank import Bank, shape_of


def arrange(model: nn.Module, jobs: Sequence[Job], base_dropout: bool = False) -> None:
    """Let the adapters of those jobs train that have not ended and are in memory, and give those of one shape places in a bank.

    A job takes a row that is free in a bank of its shape; at least two that find none make a new bank. Others have tensors of their own.
    jobs: all of the run.
    """
    training = [job for job in jobs if job.ended is None and job.resident and job.here]
    names = [job.trainable.adapter for job in training if job.trainable.adapter is not None]
    set_trainable(model, names)
    set_training(model, names, base_dropout)
    for job in jobs:
        if job.bank is not None and job not in training:
            job.bank.remove(job)
    banks = list(dict.fromkeys(job.bank for job in training if job.bank is not None))
    coming: dict[Any, list[Job]] = {}
    for job in training:
        if job.bank is None and (shape := shape_of(job)) is not None:
            room = next((bank for bank in banks if bank.shape == shape and bank.free), None)
            if room is None:
                coming.setdefault(shape, []).append(job)
            else:
                room.add(job)
    banks += [Bank(own) for own in coming.values() if len(own) > 1]
    state = state_of(model)
    state.slots_in_stacks = {}
    for bank in banks:
        bank.stack.factors = _factors(unwrapped(model), bank)
        state.slots_in_stacks |= {str(job.trainable.adapter): (bank.stack, row) for job, row in bank.row_of.items()}


def leave_stacks(model: nn.Module) -> None:
    """Let every adapter compute by itself again, with gradients that autograd makes. What lies in banks stays there."""
    state_of(model).slots_in_stacks = {}


def _factors(root: nn.Module, bank: Bank) -> dict[nn.Module, StackedFactors]:
    """The factors at every module at which each job of a bank has a low-rank update and nothing else."""
    found: dict[nn.Module, StackedFactors] = {}
    own = {job: {id(each) for each in job.params.values()} for job in bank.row_of}
    for _, module in base_modules(root):
        container = module._modules.get(CONTAINER)
        if isinstance(container, AdapterContainer):
            updates = {job: _update(container, job, own[job]) for job in bank.row_of}
            whole = {job: update for job, update in updates.items() if update is not None}
            if len(whole) == len(updates) and len({update.site_index for update in whole.values()}) == 1:
                found[container] = _stacked(bank, whole)
    return found


def _update(container: AdapterContainer, job: Job, own: set[int]) -> LowRankUpdate | None:
    """The update of a job at a module, if its factors are parameters: the same in every pass. own: the ids of the job's parameters."""
    hosted = container.hooks.adapt.get(job.trainable.adapter or "", ())
    if len(hosted) != 1 or hosted[0].features is not None:
        return None
    # A context without seeds: kinds that draw what a pass runs through have no answer to it.
    update = hosted[0].adapter.low_rank(AdapterContext())
    return update if update is not None and {id(update.A), id(update.B)} <= own else None


def _stacked(bank: Bank, updates: dict[Job, LowRankUpdate]) -> StackedFactors:
    first_job, first = next(iter(updates.items()))
    numbers = {id(each): number for number, each in enumerate(first_job.params.values())}
    at = [numbers[id(first.A)], numbers[id(first.B)]]
    scales, dropouts = [0.0] * len(bank.masters), [0.0] * len(bank.masters)
    for job, update in updates.items():
        scales[bank.row_of[job]], dropouts[bank.row_of[job]] = update.scale, update.p

    def written(slots: slice | Tensor) -> None:
        rows = slots if isinstance(slots, slice) else slots.cpu().numpy()
        for number in at:
            bank.written[rows, number] = True

    (A, B), (dA, dB) = ([bank.matrices(tensor, number) for number in at] for tensor in (bank.masters, bank.gradients))
    scale_J = torch.tensor(
        scales, device=bank.masters.device, dtype=torch.float64 if A.dtype == torch.float64 else torch.float32
    )
    return StackedFactors(A, B, dA, dB, scale_J, tuple(dropouts), first.site_index, bank.anchor, written)
