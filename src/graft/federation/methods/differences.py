"""FedAvg of what adapters add to weights, exactly, though their ranks and kinds differ.

    D = D + sum_c weight_c (fold_c(W + D) - (W + D))        W a layer's weight, fold_c the adapter of client c

Every round, clients put D into their base's weights and train fresh adapters of their own kind and rank beside them, as FLoRA does (Wang
et al. 2024, arXiv 2409.05976). D is kept in one of three forms:

    whole      as it is
    rank       as the nearest LoRA of a rank (Eckart and Young 1936), as in FlexLoRA (Bai et al. 2024, arXiv 2402.11505); the report says
               how much of the average it misses
    stack      as the factors of all clients and rounds side by side, B A = sum_c weight_c s_c B_c A_c, whose rank is the sum of theirs; as
               it is, once that is smaller

Legend: I input features, O output features, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from graft.adapters.parsing import parse
from graft.adapters.surroundings import Surroundings
from graft.combining.loras import is_lora
from graft.config.federation import AverageMethod
from graft.errors import GraftError
from graft.federation.definition import said
from graft.federation.messages import Tensors
from graft.federation.methods.base import Update
from graft.federation.methods.forms import A, B, approximated, difference, layers, pieces_of, smaller
from graft.federation.methods.parameters import check_tensors
from graft.federation.publishing import publish
from graft.federation.workplace import NAME, Workplace
from graft.formats.composing import composed
from graft.formats.filling import attach_filled
from graft.formats.folder import SiteAdapter, site_adapters
from graft.formats.weight_change import weight_change
from graft.injection.state import state_of, unwrapped


def have_differences(place: Workplace, method: AverageMethod) -> bool:
    """Whether every kind of the clients can be averaged as the method says. Raises `GraftError` where it has to be and cannot."""
    turns = place.federation.config.clients.adapters or [place.federation.config.adapter]
    for adapter in turns:
        place.part(adapter, place.federation.config.seed)
        try:
            _refuse_unlike(attached(place), method)
        except GraftError as error:
            if method.aggregate == "auto" and method.rank is None and len(turns) == 1:
                return False
            raise GraftError(
                f"{error}: let all clients have this adapter and set method.aggregate to naive, or choose another kind"
            ) from error
    return True


def _refuse_unlike(own: Sequence[SiteAdapter], method: AverageMethod) -> None:
    """Raise `GraftError` for an adapter that is no difference of weights, or no LoRA where factors are stacked."""
    for each in own:
        if not each.installed.changes_weight:
            raise GraftError(
                f"kind {each.config.kind} at {each.path} is no difference of weights of a linear layer, so fedavg cannot average unlike "
                "ones"
            )
        if method.aggregate == "stack" and not is_lora(each):
            raise GraftError(
                f"kind {each.config.kind} at {each.path} is no LoRA without a bias, so it cannot be stacked"
            )


def attached(place: Workplace) -> list[SiteAdapter]:
    """Return the sites of the adapter that trains."""
    root = unwrapped(place.base.model)
    return site_adapters(root, state_of(root), NAME)


class Differences:
    """The state holds D of each layer, in one of the forms of `forms.py`."""

    exchanges: ClassVar[bool] = True

    def __init__(self, place: Workplace, method: AverageMethod) -> None:
        self.place, self.method = place, method
        self.root = unwrapped(place.base.model)
        self.numbers = {client: number for number, client in enumerate(place.clients)}
        self.originals: dict[str, Tensor] = {}
        """W of each layer that has a difference."""
        self.at: Tensors | None = {}
        """The state whose D is in the weights; None where that failed."""
        self.stop_ids = place.part(place.federation.adapter_of(0), place.federation.config.seed).job.stop_ids
        self._fresh: tuple[Any, dict[str, Tensor]] | None = None

    def begin(self) -> Tensors:
        return {}

    def down(self, state: Tensors, number: int, client: str) -> Tensors:
        return state

    def work(self, got: Tensors, number: int, client: str) -> tuple[Tensors, str]:
        """Train a fresh adapter beside W + D; its tensors, and its config, by which the server knows what they mean."""
        adapter = self.place.federation.adapter_of(self.numbers[client])
        self.put(got)
        part = self._part(adapter, number)
        part.job.trainable.restore(self._initial(part))
        self.place.train(part, self.place.clients[client], self.place.seed_of(number, client))
        trained = {key: each.clone() for key, each in part.job.trainable.state().items()}
        return trained, json.dumps(said(adapter))

    def _part(self, adapter: Any, number: int) -> Any:
        """The adapter with the initial values of a round, which clients with equal adapters share."""
        return self.place.part(adapter, self.place.seed_of(number))

    def _initial(self, part: Any) -> dict[str, Tensor]:
        """The values with which an adapter was attached."""
        if self._fresh is None or self._fresh[0] is not part:
            self._fresh = part, {key: each.clone() for key, each in part.job.trainable.state().items()}
        return self._fresh[1]

    @torch.no_grad()
    def put(self, state: Tensors) -> None:
        """Put W + D into the layers' weights. Raises `GraftError` for a difference that does not fit the base."""
        at = self.at
        if at is not None and state.keys() == at.keys() and all(torch.equal(state[key], at[key]) for key in state):
            return
        self.place.clear()  # kinds that keep something of the weights read them when they are attached
        self.at, wanted = None, layers(state)
        for path in dict.fromkeys([*self.originals, *wanted]):
            weight = self._weight(path)
            if path not in self.originals:
                self.originals[path] = weight.clone()
            new = self.originals[path]
            if path in wanted:
                D = difference(state, path)
                if D.shape != weight.shape:
                    raise GraftError(
                        f"the difference for '{path}' has shape {tuple(D.shape)}, and its weight {tuple(weight.shape)}: the server has "
                        "another base"
                    )
                new = (new.float() + D.to(new.device)).to(new.dtype)
            weight.copy_(new)
        self.at = state

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
        _refuse_unlike(attached(self.place), self.method)
        check_tensors(update.tensors, part.job.trainable.state())

    def _described(self, update: Update) -> Any:
        try:
            adapter = parse(json.loads(update.text))
        except ValueError as error:
            raise GraftError(f"what it says of its adapter is none: {error}") from error
        part = self._part(adapter, update.number)
        self._initial(part)  # before the client's values come
        return part

    @torch.no_grad()
    def aggregate(self, state: Tensors, updates: Sequence[Update]) -> tuple[Tensors, dict[str, float]]:
        """Add the weighted differences to D, kind by kind, and in the order of the clients' names."""
        self.put(state)
        order = sorted(range(len(updates)), key=lambda at: updates[at].text)  # an adapter is attached once
        if self.method.aggregate == "stack":
            return self._stacked(state, updates, order)
        total = {path: difference(state, path).double() for path in layers(state)}
        for update in (updates[at] for at in order):
            self._described(update).job.trainable.restore(update.tensors)
            for path, change in self._changes():
                total[path] = total.get(path, 0.0) + update.weight * change.double()
        whole = {path: each.float() for path, each in total.items()}
        return (whole, {}) if self.method.rank is None else approximated(whole, self.method.rank)

    def _changes(self) -> Iterator[tuple[str, Tensor]]:
        """What the attached adapter adds to each weight [O, I]."""
        own = attached(self.place)
        for path in dict.fromkeys(each.path for each in own):
            there = [each for each in own if each.path == path]
            yield path, weight_change(self.root.get_submodule(path), path, there)

    def _stacked(
        self, state: Tensors, updates: Sequence[Update], order: Sequence[int]
    ) -> tuple[Tensors, dict[str, float]]:
        """Lay the factors of these updates beside those that are there."""
        rows: dict[str, list[Tensor]] = {key: [each] for key, each in state.items()}
        for update in (updates[at] for at in order):
            self._described(update).job.trainable.restore(update.tensors)
            for each in attached(self.place):
                down, up = each.module.A.detach(), each.module.B.detach()
                wide = up.new_zeros(self._weight(each.path).shape[0], up.shape[1])
                wide[each.features] = update.weight * each.module.scale * up
                rows.setdefault(f"{each.path}/{A}", []).append(down.clone())
                rows.setdefault(f"{each.path}/{B}", []).append(wide)
        new = {key: torch.cat(each, 1 if key.endswith(f"/{B}") else 0) for key, each in rows.items()}
        return smaller(new)

    def scores(self, state: Tensors) -> dict[str, float]:
        self.put(state)
        return self.place.scores(None, self.stop_ids)

    def publish(self, state: Tensors, folder: Path) -> Path:
        """Write D as a LoRA where it has factors, else as an adapter of kind full, beside W again."""
        self.put({})
        self.place.clear()
        config, found = composed(self.root, pieces_of(state))
        attach_filled(self.place.base.model, NAME, config, found, "what the federation learnt")
        return publish(self.place, folder, NAME)
