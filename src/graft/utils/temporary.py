"""Temporary names beside what is being written, and the removal of those that killed processes left.

A name in use is locked by its process (flock), so a leftover is told from the work of a process that lives, here or on another host,
without process ids. On file systems without locks nothing is removed.
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Identity = tuple[int, int]


@contextmanager
def temporary(final: Path, *, folder: bool = False) -> Iterator[Path]:
    """Make an empty file or folder beside `final` for a block of code, and remove leftovers of the same name.

    The block renames it to `final`; if it does not, the file or folder is removed.
    """
    for left in final.parent.glob(f".{glob.escape(final.name)}.*.tmp"):
        remove_if_left(left)
    path, descriptor = _held(final, folder)
    try:
        yield path
    finally:
        if os.path.lexists(path):  # it was not renamed
            _remove(path)
        os.close(descriptor)


def remove_if_left(path: Path) -> None:
    """Remove a temporary file or folder, unless a process works on it."""
    with suppress(OSError):  # another process removes it too, or the file system has no locks
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        finally:
            os.close(descriptor)


def _held(final: Path, folder: bool) -> tuple[Path, int]:
    """Make the file or folder and lock it. One that another process took for a leftover in between is made again."""
    while True:
        path = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
        if folder:
            path.mkdir(parents=True)
        else:
            path.touch()
        descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDONLY)
            with suppress(OSError):  # no locks here
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _identity(os.fstat(descriptor)) == _identity(os.stat(path)):
                return path, descriptor
            os.close(descriptor)
        except FileNotFoundError:
            if descriptor >= 0:
                os.close(descriptor)


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
