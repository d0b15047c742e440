"""A YAML file as plain values that remember where they were written, and the `key.sub=value` changes on top of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from graft.errors import GraftError, did_you_mean

Key = str | int
KeyPath = tuple[Key, ...]


def dotted(path: Iterable[Key]) -> str:
    """The path as the user types it: data.train.0.weight."""
    return ".".join(map(str, path))


@dataclass
class Document:
    """Plain values (`dict`, `list`, scalars) and, for each key, where it was written."""

    name: str
    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """ "run.yaml:3", or the change that set the key, or the nearest of these below or above it."""
        below = [place for at, place in self.places.items() if at[: len(path)] == path]
        if path and below:
            return self.places.get(path, below[0])
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.name

    def called(self, path: KeyPath) -> str:
        """The path as the user wrote it."""
        return dotted(path)

    @property
    def label(self) -> str:
        """Whose document this is, where a message has to say so."""
        return ""

    def change(self, changes: Iterable[str]) -> None:
        """Apply `key.sub=value` texts. A change of the adapter's kind comes first and drops the old fields."""
        parsed = [parse_change(text) for text in changes]
        for path, value, text in sorted(parsed, key=lambda change: not _names_kind(change[0])):
            if _names_kind(path):
                self._change_kind(path, value)
            else:
                self._set(path, value, text)
            for old in [place for place in self.places if place[: len(path)] == path]:
                del self.places[old]
            self.places[path] = f"'{text}'"

    def _change_kind(self, path: KeyPath, value: Any) -> None:
        owner = self.data if len(path) == 2 else self._job(path)
        adapter, key = owner.get("adapter"), path[-1]
        same = adapter.get(key) == value if isinstance(adapter, dict) else adapter == value
        if not same:
            owner["adapter"] = {key: value}

    def _job(self, path: KeyPath) -> dict[str, Any]:
        """The job that a path jobs.NAME... goes into, which must be there: a wrong name would make a job of its own."""
        jobs = self.data.get("jobs")
        if not isinstance(jobs, dict) or path[1] not in jobs:
            names = [str(name) for name in jobs] if isinstance(jobs, dict) else []
            there = f"jobs: {', '.join(names)}" if names else "this run has no `jobs`"
            raise GraftError(
                f"'{dotted(path)}': there is no job '{path[1]}'.{did_you_mean(str(path[1]), names)} {there}"
            )
        if jobs[path[1]] is None:
            jobs[path[1]] = {}
        return jobs[path[1]]

    def _set(self, path: KeyPath, value: Any, text: str) -> None:
        if path[0] == "jobs" and len(path) > 2:
            self._job(path)
        node: Any = self.data
        for depth, key in enumerate(path[:-1]):
            node = _child(node, key, path[: depth + 1], text)
        _assign(node, path, value, text)


def in_section(path: KeyPath) -> KeyPath:
    """The path inside its run or job: jobs.a.train.lr is train.lr."""
    return path[2:] if path[:1] == ("jobs",) else path


def _names_kind(path: KeyPath) -> bool:
    return in_section(path) in (("adapter", "kind"), ("adapter", "preset"))


def parse_change(text: str) -> tuple[KeyPath, Any, str]:
    """(path, value, the text itself) of a `key.sub=value`."""
    key, equals, written = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise GraftError(f"'{text}' is not a change of the configuration: write key.sub=value, as in train.lr=1e-4")
    return tuple(int(part) if part.isdecimal() else part for part in parts), _parse_value(written, text), text


def _parse_value(written: str, text: str) -> Any:
    """The value as YAML reads it; text stays text also where YAML would see a comment or a block mapping in it."""
    try:
        value = _plain(YAML(typ="rt").load(written), (), "", {}, 0)
    except YAMLError as error:
        raise GraftError(f"'{text}': the value is not YAML ({_reason(error)})") from error
    written = written.strip()
    block = isinstance(value, (dict, list)) and written[0] not in "{["
    bare = isinstance(value, str) and written[0] not in "'\""
    return written if block or bare else value


def _child(node: Any, key: Any, path: KeyPath, text: str) -> Any:
    """The mapping or list under a key, made where it is missing, spelt out where a name stands for it."""
    if isinstance(node, list):
        key = _index(node, key, path, text)
        child = node[key]
    else:
        child = node.get(key)
    if child is None:
        child = node[key] = {}
    elif isinstance(child, str) and (name_key := _name_key(path, child)):
        child = node[key] = {name_key: child}
    if not isinstance(child, (dict, list)):
        raise GraftError(f"'{text}': {dotted(path)} holds {child!r}, which has no keys")
    return child


def _name_key(path: KeyPath, name: str) -> str | None:
    """The key to which a name belongs that stands for a mapping: `adapter: lora`, `data.train: FILE`."""
    place = tuple(key for key in in_section(path) if isinstance(key, str))
    if place in (("data", "train"), ("data", "validation")):
        return "path"
    if place == ("adapter",):
        from graft.adapters.registry import kinds

        return "kind" if name in kinds() else "preset"
    return None


def _assign(node: Any, path: KeyPath, value: Any, text: str) -> None:
    if isinstance(node, list):
        node[_index(node, path[-1], path, text)] = value
    else:
        node[path[-1]] = value


def _index(node: list[Any], key: Key, path: KeyPath, text: str) -> int:
    if not isinstance(key, int) or key >= len(node):
        raise GraftError(f"'{text}': {dotted(path[:-1])} is a list with entries 0 to {len(node) - 1}; given '{key}'")
    return key


A_RUN = "a run is a mapping with base, adapter and data"
A_JOB = "a job is a mapping with any of adapter, data, train, eval and priority"


def read_document(source: str | Path | Mapping[str, Any], described: str = A_RUN) -> Document:
    """Read a YAML file, or copy a mapping. `described`: what it should be. Raises `GraftError` with the line of a mistake in it."""
    if isinstance(source, Mapping):
        return Document("the configuration", _copied(source))
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GraftError(f"there is no file {path}") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise GraftError(f"cannot read {path} as a YAML file: {error}") from error
    places: dict[KeyPath, str] = {}
    try:
        data = _plain(YAML(typ="rt").load(text), (), str(path), places, 1)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise GraftError(f"{place}: this is not valid YAML ({_reason(error)})") from error
    if not isinstance(data, dict):
        held = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise GraftError(f"{path}: {described}, but the file {held}")
    return Document(str(path), data, places)


def _reason(error: YAMLError) -> str:
    if isinstance(error, MarkedYAMLError) and error.problem:
        return str(error.problem)
    return str(error).splitlines()[0]


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _plain(value: Any, path: KeyPath, name: str, places: dict[KeyPath, str], line: int) -> Any:
    """Built-in values in place of ruamel's, noting the line of every key (its parent's where it has none)."""
    if path:
        places[path] = f"{name}:{line}"
    if isinstance(value, CommentedMap):
        lines = {key: position[0] + 1 for key, position in (value.lc.data or {}).items()}
        return {key: _plain(item, (*path, key), name, places, lines.get(key, line)) for key, item in value.items()}
    if isinstance(value, CommentedSeq):
        lines = {index: position[0] + 1 for index, position in (value.lc.data or {}).items()}
        return [_plain(item, (*path, at), name, places, lines.get(at, line)) for at, item in enumerate(value)]
    if isinstance(value, TaggedScalar):
        raise YAMLError(f"the tag {value.tag.value} in line {line} has no meaning here")
    for builtin in (bool, int, float, str):
        if isinstance(value, builtin):
            return builtin(value)
    return value
