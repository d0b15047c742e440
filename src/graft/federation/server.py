"""The server: rounds of asking clients, leaving out by name those whose answer is none, and taking the others' together.

A round is chosen once and closed once (`store`). A server that goes on after a kill asks those of the open round that have not answered.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from graft.errors import GraftError, counted
from graft.federation.client import Client, other_base, read_card
from graft.federation.messages import Message, decoded
from graft.federation.methods.base import Method, Update
from graft.federation.store import Store
from graft.federation.workplace import Workplace

_CHOICE = 0x43484F53
"""Keeps the choice of clients apart from other random numbers of the same seed."""


class Transport(Protocol):
    """How messages reach clients."""

    def ask(
        self, names: Collection[str], message: Callable[[str], bytes], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """Send each client its message and yield (client, answer) as answers come in, until this time is over."""
        ...

    def hello(self, message: bytes) -> dict[str, bytes]:
        """Ask all clients who they are; their answers by name."""
        ...


class InProcess:
    """Clients that take turns on the base of this process."""

    def __init__(self, place: Workplace, method: Method) -> None:
        self.clients = {name: Client(place, method, name) for name in place.clients}

    def ask(
        self, names: Collection[str], message: Callable[[str], bytes], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        for name in names:
            yield name, self.clients[name].answer(message(name))

    def hello(self, message: bytes) -> dict[str, bytes]:
        return {name: client.answer(message) for name, client in self.clients.items()}


@dataclass(frozen=True)
class Updates(Sequence[Update]):
    """The updates of a round, each read from the store when it is looked at: what many clients send need not fit into memory."""

    store: Store
    number: int
    shares: Sequence[tuple[str, float]]

    def __len__(self) -> int:
        return len(self.shares)

    def __getitem__(self, at: int) -> Update:  # pyright: ignore[reportIncompatibleMethodOverride]
        name, share = self.shares[at]
        message = self.store.update(self.number, name)
        return Update(name, share, message.tensors, message.text, self.number)


class Server:
    """The server of one federation."""

    def __init__(
        self, place: Workplace, method: Method, store: Store, transport: Transport, say: Callable[[str], None] = print
    ) -> None:
        self.place, self.method, self.store, self.transport, self.say = place, method, store, transport, say
        self.config = place.federation.config

    def run(self, after: Callable[[], object] = lambda: None) -> None:
        """Run the rounds that are left; `after` is called after each. Raises `GraftError` where no client is left or the model diverged."""
        self._enrol()
        while (done := self.store.done()) < self.config.rounds:
            self._round(done + 1)
            after()

    def _enrol(self) -> None:
        """Get to know the clients, and evaluate the model that they start from."""
        hello = Message("hello", 0, "", self.place.digest).encoded()
        known, refused = dict[str, int](), list[str]()
        for name, data in self.transport.hello(hello).items():
            try:
                known[name] = read_card(decoded(data), self.place)
            except GraftError as error:
                refused.append(f"{name}: {error}")
                self.say(f"client {name} is not taken: {error}")
        if not known and not self.store.clients():
            raise GraftError("no client can take part" + "".join(f"\n{each}" for each in refused))
        self.store.begin(self.method.begin(), known)
        if not self.store.rounds():
            started = time.perf_counter()
            number, state = self.store.state()
            scores = self.method.scores(state)
            self.store.close_round(number, state, scores, {}, time.perf_counter() - started)
            self.say(f"before the first round{_said(scores)}")

    def _round(self, number: int) -> None:
        started, store = time.perf_counter(), self.store
        chosen = store.chosen(number)
        if chosen is None:
            chosen = self._choose(number)
            store.begin_round(number, chosen)
        store.ask_again(number)
        state = store.state()[1]
        self._collect(number, chosen, state)
        updates = self._updates(number)
        if not updates:
            reasons = "".join(f"\n{each['client']}: {each['reason']}" for each in store.left_out(number))
            raise GraftError(f"no client is left in round {number}; go on with --resume once this is mended{reasons}")
        new, notes = self.method.aggregate(state, updates)
        last = number == self.config.rounds
        scores = self.method.scores(new) if last or number % self.config.eval.every == 0 else {}
        self._refuse_divergence(number, new, scores)
        seconds = time.perf_counter() - started
        store.close_round(number, new, scores, notes, seconds)
        self.say(
            f"round {number}/{self.config.rounds}: {self._traffic(number, len(updates))}{_said(scores)}, {seconds:.1f} s"
        )

    def _choose(self, number: int) -> list[str]:
        names = list(self.store.clients())
        count = max(1, round(self.config.fraction * len(names)))
        random = np.random.default_rng((_CHOICE, self.config.seed, number))
        return sorted(names[at] for at in random.choice(len(names), count, replace=False))

    def _collect(self, number: int, chosen: list[str], state: Mapping) -> None:
        """Ask the clients that have not answered yet, and note what each of them sends."""
        there = set(self.store.arrived(number))
        asked = [name for name in chosen if name not in there]
        sizes = dict.fromkeys(asked, 0)

        def message(name: str) -> bytes:
            tensors = self.method.down(state, number, name)
            data = Message("train", number, name, self.place.digest, tensors).encoded()
            sizes[name] = len(data) if self.method.exchanges else 0
            return data

        begun, heard = time.perf_counter(), set[str]()
        for name, data in self.transport.ask(asked, message, self.config.timeout):
            heard.add(name)
            seconds, begun = time.perf_counter() - begun, time.perf_counter()
            try:
                self._check(number, name, data, state)
            except GraftError as error:
                self._leave_out(number, name, str(error), sizes[name])
            else:
                self.store.deliver(number, name, sizes[name], data, len(data) if self.method.exchanges else 0, seconds)
        for name in (each for each in asked if each not in heard):
            self._leave_out(number, name, f"it sent nothing within {self.config.timeout:g} seconds", sizes[name])

    def _check(self, number: int, name: str, data: bytes, state: Mapping) -> None:
        message = decoded(data)
        if message.kind == "problem":
            raise GraftError(message.text)
        if (message.kind, message.round, message.client) != ("update", number, name):
            raise GraftError(
                f"it sent a message of kind '{message.kind}' as '{message.client}' for round {message.round}; this is round {number}"
            )
        if message.base != self.place.digest:
            raise GraftError(other_base(message.base, self.place.digest))
        self.method.check(Update(name, 0.0, message.tensors, message.text, number), state)

    def _leave_out(self, number: int, name: str, reason: str, down: int) -> None:
        self.store.leave_out(number, name, reason, down)
        self.say(f"round {number}: client {name} is left out: {reason}")

    def _updates(self, number: int) -> Updates:
        """The updates of a round with their shares, in the order of names, whatever the order in which they came."""
        names, rows = self.store.arrived(number), self.store.clients()
        sizes = {name: float(rows[name]) if self.config.weights == "rows" else 1.0 for name in names}
        total = sum(sizes.values())
        return Updates(self.store, number, [(name, size / total) for name, size in sizes.items()])

    def _refuse_divergence(self, number: int, state: Mapping, scores: Mapping[str, float]) -> None:
        """Raise `GraftError` for a model that is not finite, or worse than guessing all tokens alike."""
        finite = all(bool(each.isfinite().all()) for each in state.values() if each.is_floating_point())
        loss, first = scores.get("loss"), self.store.rounds()[0].scores.get("loss")
        vocabulary = self.place.base.model.config.get_text_config().vocab_size
        # what overflows inside a norm comes out as zeros, and so guesses all tokens alike
        worse = loss is not None and first is not None and loss > max(first + 0.05, math.log(vocabulary) - 1e-3)
        if finite and not worse and (loss is None or math.isfinite(loss)):
            return
        became = (
            f"its loss is {loss:.4g}, from {first:.4g} at first"
            if finite and loss is not None and first is not None
            else "it is not finite"
        )
        raise GraftError(
            f"the global model diverged in round {number}: {became}. Take a lower local.lr (it is {self.config.local.lr:g}) or fewer "
            f"local.steps; the state after round {number - 1} is kept"
        )

    def _traffic(self, number: int, count: int) -> str:
        down, up = self.store.bytes_per_client(number)
        said = f"{counted(count, 'client')}"
        return (
            f"{said}, {down:,.0f} bytes down and {up:,.0f} up each"
            if self.method.exchanges
            else f"{said}, nothing exchanged"
        )


def _said(scores: Mapping[str, float]) -> str:
    names = {"loss": ", loss {:.4f}", "rougeL": ", ROUGE-L {:.2f}"}
    return "".join(names[name].format(value) for name, value in scores.items())
