"""Files of tensors that a run reads back itself: with a checksum, so that a damaged one is noticed and never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graft.errors import GraftError

PIECE = 1 << 26
"""Bytes of a file that are read before it is opened anew."""


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, moved to the CPU, as safetensors with their checksum."""
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(found, path, metadata={"sha256": _checksum(found)})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors that `save_tensors` wrote, on the CPU. Raises `GraftError` for a file that is missing, cut short or changed.

    Each has memory of its own: a view into the file begins at any byte, and kernels round differently on such tensors.
    """
    return {name: tensor.clone() for name, tensor in each_tensor(path)}


def each_tensor(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file one by one, by name, as views into it. Errors are those of `load_tensors`; a wrong checksum shows after
    the last one.

    The file is opened anew every so many bytes, since what was read of it stays in memory until it is closed.
    """
    digest = hashlib.sha256()
    try:
        with safe_open(path, framework="pt") as file:
            names, written = sorted(file.keys()), (file.metadata() or {}).get("sha256")
        while names:
            held = 0
            with safe_open(path, framework="pt") as file:
                while names and held < PIECE:
                    name = names.pop(0)
                    tensor = file.get_tensor(name)
                    held += tensor.nbytes
                    _add(digest, name, tensor)
                    yield name, tensor
                    del tensor
    except (OSError, SafetensorError) as error:
        raise GraftError(f"{path} cannot be read ({error})") from error
    if written is not None and written != digest.hexdigest():
        raise GraftError(f"{path} is damaged (its checksum is wrong)")


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        _add(digest, name, tensors[name])
    return digest.hexdigest()


def _add(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.flatten().view(torch.uint8).numpy().data)
