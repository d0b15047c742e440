"""What the readers of single kinds have in common: fields that they know, linear layers, biases that were trained beside them.

A field is used, stands at what changes nothing, or is named in an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from graft.adapters.kinds.bitfit import BitFit
from graft.architectures.layers import is_linear, is_transposed
from graft.errors import GraftError
from graft.formats.composing import Piece, difference
from graft.formats.folder import SiteAdapter
from graft.formats.foreign import AdapterFile
from graft.formats.peft.naming import shortest_names
from graft.formats.peft.targets import targets

GENERAL = frozenset({
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "fan_in_fan_out",
})  # fmt: skip
"""Fields of any kind that the readers use, or that say nothing of what is computed."""


def check_fields(file: AdapterFile, *own: str) -> None:
    """Raise `GraftError` that names the fields which nobody reads and which are not off. own: the fields of the kind."""
    unknown = {key: value for key, value in file.config.items() if value and key not in GENERAL and key not in own}
    if unknown:
        said = ", ".join(f"{key}: {value!r}" for key, value in sorted(unknown.items()))
        raise GraftError(
            f"{file.folder}: PEFT's {file.config['peft_type']} with {said} has no equal in Graft, which knows its fields {', '.join(own)}"
        )


def linear_targets(file: AdapterFile, model: nn.Module, mark: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every target. mark: how the names of its tensors go on. Raises `GraftError` for anything but a linear layer."""
    for path, module in targets(file, model, (mark,)):
        if not is_linear(module):
            kind = file.config["peft_type"]
            raise GraftError(f"{file.folder}: '{path}' is a {type(module).__name__}; {kind} is read at linear layers")
        yield path, module


def trained_biases(file: AdapterFile, model: nn.Module, pieces: Sequence[Piece]) -> list[Piece]:
    """The biases of the adapted layers, where `bias` says that they were trained too and they moved."""
    found = []
    for piece in pieces:
        name, module = f"{piece.path}.base_layer.bias", model.get_submodule(piece.path)
        if name in file.left and isinstance(module.bias, torch.Tensor):
            delta = difference(file.take(name), module.bias)
            if delta.any() or delta.shape != module.bias.shape:
                found.append(Piece(piece.path, BitFit(), {"bias": delta}))
    return found


def whole_layers(
    root: nn.Module, adapters: Sequence[SiteAdapter], kind: str, *, transposed: bool = False, differ: Sequence[str] = ()
) -> list[str]:
    """The paths of an adapter's layers. Raises `GraftError` where PEFT has no such adapter: at slices, twice at one layer, with several
    settings, and at transposed layers.

    transposed: PEFT knows these too. differ: fields that may differ between layers.
    """
    paths = [adapter.path for adapter in adapters]
    if any(adapter.installed.site.features is not None for adapter in adapters) or len(set(paths)) < len(paths):
        raise GraftError(
            f"PEFT's {kind} holds one adapter for a whole layer; this one acts on slices of a fused layer, or twice on one"
        )
    if not transposed and any(is_transposed(root.get_submodule(path)) for path in paths):
        raise GraftError(f"PEFT has no {kind} for transposed layers (GPT-2's Conv1D)")
    settings = [adapter.config.model_dump(exclude={"sites", *differ}) for adapter in adapters]
    several = sorted({key for each in settings for key, value in each.items() if value != settings[0][key]})
    if several:
        raise GraftError(
            f"PEFT's {kind} has one setting for all layers; this adapter is a stack with different {', '.join(several)}"
        )
    return paths


def whole_names(root: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
    """`target_modules` for kinds of PEFT without `layers_to_transform`."""
    names = shortest_names(root, paths)
    return {"target_modules": sorted(paths)} if "layers_to_transform" in names else names
