"""Messages to clients by name over Flower's grid, which knows nodes by number.

A client that is started again is another node of the same name. It is greeted, and what its predecessor was asked is asked again; whichever
answers first counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from graft.errors import GraftError, require
from graft.federation.messages import decoded

RECORD, FIELD = "graft", "message"
"""Where a message of ours is in one of Flower's."""
PAUSE = 0.5
"""Seconds between two looks at what came in."""


class GridTransport:
    """The clients that are joined. expected: the number of clients to wait for at the beginning, seconds: how long."""

    def __init__(self, grid: Any, expected: int, seconds: float, say: Callable[[str], None]) -> None:
        self.grid, self.expected, self.seconds, self.say = grid, expected, seconds, say
        self.nodes: dict[str, int] = {}
        """The latest node of each client."""
        self._greeting = b""
        self._greeted = set[int]()
        self._hellos: dict[str, int] = {}
        """Greetings without an answer: the id of the message, and its node."""

    def hello(self, message: bytes) -> dict[str, bytes]:
        """Wait until as many clients are there as are expected; their answers by name."""
        self._greeting, cards = message, dict[str, bytes]()
        end = time.monotonic() + self.seconds
        self.say(f"waiting for {self.expected} clients")
        while len(cards) < self.expected and time.monotonic() < end:
            cards |= self._look()
            time.sleep(PAUSE)
        return cards

    def ask(
        self, names: Collection[str], message: Callable[[str], bytes], seconds: float
    ) -> Iterator[tuple[str, bytes]]:
        """Ask each client at its latest node, and again where that changes."""
        waiting, asked, sent = set(names), dict[str, int](), dict[str, str]()
        end = time.monotonic() + seconds
        while waiting and time.monotonic() < end:
            self._look()
            for name in sorted(waiting):
                node = self.nodes.get(name)
                if node is not None and asked.get(name) != node:
                    asked[name] = node
                    sent[self._push(node, message(name))] = name
            for reply in self.grid.pull_messages(list(sent)) if sent else ():
                name = sent.pop(reply.metadata.reply_to_message_id)
                if name in waiting and (data := _data(reply)) is not None:
                    waiting.discard(name)
                    yield name, data
            time.sleep(PAUSE)

    def _look(self) -> dict[str, bytes]:
        """Greet nodes that are new, and note who answers."""
        for node in set(self.grid.get_node_ids()) - self._greeted:
            self._greeted.add(node)
            self._hellos[self._push(node, self._greeting)] = node
        found = {}
        for reply in self.grid.pull_messages(list(self._hellos)) if self._hellos else ():
            node, data = self._hellos.pop(reply.metadata.reply_to_message_id), _data(reply)
            if data is None:
                continue
            try:
                name = decoded(data).client
            except GraftError as error:
                self.say(f"a client is not taken: {error}")
                continue
            said = "joined" if name not in self.nodes else "joined again"
            self.say(f"client {name} {said}")
            self.nodes[name], found[name] = node, data
        return found

    def _push(self, node: int, data: bytes) -> str:
        message = self.grid.create_message(wrapped(data), "train", node, "")
        return next(iter(self.grid.push_messages([message])))


def wrapped(data: bytes) -> Any:
    """Put a message of ours into what one of Flower's holds. Raises `MissingExtra` without flwr."""
    flower = require("flwr.app", "federated")
    return flower.RecordDict({RECORD: flower.ConfigRecord({FIELD: data})})


def _data(reply: Any) -> bytes | None:
    """What a client sent; None for an error of Flower's own, as where a node is gone."""
    if reply.has_error():
        return None
    return reply.content[RECORD][FIELD]
