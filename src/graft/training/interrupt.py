"""SIGINT (Ctrl-C), SIGTERM and SIGHUP end a run after its current step, with everything saved; a second one ends it at once.

SIGHUP says that the terminal is gone. It comes once from the shell and once from the system, so a second one means nothing; and where it is
ignored (nohup), it stays so.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the user asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number != signal.SIGHUP:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def watching(self) -> Iterator[Interrupt]:
        """Catch the signals in a block of code. Python allows this in the main thread only; in other threads nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        caught = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            caught.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._handle) for number in caught}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
