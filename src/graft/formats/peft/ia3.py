"""PEFT's (IA)3, read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.adapters.kinds.ia3 import IA3
from graft.architectures.layers import is_transposed
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.file import PeftFile
from graft.formats.peft.naming import shortest_names
from graft.formats.peft.targets import matches, targets


def read_ia3(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read (IA)3. A module scales its input if `feedforward_modules` matches it, else its output; without the field the shapes tell."""
    inner = file.config["feedforward_modules"]
    pieces = []
    for path, _ in targets(file, model, (".ia3_l",)):
        scale = file.take(f"{path}.ia3_l")
        scales_input = scale.shape[:1] == (1,) if inner is None else matches(path, inner)
        pieces.append(Piece(path, IA3(inputs=(".*",) if scales_input else ()), {"scale": scale.flatten()}))
    return pieces


def write_ia3(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write (IA)3. `feedforward_modules` must match the modules that scale their input, and no other target."""
    if any(adapter.installed.site.features is not None for adapter in adapters):
        raise GraftError(
            "PEFT's (IA)3 scales whole layers; this one acts on slices of a fused projection: name attn.qkv instead"
        )
    inner = {adapter.path for adapter in adapters if not hasattr(adapter.module, "inside")}
    names = shortest_names(root, [adapter.path for adapter in adapters])
    if "layers_to_transform" in names:
        names = {"target_modules": sorted(adapter.path for adapter in adapters)}
    endings = shortest_names(root, sorted(inner))
    inputs = sorted(inner) if "layers_to_transform" in endings else endings["target_modules"]
    # If a layer's name (`dense`) occurs on both sides, endings cannot tell them apart, and whole paths are written.
    if {name.rsplit(".", 1)[-1] for name in inputs} & {
        adapter.path.rsplit(".", 1)[-1] for adapter in adapters if adapter.path not in inner
    }:
        inputs = sorted(inner)
        names = {"target_modules": sorted(adapter.path for adapter in adapters)}
    transposed = any(is_transposed(root.get_submodule(adapter.path)) for adapter in adapters)
    folder.config |= {"peft_type": "IA3", "feedforward_modules": [n for n in _as_targets(inputs, names) if inner],
                      "fan_in_fan_out": transposed, "init_ia3_weights": True, "modules_to_save": None, **names}  # fmt: skip
    for adapter in adapters:
        scale = adapter.module.scale
        folder.tensors[f"{adapter.path}.ia3_l"] = scale[None, :] if adapter.path in inner else scale[:, None]


def _as_targets(inputs: Sequence[str], names: dict[str, Any]) -> list[str]:
    """Return the entries of `target_modules` that mean these inputs: PEFT wants both lists to spell a module the same way."""
    return [
        name
        for name in names["target_modules"]
        if any(name == each or name.endswith(f".{each}") or each.endswith(f".{name}") for each in inputs)
    ]
