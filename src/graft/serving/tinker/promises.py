"""What a training service has promised, in one SQLite file: it is on the disk before a client hears of it.

    promises  one per request that changes or makes something. A key (a model and its sequence number, ...) has one, never two
    ends      samples in the order in which they got their results, until their client has them
    ticks     which promises the engine took together, written before it begins. Those after the last snapshot run again after a crash
    records   sessions, models, samplers and checkpoints, by kind and id

Everything that one tick changes is one transaction.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from graft.errors import GraftError
from graft.runs.storage import Storage

FILE = "service.sqlite"
_TABLES = """
create table if not exists promises (
    id integer primary key, key text not null unique, kind text not null, owner text not null, seq integer not null, digest blob not null,
    content blob, tick integer, form text, result blob);
create index if not exists promises_by_owner on promises (owner, seq);
create table if not exists ticks (id integer primary key, promises text not null);
create table if not exists ends (number integer primary key autoincrement, promise integer not null unique, owner text not null);
create index if not exists ends_by_owner on ends (owner, number);
create table if not exists records (kind text not null, id text not null, about text not null, primary key (kind, id));
"""


@dataclass(frozen=True)
class Promise:
    """A request that was accepted."""

    id: int
    kind: str
    owner: str
    """The model or sampler that it is for."""
    seq: int
    content: bytes

    @property
    def name(self) -> str:
        """What a client knows it by."""
        return f"request-{self.id}"


def number_of(name: str) -> int:
    """Return the id in a promise's name. Raises `KeyError` for what is no such name."""
    found = re.fullmatch(r"request-([0-9]{1,18})", name)
    if found is None:
        raise KeyError(name)
    return int(found[1])


@dataclass(frozen=True)
class Result:
    """What came of a promise: a protobuf message, or JSON."""

    form: str
    """"protobuf" or "json"."""
    body: bytes

    @classmethod
    def json(cls, fields: Mapping[str, Any]) -> Self:
        return cls("json", json.dumps(fields).encode())

    @classmethod
    def failed(cls, message: str, category: str = "user") -> Self:
        """Return the result of a request that failed. category: user or server."""
        return cls.json({"error": message, "category": category})


DELIVERED = Result.failed("the client has had this result")


@dataclass(frozen=True)
class Record:
    """A session, model, sampler or checkpoint as it is from now on; None if it is gone."""

    kind: str
    id: str
    about: Mapping[str, Any] | None


class OtherContent(GraftError):
    """A key was used before, for a request with other content."""


