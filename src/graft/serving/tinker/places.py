"""Where a training service keeps what it has: checkpoints by their tinker:// paths, samplers, snapshots."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from graft.errors import GraftError

FOLDERS = {"weights": "training", "sampler_weights": "sampler"}
"""The middle part of a path -> the type of checkpoint, as listings have it."""
_PATH = re.compile(r"tinker://([A-Za-z0-9:_\-]+)/([a-z_]+)/([A-Za-z0-9][A-Za-z0-9._\-]*)")


@dataclass(frozen=True)
class Place:
    """A checkpoint's address: tinker://MODEL/KIND/NAME."""

    model: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.model}/{self.kind}/{self.name}"

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.name}"


def place_of(text: str) -> Place:
    """Read an address. Raises `GraftError` for anything else."""
    found = _PATH.fullmatch(text)
    if found is None or found[2] not in FOLDERS:
        kinds = " or ".join(FOLDERS)
        raise GraftError(f"a checkpoint is tinker://MODEL/KIND/NAME, with KIND {kinds}; given: {text[:200]!r}")
    return Place(*found.groups())


def adapter_name(owner: str) -> str:
    """Return the name under which the adapter of a model or sampler is attached."""
    return owner.replace(":", "_")


def model_id(session: str, number: int) -> str:
    """Return the id of a session's model, as clients compose it too."""
    return f"{session}:train:{number}"


def sampler_id(session: str, number: int) -> str:
    """Return the id of a session's sampler."""
    return f"{session}:sample:{number}"


def session_of(owner: str) -> str:
    """Return the session of a model or sampler."""
    return owner.partition(":")[0]


class Places:
    """The folders of one service."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def checkpoint(self, place: Place) -> Path:
        return self.root / "checkpoints" / adapter_name(place.model) / place.kind / place.name

    def sampler(self, name: str) -> Path:
        return self.root / "samplers" / adapter_name(name)

    def snapshot(self, tick: int) -> Path:
        return self.root / "snapshots" / str(tick)
