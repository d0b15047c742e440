"""A breakdown of the wall time of a run: each second counts for one phase, the innermost that is running.

    step          forward, backward and update
    batches       choosing, cutting and laying out samples; copies to the device
    between       everything else between two steps
    validation    validation losses
    checkpoints   checkpoints, adapter folders, offloading of jobs
    books         metrics, status, events, terminal output
    rest          before the first step and after the last

For example, `validation` stops the time of `between`, and the batches that it makes count for `validation`.

A GPU works on while the CPU continues, so there the time of `batches` and `between` is CPU time: an upper bound for how long the GPU
has waited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

Phase = Literal["step", "batches", "between", "validation", "checkpoints", "books", "rest"]
LABELS: dict[Phase, str] = {
    "step": "forward, backward and update",
    "batches": "making batches",
    "between": "between steps",
    "validation": "validation",
    "checkpoints": "checkpoints",
    "books": "logs",
    "rest": "start and end",
}
TRAINING: tuple[Phase, ...] = ("step", "batches", "between")

P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """Counts the seconds of each phase. `timed` functions report to the clock that is `running`; without one they cost almost nothing."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(LABELS, 0.0)
        self.phase: Phase = "rest"
        """The phase that the time counts for now."""
        self._since = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block of code."""
        self._since, token = time.perf_counter(), _running.set(self)
        try:
            yield
        finally:
            self.switch("rest")
            _running.reset(token)

    def switch(self, phase: Phase) -> Phase:
        """Count the time for this phase from now on, and return the phase before."""
        now, before = time.perf_counter(), self.phase
        self.seconds[before] += now - self._since
        self.phase, self._since = phase, now
        return before

    def read(self) -> dict[Phase, float]:
        """Return the seconds of each phase until now."""
        self.switch(self.phase)
        return {phase: round(seconds, 3) for phase, seconds in self.seconds.items()}


_running: ContextVar[Clock | None] = ContextVar("running", default=None)


def timed(phase: Phase) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function so that its time counts for this phase of the run in which it is called.

    Batches count as `batches` only in training; those of a validation count for the validation.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def counting(*args: P.args, **kwargs: P.kwargs) -> R:
            clock = _running.get()
            if clock is None or (phase == "batches" and clock.phase not in TRAINING):
                return function(*args, **kwargs)
            before = clock.switch(phase)
            try:
                return function(*args, **kwargs)
            finally:
                clock.switch(before)

        return counting

    return decorated


def describe_times(seconds: Mapping[Phase, float]) -> str:
    """Describe a breakdown in one line: the total, and the shares of the phases that took any time."""
    total = sum(seconds.values())
    shares = [f"{seconds[phase] / total:.1%} {label}" for phase, label in LABELS.items() if seconds.get(phase, 0) > 0]
    return f"{total:,.1f} s: {', '.join(shares)}" if shares else "no time yet"
