"""A YAML file as plain values, with the place where each was written, and the `key.sub=value` changes on top of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft.config.yaml_values import Key, KeyPath, check_number, read_yaml_text, yaml_values
from graft.errors import GraftError, did_you_mean


def dotted(path: Iterable[Key]) -> str:
    """Return the path as the user types it: data.train.0.weight."""
    return ".".join(map(str, path))


@dataclass
class Document:
    """Plain values (`dict`, `list`, scalars) with the place where each key was written."""

    name: str
    """The file, for error messages."""
    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)
    """For each key: "run.yaml:3", or the text of the change that set it."""

    def where(self, path: KeyPath) -> str:
        """Return the place of a key: "run.yaml:3", or the change that set it; if it has none, the nearest place below or above it."""
        below = [place for at, place in self.places.items() if at[: len(path)] == path]
        if path and below:
            return self.places.get(path, below[0])
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return self.name

    def as_typed(self, path: KeyPath) -> str:
        """Return the path as the user wrote it."""
        return dotted(path)

    @property
    def label(self) -> str:
        """The job that this document belongs to, as a suffix for messages; empty for a whole run."""
        return ""

    def change(self, changes: Iterable[str]) -> None:
        """Apply changes of the form `key.sub=value`. A change of the adapter's kind comes first and drops the fields of the old kind."""
        self.assign(parse_change(text) for text in changes)

    def assign(self, changes: Iterable[tuple[KeyPath, Any, str]]) -> None:
        """Set values, each given as (path, value, the text or place that it comes from). Changes of the adapter's kind come first."""
        for path, value, text in sorted(changes, key=lambda change: not _names_kind(change[0])):
            if _names_kind(path):
                self._change_kind(path, value)
            else:
                self._set(path, value, text)
            # The places of what the change has replaced are outdated.
            for old in [place for place in self.places if place[: len(path)] == path]:
                del self.places[old]
            self.places[path] = f"'{text}'" if "=" in text else text

    def _change_kind(self, path: KeyPath, value: Any) -> None:
        owner = self.data if len(path) == 2 else self._job(path)
        adapter, key = owner.get("adapter"), path[-1]
        same = adapter.get(key) == value if isinstance(adapter, dict) else adapter == value
        if not same:
            owner["adapter"] = {key: value}

    def _job(self, path: KeyPath) -> dict[str, Any]:
        """Return the job of a path jobs.NAME... Raises `GraftError` for an unknown name, which would otherwise create a new job."""
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
    """Return the path relative to its run or job: train.lr for jobs.a.train.lr."""
    return path[2:] if path[:1] == ("jobs",) else path


def _names_kind(path: KeyPath) -> bool:
    return in_section(path) in (("adapter", "kind"), ("adapter", "preset"))


def parse_change(text: str) -> tuple[KeyPath, Any, str]:
    """Parse a change `key.sub=value` into its path, its value and the text itself."""
    key, equals, written = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise GraftError(f"'{text}' is not a change of the configuration: write key.sub=value, e.g. train.lr=1e-4")
    return tuple(int(part) if part.isdecimal() else part for part in parts), _parse_value(written, text), text


def _parse_value(written: str, text: str) -> Any:
    """Parse a value as YAML does, but keep text as it is where YAML would see a comment or a block mapping in it.

    `system=Say: no #1` is the text "Say: no #1", although YAML reads it as the mapping {Say: no} with a comment.
    """
    value, _ = yaml_values(written, f"'{text}'", is_file=False)
    written = written.strip()
    block = isinstance(value, (dict, list)) and written[0] not in "{["
    bare = isinstance(value, str) and written[0] not in "'\""
    return written if block or bare else value


def _child(node: Any, key: Any, path: KeyPath, text: str) -> Any:
    """Return the mapping or list under a key. A missing one is created, and a name that stands for a mapping is expanded to it."""
    if isinstance(node, list):
        key = _index(node, key, path, text)
        child = node[key]
    else:
        child = node.get(key)
    if child is None:
        child = node[key] = {}
    elif isinstance(child, str) and (name_key := _name_key(path, child)):
        # `adapter: lora` becomes `adapter: {kind: lora}`
        child = node[key] = {name_key: child}
    if not isinstance(child, (dict, list)):
        raise GraftError(f"'{text}': {dotted(path)} holds {child!r}, which has no keys")
    return child


def _name_key(path: KeyPath, name: str) -> str | None:
    """Return the key that a name stands for, if a name may stand for the mapping at this path: "kind" for `adapter: lora`."""
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


A_RUN = "a run must be a mapping with base, adapter and data"
A_JOB = "a job must be a mapping with any of adapter, data, train, eval and priority"


def read_document(source: str | Path | Mapping[str, Any], described: str = A_RUN) -> Document:
    """Read a YAML file, or copy a mapping. Raises `GraftError`, with the line if it is known, if the file is missing or not such a mapping.

    described: what the file should hold, for the error message.
    """
    if isinstance(source, Mapping):
        return Document("the configuration", _copied(source))
    data, places = yaml_values(read_yaml_text(Path(source)), str(source))
    if not isinstance(data, dict):
        held = "is empty" if data is None else f"holds a value of type {type(data).__name__}"
        raise GraftError(f"{source}: {described}, but the file {held}")
    return Document(str(source), data, places)


def _copied(value: Any) -> Any:
    """Copy nested mappings and lists. Raises `GraftError` for a number that no file could hold."""
    if isinstance(value, int):
        check_number(value, "the configuration")
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
