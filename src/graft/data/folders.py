"""Which files a source names: one file, the files of a folder, or those that match a pattern.

A folder is often more than its data. Hidden files, cards of data sets and caches are left out by name. Files that their names place in a
split (test, holdout, dev ...) are never mixed with others: where a folder holds more than one split, the source has to choose.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from graft.config.data import SourceConfig
from graft.data.file_readers import EXPECTED, check_regular, file_type
from graft.errors import GraftError, listed, nearest

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("dev", "valid", "validation", "val", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("holdout", "heldout"), "holdout"),
}
"""Words in the names of files and folders, and the split that each means."""
CARDS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "croissant.json",
    "metadata.json",
}
"""Files that describe data sets."""
CACHES = {"__pycache__", "__macosx", "cache", "caches", "node_modules"}
COPY = re.compile(
    r"^copy of (?=.)|(?<=.)(?: ?- copy| copy|[ _]?\(copy\)| ?\(\d+\)|-checkpoint|~)(?: \d+)?$", re.IGNORECASE
)
"""What editors, browsers and desktops add to the name of a copy; it is one only beside a file of the name without it."""
MOST = 20_000
"""Most entries that a folder is searched for."""


def local_files(source: SourceConfig, left_out: list[str] | None = None) -> list[Path] | None:
    """Return the files of a source in sorted order, or None if its path is a hub name. Raises `GraftError` if there are no files.

    left_out: gets the names of files in a folder that are no data.
    """
    path = Path(source.path).expanduser()
    if "\0" in source.path:
        raise GraftError(f"{source.path!r} holds a NUL, so it names no file")
    if path.is_dir():
        found, others = _in_folder(path)
        if left_out is not None:
            left_out += others
        return _of_split(path, found, source.split, others)
    if path.exists():
        check_regular(path)
        if file_type(path) is None:
            raise GraftError(f"{path}: unknown file type '{path.suffix}', expected {EXPECTED}")
        return [path]
    if glob.has_magic(source.path):
        matching = sorted(Path(f) for f in glob.glob(str(path), recursive=True))
        found = [f for f in matching if file_type(f) is not None and f.is_file()]
        if not found:
            raise GraftError(f"no data file matches {source.path} (file types: {EXPECTED})")
        return _of_split(path, found, source.split, [])
    if file_type(path) is not None or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.path):
        raise GraftError(f"{source.path}: no such file.{near(path)}")
    return None


def check_trainable(source: SourceConfig) -> None:
    """Raise `GraftError` for a folder of which all files are named as held out, unless the source asks for that split."""
    path = Path(source.path).expanduser()
    if source.split is not None or not path.is_dir():
        return
    named = {_split_of(file.relative_to(path)) for file in _in_folder(path)[0]}
    if named and named <= {*SPLITS.values()} - {"train"}:
        (only,) = named if len(named) == 1 else ("several splits",)
        raise GraftError(
            f"{path} holds only files that are named as held out ({only}); to train on them, choose them with `split: {only}`"
        )


def content_hash(source: SourceConfig) -> str | None:
    """Return the SHA-256 of the names and bytes of a source's files; None for a hub name, which has no files here."""
    files = local_files(source)
    if files is None:
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file).encode(errors="surrogateescape"))
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def near(path: Path) -> str:
    """Return a hint for an error message: the existing file with the nearest name, or that the folder does not exist."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    try:
        found = nearest(path.name, os.listdir(path.parent)[:MOST])
    except OSError:
        return ""
    return f" Did you mean '{path.parent / found}'?" if found else ""


def _in_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the data files below a folder, and the names of files that have the suffix of data and are none."""
    found: list[Path] = []
    others: list[str] = []
    seen = 0
    for place, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > MOST:
            raise GraftError(
                f"{folder} holds more than {MOST:,} files and folders: name the folder or the file of the data"
            )
        inside = Path(place)
        for name in sorted(files):
            file = inside / name
            if file_type(file) is not None:
                relative = file.relative_to(folder)
                no_data = _is_no_data(relative) or _is_copy(file, files) or not file.is_file()
                (others.append(str(relative)) if no_data else found.append(file))
    return sorted(found), sorted(others)


def _is_no_data(file: Path) -> bool:
    hidden = any(part.startswith((".", "~")) for part in file.parts)
    return hidden or file.name.lower() in CARDS or any(part.lower() in CACHES for part in file.parts[:-1])


def _is_copy(file: Path, names: Sequence[str]) -> bool:
    stem, _, suffixes = file.name.partition(".")
    while (shorter := COPY.sub("", stem)) != stem:
        stem = shorter
        if f"{stem}.{suffixes}" in names:
            return True
    return False


def _of_split(folder: Path, files: Sequence[Path], split: str | None, left_out: Sequence[str]) -> list[Path]:
    """Return the files of one split; the words in their paths tell the split. Several splits without a choice are an error.

    Files of no split are the training data where no file is named so.
    """
    root = folder if folder.is_dir() else None
    named = {file: _split_of(file.relative_to(root) if root else Path(file.name)) for file in files}
    there = sorted({name for name in named.values() if name})
    chosen = list(files)
    if split is not None:
        wanted = SPLITS.get(split, split)
        chosen = [f for f in files if named[f] == wanted or split in re.split(r"[^A-Za-z0-9]+", f.name)]
        if not chosen and wanted == "train":
            chosen = [f for f in files if named[f] is None]
    elif len(there) > 1:
        raise GraftError(f"{folder} holds several splits ({', '.join(there)}): choose one with `split`, or name a file")
    elif there and there != ["train"] and None in named.values():
        held = listed([f.name for f in files if named[f]], 3)
        raise GraftError(
            f"{folder} holds files of the split '{there[0]}' ({held}) beside files of no split: choose with `split: {there[0]}` or "
            "`split: train`, or name a file"
        )
    if not chosen:
        what = f"no data file of the split '{split}'" if split else "no data file"
        others = f"; left out: {listed(left_out, 3)}" if left_out else ""
        raise GraftError(
            f"{folder} holds {what} ({EXPECTED}){'; splits: ' + ', '.join(there) if there else ''}{others}"
        )
    return chosen


def _split_of(file: Path) -> str | None:
    """Return the split that a path names: in its file name, else in its folders."""
    for part in reversed(file.parts):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            bare = re.sub(r"(set|data|split)?\d*$", "", word)
            if bare in SPLITS:
                return SPLITS[bare]
    return None
