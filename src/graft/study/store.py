"""What is known of a study's points, trials and joint runs, in one SQLite file, so that several processes work on one study.

    points   what to try: the settings, and the codes of a search
    trials   one per point and seed, never two: waiting, running, done, failed, or infeasible (would not fit into memory)
    packs    joint runs: which trials they hold; a running one belongs to the process that holds its lock

Every change is one transaction, so that a process that is killed loses none and repeats none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.runs.storage import Storage
from graft.utils.files import to_json

FILE = "study.sqlite"
_TABLES = """
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


class Store(Storage):
    """The store of one study."""

    what, tables = "study", _TABLES

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
