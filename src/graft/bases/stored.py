"""How the files of a base hold its weights, read from their headers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.hub import cached_file

from graft.errors import GraftError

WEIGHTS = "model.safetensors"
_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


def narrower(source: str, options: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype | None:
    """The number format of all weights in the files, where float32 computes with the same values; None where they have another one.

    source, options: as `source_of` gives them. dtype: of the computation.
    """
    if dtype != torch.float32:
        return None
    formats: set[str] = set()
    for path in _files(source, options):
        with safe_open(path, framework="pt") as file:
            formats |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return _NARROW.get(formats.pop()) if len(formats) == 1 else None


def refuse_no_gain(source: str, quantised: bool, held: torch.dtype, dtype: torch.dtype) -> None:
    """Raise `GraftError` for `base.offload` on a CPU that would save nothing there."""
    if quantised or held == dtype:
        what = (
            "quantised"
            if quantised
            else f"in {str(dtype).removeprefix('torch.')}, the number format of the computation,"
        )
        raise GraftError(
            f"base.offload: host saves memory on a GPU. On a CPU it keeps weights in a narrower number format until they are used, but the "
            f"weights of {source} are {what} already, so nothing would be saved: remove it"
        )


def _files(source: str, options: Mapping[str, Any]) -> Iterator[str]:
    index, whole = (_found(source, name, options) for name in (f"{WEIGHTS}.index.json", WEIGHTS))
    if index is not None:
        parts = set(json.loads(Path(index).read_text())["weight_map"].values())
        yield from (each for part in sorted(parts) if (each := _found(source, part, options)) is not None)
    elif whole is not None:
        yield whole


def _found(source: str, name: str, options: Mapping[str, Any]) -> str | None:
    """The path of a file of the model, in its folder or in the hub's cache; None if it has none of this name."""
    revision = {"revision": options["revision"]} if "revision" in options else {}
    return cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False, **revision
    )
