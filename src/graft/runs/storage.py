"""What a folder of Graft remembers in one SQLite file, so that a process that is killed loses nothing and repeats nothing.

A `Storage` has facts by name, and the tables that a subclass adds. Every change is one transaction.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

from graft.errors import GraftError
from graft.utils.files import to_json

PATIENCE = 600.0
"""Seconds to wait for another process's transaction; one that asks NOMAD takes seconds."""
_FACTS = "create table if not exists facts (name text primary key, value text not null);"


class Storage:
    """The storage of one thing, which is known by the digest of what its results depend on."""

    what: ClassVar[str]
    """What it is the storage of, for messages and as the name of the fact that holds it."""
    tables: ClassVar[str]
    """The statements that make its tables."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
        self._inside = 0

    @classmethod
    def open(cls, path: Path, known_as: Mapping[str, Any] | None) -> Self:
        """Open the storage of what is known as this, or make it; None opens whichever is there.

        Raises `GraftError` for the storage of another one, or a file that is none.
        """
        digest = None if known_as is None else hashlib.sha256(to_json(known_as).encode()).hexdigest()
        store = cls(path)
        try:
            with store.transaction():
                for statement in filter(str.strip, f"{_FACTS}{cls.tables}".split(";")):
                    store.execute(statement)
                known = store.fact("digest")
                if known is None and digest is not None:
                    store.set_fact("digest", digest)
                    store.set_fact(cls.what, to_json(known_as))
        except sqlite3.DatabaseError as error:
            raise GraftError(f"{path} is not the storage of a {cls.what}: {error}") from error
        if known_as is not None and known is not None and known != digest:
            changed = differing(json.loads(store.fact(cls.what) or "{}"), json.loads(to_json(known_as)))
            raise GraftError(
                f"{path} belongs to another {cls.what}, which differs in {', '.join(changed[:6])}: give the settings that it began with, "
                "or another folder with --out"
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


def differing(first: Any, second: Any, name: str = "") -> list[str]:
    """Return the dotted names of what differs between two descriptions of one thing."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = dict.fromkeys([*first, *second])
        return [
            each for key in keys for each in differing(first.get(key), second.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if first == second else [name.removeprefix("study.").removeprefix("run.")]
