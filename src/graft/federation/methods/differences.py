"""FedAvg of what adapters add to weights, exactly, though their ranks and kinds differ.

    D = D + sum_c weight_c (fold_c(W + D) - (W + D))        W a layer's weight, fold_c the adapter of client c

Every round, clients put D into their base's weights and train fresh adapters of their own kind and rank beside them, as FLoRA does (Wang
et al. 2024, arXiv 2409.05976). With a rank, D is the nearest LoRA of this rank (Eckart and Young 1936), as in FlexLoRA (Bai et al. 2024,
arXiv 2402.11505), and the report says how much of the average it misses.

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from graft.adapters.kinds.full import Full
from graft.adapters.kinds.lora import LoRA
from graft.adapters.parsing import parse
from graft.adapters.surroundings import Surroundings
from graft.config.federation import AverageMethod
from graft.errors import GraftError
from graft.federation.definition import said
from graft.federation.messages import Tensors
from graft.federation.methods.base import Update
from graft.federation.methods.parameters import check_tensors
from graft.federation.publishing import publish
from graft.federation.workplace import NAME, Workplace
from graft.formats.composing import Piece, composed
from graft.formats.filling import attach_filled
from graft.formats.folder import site_adapters
from graft.formats.weight_change import nearest_lora, weight_change
from graft.injection.state import state_of, unwrapped

A, B = "A", "B"


def have_differences(place: Workplace, method: AverageMethod) -> bool:
    """Whether every kind of the clients is a difference of weights. Raises `GraftError` where this is demanded and does not hold."""
    turns = place.federation.config.clients.adapters or [place.federation.config.adapter]
    for adapter in turns:
        place.part(adapter, place.federation.config.seed)
        root = unwrapped(place.base.model)
        own = site_adapters(root, state_of(root), NAME)
        stuck = next((each for each in own if not each.installed.changes_weight), None)
        if stuck is None:
            continue
        if method.on == "differences" or method.rank is not None or len(turns) > 1:
            raise GraftError(
                f"kind {stuck.config.kind} at {stuck.path} is no difference of weights of a linear layer, so fedavg cannot average unlike "
                "ones: let all clients have this adapter and set method.on to parameters, or choose another kind"
            )
        return False
    return True


class Differences:
    """The state holds D [O, I] of each layer under its path, or its factors under path/A [R, I] and path/B [O, R]."""

    exchanges: ClassVar[bool] = True

    def __init__(self, place: Workplace, method: AverageMethod) -> None:
        self.place, self.method = place, method
        self.root = unwrapped(place.base.model)
        self.numbers = {client: number for number, client in enumerate(place.clients)}
        self.originals: dict[str, Tensor] = {}
        """W of each layer that has a difference."""
        self._fresh: tuple[str, dict[str, Tensor]] | None = None

    def begin(self) -> Tensors:
        return {}

    def down(self, state: Tensors, number: int, client: str) -> Tensors:
        return state

    def work(self, got: Tensors, number: int, client: str) -> tuple[Tensors, str]:
        """Train a fresh adapter beside W + D; its tensors, and its config, by which the server knows what they mean."""
        adapter = self.place.federation.adapter_of(self.numbers[client])
        self.put(got)
        part = self._attached(adapter, self.place.seed_of(number))
        self.place.train(part, self.place.clients[client], self.place.seed_of(number, client))
        trained = {key: each.clone() for key, each in part.job.trainable.state().items()}
        return trained, json.dumps(said(adapter))

    def _attached(self, adapter: Any, seed: int) -> Any:
        """The adapter with the initial values of this seed, which clients with equal adapters share."""
        known = json.dumps([said(adapter), seed], sort_keys=True)
        part = self.place.part(adapter, seed)
        if self._fresh is None or self._fresh[0] != known:
            self._fresh = known, {key: each.clone() for key, each in part.job.trainable.state().items()}
        part.job.trainable.restore(self._fresh[1])
        return part

    @torch.no_grad()
    def put(self, state: Tensors) -> None:
        """Put W + D into the layers' weights. Raises `GraftError` for a difference that does not fit the base."""
        wanted = differences(state)
        for path in {**self.originals, **wanted}:
            weight = self._weight(path)
            if path not in self.originals:
                self.originals[path] = weight.clone()
            new = self.originals[path]
            if path in wanted:
                if wanted[path].shape != weight.shape:
                    raise GraftError(
                        f"the difference for '{path}' has shape {tuple(wanted[path].shape)}, and its weight {tuple(weight.shape)}: the "
                        "server has another base"
                    )
                new = (new.float() + wanted[path].to(new.device)).to(new.dtype)
            if not torch.equal(weight, new):
                self.place.clear()  # kinds that keep something of the weights read them when they are attached
                self._fresh = None
                weight.copy_(new)

    def _weight(self, path: str) -> Tensor:
        try:
            host = self.root.get_submodule(path)
        except AttributeError:
            raise GraftError(f"there is no layer '{path}' in this base: the server has another one") from None
        return Surroundings(host).weight().detach()

    def check(self, update: Update, state: Tensors) -> None:
        """Compare an update with the adapter that its text describes."""
        self.put(state)
        part = self._described(update)
        check_tensors(update.tensors, part.job.trainable.state())

    def _described(self, update: Update) -> Any:
        try:
            adapter = parse(json.loads(update.text))
        except ValueError as error:
            raise GraftError(f"what it says of its adapter is none: {error}") from error
        return self.place.part(adapter, self.place.federation.config.seed)

    @torch.no_grad()
    def aggregate(self, state: Tensors, updates: Sequence[Update]) -> tuple[Tensors, dict[str, float]]:
        """Add the weighted differences to D, in the order of the clients' names; with a rank, the share of D that its LoRA misses."""
        self.put(state)
        total = {path: each.double() for path, each in differences(state).items()}
        for update in updates:
            self._described(update).job.trainable.restore(update.tensors)
            for path, change in self._changes().items():
                total[path] = total.get(path, 0.0) + update.weight * change.double()
        whole = {path: each.float() for path, each in total.items()}
        if self.method.rank is None:
            return whole, {}
        found, missed, size = dict[str, Tensor](), 0.0, 0.0
        for path, each in whole.items():
            found[f"{path}/{A}"], found[f"{path}/{B}"] = nearest_lora(each, min(self.method.rank, *each.shape))
            missed += float((each - found[f"{path}/{B}"] @ found[f"{path}/{A}"]).square().sum())
            size += float(each.square().sum())
        return found, {"approximation error": (missed / size) ** 0.5 if size else 0.0}

    def _changes(self) -> dict[str, Tensor]:
        """What the attached adapter adds to each weight [O, I]."""
        own = site_adapters(self.root, state_of(self.root), NAME)
        return {
            path: weight_change(self.root.get_submodule(path), path, [each for each in own if each.path == path])
            for path in dict.fromkeys(each.path for each in own)
        }

    def scores(self, state: Tensors) -> dict[str, float]:
        self.put(state)
        part = self._attached(self.place.federation.adapter_of(0), self.place.federation.config.seed)
        return self.place.scores(None, part.job.stop_ids)

    def publish(self, state: Tensors, folder: Path) -> Path:
        """Write D as a LoRA where there is a rank, else as an adapter of kind full, beside W again."""
        self.put({})
        self.place.clear()
        config, found = composed(self.root, pieces_of(state))
        attach_filled(self.place.base.model, NAME, config, found, "what the federation learnt")
        return publish(self.place, folder, NAME)


def differences(state: Tensors) -> dict[str, Tensor]:
    """Return D [O, I] of each layer from a state."""
    factors = {key.rpartition("/")[0] for key in state if key.endswith(f"/{A}")}
    whole = {key: each for key, each in state.items() if key.rpartition("/")[0] not in factors}
    return {**whole, **{path: state[f"{path}/{B}"] @ state[f"{path}/{A}"] for path in factors}}


def pieces_of(state: Tensors) -> list[Piece]:
    """Return the adapter that a state is, layer by layer."""
    found = []
    for key, each in state.items():
        path, _, factor = key.rpartition("/")
        if factor == A:
            rank = each.shape[0]
            found.append(Piece(path, LoRA(rank=rank, alpha=float(rank)), {A: each, B: state[f"{path}/{B}"]}))
        elif not factor or not path:
            found.append(Piece(key, Full(), {"weight": each}))
    return found
