"""What the wall time of a run goes to: every second counts for one part, the innermost that is running.

    step          forward, backward and update
    batches       choosing, cutting and laying out samples, copies to the device
    between       whatever else happens between two steps
    validation    validation losses
    checkpoints   checkpoints, adapter folders, jobs that are set aside
    books         metrics, status, events, what the terminal shows
    rest          before the first step and behind the last

A GPU works while the processor goes on, so there the time of `batches` and `between` is what the processor needs for them, which is the
most that the GPU can have waited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

Part = Literal["step", "batches", "between", "validation", "checkpoints", "books", "rest"]
CALLED: dict[Part, str] = {
    "step": "forward, backward and update",
    "batches": "making batches",
    "between": "between steps",
    "validation": "validation",
    "checkpoints": "checkpoints",
    "books": "logs",
    "rest": "start and end",
}
TRAINING: tuple[Part, ...] = ("step", "batches", "between")

P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """Seconds by part. `running` makes it the one that `timed` functions tell; they cost next to nothing where none is running."""

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = dict.fromkeys(CALLED, 0.0)
        self.part: Part = "rest"
        """What time counts for now."""
        self._since = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what happens inside."""
        self._since, token = time.perf_counter(), _running.set(self)
        try:
            yield
        finally:
            self.turn("rest")
            _running.reset(token)

    def turn(self, part: Part) -> Part:
        """From now on time counts for this part; the one that it counted for until now."""
        now, before = time.perf_counter(), self.part
        self.seconds[before] += now - self._since
        self.part, self._since = part, now
        return before

    def read(self) -> dict[Part, float]:
        """Seconds by part until now."""
        self.turn(self.part)
        return {part: round(seconds, 3) for part, seconds in self.seconds.items()}


_running: ContextVar[Clock | None] = ContextVar("running", default=None)


def timed(part: Part) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose time counts for this part of the run that it is called in.

    Batches that are not trained on count for what they serve.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def counting(*args: P.args, **kwargs: P.kwargs) -> R:
            clock = _running.get()
            if clock is None or (part == "batches" and clock.part not in TRAINING):
                return function(*args, **kwargs)
            before = clock.turn(part)
            try:
                return function(*args, **kwargs)
            finally:
                clock.turn(before)

        return counting

    return decorated


def describe_times(seconds: Mapping[Part, float]) -> str:
    """One line: the whole, and the shares of what took any time."""
    total = sum(seconds.values())
    shares = [f"{seconds[part] / total:.1%} {called}" for part, called in CALLED.items() if seconds.get(part, 0) > 0]
    return f"{total:,.1f} s: {', '.join(shares)}" if shares else "no time yet"
