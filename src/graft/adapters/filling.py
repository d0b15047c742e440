"""Tell kinds whether the adapter that is being attached gets its tensors from a file, so that they can skip a costly start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FILLED: ContextVar[bool] = ContextVar("graft_filled", default=False)


@contextmanager
def to_be_filled() -> Iterator[None]:
    """Attach adapters in this block of code if all their tensors are then copied from a file or from another adapter."""
    token = _FILLED.set(True)
    try:
        yield
    finally:
        _FILLED.reset(token)


def will_be_filled() -> bool:
    """Whether a kind may skip a costly start, because all its tensors will be copied."""
    return _FILLED.get()
