"""YAML text as plain values, with limits: a text from anywhere is read within seconds or refused with the reason."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from graft.errors import GraftError

Key = str | int
KeyPath = tuple[Key, ...]
MOST_BYTES = 2_000_000
"""Largest YAML file."""
MOST_VALUES = 100_000
"""Most values in a file, with aliases written out: a few lines of aliases can stand for billions."""
MOST_DEPTH = 40
"""Most mappings and lists inside one another."""
LARGEST = 2**63 - 1
"""Largest whole number, of either sign."""


def read_yaml_text(path: Path) -> str:
    """Return the text of a YAML file. Raises `GraftError` if it is missing, unreadable, no regular file, or too large."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise GraftError(f"cannot read {path} as a YAML file: it is {kind}")
        if found.st_size > MOST_BYTES:
            raise GraftError(
                f"cannot read {path} as a YAML file: it has {found.st_size / 1e6:,.1f} MB, and the limit is {MOST_BYTES / 1e6:,.0f} MB"
            )
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise GraftError(f"there is no file {path}") from None
    except GraftError:
        raise
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null byte in the name
        raise GraftError(f"cannot read {path} as a YAML file: {error}") from error


def yaml_values(text: str, name: str, *, is_file: bool = True) -> tuple[Any, dict[KeyPath, str]]:
    """Return the values of a YAML text (`dict`, `list`, scalars), and for each key its place, such as "run.yaml:3".

    name: the file, or (with `is_file=False`) the change of the command line that the text is from. Raises `GraftError`, with the line if
    it is known, for text that is not YAML, for values that no setting can have (dates, tagged values, bytes), and for text beyond the
    limits above.
    """
    what = "this is not valid YAML" if is_file else "the value is not YAML"
    reader = _Reader(name, is_file, {})
    try:
        _refuse_depth(text)
        return reader.plain(YAML(typ="rt").load(text), (), 1), reader.places
    except GraftError:
        raise
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = reader.place(mark.line + 1) if mark else name
        reason = error.problem if isinstance(error, MarkedYAMLError) and error.problem else str(error).splitlines()[0]
        raise GraftError(f"{where}: {what} ({reason})") from error
    except Exception as error:  # ruamel's constructors of numbers, dates and tags raise whatever Python raises there
        raise GraftError(f"{name}: {what} ({error})") from error


def check_number(value: int, place: str) -> None:
    """Raise `GraftError` for a whole number beyond 64 bits. place: where it stands, for the message."""
    if abs(value) > LARGEST:
        raise GraftError(
            f"{place}: a whole number must lie between -2^63 and 2^63; given one of {value.bit_length()} bits"
        )


def _refuse_depth(text: str) -> None:
    """Raise `YAMLError` for mappings and lists that are too deep: ruamel takes minutes for them, or ends in a RecursionError."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MOST_DEPTH:
            problem = f"more than {MOST_DEPTH} mappings and lists inside one another"
            raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


@dataclass(frozen=True)
class _Reader:
    """Converts ruamel's values to built-in ones."""

    name: str
    is_file: bool
    places: dict[KeyPath, str]

    def place(self, line: int) -> str:
        return f"{self.name}:{line}" if self.is_file else self.name

    def plain(self, value: Any, path: KeyPath, line: int) -> Any:
        """Convert a value, and record the line of every key (its parent's if it has none)."""
        if path:
            self.places[path] = self.place(line)
        if len(self.places) > MOST_VALUES or len(path) > MOST_DEPTH:
            raise GraftError(
                f"{self.place(line)}: with its aliases written out, this YAML has more than {MOST_VALUES:,} values, or more than "
                f"{MOST_DEPTH} mappings and lists inside one another"
            )
        if isinstance(value, CommentedMap | CommentedSeq):
            lines = {key: position[0] + 1 for key, position in (value.lc.data or {}).items()}
            if isinstance(value, CommentedSeq):
                return [self.plain(item, (*path, at), lines.get(at, line)) for at, item in enumerate(value)]
            return {
                self._key(key, line): self.plain(item, (*path, key), lines.get(key, line))
                for key, item in value.items()
            }
        return value if value is None or isinstance(value, bool) else self._scalar(value, line)

    def _key(self, key: Any, line: int) -> Key:
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise GraftError(
                f"{self.place(line)}: a key must be text or a whole number; given: {key!r}. Put it in quotes"
            )
        return self._scalar(key, line)

    def _scalar(self, value: Any, line: int) -> Any:
        """Return ruamel's text or number as Python's own."""
        if isinstance(value, TaggedScalar):
            raise GraftError(
                f"{self.place(line)}: this is not valid YAML for a setting (the tag {value.tag.value} is not supported): put the value "
                "in quotes"
            )
        if isinstance(value, int):
            check_number(value, self.place(line))
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise GraftError(f"{self.place(line)}: text must be of characters that UTF-8 has; given: {value[:60]!r}")
        for builtin in (int, float, str):
            if isinstance(value, builtin):
                return builtin(value)
        raise GraftError(
            f"{self.place(line)}: a setting cannot be of type {type(value).__name__}; given: {str(value)[:60]!r}. If it is text, put it "
            "in quotes"
        )
