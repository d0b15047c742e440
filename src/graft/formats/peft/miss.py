"""PEFT's MiSS: `miss_block`; `init_weights` says which variant it is.

Legend: I input, O output features, R rank, M mini rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.adapters.kinds.miss import MiSS
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.allowed import linear_targets, whole_layers
from graft.formats.peft.file import PeftFile
from graft.formats.peft.naming import shortest_names


def read_miss(file: PeftFile, model: nn.Module) -> list[Piece]:
    """One matrix per layer: [R, O], mini [R, M], bat [O / R, R, R]. `init_weights: false` is a plain one with a random start."""
    start = file.config.get("init_weights")
    if isinstance(start, str) and start not in ("bat", "mini"):
        raise GraftError(
            f"{file.folder}: MiSS with init_weights '{start}' has no equal in Graft, which knows bat, mini, true and false"
        )
    variant: Any = start if isinstance(start, str) else "plain"
    mini_rank = file.field("mini_r") if variant == "mini" else 1
    config = MiSS(
        rank=file.field("r"), variant=variant, mini_rank=mini_rank, dropout=file.config.get("miss_dropout") or 0.0
    )
    return [
        Piece(path, config, {"D": file.take(f"{path}.miss_block")})
        for path, _ in linear_targets(file, model, ".miss_block")
    ]


def write_miss(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """MiSS. PEFT has no dropout in bat."""
    config: Any = adapters[0].config
    paths = whole_layers(root, adapters, "MiSS")
    if config.variant == "bat" and config.dropout:
        folder.notes.append("PEFT stores dropout and does not apply it: its MiSS with init_weights bat has none")
    folder.config |= {
        "peft_type": "MISS", "r": config.rank, "mini_r": config.mini_rank, "miss_dropout": config.dropout, "bias": "none",
        "init_weights": True if config.variant == "plain" else config.variant, **shortest_names(root, paths),
    }  # fmt: skip
    folder.tensors |= {f"{adapter.path}.miss_block": adapter.module.D for adapter in adapters}
