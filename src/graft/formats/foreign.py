"""Another library's adapter on disk: its config, and its tensors, each of which is taken exactly once.

Pickles are read with torch's `weights_only`, which runs no code from the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graft.attaching.stored import as_floats, as_integers, load_tensors
from graft.errors import GraftError, listed
from graft.utils.strict_json import read_object

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""The names of the weights file. Where both are there, PEFT and servers read the first."""


def read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of `adapter_config.json`. Raises `GraftError` when the file cannot be read."""
    return read_object(folder / CONFIG)


class AdapterFile:
    """The config and the tensors of one adapter.

    A reader takes every tensor that it knows, and `finish` raises if any was missing or is left over. So a file can never be read in part.
    """

    def __init__(self, folder: Path, config: dict[str, Any], root: str, files: Sequence[str] = WEIGHTS) -> None:
        """Read the tensors. root: the prefix to remove from their names. files: names of the weights file to try, in this order."""
        self.folder, self.config = folder, config
        self.left = {name.removeprefix(root): tensor for name, tensor in load_weights(folder, files).items()}
        """Tensors that nobody has taken yet."""
        self.kept = dict(self.left)
        """All tensors of the file, including those taken."""
        self.missing: list[str] = []

    def take(self, name: str) -> Tensor:
        """Return a tensor of the file in float32. If it is missing, note that for `finish` and return an empty tensor.

        Raises `GraftError` if it holds anything but finite floating-point numbers.
        """
        return as_floats(self._pop(name), self._where(name))

    def take_integers(self, name: str) -> Tensor:
        """Return a tensor of integers. If it is missing, note that for `finish` and return an empty tensor."""
        return as_integers(self._pop(name, torch.long), self._where(name))

    def peek(self, name: str) -> Tensor:
        """Return a tensor of which several modules use a slice each: the first call takes it, later calls return it again."""
        if name not in self.kept or name in self.left:
            return self.take(name)
        return as_floats(self.kept[name], self._where(name))

    def note_missing(self, name: str) -> None:
        """Note for `finish` a tensor that the config promises and the file lacks."""
        if name not in self.missing:
            self.missing.append(name)

    def _pop(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        if name not in self.left:
            self.note_missing(name)
            return torch.empty(0, dtype=dtype)
        return self.left.pop(name)

    def _where(self, name: str) -> str:
        return f"{self.folder}: tensor '{name}'"

    def field(self, name: str) -> Any:
        """Return a field of the config. Raises `GraftError` when the config does not have it."""
        if self.config.get(name) is None:
            raise GraftError(f"{self.folder / CONFIG} lacks the field '{name}'")
        return self.config[name]

    def finish(self) -> None:
        """Raise `GraftError` when tensors were missing or are left over."""
        if not self.missing and not self.left:
            return
        problems = (("missing", sorted(self.missing)), ("unexpected", sorted(self.left)))
        counts = [f"{len(names)} {problem}: {listed(names)}" for problem, names in problems if names]
        everywhere = self.config.get("bias") == "all"
        hint = " (`bias: all` also trains biases outside the adapted layers, which no kind holds)" if everywhere else ""
        raise GraftError(
            f"{self.folder} does not fit this base (it was made for "
            f"{self.config.get('base_model_name_or_path') or 'an unnamed base'}). Tensors {'; '.join(counts)}{hint}"
        )


def load_weights(folder: Path, files: Sequence[str] = WEIGHTS) -> dict[str, Tensor]:
    """Load all tensors of a folder by name, on the CPU: of the first of these files that it has.

    Warns if another of them is there and holds something else. Raises `GraftError` for a missing or damaged file.
    """
    paths = [folder / name for name in files if (folder / name).is_file()]
    if not paths:
        raise GraftError(f"{folder} has no weights: expected {' or '.join(files)}")
    tensors = load_tensors(paths[0])
    for other in paths[1:]:
        if not _same(other, tensors):
            warnings.warn(
                f"{folder} holds two files of weights that differ: {paths[0].name} is read, {other.name} is not. Remove one of them",
                stacklevel=2,
            )
    return tensors


def _same(path: Path, tensors: dict[str, Tensor]) -> bool:
    """Whether a file holds exactly these tensors."""
    try:
        others = load_tensors(path)
    except GraftError:
        return False
    return others.keys() == tensors.keys() and all(torch.equal(others[name], tensors[name]) for name in tensors)
