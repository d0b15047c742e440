"""The paths in a run's YAML. In a run folder they go on to mean what they meant where the run was started.

There the folders that relative paths are relative to are kept beside the YAML (`RunFolder.started_in`), and reading replaces each relative
path by one that leads to the same file from the present working directory.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_FIELDS = (("base", "model"), ("base", "tokenizer"), ("data", "template"), ("train", "init_from"), ("eval", "data"))
_SOURCES = (("data", "train"), ("data", "validation"))
_BEYOND_TRAINING = ("init_from", "data")
"""Fields that a run does without when it goes on: it has a copy of its first adapter, and evaluates nothing."""
_NAMES = ("seedling", "auto", "chat", "plain", "alpaca", "llm-adapters")
"""Values of these fields that are never paths."""


def local_paths(data: Mapping[str, Any]) -> list[str]:
    """Return the paths in a run's or a job's plain values that lead to files or folders from the working directory."""
    return sorted({node[key] for node, key in _places(data) if _is_there(Path(), node[key])})


def lost_paths(data: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """Return the paths that a run needs to go on, are among `known`, and lead to nothing from the working directory."""
    needed = {node[key] for node, key in _places(data) if key not in _BEYOND_TRAINING}
    return sorted(value for value in needed & set(known) if not _is_there(Path(), value))


def relocate(data: dict[str, Any], started_in: Sequence[Path]) -> None:
    """Replace, in a run's or a job's plain values, relative paths that lead somewhere from one of these folders; the first one counts.

    Other values stay: names on the hub, and paths of files that are gone.
    """
    for node, key in _places(data):
        relative = not os.path.isabs(node[key]) and not node[key].startswith("~")
        found = next((root for root in started_in if relative and _is_there(root, node[key])), None)
        if found is not None and found.resolve() != Path.cwd():
            node[key] = os.path.relpath(found.resolve() / node[key])


def _places(data: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each field that may hold a path: the mapping or list that it is in, and its key there."""
    jobs = data.get("jobs")
    for part in (data, *(jobs.values() if isinstance(jobs, Mapping) else ())):
        for section, field in (*_FIELDS, *_SOURCES) if isinstance(part, Mapping) else ():
            if isinstance(node := part.get(section), dict):
                yield from (place for place in _of_value(node, field) if _is_text(place[0][place[1]]))


def _of_value(node: Any, key: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the places in a field: its own, or those of a source with a path, or of a list of sources."""
    value = node[key] if isinstance(node, list) else node.get(key)
    if isinstance(value, dict):
        yield from _of_value(value, "path")
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from _of_value(value, index)
    elif value is not None:
        yield node, key


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value not in _NAMES


def _is_there(root: Path, value: str) -> bool:
    there = os.path.join(root, os.path.expanduser(value))
    return os.path.exists(there) or (glob.has_magic(value) and bool(glob.glob(there, recursive=True)))
