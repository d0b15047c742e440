"""Whether the adapters that are being attached get their tensors from elsewhere, so that a costly start can be left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FILLED: ContextVar[bool] = ContextVar("graft_filled", default=False)


@contextmanager
def to_be_filled() -> Iterator[None]:
    """While adapters are attached whose every tensor is then copied from elsewhere: a file, another adapter."""
    token = _FILLED.set(True)
    try:
        yield
    finally:
        _FILLED.reset(token)


def will_be_filled() -> bool:
    """Whether a kind may leave out a costly start, since its tensors come from elsewhere."""
    return _FILLED.get()
