"""PEFT's SHiRA: `shira_weight` [K] and `shira_indices` [2, K], the rows and columns of the entries.

PEFT draws one mask for all layers of a shape from `random_seed`; what a file holds is read as it is, masks of the user's own too.

Legend: I input, O output features, K entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.adapters.kinds.shira import SHiRA
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.allowed import linear_targets, whole_layers, whole_names
from graft.formats.peft.file import PeftFile


def read_shira(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Values and positions of each layer."""
    config = SHiRA(rank=file.field("r"), seed=file.config.get("random_seed") or 0, mask_per="shape")
    return [
        Piece(
            path,
            config,
            {
                "values": file.take(f"{path}.shira_weight"),
                "positions": file.take_integers(f"{path}.shira_indices").int(),
            },
        )
        for path, _ in linear_targets(file, model, ".shira_")
    ]


def write_shira(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """SHiRA. The seed is written where PEFT would draw the same masks from it."""
    config: Any = adapters[0].config
    paths = whole_layers(root, adapters, "SHiRA")
    if config.dropout:
        folder.notes.append("dropout is not written: PEFT's SHiRA has none")
    folder.config |= {
        "peft_type": "SHIRA", "r": config.rank, "mask_type": "random", "fan_in_fan_out": False, "init_weights": True,
        "random_seed": config.seed if config.mask_per == "shape" else None, **whole_names(root, paths),
    }  # fmt: skip
    for adapter in adapters:
        folder.tensors[f"{adapter.path}.shira_weight"] = adapter.module.values
        folder.tensors[f"{adapter.path}.shira_indices"] = adapter.module.positions
