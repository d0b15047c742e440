"""Averages of parameters: FedAvg of adapters with equal settings (McMahan et al. 2017), and FedZO, whose clients step along noise.

Averages of a LoRA's A and B are not the average of what the LoRAs compute, since mean(B) mean(A) is not mean(B A); that of its differences
is in `differences.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from graft.attaching.stored import compare_shapes
from graft.errors import GraftError
from graft.federation.messages import Tensors
from graft.federation.methods.base import Update
from graft.federation.publishing import publish
from graft.federation.workplace import Workplace


class Parameters:
    """The tensors of one adapter, or of the base where it trains."""

    exchanges: ClassVar[bool] = True

    def __init__(self, place: Workplace) -> None:
        self.place, federation = place, place.federation
        self.part = place.part(federation.adapter_of(0), federation.config.seed)
        self.start = {key: each.clone() for key, each in self.part.job.trainable.state().items()}

    def begin(self) -> Tensors:
        return self.start

    def down(self, state: Tensors, number: int, client: str) -> Tensors:
        return state

    def work(self, got: Tensors, number: int, client: str) -> tuple[Tensors, str]:
        self.put(got)
        self.place.train(self.part, self.place.clients[client], self.place.seed_of(number, client))
        return {key: each.clone() for key, each in self.part.job.trainable.state().items()}, ""

    def put(self, state: Tensors) -> None:
        """Put the model at this state."""
        self.part.job.trainable.restore(state)

    def check(self, update: Update, state: Tensors) -> None:
        check_tensors(update.tensors, self.start)

    def aggregate(self, state: Tensors, updates: Sequence[Update]) -> tuple[Tensors, dict[str, float]]:
        return averaged(updates), {}

    def scores(self, state: Tensors) -> dict[str, float]:
        self.put(state)
        return self.place.scores(self.part.job.trainable.adapter, self.part.job.stop_ids)

    def publish(self, state: Tensors, folder: Path) -> Path:
        self.put(state)
        return publish(self.place, folder, self.part.job.trainable.adapter)


def check_tensors(given: Tensors, expected: Tensors) -> None:
    """Raise `GraftError` for tensors with other names, shapes or kinds of numbers than expected, and for numbers that are not finite."""
    compare_shapes({key: tuple(each.shape) for key, each in given.items()}, expected, "what it sent")
    for key, each in given.items():
        if each.dtype != expected[key].dtype:
            raise GraftError(f"what it sent: tensor '{key}' is of type {each.dtype}, and not of {expected[key].dtype}")
        if each.is_floating_point() and not bool(each.isfinite().all()):
            raise GraftError(f"what it sent: tensor '{key}' holds numbers that are NaN or infinite")


def averaged(updates: Iterable[Update]) -> dict[str, Tensor]:
    """Return the weighted sum of tensors by name, in float64. Whole numbers have no average: they have to be equal."""
    totals, types = dict[str, Tensor](), dict[str, torch.dtype]()
    for update in updates:
        for key, each in update.tensors.items():
            types[key] = each.dtype
            if each.is_floating_point():
                totals[key] = totals.get(key, 0.0) + update.weight * each.double()
            elif not torch.equal(totals.setdefault(key, each), each):
                raise GraftError(f"the clients sent unlike whole numbers in {key}, which have no average")
    return {key: each.to(types[key]) for key, each in totals.items()}
