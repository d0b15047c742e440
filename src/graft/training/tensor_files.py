"""Files of tensors that a run reads back itself: with a checksum, so that a damaged one is noticed and never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graft.errors import GraftError


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors, moved to the CPU, as safetensors with their checksum."""
    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(found, path, metadata={"sha256": _checksum(found)})


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read tensors that `save_tensors` wrote, on the CPU. Raises `GraftError` for a file that is missing, cut short or changed.

    Each has memory of its own: a view into the file begins at any byte, and kernels round differently on such tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
            written = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise GraftError(f"{path} cannot be read ({error})") from error
    if written is not None and written != _checksum(tensors):
        raise GraftError(f"{path} is damaged (its checksum is wrong)")
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
