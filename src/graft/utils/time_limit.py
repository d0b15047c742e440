"""A limit of time for code that somebody else wrote, such as the code of a chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from graft.errors import GraftError


class _TimeUp(BaseException):
    """Raised inside the block. Not an `Exception`, so that no handler of the block takes it for its own."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise `GraftError` if a block of code takes longer than this. what: the code, for the message.

    The alarm reaches the main thread of a Unix process only; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeUp:
        raise GraftError(f"{what} takes more than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
