"""All points together: whatever sequence of calls a session makes, the base, every adapter and the choice of one are what they should be.

Each sequence is drawn from a seed. After every call the model is compared with fresh ones that hold the same weights.
"""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.base import CannotFold
from graft.attaching.saving import load_training_state, training_state
from graft.injection.state import state_of
from tests.contract.table import base, ids, logits, loss, pristine, randomise, same_base
from tests.contract.test_contract_many import KINDS

CALLS = 10
INPUTS = ids(3, 6)


class Session:
    """A model, and beside it what each adapter should be: its config and weights, which one is active, which one merged."""

    def __init__(self, family: str, seed: int) -> None:
        self.family, self.random, self.model = family, random.Random(seed), base(family)
        self.known: dict[str, tuple[Any, dict[str, Tensor]]] = {}
        self.active: str | None = None
        self.merged: str | None = None
        self.before: str | None = None
        self.made = 0

    def new(self) -> str:
        self.made += 1
        return f"n{self.made}"

    def learned(self, name: str) -> dict[str, Tensor]:
        return {key: tensor.clone() for key, tensor in training_state(self.model, name).items()}

    def call(self, inside: bool = False) -> str:
        """Make one call at random; inside of a block only those that may be made there."""
        calls = ["attach", "copy", "rename", "detach", "reload", "block"]
        calls += [] if inside else ["choose", "train", "merge", "unmerge", "twin"]
        if self.merged is not None:
            calls = ["rename", "unmerge", "twin"]
        call = self.random.choice(calls) if self.known else "attach"
        getattr(self, call)(self.random.choice([*self.known, None]) or next(iter(self.known), ""))
        return call

    def attach(self, _: str) -> None:
        name, spec = self.new(), self.random.choice(list(KINDS.values()))
        self.active = self.active if self.known else name
        graft.attach(self.model, {name: spec})
        randomise(self.model, name, self.made)
        self.known[name] = (spec, self.learned(name))

    def copy(self, name: str) -> None:
        new = self.new()
        graft.copy(self.model, name, new)
        self.known[new] = self.known[name]

    def rename(self, name: str) -> None:
        new = self.new()
        graft.rename(self.model, name, new)
        self.known[new] = self.known.pop(name)
        self.active, self.merged, self.before = (
            new if each == name else each for each in (self.active, self.merged, self.before)
        )

    def detach(self, name: str) -> None:
        graft.detach(self.model, name)
        del self.known[name]
        self.active = None if self.active == name else self.active

    def reload(self, name: str) -> None:
        new = self.new()
        with tempfile.TemporaryDirectory() as folder:
            graft.load(self.model, graft.save(self.model, name, f"{folder}/a"), name=new)
        self.known[new] = (state_of(self.model).adapter(new).config, self.learned(new))

    def block(self, name: str) -> None:
        which = self.random.choice([None, name])
        with graft.use(self.model, which) if self.random.random() < 0.5 else graft.route(self.model, [which, name]):
            for _ in range(2):
                self.call(inside=True)

    def choose(self, name: str) -> None:
        self.active = self.random.choice([None, name])
        graft.set_active(self.model, self.active)

    def train(self, name: str) -> None:
        self.active = name
        graft.set_active(self.model, name)
        optimizer = torch.optim.SGD([p for _, p in graft.parameters(self.model, name)], lr=1e-3)
        loss(self.model.train(), INPUTS).backward()
        optimizer.step()
        self.model.eval().zero_grad()
        self.known[name] = (self.known[name][0], self.learned(name))

    def merge(self, name: str) -> None:
        try:
            graft.merge(self.model, name)
        except CannotFold:
            return
        self.before, self.merged, self.active = self.active, name, name

    def unmerge(self, _: str) -> None:
        if self.merged is not None:
            graft.unmerge(self.model, self.merged)
            self.merged, self.active = None, self.before

    def twin(self, _: str) -> None:
        self.model = copy.deepcopy(self.model) if self.random.random() < 0.5 else pickle.loads(pickle.dumps(self.model))

    def expected(self, name: str | None) -> Tensor:
        """What a fresh model with this adapter's weights computes."""
        if name is None:
            return logits(pristine(self.family), INPUTS)
        model, (spec, tensors) = base(self.family), self.known[name]
        graft.attach(model, {"x": spec})
        load_training_state(model, "x", tensors)
        return logits(model, INPUTS)

    def check(self) -> None:
        assert set(graft.names(self.model)) == set(self.known)
        if not self.known:
            assert [type(module) for module in self.model.modules()] == [
                type(module) for module in pristine(self.family).modules()
            ]
        else:
            assert state_of(self.model).current.rows == self.active
        torch.testing.assert_close(logits(self.model, INPUTS), self.expected(self.active), atol=3e-4, rtol=0)
        training = {name for name in self.known if any(p.requires_grad for _, p in graft.parameters(self.model, name))}
        assert training == ({self.active} - {None} if self.merged is None else set())
        if self.merged is None:
            assert same_base(self.model, self.family)
            for name in [None, *self.known][-2:] if self.known else []:
                with graft.route(self.model, [name, self.active, None]):
                    mixed = logits(self.model, INPUTS)
                for row, each in enumerate((name, self.active, None)):
                    torch.testing.assert_close(mixed[row], self.expected(each)[row], atol=3e-5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_any_sequence_of_calls_leaves_every_adapter_and_the_base_what_they_are(family: str, seed: int) -> None:
    session = Session(family, seed)
    for _ in range(CALLS):
        print(session.call())  # for who reads a failure
        session.check()
