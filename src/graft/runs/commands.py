"""The commands that a user gives to a run while it trains: files in its folder, which the run reads between steps.

    jobs/inbox/<id>.json     a command that was given and not yet taken; written under a temporary name and renamed
    jobs/journal.jsonl       the commands taken, each with the step after which it took effect

A command enters the journal before it leaves the inbox, and its id identifies it. So a run that is killed in between takes it once. A
resumed run takes the commands that came after its checkpoint from the journal, after the same steps as before:

    checkpoint at step 4; "cancel b" taken after step 5; killed at step 7
    resumed at step 4:    "cancel b" is taken after step 5 again
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.utils.files import write_json_atomic
from graft.utils.jsonl import JsonLines, read_json
from graft.utils.temporary import remove_if_left

Command = dict[str, Any]
"""{"do": submit, cancel or priority; "job": name}; submit also has "config", and priority has "priority". A file without a valid command
is read as {"do": "unknown", "job": the file's name, "reason": what is wrong with it}."""
FIELDS: dict[str, dict[str, type]] = {"submit": {"config": dict}, "cancel": {}, "priority": {"priority": int}}
"""The further fields of each command, with their types."""


class CommandQueue:
    """The commands of one run: `put` them from outside; the run asks whether any are `due` and takes them."""

    def __init__(self, folder: Path) -> None:
        self.inbox, self.journal = folder / "jobs" / "inbox", JsonLines(folder / "jobs" / "journal.jsonl")
        self.done, self._to_repeat = 0, self.journal.read()

    def skip(self, done: int) -> None:
        """Skip the first commands of the journal, because a checkpoint already contains their effects."""
        self.done, self._to_repeat = done, self.journal.read()[done:]

    def put(self, do: str, job: str, **more: Any) -> None:
        """Give a command. The run takes it before its next step, or when it is resumed."""
        self.inbox.mkdir(parents=True, exist_ok=True)
        for left in self.inbox.glob(".*.tmp"):  # of a process that was killed while it gave a command
            remove_if_left(left)
        before = [path.stem for path in self._files()] + [command["id"] for command in self.journal.read()]
        latest = max((int(each[:20]) for each in before if each[:20].isdecimal()), default=0)
        number = f"{max(time.time_ns(), latest + 1):020d}-{os.getpid()}"  # the clock may have gone back
        write_json_atomic(self.inbox / f"{number}.json", {"id": number, "do": do, "job": job, **more})

    def pending(self) -> list[Command]:
        """Return the commands in the inbox, in the order in which they were given."""
        return [command for path in self._files() if (command := _read(path)) is not None]

    def due(self, step: int) -> bool:
        """Whether there are commands to take after this many steps."""
        return self._to_repeat[0]["step"] <= step if self._to_repeat else bool(self._files())

    def take(self, step: int) -> list[Command]:
        """Return the commands that take effect after this many steps: first those that a resumed run repeats, then new ones."""
        taken = [command for command in self._to_repeat if command["step"] <= step]
        self._to_repeat = self._to_repeat[len(taken) :]
        if not self._to_repeat:
            taken += self._take_new(step)
        self.done += len(taken)
        return taken

    def _files(self) -> list[Path]:
        return sorted(self.inbox.glob("[!.]*.json")) if self.inbox.is_dir() else []

    def _take_new(self, step: int) -> list[Command]:
        """Move the commands of the inbox to the journal. A kill at any point loses none and repeats none."""
        known = {command["id"] for command in self.journal.read()}
        new = [{**command, "step": step} for command in self.pending() if command["id"] not in known]
        for command in new:
            self.journal.append(command)
        self.journal.sync()
        for path in self._files():
            if path.stem in known | {command["id"] for command in new}:
                path.unlink()
        return new


def _read(path: Path) -> Command | None:
    """Read a command file; its name is the id. Return None if the run has just taken it.

    Anything can lie in the inbox, and no file may stop the run: an invalid one becomes a command "unknown" with the reason.
    """
    unknown = {"id": path.stem, "do": "unknown", "job": path.name}
    try:
        command = read_json(path)
    except FileNotFoundError:
        return None
    except GraftError as error:
        return {**unknown, "reason": str(error)}
    fields = FIELDS.get(str(command.get("do")))
    if fields is None or any(not isinstance(command.get(key), kind) for key, kind in {"job": str, **fields}.items()):
        allowed = "; ".join(f"{do} has {' and '.join(['job', *more])}" for do, more in FIELDS.items())
        return {**unknown, "reason": f"it is not a valid command: {allowed}"}
    return {**command, "id": path.stem}
