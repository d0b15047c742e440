"""Which promises run next. Each model has one sequence of numbers: effects happen in this order, whatever the order of arrival.

The heads of different models run together, in one tick. Where one model sends more than others, it has to wait for them (deficit round
robin, Shreedhar and Varghese 1995): every model earns the same number of bytes a tick, and a request runs when its model can pay for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from graft.serving.tinker.promises import Promise

QUANTUM = 1_000_000
"""Bytes of requests that a model earns a tick while others wait."""
MOST, MOST_BYTES = 4096, 256 * 1024 * 1024
"""Requests of a model that may wait, and their bytes; more get status 429, and clients send them again."""


@dataclass
class _Line:
    """The promises of one model that wait."""

    next: int = 0
    waiting: dict[int, Promise] = field(default_factory=dict)
    earned: int = 0
    size: int = 0
    """Bytes of what waits."""
    over: bool = False
    """Whether the model is to be closed."""

    def put(self, promise: Promise) -> None:
        self.over |= promise.kind == "close"
        self.waiting[promise.seq] = promise
        self.size += len(promise.content)

    def take(self) -> Promise:
        head = self.waiting.pop(self.next)
        self.size -= len(head.content)
        self.next += 1
        return head

    @property
    def head(self) -> Promise | None:
        return self.waiting.get(self.next)


class Order:
    """The lines of all models. A model begins with number 0, the request that makes it."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}

    def open(self, model: str, next: int = 0) -> None:
        """Make the line of a model, if it has none."""
        self._lines.setdefault(model, _Line(next))

    def __contains__(self, model: str) -> bool:
        """Whether a model takes requests: it has a line, and is not to be closed."""
        line = self._lines.get(model)
        return line is not None and not line.over

    @property
    def models(self) -> list[str]:
        """The models that have a line."""
        return list(self._lines)

    def full(self, model: str, seq: int) -> bool:
        """Whether a model has so much waiting that a request has to come later. The one that the others wait for never has to."""
        line = self._lines[model]
        return seq > line.next and (len(line.waiting) >= MOST or line.size >= MOST_BYTES)

    def waits(self) -> dict[str, int]:
        """Return how many requests of each model wait, of those that have any."""
        return {model: len(line.waiting) for model, line in self._lines.items() if line.waiting}

    def put(self, promise: Promise) -> None:
        """Let a promise wait for its turn."""
        self.open(promise.owner)
        self._lines[promise.owner].put(promise)

    def close(self, model: str) -> list[Promise]:
        """Drop the line of a model, and return what waited in it."""
        line = self._lines.pop(model, _Line())
        return [line.waiting[seq] for seq in sorted(line.waiting)]

    def gap(self, promise: Promise) -> int | None:
        """Return the number that a promise waits for and that has not arrived, None if it waits for nothing but its turn."""
        line = self._lines.get(promise.owner)
        return line.next if line is not None and line.head is None and promise.seq > line.next else None

    def take(self) -> list[Promise]:
        """Take the promises that run now: at most one of each model, and none only if no model can go on."""
        ready = {model: line for model, line in self._lines.items() if line.head is not None}
        for line in self._lines.values():
            if line.head is None:
                line.earned = 0
        taken: list[Promise] = []
        while ready and not taken:
            for line in ready.values():
                assert (head := line.head) is not None
                line.earned += QUANTUM
                if len(head.content) <= line.earned:
                    line.earned = min(line.earned - len(head.content), QUANTUM)
                    taken.append(line.take())
        return taken
