"""Who trains on a server and what waits, as its state folder says: read from the database, by the server itself or by anybody beside it."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.serving.tinker.places import session_of
from graft.serving.tinker.promises import FILE
from graft.utils.files import stamps


@dataclass
class Tenant:
    """One model in training."""

    name: str
    kind: str
    session: str
    steps: int = 0
    """Updates so far."""
    running: list[str] = field(default_factory=list)
    """What runs now."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Requests that wait, by what they ask for."""
    gap: int | None = None
    """The number of the request that the others wait for, where it has not arrived."""

    @property
    def state(self) -> str:
        """What it does, in a word."""
        if self.running:
            return "runs"
        if self.gap is not None:
            return "waits for the client"
        return "waits" if self.waiting else "idle"


@dataclass
class Queue:
    """What a training service does."""

    tenants: list[Tenant]
    samples: dict[str, int]
    """Samples that are not drawn yet, by session."""
    sessions: int
    """Sessions that are open."""
    checkpoints: int

    @property
    def waiting(self) -> int:
        """Requests to models that wait."""
        return sum(sum(each.waiting.values()) for each in self.tenants)


def read_queue(state: Path) -> Queue:
    """Read what the service in a folder does. Raises `GraftError` for a folder of none."""
    path = state / FILE
    if not path.is_file():
        raise GraftError(f"{state} is not the state of a training service: it has no {FILE}")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)) as store:
            store.execute("begin")  # all of one moment
            records: dict[str, dict[str, Any]] = defaultdict(dict)
            for kind, name, about in store.execute("select kind, id, about from records order by rowid"):
                records[kind][name] = json.loads(about)
            tenants = {name: its for name, its in _tenants(records) if not its.get("closed")}
            return _queue(store, tenants, records)
    except (sqlite3.Error, ValueError) as error:
        raise GraftError(f"{path} cannot be read: {error}") from error


def _tenants(records: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    over = {name for name, about in records["session"].items() if about.get("finished")}
    for name, about in records["model"].items():
        if about["session"] not in over:
            yield name, about


def _queue(store: sqlite3.Connection, about: dict[str, dict[str, Any]], records: dict[str, dict[str, Any]]) -> Queue:
    tenants = {name: Tenant(name, _kind(its["adapter"]), its["session"]) for name, its in about.items()}
    samples, lowest, reached = Counter[str](), dict[str, int](), Counter[str]()
    for owner, kind, taken, done, count, first, last in store.execute(
        "select owner, kind, tick is not null, form is not null, count(*), min(seq), max(seq) from promises "
        "group by owner, kind, tick is not null, form is not null"
    ):
        if kind == "sample":
            samples[session_of(owner)] += 0 if done else count
            continue
        if (tenant := tenants.get(owner)) is None:
            continue
        word = kind.partition(":")[0]
        reached[owner] = max(reached[owner], last + 1 if taken or done else 0)
        tenant.steps += count if word == "optim_step" and done else 0
        if not done and taken:
            tenant.running.append(word)
        if not done and not taken:
            tenant.waiting[word] += count
            lowest[owner] = min(first, lowest.get(owner, first))
    for owner, first in lowest.items():
        tenants[owner].gap = reached[owner] if first > reached[owner] else None
    return Queue(
        list(tenants.values()),
        {session: count for session, count in samples.items() if count},
        sum(not its.get("finished") for its in records["session"].values()),
        len(records["checkpoint"]),
    )


def _kind(adapter: dict[str, Any]) -> str:
    """What an adapter is, in a few words: its kind and its size."""
    size = next((f" {adapter[key]}" for key in ("rank", "bottleneck", "tokens") if key in adapter), "")
    return f"{adapter.get('kind', '?')}{size}"


def signature(state: Path) -> tuple[tuple[int, int], ...]:
    """What changes when the queue does."""
    return stamps(sorted(state.glob(f"{FILE}*")))
