"""The folder of a federation, and the ways into it: begin, or go on.

federation.json     the federation as it was given
federation.sqlite   what the server remembers (store.py)
adapters/ or model/ what came out
report.html  report.md  report.json
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.federation.definition import Federation, read_federation
from graft.federation.methods.choosing import method_of
from graft.federation.report import report_of, write_reports
from graft.federation.server import InProcess, Server
from graft.federation.store import FILE, Store
from graft.federation.workplace import Workplace
from graft.runs.claim import LOCK, claim
from graft.runs.surroundings import surroundings
from graft.utils.files import write_json_atomic
from graft.utils.jsonl import read_json

FEDERATION = "federation.json"
PAUSE = 5.0
"""Seconds between two reports: its curves take longer to draw than a round of a small federation."""
Say = Callable[[str], None]


@contextmanager
def opened(
    source: Any, changes: Sequence[str], out: Path, *, resume: bool, say: Say
) -> Iterator[tuple[Federation, Store]]:
    """Begin a federation in a folder, or go on with the one that is there, and hold the folder for a block of code.

    Raises `GraftError` for whatever is wrong with it, and where another process works on it.
    """
    federation = read_federation(source, changes)
    there = (out / FILE).exists()
    if there and not resume:
        raise GraftError(
            f"{out} already holds a federation: go on with it with --resume, or name another folder with --out"
        )
    if resume and not there:
        raise GraftError(f"{out} holds no federation to go on with: leave out --resume, or name its folder with --out")
    if not there and out.exists() and any(each.name != LOCK for each in out.iterdir()):
        raise GraftError(f"{out} holds files that are not a federation: name a new or empty folder with --out")
    with claim(out, {}):
        store = Store.open(out / FILE, federation.known_as)
        try:
            kept = {"name": federation.name, "federation": federation.document.data, "environment": surroundings()}
            if not (out / FEDERATION).exists():
                write_json_atomic(out / FEDERATION, kept)
            yield federation, store
        except Exception:
            if not there and not store.begun:  # a mistake in base or data: the same folder may be named again
                for name in (FILE, FEDERATION):
                    (out / name).unlink(missing_ok=True)
            raise
        finally:
            store.close()


def federate(
    source: Any, changes: Sequence[str], out: Path, *, resume: bool = False, say: Say = lambda text: None
) -> dict[str, Any]:
    """Run a federation in this process, one client after the other, on one base. Returns the report."""
    with opened(source, changes, out, resume=resume, say=say) as (federation, store):
        place = Workplace(federation)
        for note in (*place.data.report.left_out, *place.data.report.notes):
            say(note)
        method = method_of(place)
        return serve(Server(place, method, store, InProcess(place, method), say), out)


def serve(server: Server, out: Path) -> dict[str, Any]:
    """Run the rounds of a server, keep its report up to date, and write what came out."""
    written = -PAUSE

    def refresh() -> None:
        nonlocal written
        if time.monotonic() - written >= PAUSE:
            write_reports(server.place.federation, server.store, out)
            written = time.monotonic()

    server.run(refresh)
    where = server.method.publish(server.store.state()[1], out)
    server.say(f"written: {where}")
    return write_reports(server.place.federation, server.store, out)


def report_in(out: Path) -> dict[str, Any]:
    """Return the report of the federation in a folder. Raises `GraftError` for a folder that holds none."""
    kept = read_json(out / FEDERATION)
    federation = replace(read_federation(kept["federation"]), name=kept["name"])
    if not (out / FILE).is_file():
        raise GraftError(f"{out} holds {FEDERATION}, but {FILE} is missing")
    store = Store.open(out / FILE, None)
    try:
        return report_of(federation, store)
    finally:
        store.close()
