"""One process at a time trains in a run folder. It claims the folder by a lock of the operating system on the file `.lock`.

Such a lock ends with its process, however that ends. A process id in a file would say less: it may be in use again, and it means nothing
on another host. Some network file systems have no locks, or keep them from other hosts; there the user has to decide (`force`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from graft.errors import GraftError
from graft.utils.files import explain_write_errors

LOCK = ".lock"
PATIENCE = 1.0
"""Seconds to wait for a lock: a process that only asks whether a folder is claimed holds it for a moment."""
_OF_SEVERAL_HOSTS = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "afs",
    "glusterfs",
)
"""File systems of several hosts whose locks may not reach the other hosts; `fuse.` names count too."""


def is_claimed(folder: Path) -> bool | None:
    """Whether a process trains in a run folder now. None means that the system cannot say."""
    if not (folder / LOCK).exists():
        return False
    lock, taken = FileLock(folder / LOCK, thread_local=False), None
    try:
        lock.acquire(timeout=0)
        lock.release()
        taken = False
    except Timeout:
        taken = True
    except (OSError, NotImplementedError):
        return None
    return None if isinstance(lock, SoftFileLock) else taken


@contextmanager
def claim(folder: Path, status: Mapping[str, Any], force: bool = False) -> Iterator[None]:
    """Make the folder if needed and claim it for a block of code.

    status: the content of status.json, which says who trained there last. force: go on where the lock says nothing.
    What was made goes again if the block leaves nothing behind. Raises `GraftError` where another process trains in the folder, where that
    cannot be told, and where the folder cannot be written.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    known = (folder / LOCK).exists()
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquired(folder, status, force)
    try:
        yield
    finally:
        if not known and not _begun(folder):  # while it is held, so that nobody else's is removed
            (folder / LOCK).unlink(missing_ok=True)
        if lock is not None:
            lock.release()
        for each in made:
            with suppress(OSError):  # it is in use
                each.rmdir()


def _begun(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("lock.json", "config.yaml", "status.json"))


def _acquired(folder: Path, status: Mapping[str, Any], force: bool) -> FileLock | None:
    """The lock of a folder; None where its file system has none and the user, or status.json, says that nobody trains there."""
    lock = FileLock(folder / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout as error:
        if not isinstance(lock, SoftFileLock):
            raise GraftError(
                f"the run in {folder} is still running: another process trains in this folder{_who(status)}. Wait for it or stop it, "
                "or name another folder"
            ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, PermissionError):
            raise
    if lock.is_locked and not isinstance(lock, SoftFileLock):
        if not force and _runs_elsewhere(status) and (name := file_system(folder)) is not None:
            lock.release()
            raise GraftError(_unknown(folder, status, f"locks on this file system ({name}) may not reach other hosts"))
        return lock
    lock.release(force=True)
    if not force and _may_run(status):
        raise GraftError(_unknown(folder, status, "its file system has no locks"))
    return None


def _unknown(folder: Path, status: Mapping[str, Any], why: str) -> str:
    return (
        f"whether the run in {folder} is still running cannot be told, because {why}. By its status.json, process {status.get('pid')} on "
        f"{status.get('host')} trained it at {str(status.get('updated'))[:19]}. If that process is gone, say so with --force"
    )


def _who(status: Mapping[str, Any]) -> str:
    if status.get("state") != "running":
        return ""
    return f" (by its status.json, process {status.get('pid')} on {status.get('host')})"


def _runs_elsewhere(status: Mapping[str, Any]) -> bool:
    return status.get("state") == "running" and status.get("host") != socket.gethostname()


def _may_run(status: Mapping[str, Any]) -> bool:
    return status.get("state") == "running" and (_runs_elsewhere(status) or is_alive(status.get("pid")))


def is_alive(pid: Any) -> bool:
    """Whether a process of this host has this id."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def file_system(folder: Path) -> str | None:
    """Name the file system of a folder if it is one of several hosts whose locks may not reach the others; else None.

    Only Linux tells; elsewhere the answer is None.
    """
    if not sys.platform.startswith("linux"):
        return None
    path, found = folder.resolve(), (0, "")
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
            _, place, kind = line.split()[:3]
            place = place.encode().decode("unicode_escape")
            if path.is_relative_to(place):
                found = max(found, (len(place), kind))
    kind = found[1]
    return kind if kind in _OF_SEVERAL_HOSTS or kind.startswith("fuse.") else None
