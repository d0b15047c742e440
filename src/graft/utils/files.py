"""Atomic writing: neither a reader nor a crash nor a full disk ever leaves half a file.

A file or folder is written under a temporary name beside its place (`temporary.py`), flushed to the disk, and renamed. A full disk is for
the user to fix, so it becomes a `GraftError`; the old file or folder then stays as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.utils.temporary import temporary
from graft.utils.terminal import ESCAPES

_JSON_ESCAPES = {code: f"\\u{code:04x}" for code in ESCAPES if code >= 0x20}
_USER_FIXABLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "the system does not permit it",
    errno.EFBIG: "no file may grow so large here (see ulimit -f)",
    errno.EMFILE: "too many files are open (see ulimit -n)",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system has lost it",
}


@contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn errors that the user can fix (full disk, no permission) into a `GraftError` that names the path."""
    try:
        yield
    except OSError as error:
        reason = _USER_FIXABLE.get(error.errno or 0)
        if reason is None:
            raise
        raise GraftError(f"cannot write {error.filename or path}: {reason}{_after(error.errno, Path(path))}") from error
    except Exception as error:
        # safetensors wraps the system's error in a type of its own that is not an OSError.
        found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if found is None or (reason := _USER_FIXABLE.get(int(found[1]))) is None:
            raise
        raise GraftError(f"cannot write {path}: {reason}{_after(int(found[1]), Path(path))}") from error


def _after(number: int | None, path: Path) -> str:
    """What follows the reason: how much space is left, where that is the reason, and that the old file stays."""
    there = next((parent for parent in [path, *path.parents] if os.path.exists(parent)), Path("/"))
    full = number in (errno.ENOSPC, errno.EDQUOT)
    return (f" ({shutil.disk_usage(there).free / 1e6:.1f} MB free)" if full else "") + ". Nothing there was changed."


def sync(path: Path) -> None:
    """Flush a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace a text file as a whole. Raises `GraftError` if the disk is full; the old file then stays."""
    path = Path(path)
    with explain_write_errors(path):
        with temporary(path) as fresh:
            with open(fresh, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        sync(path.parent)


def write_json_atomic(path: str | Path, obj: Mapping[str, Any] | Sequence[Any]) -> None:
    """Replace a JSON file as a whole."""
    write_text_atomic(path, to_json(obj, indent=2) + "\n")


def to_json(obj: Any, indent: int | None = None) -> str:
    """Serialise plain values, paths, and numbers of numpy or torch as JSON. JSON has no NaN: it becomes "nan", and infinity "inf".

    Characters that a terminal would obey, or that UTF-8 does not have, are written as escapes.
    """
    return json.dumps(_jsonable(obj), indent=indent, ensure_ascii=False, allow_nan=False).translate(_JSON_ESCAPES)


def _jsonable(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else str(obj)
    if obj is None or isinstance(obj, (str, int)):
        return obj
    if isinstance(obj, Mapping):
        return {str(key): _jsonable(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_jsonable(value) for value in obj]
    if isinstance(obj, Path):
        return str(obj)
    if hasattr(obj, "item"):  # a number of numpy or torch, without importing either
        return _jsonable(obj.item())
    raise TypeError(f"{type(obj).__name__} has no JSON form: {obj!r}")


@contextmanager
def new_dir(final: str | Path) -> Iterator[Path]:
    """Write a folder as a whole: `with new_dir("adapters/math") as folder: ...`.

    The block gets an empty temporary folder beside `final`. When the block ends, this folder replaces `final`; when it raises, the
    temporary folder is removed and `final` stays as it was.
    """
    final = Path(final)
    with explain_write_errors(final), temporary(final, folder=True) as fresh:
        yield fresh
        replace_dir_atomic(fresh, final)


def keep_others(old: Path, fresh: Path) -> None:
    """Carry over what an old folder holds besides the names that a fresh one has, so that nobody's files are lost."""
    for path in old.iterdir() if old.is_dir() else ():
        target = fresh / path.name
        if os.path.lexists(target):
            continue
        if path.is_symlink() or not path.is_dir():
            _linked(path, target)
        else:
            shutil.copytree(path, target, symlinks=True, copy_function=_linked)


def _linked(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, or copy it where the file system cannot."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def replace_dir_atomic(temporary: str | Path, final: str | Path) -> None:
    """Rename a finished folder into place, and replace an older one if there is one.

    A folder cannot be renamed over another, so two renames are needed: final -> .final.old, then temporary -> final. A crash leaves
    the old or the new folder in place, or, between the two renames, the old one under the name that `recover_dir` looks for.
    """
    temporary, final = Path(temporary), Path(final)
    recover_dir(final)
    old = _old(final)
    with explain_write_errors(final):
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        if final.exists():
            os.rename(final, old)
        os.rename(temporary, final)
        sync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def recover_dir(final: str | Path) -> None:
    """Clean up after a crash inside `replace_dir_atomic`: restore the old folder, or remove it if the new one is in place."""
    final = Path(final)
    old = _old(final)
    if old.exists():
        if final.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, final)


def _old(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def stamps(paths: Iterable[Path]) -> tuple[tuple[int, int], ...]:
    """Return the time and the size of each of these files that is there: they change when one is written or replaced."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):  # it may go at any moment
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size))
    return tuple(found)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, as configs write it: "sha256:" and 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
