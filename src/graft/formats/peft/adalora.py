"""PEFT's AdaLoRA, read and written: the triplets that were kept, and `rank_pattern`, which tells which of the initial ones they are.

Legend: R initial rank, K kept triplets, I input, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.adalora import AdaLoRA
from graft.architectures.layers import is_transposed
from graft.errors import GraftError, listed
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.file import PeftFile
from graft.formats.peft.naming import shortest_names
from graft.formats.peft.targets import targets


def read_adalora(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read AdaLoRA: P, E and Q at their initial rank, with zeros where triplets were pruned."""
    config = file.config
    pattern = {key.partition(".lora_E")[0]: kept for key, kept in (config.get("rank_pattern") or {}).items()}
    if file.field("lora_alpha") <= 0:
        raise GraftError(
            f"{file.folder}: PEFT's ADALORA with lora_alpha {config['lora_alpha']:g} has no equal in Graft; it must be above 0"
        )
    like = AdaLoRA(init_rank=file.field("init_r"), target_rank=None, alpha=float(file.field("lora_alpha")),
                   dropout=config.get("lora_dropout") or 0.0)  # fmt: skip
    pieces = []
    for path, _ in targets(file, model, (".lora_E",)):
        Q, P, E = (file.take(f"{path}.lora_{letter}") for letter in "ABE")
        kept = torch.tensor(pattern.pop(path, [True] * like.init_rank))
        if P.dim() == Q.dim() == 2 and not (
            int(kept.sum()) == len(Q) == P.shape[1] == len(E) and len(kept) == like.init_rank
        ):
            raise GraftError(
                f"{file.folder}: '{path}' has {len(Q)} triplets, but rank_pattern keeps {int(kept.sum())} of {len(kept)}"
            )
        pieces.append(Piece(path, like, _spread(P, E.flatten(), Q, kept)))
    if pattern:
        raise GraftError(f"{file.folder}: rank_pattern names {listed(sorted(pattern))}, which target_modules does not")
    return pieces


def _spread(P: Tensor, E: Tensor, Q: Tensor, kept: Tensor) -> dict[str, Tensor]:
    """Put P [O, K], E [K] and Q [K, I] at the places of the kept triplets: kept [R] is true K times, and the others get zeros."""
    if not P.dim() == Q.dim() == 2:  # they are missing; `finish` reports it
        return {"P": P, "E": E, "Q": Q, "kept": kept}
    whole = {"P": torch.zeros(len(P), len(kept)), "E": torch.zeros(len(kept)), "Q": torch.zeros(len(kept), Q.shape[1])}
    whole["P"][:, kept], whole["E"][kept], whole["Q"][kept] = P, E, Q
    return {**whole, "kept": kept}


def write_adalora(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write AdaLoRA as PEFT does after its last pruning: the kept triplets only."""
    config: Any = adapters[0].config
    paths = [adapter.path for adapter in adapters]
    if any(adapter.installed.site.features is not None for adapter in adapters) or len(set(paths)) < len(paths):
        raise GraftError(
            "PEFT's AdaLoRA adapts whole layers, once each; this adapter acts on slices, or twice on one layer"
        )
    if config.epsilon != 1e-5:
        raise GraftError(
            f"PEFT's AdaLoRA divides alpha by the rank plus 1e-5; this adapter has epsilon {config.epsilon:g}, which PEFT cannot hold"
        )
    pattern: dict[str, list[bool]] = {}
    for adapter in adapters:
        module, kept = adapter.module, adapter.module.kept
        pattern[f"{adapter.path}.lora_E"] = kept.tolist()
        folder.tensors |= {f"{adapter.path}.lora_A": module.Q[kept], f"{adapter.path}.lora_B": module.P[:, kept],
                           f"{adapter.path}.lora_E": module.E[kept][:, None]}  # fmt: skip
    total = sum(sum(kept) for kept in pattern.values())
    folder.config |= {
        "peft_type": "ADALORA", "init_r": config.init_rank, "target_r": max(1, total // len(adapters)), "lora_alpha": config.alpha,
        "lora_dropout": config.dropout, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": config.beta1, "beta2": config.beta2,
        "orth_reg_weight": config.orthogonality, "total_step": 1, "rank_pattern": pattern, "bias": "none", "init_lora_weights": True,
        "fan_in_fan_out": any(is_transposed(root.get_submodule(path)) for path in paths), **shortest_names(root, paths),
    }  # fmt: skip
