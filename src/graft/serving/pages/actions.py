"""What can be done from the pages: start and go on with a run, submit and cancel jobs. Each is a command of `graft` in its own process.

What ends at once is waited for, and its answer shown. Training goes on when the server ends; what it prints is in NAME.log.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from graft.errors import GraftError
from graft.serving.pages.reading import Shelf

SECONDS = 120
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


async def start(shelf: Shelf, name: str, text: str) -> str:
    """Train a new run from a YAML text. Raises `GraftError` for a name that is taken or no name."""
    named(name)
    folder, file = shelf.root / name, shelf.root / f"{name}.yaml"
    if folder.exists() or file.exists():
        raise GraftError(f"{name} is there already: choose another name")
    file.write_text(text, encoding="utf-8")
    _detached(["train", str(file), "--out", str(folder)], shelf.root / f"{name}.log")
    return f"{name} starts; what it prints is in {name}.log"


async def go_on(shelf: Shelf, name: str) -> str:
    """Continue a run that was stopped."""
    folder = shelf.run(name).path
    _detached(["resume", str(folder)], folder.parent / f"{folder.name}.log")
    return f"{name} goes on; what it prints is in {folder.name}.log"


async def submit(shelf: Shelf, name: str, job: str, text: str) -> str:
    """Add a job to a run from a YAML text."""
    named(job)
    folder = shelf.run(name).path
    file = folder.parent / f"{folder.name}-{job}.yaml"
    if file.exists():
        raise GraftError(f"{file.name} is there already: choose another name for the job")
    file.write_text(text, encoding="utf-8")
    try:
        return await _waited(["jobs", "submit", str(folder), str(file), "--name", job])
    except GraftError:
        file.unlink()
        raise


async def cancel(shelf: Shelf, name: str, job: str) -> str:
    """Stop training a job."""
    return await _waited(["jobs", "cancel", str(shelf.run(name).path), "--", job])


def named(name: str) -> None:
    """Raise `GraftError` for what is no name of a run or a job."""
    if _NAME.fullmatch(name) is None:
        raise GraftError(
            f"a name has letters, digits, '_', '-' and '.', and begins with a letter or digit; given: {name[:100]!r}"
        )


def _detached(words: Sequence[str], log: Path) -> None:
    with open(log, "ab") as out:
        subprocess.Popen(
            [sys.executable, "-m", "graft", *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )


async def _waited(words: Sequence[str]) -> str:
    """Run a command and return what it says. Raises `GraftError` with what it says if it fails."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "graft", *words, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), SECONDS)
    except TimeoutError as error:
        process.kill()
        raise GraftError(f"graft {words[0]} took longer than {SECONDS} seconds") from error
    if process.returncode:
        raise GraftError(err.decode(errors="replace").strip() or f"graft {words[0]} failed")
    return out.decode(errors="replace").strip()
