"""AdapterHub's gates (`use_gating`, UniPELT), read and written: one number per row, averaged over all positions, padding included.

    LoRA          h + g B A x, and the gate replaces alpha / r       (IA)3         h (.) (g s)
    bottleneck    the bottleneck's output times g                    prefix        keys and values times g

In Graft this is the kind gate around each, with `mean: positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import AdapterConfig
from graft.adapters.kinds.gate import Gate
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.places import bottleneck_prefix, refuse
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter

FORMS = {
    "lora": {"reads": "input", "scales": "change"},
    "ia3": {"reads": "input", "scales": "output"},
    "prefix": {"reads": "input", "scales": "change"},
    "parallel": {"reads": "input", "scales": "change"},
    "series": {"reads": "output", "scales": "change"},
    "compacter": {"reads": "output", "scales": "change"},
}
"""What the library's gate reads and scales, by the kind in it."""


def gated(file: HubFile, piece: Piece, key: str, rows: slice = slice(None)) -> Piece:
    """Return a piece with the gate around it that the file holds under `key`. rows: its rows, of a fused projection."""
    gate = {f"gate.{end}": file.peek(f"{key}.{end}")[rows].clone() for end in ("weight", "bias")}
    config = around(piece.config)
    return replace(
        piece, config=config, tensors={**{f"of.{name}": each for name, each in piece.tensors.items()}, **gate}
    )


def around(of: AdapterConfig) -> Gate:
    """Return the library's gate around a config."""
    return Gate(of=of, mean="positions", **FORMS[of.kind])  # pyright: ignore[reportArgumentType]


def ungated(adapters: Sequence[SiteAdapter]) -> list[SiteAdapter]:
    """Return the adapters inside gates. Raises `GraftError` for gates that the library has not."""
    inside = []
    for adapter in adapters:
        config, of = adapter.config, adapter.config.of
        form = FORMS.get(of.kind)
        refuse("gates", {
            f"a gate around kind {of.kind} (it has them around {', '.join(FORMS)})": form is None,
            f"a gate with per: {config.per}, mean: {config.mean} (it takes the mean over all positions: per: row, mean: positions)": (
                config.per != "row" or config.mean != "positions"
            ),
            f"a gate around {of.kind} with reads: {config.reads}, scales: {config.scales} (it computes {form})": (
                form is not None and form != {"reads": config.reads, "scales": config.scales}
            ),
            "a scale of LoRA beside the gate, which replaces it: set alpha to rank": of.kind == "lora" and of.scale != 1.0,
            "a gate around a bottleneck with norm_after or skip: stream": (
                getattr(of, "norm_after", False) or getattr(of, "skip", "site") == "stream"
            ),
        })  # fmt: skip
        inside.append(SiteAdapter(replace(adapter.installed, config=of, module=adapter.module.of), adapter.module.of))
    return inside


def write_gates(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> None:
    """Write the tensors of gates. Those at slices of a fused projection are stacked in the order q, k, v."""
    found: dict[str, list[Any]] = {}
    for adapter in sorted(adapters, key=lambda each: "qkv".find(each.installed.site.name[-1])):
        found.setdefault(_key(root, adapter, name), []).append(adapter.module.gate)
    for key, gates in found.items():
        for end in ("weight", "bias"):
            parts: list[Tensor] = [getattr(gate, end) for gate in gates]
            folder.tensors[f"{key}.{end}"] = parts[0] if len(parts) == 1 else torch.cat(parts)


def _key(root: nn.Module, adapter: SiteAdapter, name: str) -> str:
    kind = adapter.config.of.kind
    if kind in ("lora", "ia3"):
        return f"{adapter.path}.loras.{name}.gate"
    if kind == "prefix":
        return f"{adapter.path}.prefix_tuning.prefix_gates.{name}"
    return f"{bottleneck_prefix(root, adapter, name)}gate"
