"""SIGINT (Ctrl-C), SIGTERM and SIGHUP end a run after its current step, with everything saved; a second one ends it at once.

SIGHUP says that the terminal is gone. It comes once from the shell and once from the system, so a second one means nothing; and where it is
ignored (nohup), it stays so.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from graft.utils import launched

ECHO_SECONDS = 5.0
"""Under a launcher, a signal within so many seconds after another is the same one: it comes from the terminal and from the launcher."""


class Interrupt:
    """Whether the user asked the run to stop."""

    def __init__(self) -> None:
        self.asked, self._since = False, 0.0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        echoed = launched.inside() and time.monotonic() - self._since < ECHO_SECONDS
        if self.asked and number != signal.SIGHUP and not echoed:
            raise KeyboardInterrupt
        self.asked, self._since = True, time.monotonic()

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
