"""A job: one adapter (or the base itself) with its data, optimiser, schedule, seed, position and stop rule.

A run is a set of jobs on one frozen base. A job knows nothing of the other jobs: its random numbers (order of the data, dropout) come from
its own seed and position alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graft.adapters.base import AdapterModule
from graft.attaching.parameters import summed_penalty
from graft.config.objectives import ConsistencyConfig, KTOConfig
from graft.config.policies import POLICIES, PolicyConfig
from graft.config.train import TrainConfig
from graft.data.batches import samples_of_step, steps_per_epoch
from graft.data.datasets import TokenDataset
from graft.data.samples import Example
from graft.errors import GraftError
from graft.training.objectives import Objective, Supervised, objective_of
from graft.training.rows import Row, View, row_seed
from graft.training.trainable import Trainable, trainable_of
from graft.training.updates.optimizers import build_optimizer, state_bytes, update_bytes, weight_bytes
from graft.training.updates.schedules import build_schedule, restart_schedule, restore_schedule, schedule_state
from graft.training.updates.states import optimizer_tensors, restore_optimizer
from graft.utils.clock import timed

FAILED = "failed"
PASS_PART = 2
"""Stands in for `Row.part`, which is 0 or 1, in the seed that all rows of a view share."""
AGAIN_PART = 4
"""Added to the part in the seeds of rows that run again."""
POSITION = ("step", "epoch", "batch", "best", "best_at", "stale", "ended", "priority", "arrival", "last")
"""Fields of a job that a checkpoint keeps, besides tensors and schedule."""


@dataclass(eq=False)
class Job:
    """One adapter in training. `step` counts optimiser steps; (epoch, batch) is the next batch's place in the data."""

    name: str
    config: TrainConfig
    train: TokenDataset
    validation: TokenDataset | None
    trainable: Trainable
    """What it trains: an adapter, or parameters of the base."""
    optimizer: Optimizer
    schedule: LRScheduler
    steps: int
    """Optimiser steps from beginning to end."""
    epoch_steps: int
    """Optimiser steps per epoch."""
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: dict[str, float] | None = None
    """{"step", "loss"} of the lowest validation loss; the step is the job's own."""
    stale: int = 0
    """Validations since the best one."""
    ended: str | None = None
    """Why the job takes no more steps: "finished", "early", "halved", "median", "cancelled" or "failed"."""
    best_at: int | None = None
    """The run's step at the best validation: the checkpoint of that step has the best weights."""
    priority: int = 0
    arrival: int = 0
    """Number of the job in the order in which jobs joined the run."""
    last: int = -1
    """The last step of the run in which the job took part."""
    resident: bool = True
    """Whether its tensors are in memory; else they are in the run folder (see `offload`)."""
    here: bool = True
    """Whether it lives on this rank; else only its data and position are here, and its tensors are empty (see `Shares.homes`)."""
    own_bytes: int = 0
    """Memory of the parameters, their gradients (or what stands in for them) and the optimiser's state."""
    own_weights: int = 0
    """Of these, that of the parameters."""
    own_state: int = 0
    """Of these, that of the optimiser's state."""
    objective: Objective = field(default_factory=Supervised)
    """What the job learns from the losses of its rows."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end an answer, for the stop rate; empty where nothing is answered."""
    reference: str | None = None
    """Adapter that the objective compares with, where it compares; None is the bare base."""
    bank: Any = None
    """The `Bank` (`updates/bank.py`) that its tensors lie in while it trains beside jobs of its shape; else None."""
    _order: tuple[int, np.ndarray] | None = field(default=None, repr=False)
    """(epoch, order of its samples), of the epoch that was asked for last."""

    @classmethod
    def make(
        cls, model: nn.Module, name: str, config: TrainConfig, train: TokenDataset, validation: TokenDataset | None,
        also: Sequence[str] = (),
    ) -> Job:  # fmt: skip
        """Make a job that starts at step 0. Its adapter, where it trains one, is attached and trainable.

        also: modules that a base that trains itself trains in any case: a fresh head.
        Raises `GraftError` where the data hold pairs of answers but `train.objective` is not set, or the other way round.
        """
        trainable = trainable_of(model, name, config, also)
        optimizer = build_optimizer(trainable.groups(config.lr), config)
        epoch_steps = steps_per_epoch(train, config.batch_size)
        steps = config.steps if config.steps is not None else max(1, math.ceil(config.epochs * epoch_steps))
        schedule = build_schedule(optimizer, config, steps)
        _check_drawn(name, config, train)
        prefers = config.objective is not None and not isinstance(config.objective, ConsistencyConfig | PolicyConfig)
        if train.has_pairs != prefers:
            raise GraftError(
                f"'{name}' has {'pairs of answers but no' if train.has_pairs else 'no pairs of answers for its'} train.objective"
            )
        if train.has_marks != isinstance(config.objective, KTOConfig):
            said = "answers that are marked by a label" if train.has_marks else "pairs of answers"
            raise GraftError(
                f"'{name}' has {said}, which is not what its train.objective learns from: kto takes prompt, completion and label, the "
                "others prompt, chosen and rejected"
            )
        params = list(trainable.params.values())
        own_weights, own_state = weight_bytes(params, config), state_bytes(params, config)
        own_bytes = own_weights + update_bytes(params, config)
        return cls(
            name, config, train, validation, trainable, optimizer, schedule, steps, epoch_steps, own_bytes=own_bytes,
            own_weights=own_weights, own_state=own_state,
            objective=objective_of(config.objective),
        )  # fmt: skip

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in the order of the optimiser's groups."""
        return self.trainable.params

    @property
    def modules(self) -> list[AdapterModule]:
        """The modules of its adapter; none where the base trains."""
        return self.trainable.modules

    @timed("batches")
    def rows(self) -> list[Row]:
        """Return the rows of the next step, longest sample first. `Batcher.cut` then cuts the rows of all jobs together."""
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, self.train.epoch_order(self.config.seed, self.epoch))
        samples = samples_of_step(self.train, self._order[1], self.config.batch_size, self.batch)
        rows = [
            row for position, sample in enumerate(samples) for row in self.rows_of(self.train[sample], sample, position)
        ]
        share = 1 / sum(row.view != "reference" for row in rows)
        return [row if row.view == "reference" else replace(row, share=share) for row in rows]

    def rows_of(self, example: Example, sample: int, position: int, learning: bool = True) -> list[Row]:
        """Make the rows of one sample: those of the adapter, then those of the reference where the objective compares with one.

        learning: with what only training has, the second pass and the smoothed targets of an objective.
        """
        views: dict[View, str | None] = {"adapter": self.trainable.adapter}
        if self.objective.twice and learning:
            views["again"] = self.trainable.adapter
        if self.objective.compares:
            views["reference"] = self.reference
        return [
            Row(
                job=self.name,
                adapter=adapter,
                example=sequence,
                sample=sample,
                position=position,
                part=part,
                view=view,
                seed=self.seed_of(position, part, view),
                pass_seed=self.seed_of(0, PASS_PART, view),
                smoothing=self.objective.smoothing if learning else 0.0,
                whole=self.trainable.compares_rows,
            )
            for view, adapter in views.items()
            for part, sequence in enumerate(example.sequences)
        ]

    def seed_of(self, position: int, part: int = 0, view: View = "adapter") -> int:
        """Dropout seed (63 bits) of the next step for the sample at a position and, of a pair, for one side (see `Row.part`)."""
        return row_seed(self.config.seed, self.step, position, part + (AGAIN_PART if view == "again" else 0))

    @property
    def step_tokens(self) -> float:
        """Mean number of tokens per step, those of a reference or of second passes included."""
        twice = self.objective.compares or self.objective.twice
        return float(self.train.lengths.sum()) / self.epoch_steps * (2 if twice else 1)

    def penalty(self) -> Tensor | None:
        """The penalty that the adapter's kind adds to the loss, once per step; None where it has none."""
        return summed_penalty(self.modules)

    def advance(self) -> None:
        """Move on to the next step after an optimiser step; end the job after the last one."""
        self.step, self.batch = self.step + 1, self.batch + 1
        for module in self.modules if self.here else ():
            module.after_step(self.step, self.steps)
        if self.batch == self.epoch_steps:
            self.epoch, self.batch = self.epoch + 1, 0
        if self.step >= self.steps:
            self.ended = "finished"

    @property
    def epochs_done(self) -> float:
        """Passes over the data so far, as a fraction."""
        return self.epoch + self.batch / self.epoch_steps

    @property
    def validation_due(self) -> bool:
        """Whether to validate after the step just taken."""
        if self.validation is None or not self.step:
            return False
        every = self.config.validate_every
        return self.ended is not None or (self.step % every == 0 if every else self.batch == 0)

    def note_validation(self, loss: float) -> bool:
        """Note a validation loss, and stop early where patience is out; whether it is the best so far. One that is not finite never is."""
        if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
            self.best, self.stale = {"step": self.step, "loss": loss}, 0
            return True
        self.stale += 1
        if self.config.patience is not None and self.stale >= self.config.patience and self.ended is None:
            self.ended = "early"
        return False

    def state(self) -> dict[str, Any]:
        """Return the job's state without tensors, as JSON values."""
        kept = {key: getattr(self, key) for key in (*POSITION, "steps")}
        return {**kept, "data": self.train.digest, "schedule": schedule_state(self.schedule)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the optimiser's state by parameter name."""
        return optimizer_tensors(self.optimizer, list(self.params))

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue where a checkpoint was made. The adapter's own tensors are restored elsewhere."""
        for key in POSITION:
            setattr(self, key, state[key])
        restore_schedule(self.schedule, state["schedule"])
        if self.steps != state["steps"]:  # the run became longer
            self.ended = None if self.ended == "finished" else self.ended
            restart_schedule(self.schedule)
        restore_optimizer(self.optimizer, list(self.params), tensors)


def _check_drawn(name: str, config: TrainConfig, train: TokenDataset) -> None:
    """Raise `GraftError` unless the data hold drawn answers exactly where the objective learns from them."""
    if train.has_rollouts and not isinstance(config.objective, PolicyConfig):
        raise GraftError(
            f"'{name}' has answers that a model drew (prompt_ids, completion_ids), but no train.objective that learns from them: "
            f"choose one of {', '.join(POLICIES)}"
        )
    if isinstance(config.objective, PolicyConfig) and not train.has_rollouts:
        raise GraftError(
            f"train.objective {config.objective.kind} learns from drawn answers, but '{name}' has none: their columns are "
            "prompt_ids, completion_ids, logprobs and advantage"
        )
