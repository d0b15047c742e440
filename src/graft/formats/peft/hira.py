"""PEFT's HiRA: `hira_A`, `hira_B`, without a scale and with one rank.

PEFT 0.21 makes every layer with the rank `r`, whatever `rank_pattern` says. So files are read by the shapes of their tensors, and layers
of lower rank are written with rows and columns of zeros, which compute the same.

Legend: I input, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from graft.adapters.kinds.hira import HiRA
from graft.architectures.layers import is_transposed
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.allowed import linear_targets, whole_layers
from graft.formats.peft.file import PeftFile
from graft.formats.peft.naming import shortest_names


def read_hira(file: PeftFile, model: nn.Module) -> list[Piece]:
    """A [R, I] and B [O, R] of each linear layer."""
    pieces = []
    for path, _ in linear_targets(file, model, ".hira_"):
        A, B = file.take(f"{path}.hira_A"), file.take(f"{path}.hira_B")
        rank = len(A) or file.field("r")
        config = HiRA(rank=rank, alpha=float(rank), dropout=file.config.get("hira_dropout") or 0.0)
        pieces.append(Piece(path, config, {"A": A, "B": B}))
    return pieces


@torch.no_grad()
def write_hira(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """HiRA, scales in B."""
    scales = ("rank", "alpha", "rank_pattern", "alpha_pattern")
    paths = whole_layers(root, adapters, "HiRA", transposed=True, differ=scales)
    rank = max(adapter.config.rank for adapter in adapters)
    folder.config |= {
        "peft_type": "HIRA", "r": rank, "rank_pattern": {}, "hira_dropout": adapters[0].config.dropout, "init_weights": True,
        "fan_in_fan_out": any(is_transposed(root.get_submodule(path)) for path in paths), **shortest_names(root, paths),
    }  # fmt: skip
    for adapter in adapters:
        A, B, missing = adapter.module.A, adapter.module.B, rank - adapter.config.rank
        B = B if adapter.module.scale == 1 else B * adapter.module.scale
        folder.tensors[f"{adapter.path}.hira_A"] = torch.cat([A, A.new_zeros(missing, A.shape[1])])
        folder.tensors[f"{adapter.path}.hira_B"] = torch.cat([B, B.new_zeros(len(B), missing)], 1)
    if any(adapter.module.scale != 1 for adapter in adapters):
        folder.notes.append("PEFT's HiRA has no scale: alpha / rank is multiplied into B")
    if any(adapter.config.rank < rank for adapter in adapters):
        folder.notes.append(f"PEFT's HiRA has one rank: layers of a lower one have zeros up to {rank}")
