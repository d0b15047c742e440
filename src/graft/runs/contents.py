"""Which files of a folder are those of a run: how a run is known, and what `--overwrite` deletes.

A run is known by its config.yaml and by a lock.json or status.json that Graft wrote; many other tools have a config.yaml. Only files of the
names below are ever deleted, and then the folders that this leaves empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from graft.errors import GraftError
from graft.runs.claim import LOCK
from graft.utils.jsonl import read_json
from graft.utils.temporary import remove_if_left

FOLDERS = ("adapters", "checkpoints", "eval")
"""The folders that every run has."""
_TOP = ("status.json", "metrics.jsonl", "events.jsonl", "samples.jsonl", "config.yaml", "lock.json")
_ADAPTER = (
    "adapter_config.json", "adapter_model.safetensors", "template.json", "chat_template.jinja", "task.json", "README.md",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
_MODEL = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", *_ADAPTER[2:],
    "tokenizer.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "*.py",
)  # fmt: skip
_FILES = {
    "adapters/*": _ADAPTER,
    "model": _MODEL,
    "references/*": _ADAPTER,
    "checkpoints": ("last.json", "best.json"),
    "checkpoints/[0-9]*": ("*.safetensors", "state.json"),
    "eval/*": ("evaluation.json", "answers.jsonl", "result.json", "scores.json", LOCK),
    "jobs": ("journal.jsonl",),
    "jobs/inbox": ("*.json",),
    "aside": ("*.safetensors",),
    "failed_batch*": ("batch.safetensors", "samples.json"),
    "tensorboard": ("events.out.tfevents.*",),
    "adapters": (),
    "references": (),
    "eval": (),
    "": _TOP,
}
"""Folder -> the names of a run's files in it, as glob patterns. They are deleted in this order: what the run is known by goes last."""
_UNFINISHED = (
    *(f".{name}.*.tmp" for name in (*_TOP, "failed_batch*", "model")),
    ".model.old",
    *(f"{place}/.*.{end}" for place in ("adapters", "references", "checkpoints") for end in ("tmp", "old")),
    *(f"{place}/.*.tmp" for place in ("jobs/inbox", "aside", "eval/*")),
)
"""What killed processes leave under temporary names, as glob patterns."""


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run: its configuration, and a lock.json or status.json that Graft wrote."""
    return (folder / "config.yaml").is_file() and _is_marked(folder)


def may_be_run(folder: Path) -> bool:
    """Whether a folder looks like that of a run whose files are damaged."""
    return all((folder / name).is_dir() for name in FOLDERS)


def is_vacant(folder: Path) -> bool:
    """Whether a new run may begin in a folder: nothing is there, or only what a run leaves that was killed before its first file."""
    if not folder.exists():
        return True
    if _is_marked(folder) and set(_own(folder)) == {folder / "lock.json"}:
        return True
    known = {folder / LOCK, *(path for pattern in _UNFINISHED for path in folder.glob(pattern))}
    known |= {path for name in FOLDERS if (path := folder / name).is_dir() and not any(path.iterdir())}
    return set(folder.iterdir()) <= known


def delete_run(folder: Path) -> None:
    """Delete the files of a run, and the folders that are empty then. Everything else stays."""
    delete_unfinished(folder)
    for path in list(_own(folder)):
        path.unlink()
    for place in sorted(filter(None, _FILES), key=len, reverse=True):
        for path in folder.glob(place):
            with suppress(OSError):  # it holds something else
                path.rmdir()


def delete_unfinished(folder: Path) -> None:
    """Delete what a killed process left half written in a run folder."""
    for pattern in _UNFINISHED:
        for path in folder.glob(pattern):
            remove_if_left(path)


def _own(folder: Path) -> Iterator[Path]:
    """The files of a run in a folder. A folder of such a name is somebody else's."""
    for place, names in _FILES.items():
        for name in names:
            yield from (path for path in sorted(folder.glob(f"{place}/{name}".lstrip("/"))) if not path.is_dir())


def _is_marked(folder: Path) -> bool:
    """Whether lock.json or status.json of a folder is Graft's."""
    lock, status = _object(folder / "lock.json"), _object(folder / "status.json")
    return ("graft" in lock and "versions" in lock) or {"state", "pid", "host", "updated"} <= set(status)


def _object(path: Path) -> dict[str, Any]:
    try:
        return read_json(path) if path.is_file() else {}
    except (GraftError, OSError):
        return {}
