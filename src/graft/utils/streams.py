"""Standard output and errors that outlast their reader: after `| head`, or in a terminal that was closed, a run goes on quietly."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)


@contextmanager
def outlasting() -> Iterator[None]:
    """Let sys.stdout and sys.stderr swallow what is written in a block of code once nobody reads it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if each is None else _Outlasting(each) for each in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


class _Outlasting:
    """A stream whose writes never fail because its reader is gone; the rest is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._silence(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._silence(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _silence(self, error: OSError) -> None:
        """Point the stream's descriptor nowhere, so that what is still buffered, and code that writes below Python, fail no more."""
        if error.errno not in _GONE:
            raise error
        with suppress(OSError, ValueError):  # a stream without a descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
