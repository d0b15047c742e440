"""PEFT's OFT: `oft_R.weight`, the upper triangles of the skew-symmetric matrices by rows.

PEFT's series of three terms is its series of four, that of two is 1 + 2 Q, and that of one leaves the input as it is. PEFT stores
`module_dropout` and does not apply it at linear layers.

Legend: N blocks, C block size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from graft.adapters.kinds.oft import OFT
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.allowed import linear_targets, whole_layers
from graft.formats.peft.file import PeftFile
from graft.formats.peft.naming import shortest_names


def read_oft(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Angles [N, C (C - 1) / 2] of each linear layer, [1, ...] where its blocks share them."""
    config = OFT(
        block_size=file.field("oft_block_size") or None,
        blocks=file.field("r") or None,
        share=bool(file.config.get("block_share")),
        terms=_terms(file) if file.config.get("use_cayley_neumann") else None,
        coft=file.field("eps") if file.config.get("coft") else None,
        dropout=file.config.get("module_dropout") or 0.0,
    )
    return [
        Piece(path, config, {"angles": file.take(f"{path}.oft_R.weight")})
        for path, _ in linear_targets(file, model, ".oft_R.")
    ]


def _terms(file: PeftFile) -> int:
    terms, version = file.field("num_cayley_neumann_terms"), str(file.config.get("peft_version") or "")
    if terms < 3:
        raise GraftError(
            f"{file.folder}: PEFT's series of {terms} terms is no rotation and has no equal in Graft; it has from 3 on"
        )
    number = re.match(r"(\d+)\.(\d+)", version)
    if number is None or (int(number[1]), int(number[2])) < (0, 18):
        raise GraftError(
            f"{file.folder} was written by PEFT {version or 'before 0.18'}; its series differs from that of 0.18 and later"
        )
    return max(terms, 4)


def write_oft(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """OFT at whole linear layers."""
    config: Any = adapters[0].config
    paths = whole_layers(root, adapters, "OFT")
    if config.terms is not None and config.terms < 4:
        raise GraftError(
            f"PEFT computes something else for a series of {config.terms} terms: it can hold 4 and more, and the exact form"
        )
    if config.dropout:
        folder.notes.append("PEFT stores dropout as module_dropout and does not apply it")
    folder.config |= {
        "peft_type": "OFT", "r": config.blocks or 0, "oft_block_size": config.block_size or 0, "block_share": config.share,
        "use_cayley_neumann": config.terms is not None, "num_cayley_neumann_terms": config.terms or 5, "coft": config.coft is not None,
        "eps": config.coft or 6e-5, "module_dropout": config.dropout, "bias": "none", "fan_in_fan_out": False, "init_weights": True,
        **shortest_names(root, paths),
    }  # fmt: skip
    folder.tensors |= {f"{adapter.path}.oft_R.weight": adapter.module.angles for adapter in adapters}
