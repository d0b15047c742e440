"""What the server of a federation remembers, in one SQLite file: rounds, the state after the last one, and what each client sent.

    rounds     number, clients that were chosen, scores and notes once it is closed
    updates    one for each client of a round, never two: what it sent until the round is closed, or why it was left out
    states     the server's tensors after the last closed round

An update is there or not, and closing a round changes state, round and updates at once: whenever the server is killed, nothing is lost that
arrived, and nothing counts twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load

from graft.federation.messages import Message, Tensors, decoded, packed
from graft.runs.storage import Storage
from graft.utils.files import to_json

FILE = "federation.sqlite"
_TABLES = """
create table if not exists rounds (number integer primary key, chosen text not null, closed integer not null default 0,
    scores text, notes text, seconds real);
create table if not exists updates (round integer not null, client text not null, reason text, down integer not null,
    up integer not null, seconds real, payload blob, unique (round, client));
create table if not exists states (id integer primary key check (id = 0), round integer not null, tensors blob not null);
create table if not exists clients (name text primary key, rows integer not null);
"""


@dataclass(frozen=True)
class Round:
    """A round that is closed, as the report shows it. Round 0 is the model before the first one."""

    number: int
    chosen: list[str]
    scores: dict[str, float]
    notes: dict[str, float]
    seconds: float


class Store(Storage):
    """The store of one federation."""

    what, tables = "federation", _TABLES

    def begin(self, state: Tensors, clients: Mapping[str, int]) -> None:
        """Note the state before the first round, and the clients that are known with their numbers of rows."""
        with self.transaction():
            self.execute("insert or ignore into states values (0, 0, ?)", (packed(state),))
            for name, rows in clients.items():
                self.execute("insert or replace into clients values (?, ?)", (name, rows))

    @property
    def begun(self) -> bool:
        """Whether the state before the first round is noted."""
        return self.execute("select 1 from states").fetchone() is not None

    def done(self) -> int:
        """The number of the last closed round, 0 at first."""
        return self.execute("select round from states").fetchone()[0]

    def state(self) -> tuple[int, Tensors]:
        """The number of the last closed round (0 at first), and the state after it."""
        number, data = self.execute("select round, tensors from states").fetchone()
        return number, load(data)

    def clients(self) -> dict[str, int]:
        """The clients that are known, with their numbers of rows, in the order of their names."""
        return dict(self.execute("select name, rows from clients order by name").fetchall())

    def chosen(self, number: int) -> list[str] | None:
        """The clients of a round; None if it has not begun."""
        found = self.execute("select chosen from rounds where number = ?", (number,)).fetchone()
        return None if found is None else json.loads(found[0])

    def begin_round(self, number: int, chosen: Sequence[str]) -> None:
        self.execute("insert into rounds (number, chosen) values (?, ?)", (number, json.dumps(list(chosen))))

    def deliver(self, number: int, client: str, down: int, payload: bytes, up: int, seconds: float) -> None:
        """Note what a client sent. What it sends again counts for nothing."""
        self.execute(
            "insert or ignore into updates values (?, ?, null, ?, ?, ?, ?)",
            (number, client, down, up, seconds, payload),
        )

    def leave_out(self, number: int, client: str, reason: str, down: int) -> None:
        """Note that a client takes no part in a round, and why."""
        self.execute("insert or ignore into updates values (?, ?, ?, ?, 0, null, null)", (number, client, reason, down))

    def ask_again(self, number: int) -> None:
        """Forget who was left out of an open round."""
        self.execute("delete from updates where round = ? and reason is not null", (number,))

    def arrived(self, number: int) -> list[str]:
        """The clients that sent something in an open round, in the order of their names."""
        rows = self.execute(
            "select client from updates where round = ? and payload is not null order by client", (number,)
        )
        return [client for (client,) in rows]

    def update(self, number: int, client: str) -> Message:
        """What a client sent in an open round."""
        row = self.execute("select payload from updates where round = ? and client = ?", (number, client)).fetchone()
        return decoded(row[0])

    def left_out(self, number: int | None = None) -> list[dict[str, Any]]:
        """Who was left out of a round, or of any round, and why."""
        rows = self.execute(
            "select round, client, reason from updates where reason is not null and (?1 is null or round = ?1) order by round, client",
            (number,),
        )
        return [dict(zip(("round", "client", "reason"), row, strict=True)) for row in rows]

    def close_round(
        self, number: int, state: Tensors, scores: Mapping[str, float], notes: Mapping[str, float], seconds: float
    ) -> None:
        """Take a round's state for the federation's, all at once."""
        with self.transaction():
            self.execute("update states set round = ?, tensors = ?", (number, packed(state)))
            self.execute("update updates set payload = null where round = ?", (number,))
            self.execute(
                "insert into rounds values (?1, '[]', 1, ?2, ?3, ?4) on conflict (number) do update set closed = 1, scores = ?2, "
                "notes = ?3, seconds = ?4",
                (number, to_json(scores), to_json(notes), seconds),
            )

    def rounds(self) -> list[Round]:
        """All closed rounds."""
        rows = self.execute(
            "select number, chosen, scores, notes, seconds from rounds where closed order by number"
        ).fetchall()
        return [Round(row[0], json.loads(row[1]), json.loads(row[2]), json.loads(row[3]), row[4]) for row in rows]

    def traffic(self) -> list[dict[str, Any]]:
        """What each client received and sent in all closed rounds together."""
        rows = self.execute(
            "select client, count(*) filter (where reason is null), count(*) filter (where reason is not null), sum(down), sum(up), "
            "sum(seconds) from updates group by client order by client"
        )
        names = ("client", "rounds", "left_out", "down", "up", "seconds")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def bytes_per_client(self, number: int) -> tuple[float, float]:
        """The mean bytes down and up of the clients that took part in a round."""
        return self.execute(
            "select coalesce(avg(down), 0), coalesce(avg(up), 0) from updates where round = ? and reason is null",
            (number,),
        ).fetchone()
