"""What is known of a study's points, trials and joint runs, in one SQLite file, so that several processes work on one study.

    points   what to try: the settings, and the codes of a search
    trials   one per point and seed, never two: waiting, running, done, failed, or infeasible (would not fit into memory)
    packs    joint runs: which trials they hold; a running one belongs to the process that holds its lock

Every change is one transaction, so that a process that is killed loses none and repeats none.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.utils.files import to_json

FILE = "study.sqlite"
PATIENCE = 600.0
"""Seconds to wait for another process's transaction; one that asks NOMAD takes seconds."""
_TABLES = """
create table if not exists facts (name text primary key, value text not null);
create table if not exists points (id integer primary key, known text not null unique, settings text not null, codes text);
create table if not exists packs (id integer primary key, state text not null);
create table if not exists trials (
    id integer primary key, point integer not null references points, seed integer not null, state text not null,
    pack integer references packs, alone integer not null default 0, result text, error text, unique (point, seed));
"""


@dataclass(frozen=True)
class Trial:
    """One point with one seed."""

    id: int
    point: int
    seed: int
    settings: dict[str, Any]
    codes: dict[str, Any] | None
    state: str
    pack: int | None
    alone: bool
    """Whether it runs by itself, since a joint run with it could not begin."""
    result: dict[str, Any] | None
    error: str | None

    @property
    def job(self) -> str:
        """The name of its job in the joint run."""
        return f"t{self.id:04d}"


class Store:
    """The store of one study. digest: what the study is known by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        self._inside = 0

    @classmethod
    def open(cls, path: Path, study: Mapping[str, Any] | None) -> Store:
        """Open the store of a study, or make it; None opens whichever is there.

        Raises `GraftError` for the store of another study, or a file that is none.
        """
        digest = None if study is None else hashlib.sha256(to_json(study).encode()).hexdigest()
        store = cls(path)
        try:
            with store.transaction():
                for statement in filter(str.strip, _TABLES.split(";")):
                    store.execute(statement)
                known = store.fact("digest")
                if known is None and digest is not None:
                    store.set_fact("digest", digest)
                    store.set_fact("study", to_json(study))
        except sqlite3.DatabaseError as error:
            raise GraftError(f"{path} is not the storage of a study: {error}") from error
        if study is not None and known is not None and known != digest:
            changed = _differing(json.loads(store.fact("study") or "{}"), json.loads(to_json(study)))
            raise GraftError(
                f"{path} belongs to another study, which differs in {', '.join(changed[:6])}: give the settings that it began with, or "
                "another folder with --out"
            )
        return store

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of a block of code, or none. Other processes wait."""
        if self._inside:
            yield
            return
        self.execute("begin immediate")
        self._inside = 1
        try:
            yield
        except BaseException:
            self.execute("rollback")
            raise
        else:
            self.execute("commit")
        finally:
            self._inside = 0

    def close(self) -> None:
        self._connection.close()

    def fact(self, name: str) -> str | None:
        found = self.execute("select value from facts where name = ?", (name,)).fetchone()
        return None if found is None else found[0]

    def set_fact(self, name: str, value: str) -> None:
        self.execute("insert or replace into facts values (?, ?)", (name, value))

    def add_point(
        self, settings: Mapping[str, Any], seeds: Sequence[int], codes: Mapping[str, Any] | None = None
    ) -> bool:
        """Add a point with a trial for each seed; False if it is there already."""
        known = json.dumps(settings, sort_keys=True)
        with self.transaction():
            if self.execute("select 1 from points where known = ?", (known,)).fetchone():
                return False
            point = self.execute(
                "insert into points (known, settings, codes) values (?, ?, ?)",
                (known, json.dumps(settings), None if codes is None else json.dumps(codes)),
            ).lastrowid
            for seed in seeds:
                self.execute("insert into trials (point, seed, state) values (?, ?, 'waiting')", (point, seed))
        return True

    def trials(self, state: str | None = None, pack: int | None = None) -> list[Trial]:
        """Return trials in the order in which they were added."""
        rows = self.execute(
            "select t.id, t.point, t.seed, p.settings, p.codes, t.state, t.pack, t.alone, t.result, t.error from trials t "
            "join points p on p.id = t.point where (?1 is null or t.state = ?1) and (?2 is null or t.pack = ?2) order by t.id",
            (state, pack),
        ).fetchall()
        return [
            Trial(
                row[0], row[1], row[2], json.loads(row[3]), None if row[4] is None else json.loads(row[4]), row[5], row[6],
                bool(row[7]), None if row[8] is None else json.loads(row[8]), row[9],
            )
            for row in rows
        ]  # fmt: skip

    def points(self) -> int:
        return self.execute("select count(*) from points").fetchone()[0]

    def running_packs(self) -> list[int]:
        return [row[0] for row in self.execute("select id from packs where state = 'running' order by id")]

    def add_pack(self, trials: Sequence[Trial]) -> int:
        """Note that these trials run together from now on; returns the number of the joint run."""
        with self.transaction():
            pack = self.execute("insert into packs (state) values ('running')").lastrowid
            assert pack is not None
            for trial in trials:
                changed = self.execute(
                    "update trials set state = 'running', pack = ? where id = ? and state = 'waiting'", (pack, trial.id)
                ).rowcount
                assert changed == 1, "a trial that waits is taken once"
        return pack

    def finish(self, pack: int, outcomes: Mapping[int, tuple[str, dict[str, Any] | None, str | None]]) -> None:
        """Record (state, result, error) of a joint run's trials, by their ids, and that it is over."""
        with self.transaction():
            for trial, (state, result, error) in outcomes.items():
                self.execute(
                    "update trials set state = ?, result = ?, error = ? where id = ? and pack = ?",
                    (state, None if result is None else to_json(result), error, trial, pack),
                )
            self.execute("update packs set state = 'done' where id = ?", (pack,))

    def separate(self, pack: int) -> None:
        """Let the trials of a joint run that could not begin wait again, each to run alone."""
        with self.transaction():
            self.execute("update trials set state = 'waiting', pack = null, alone = 1 where pack = ?", (pack,))
            self.execute("update packs set state = 'separated' where id = ?", (pack,))

    def refuse(self, trial: Trial, reason: str) -> None:
        """Note that a waiting trial would not fit into memory."""
        self.execute("update trials set state = 'infeasible', error = ? where id = ?", (reason, trial.id))

    def counts(self) -> dict[str, int]:
        return dict(self.execute("select state, count(*) from trials group by state").fetchall())


def _differing(first: Any, second: Any, name: str = "") -> list[str]:
    """Return the dotted names of what differs between two studies."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = dict.fromkeys([*first, *second])
        return [
            each for key in keys for each in _differing(first.get(key), second.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if first == second else [name.removeprefix("study.").removeprefix("run.")]
