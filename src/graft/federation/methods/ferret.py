"""Ferret (Shu et al. 2025, arXiv 2409.06277): clients step along gradients, and send their change as coordinates on shared random bases.

    c_l = d_l (z_l . D_l) / (z_l . z_l)          D the client's change of all parameters, cut into blocks l of d_l values
    w_l = w_l + c_l z_l                          c the weighted mean of the clients' coordinates, z standard normal noise of the round

The mean of c_l z_l over bases is D_l, since z_l / |z_l| is uniform on the sphere, and its squared error is (d_l - 1) |D_l|^2. The paper
gives a block several bases; as many blocks as there are coordinates have the same error for a fraction of the noise to draw. Clients of a
round share its bases, so that the server adds coordinates up and a round costs each of them one set, not one for each client.

Legend: R rounds that are done, M coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from graft.config.federation import FerretMethod
from graft.errors import GraftError
from graft.federation.messages import Tensors
from graft.federation.methods.base import Update
from graft.federation.publishing import publish
from graft.federation.workplace import Workplace
from graft.training.updates.noise import add_noise_

_BASES = 0x46455252
"""Keeps the bases apart from other random numbers of the same seed."""


class Ferret:
    """On all parameters of the base, on parts of it, or on an adapter of any kind."""

    exchanges: ClassVar[bool] = True

    def __init__(self, place: Workplace, method: FerretMethod) -> None:
        self.place, self.block, federation = place, method.block, place.federation
        self.part = place.part(federation.adapter_of(0), federation.config.seed)
        self.params: list[nn.Parameter] = list(self.part.job.params.values())
        self.origin = [each.detach().clone() for each in self.params]
        self.counts = [-(-each.numel() // self.block) for each in self.params]
        self._rewind()

    def _rewind(self) -> None:
        self.at = torch.zeros(0, sum(self.counts))
        self.start = [each.to(torch.float32, copy=True) for each in self.origin]
        """The parameters in float32 after the rounds whose coordinates are in `at`."""

    def begin(self) -> Tensors:
        """No rounds."""
        return {"coordinates": torch.zeros(0, sum(self.counts))}

    def down(self, state: Tensors, number: int, client: str) -> Tensors:
        """The coordinates of all rounds so far [R, M]: a client keeps nothing between rounds."""
        return state

    def work(self, got: Tensors, number: int, client: str) -> tuple[Tensors, str]:
        """Rebuild the model, take the local steps, and go back to where they began; the coordinates of the change [M]."""
        self.put(got["coordinates"])
        try:
            self.place.train(self.part, self.place.clients[client], self.place.seed_of(number, client))
            # training began at the rounded values, so what rounding took away is no change
            changes = [
                each.detach().float() - start.to(each.dtype).float()
                for each, start in zip(self.params, self.start, strict=True)
            ]
        finally:
            self._show()
        return {"coordinates": projected(changes, self.block, self._key(number)).cpu()}, ""

    def put(self, coordinates: Tensor) -> None:
        """Put the model behind the rounds with these coordinates [R, M], by adding those that are new."""
        done = len(self.at)
        if len(coordinates) < done or not torch.equal(coordinates[:done], self.at):
            self._rewind()
        for number in range(len(self.at), len(coordinates)):
            add_projected_(self.start, coordinates[number], self.block, self._key(number + 1))
        self.at = coordinates.clone()
        self._show()

    @torch.no_grad()
    def _show(self) -> None:
        for parameter, value in zip(self.params, self.start, strict=True):
            parameter.copy_(value)

    def _key(self, number: int) -> int:
        words = np.random.SeedSequence((_BASES, self.place.federation.config.seed, number))
        return int(words.generate_state(1, np.uint64)[0])

    def check(self, update: Update, state: Tensors) -> None:
        given, wanted = update.tensors.get("coordinates"), (sum(self.counts),)
        if given is None or tuple(given.shape) != wanted:
            said = "nothing" if given is None else f"shape {tuple(given.shape)}"
            raise GraftError(f"its coordinates should have shape {wanted}, one for each block; it sent {said}")
        if not given.is_floating_point() or not bool(given.isfinite().all()):
            raise GraftError("its coordinates hold numbers that are NaN or infinite")

    def aggregate(self, state: Tensors, updates: Sequence[Update]) -> tuple[Tensors, dict[str, float]]:
        """Add the weighted mean of the coordinates as a round of its own, in float64 and in the order of the clients' names."""
        mean = torch.zeros(sum(self.counts), dtype=torch.float64)
        for update in updates:
            mean += update.weight * update.tensors["coordinates"].double()
        return {"coordinates": torch.cat([state["coordinates"], mean.float()[None]])}, {}

    def scores(self, state: Tensors) -> dict[str, float]:
        self.put(state["coordinates"])
        return self.place.scores(self.part.job.trainable.adapter, self.part.job.stop_ids)

    def publish(self, state: Tensors, folder: Path) -> Path:
        self.put(state["coordinates"])
        return publish(self.place, folder, self.part.job.trainable.adapter)


@torch.no_grad()
def projected(changes: Sequence[Tensor], block: int, key: int) -> Tensor:
    """Return the coordinates [M] of changes, one for each block of each tensor; the last block of a tensor may be smaller."""
    found = []
    for index, change in enumerate(changes):
        parts, bases = _blocks(change, block), _bases(change, block, key, index)
        sizes = torch.full((len(parts),), float(block), device=change.device)
        sizes[-1] = change.numel() - block * (len(parts) - 1)
        found.append(sizes * (bases * parts).sum(1) / bases.square().sum(1).clamp_min(1e-30))
    return torch.cat(found)


@torch.no_grad()
def add_projected_(tensors: Sequence[Tensor], coordinates: Tensor, block: int, key: int) -> None:
    """Add the change with these coordinates [M] to tensors in place."""
    at = 0
    for index, each in enumerate(tensors):
        bases = _bases(each, block, key, index)
        own = coordinates[at : at + len(bases)].to(each.device)
        each += (own[:, None] * bases).flatten()[: each.numel()].view_as(each)
        at += len(bases)


def _bases(like: Tensor, block: int, key: int, index: int) -> Tensor:
    """The bases of a tensor's blocks, in the form of `_blocks`."""
    noise = torch.zeros(like.numel(), dtype=torch.float32, device=like.device)
    add_noise_(noise, 1.0, key, index)
    return _blocks(noise, block)


def _blocks(tensor: Tensor, block: int) -> Tensor:
    """Cut a tensor's values into rows of one block each, zeros behind the last."""
    return pad(tensor.flatten(), (0, -tensor.numel() % block)).view(-1, block)
