"""glibc's allocator, told to give large blocks back to the system at once.

Why: it learns from the first large block that is freed to take blocks of up to 32 MiB from its own heap, where those that are still in use
keep the freed ones from going back. A base that is quantised tensor by tensor then takes several times the memory that it holds.
Breaks: with another C library, or one whose allocator was replaced, nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
SMALL, LARGEST = 256 * 1024, 32 * 1024 * 1024
"""Blocks from this size on are given back while loading; and what glibc comes to by itself in a process that frees large blocks."""

OWN_CHOICE = "MALLOC_MMAP_THRESHOLD_"
"""Variable of the environment by which the user sets glibc's threshold; it is then left alone."""


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """Let blocks from 256 KiB on go back to the system when they are freed. Afterwards the allocator is as training finds it anyway."""
    if (mallopt := _mallopt()) is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, SMALL)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, LARGEST)
        mallopt(_TRIM_THRESHOLD, 2 * LARGEST)


def always_give_back() -> None:
    """From now on let blocks from 1 MiB on go back to the system when they are freed."""
    if (mallopt := _mallopt()) is not None:
        mallopt(_MMAP_THRESHOLD, 4 * SMALL)


def give_back_free() -> None:
    """Give the free pages of glibc's heap back to the system, so that a measured peak does not depend on what was there before.

    Parts that are in use stay where they are, so what is freed between them later is kept again.
    """
    if (trim := _of_glibc("malloc_trim")) is not None:
        trim(0)


def _mallopt() -> Any:
    """Return what sets the allocator's thresholds; None where there is none, or where the user set them."""
    return _of_glibc("mallopt") if OWN_CHOICE not in os.environ else None


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