class Promises(Storage):
    """The promises of one service. It belongs to one thread."""

    what, tables = "service", _TABLES

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.execute("pragma journal_mode = wal")
        self.execute("pragma synchronous = full")

    def promise(
        self, key: Sequence[Any], kind: str, owner: str, seq: int, content: bytes, canonical: bytes
    ) -> tuple[Promise, bool]:
        """Return the promise of a key, and whether it is new. canonical: equal bytes for equal content.

        Raises `OtherContent`.
        """
        text, digest = json.dumps(list(key)), hashlib.sha256(canonical).digest()
        with self.transaction():
            known = self.execute("select id, digest from promises where key = ?", (text,)).fetchone()
            if known is not None:
                if known[1] != digest:
                    raise OtherContent(f"another request was sent before as number {seq} of {owner}")
                return Promise(known[0], kind, owner, seq, content), False
            made = self.execute(
                "insert into promises (key, kind, owner, seq, digest, content) values (?, ?, ?, ?, ?, ?)",
                (text, kind, owner, seq, digest, content),
            ).lastrowid
        assert made is not None
        return Promise(made, kind, owner, seq, content), True

    def result(self, number: int) -> Result | None:
        """Return what came of a promise, None if nothing has yet. Raises `KeyError` for one that was never given."""
        found = self.execute("select form, result from promises where id = ?", (number,)).fetchone()
        if found is None:
            raise KeyError(number)
        return None if found[0] is None else Result(*found)

    def begin(self, promises: Sequence[Promise]) -> int:
        """Note that these run together now; returns the number of the tick."""
        with self.transaction():
            tick = self.execute(
                "insert into ticks (promises) values (?)", (json.dumps([each.id for each in promises]),)
            ).lastrowid
            self._mark(tick, promises)
        assert tick is not None
        return tick

    def _mark(self, tick: int | None, promises: Iterable[Promise]) -> None:
        for each in promises:
            self.execute("update promises set tick = ? where id = ?", (tick, each.id))

    def settle(self, results: Mapping[int, Result], records: Iterable[Record] = ()) -> None:
        """Keep results by promise, and records. A result that is there already stays."""
        with self.transaction():
            for number, result in results.items():
                self.execute(
                    "update promises set form = ?, result = ?, content = iif(kind = 'sample', null, content) "
                    "where id = ? and form is null",
                    (result.form, result.body, number),
                )
                self.execute(
                    "insert or ignore into ends (promise, owner) select id, owner from promises where id = ? and kind = 'sample'",
                    (number,),
                )
            for record in records:
                self.put(record)

    def ended(self, owner: str, clone: int, after: int) -> list[tuple[int, int, int | None]]:
        """Return the samples of a clone of a sampler that have ended since a number: number, promise, and bytes, None if it failed."""
        return self.execute(
            "select ends.number, promises.id, iif(promises.form = 'protobuf', length(promises.result), null) from ends "
            "join promises on promises.id = ends.promise "
            "where ends.owner = ? and ends.number > ? and promises.seq / 1000000000 = ? order by ends.number limit 1000",
            (owner, after, clone),
        ).fetchall()

    def acknowledge(self, owner: str, clone: int, until: int, got: Sequence[int]) -> None:
        """Note that a client has heard of the ends up to a number, and that it has some results, which need not be kept."""
        with self.transaction():
            self.execute(
                "delete from ends where owner = ? and number <= ? and promise in "
                "(select id from promises where owner = ? and seq / 1000000000 = ?)",
                (owner, until, owner, clone),
            )
            for number in got:
                self.execute(
                    "update promises set form = ?, result = ? where id = ? and owner = ? and form is not null",
                    (DELIVERED.form, DELIVERED.body, number, owner),
                )

    def put(self, record: Record) -> None:
        if record.about is None:
            self.execute("delete from records where kind = ? and id = ?", (record.kind, record.id))
        else:
            about = json.dumps(record.about)
            self.execute("insert or replace into records values (?, ?, ?)", (record.kind, record.id, about))

    def records(self) -> list[Record]:
        rows = self.execute("select kind, id, about from records order by rowid")
        return [Record(kind, name, json.loads(about)) for kind, name, about in rows]

    def waiting(self) -> list[Promise]:
        """Return the promises that are in no tick and have no result, in the order in which they were given."""
        rows = self.execute(
            "select id, kind, owner, seq, content from promises where tick is null and form is null order by id"
        )
        return [Promise(*row) for row in rows]

    def reached(self) -> dict[str, int]:
        """Return the next sequence number of each model that has been in a tick, or was refused before it was."""
        return dict(
            self.execute(
                "select owner, max(seq) + 1 from promises where kind not in ('sample', 'close') "
                "and (tick is not null or form is not null) group by owner"
            ).fetchall()
        )

    def ticks_after(self, tick: int) -> list[list[tuple[Promise, bool]]]:
        """Return the ticks after one, each as its promises and whether they have a result."""
        found = []
        for (text,) in self.execute("select promises from ticks where id > ? order by id", (tick,)).fetchall():
            rows = [
                self.execute(
                    "select id, kind, owner, seq, content, form is not null from promises where id = ?", (number,)
                ).fetchone()
                for number in json.loads(text)
            ]
            found.append([(Promise(*row[:5]), bool(row[5])) for row in rows])
        return found

    def snapshot(self, tick: int, folder: str) -> None:
        """Note that a folder holds the engine's state after a tick. What came before need not run again, so its contents go."""
        with self.transaction():
            self.set_fact("snapshot", json.dumps([tick, folder]))
            self.execute("update promises set content = null where tick <= ?", (tick,))
            self.execute(
                "delete from ticks where id < ?", (tick,)
            )  # the last one stays: its number must not be given again

    @property
    def last_tick(self) -> int:
        """The number of the last tick, 0 before the first."""
        return self.execute("select coalesce(max(id), 0) from ticks").fetchone()[0]

    @property
    def last_snapshot(self) -> tuple[int, str | None]:
        """The tick of the last snapshot and its folder; 0 and None before the first."""
        text = self.fact("snapshot")
        return tuple(json.loads(text)) if text else (0, None)

    def forget(self, owners: Sequence[str], result: Result) -> None:
        """Drop the results of models and samplers whose session is over; a client that still asks gets this result."""
        with self.transaction():
            for owner in owners:
                self.execute(
                    "update promises set form = ?, result = ? where owner = ? and form is not null",
                    (result.form, result.body, owner),
                )
                self.execute("delete from ends where owner = ?", (owner,))
                # What was in a tick may have to run again until the next snapshot.
                self.execute("update promises set content = null where owner = ? and tick is null", (owner,))

    def drop(self, session: str) -> bool:
        """Delete the promises of a session that is over. Returns whether that could be: what ran since the snapshot may run again."""
        owned = "owner >= ? and owner < ?"
        own = (f"{session}:", f"{session};")  # ";" comes after ":"
        with self.transaction():
            if self.execute(
                f"select 1 from promises where {owned} and tick > ?", (*own, self.last_snapshot[0])
            ).fetchone():
                return False
            self.execute(f"delete from ends where {owned}", own)
            self.execute(f"delete from promises where {owned}", own)
        return True
