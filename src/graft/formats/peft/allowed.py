"""What the readers and writers of single kinds have in common: linear layers, and whole layers with one setting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from graft.architectures.layers import is_linear, is_transposed
from graft.errors import GraftError
from graft.formats.folder import SiteAdapter
from graft.formats.peft.file import PeftFile
from graft.formats.peft.naming import shortest_names
from graft.formats.peft.targets import targets


def linear_targets(file: PeftFile, model: nn.Module, mark: str) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of every target. mark: how the names of its tensors go on. Raises `GraftError` for anything but a linear layer."""
    for path, module in targets(file, model, (mark,)):
        if not is_linear(module):
            kind = file.config["peft_type"]
            raise GraftError(f"{file.folder}: '{path}' is a {type(module).__name__}; {kind} is read at linear layers")
        yield path, module


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
