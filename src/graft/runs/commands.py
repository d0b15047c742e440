"""What is asked of a run while it trains: files in its folder, which the run reads between steps.

    jobs/inbox/<id>.json     an order that was placed and not yet taken; written beside its place and renamed
    jobs/journal.jsonl       the orders taken, each with the step after which it took effect

An order enters the journal before it leaves the inbox, and is known by its id, so that a run killed in between takes it once. A resumed
run takes the orders behind its checkpoint from the journal, after the same steps as before.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.utils.files import write_json_atomic
from graft.utils.jsonl import JsonLines, read_json

Command = dict[str, Any]
"""{"do": submit, cancel or priority; "job": name}; submit has "config", priority has "priority". A file that holds nothing of the kind
is {"do": "unknown", "job": the file's name, "reason": what is wrong with it}."""
NEEDS: dict[str, dict[str, type]] = {"submit": {"config": dict}, "cancel": {}, "priority": {"priority": int}}
"""What an order says besides the job, by what is to be done."""


class CommandQueue:
    """The orders of one run."""

    def __init__(self, folder: Path) -> None:
        self.inbox, self.journal = folder / "jobs" / "inbox", JsonLines(folder / "jobs" / "journal.jsonl")
        self.done, self._behind = 0, self.journal.read()

    def skip(self, done: int) -> None:
        """So many orders of the journal have taken effect already."""
        self.done, self._behind = done, self.journal.read()[done:]

    def put(self, do: str, job: str, **more: Any) -> None:
        """Ask for something. The run takes it before its next step, or when it is resumed."""
        self.inbox.mkdir(parents=True, exist_ok=True)
        number = f"{time.time_ns():020d}-{os.getpid()}"
        write_json_atomic(self.inbox / f"{number}.json", {"id": number, "do": do, "job": job, **more})

    def pending(self) -> list[Command]:
        """What is in the inbox, in the order of asking."""
        return [order for path in self._files() if (order := _read(path)) is not None]

    def due(self, step: int) -> bool:
        """Whether there is something to take after this many steps."""
        return self._behind[0]["step"] <= step if self._behind else bool(self._files())

    def take(self, step: int) -> list[Command]:
        """The orders that take effect after this many steps: those that did so before a kill, then new ones."""
        taken = [order for order in self._behind if order["step"] <= step]
        self._behind = self._behind[len(taken) :]
        if not self._behind:
            taken += self._new(step)
        self.done += len(taken)
        return taken

    def _files(self) -> list[Path]:
        return sorted(self.inbox.glob("[!.]*.json")) if self.inbox.is_dir() else []

    def _new(self, step: int) -> list[Command]:
        known = {order["id"] for order in self.journal.read()}
        fresh = [{**order, "step": step} for order in self.pending() if order["id"] not in known]
        for order in fresh:
            self.journal.append(order)
        self.journal.sync()
        for path in self._files():
            if path.stem in known | {order["id"] for order in fresh}:
                path.unlink()
        return fresh


def _read(path: Path) -> Command | None:
    """A file of the inbox, which is known by its name; None where the run has just taken it. Whoever wrote it, the run goes on."""
    unknown = {"id": path.stem, "do": "unknown", "job": path.name}
    try:
        order = read_json(path)
    except FileNotFoundError:
        return None
    except GraftError as error:
        return {**unknown, "reason": str(error)}
    needs = NEEDS.get(str(order.get("do")))
    if needs is None or any(not isinstance(order.get(key), kind) for key, kind in {"job": str, **needs}.items()):
        said = "; ".join(f"{do} names {' and '.join(['job', *more])}" for do, more in NEEDS.items())
        return {**unknown, "reason": f"it is no order: {said}"}
    return {**order, "id": path.stem}
