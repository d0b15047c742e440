"""The cache of tokenised data between runs: one safetensors file under a hash of everything that it depends on.

The hash covers the bytes of the data, the tokenizer, the template, the settings, the code of this package, and the versions of the
libraries that tokenise. A file that cannot be read back completely is made again, and a warning in the report says so.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from graft.data.datasets import TokenDataset
from graft.data.report import DataReport
from graft.errors import GraftError
from graft.utils.files import explain_write_errors
from graft.utils.temporary import temporary

Stored = tuple[TokenDataset, TokenDataset | None, DataReport]


def cache_key(parts: Mapping[str, Any]) -> str:
    """Return the hash under which data are cached. `parts` holds everything that they depend on, as JSON values."""
    everything = {
        **parts,
        "code": _code(),
        "tokenizers": version("tokenizers"),
        "transformers": version("transformers"),
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the SHA-256 of everything that a tokenizer's output depends on, except padding and truncation, which are not used here."""
    serialised = json.loads(tokenizer.backend_tokenizer.to_str())
    serialised["padding"] = serialised["truncation"] = None
    everything = [serialised, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    """Return a hash of the source code of this package: a change may change the tokens."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def store(folder: Path, key: str, stored: Stored) -> None:
    """Write data to the cache, atomically. Raises `GraftError` if the disk is full, or if there can be no such folder."""
    train, validation, report = stored
    path = _path(folder, key)
    arrays = {f"train.{name}": array for name, array in _arrays(train).items()}
    if validation is not None:
        arrays |= {f"validation.{name}": array for name, array in _arrays(validation).items()}
    about = {
        "report": json.dumps(report.to_dict()),
        "train": json.dumps(train.sources),
        "validation": json.dumps(None if validation is None else validation.sources),
        "sha256": _checksum(arrays),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraftError(
            f"the cache of tokenised data cannot be kept in {folder} ({error.strerror}): set the variable GRAFT_CACHE to a folder that can "
            "be written, or data.cache to false"
        ) from error
    with explain_write_errors(path), temporary(path) as fresh:
        save_file(arrays, fresh, metadata=about)
        os.replace(fresh, path)


def fetch(folder: Path, key: str) -> tuple[Stored | None, str | None]:
    """Return the data under a key or None, and a warning if their file was broken."""
    path = _path(folder, key)
    if not path.is_file():
        return None, None
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if _checksum(arrays) != about["sha256"]:
            raise ValueError("its checksum is wrong")
        report = DataReport.from_dict(json.loads(about["report"]))
        validation = json.loads(about["validation"])
        held_out = None if validation is None else _dataset(arrays, "validation", validation)
        return (_dataset(arrays, "train", json.loads(about["train"])), held_out, report), None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        return None, f"The cached data in {path} were broken ({error}) and have been made again."


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key[:32]}.safetensors"


def _arrays(dataset: TokenDataset) -> dict[str, np.ndarray]:
    return {f.name: getattr(dataset, f.name) for f in fields(dataset) if f.name != "sources"}


def _dataset(arrays: Mapping[str, np.ndarray], part: str, sources: list[str]) -> TokenDataset:
    names = [f.name for f in fields(TokenDataset) if f.name != "sources"]
    return TokenDataset(**{name: arrays[f"{part}.{name}"] for name in names}, sources=tuple(sources))


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
