"""LoRA and DoRA as PEFT stores them, and whole modules and token rows beside any kind.

Several LoRAs at one module, and LoRAs on slices of a fused projection, are one LoRA of the summed rank there, which computes the same.

Legend: R rank, I input, O output features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.base import Adapter
from graft.architectures.layers import is_transposed
from graft.errors import GraftError
from graft.formats.peft.experts import write_parameters
from graft.formats.peft.folder import Folder, Held
from graft.formats.peft.naming import patterns, shortest_names


def write_lora(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """LoRA, DoRA, and PiSSA as a LoRA of twice the rank."""
    experts = [held for held in installs if held.installed.site.type == "experts"]
    by_module: dict[str, list[Held]] = defaultdict(list)
    for held in installs:
        if held.installed.site.type != "experts":
            by_module[held.path].append(held)
    pairs = {path: _pair(root.get_submodule(path), own) for path, own in by_module.items()}
    dora = installs[0].config.kind == "dora"
    at_experts = {f"{held.path}.{held.module.parameter}": held.config for held in experts}
    rank, rank_pattern = patterns(
        {path: pair.A.shape[0] for path, pair in pairs.items()} | {key: own.rank for key, own in at_experts.items()}
    )
    alpha, alpha_pattern = patterns(
        {path: pair.alpha for path, pair in pairs.items()} | {key: own.alpha for key, own in at_experts.items()}
    )
    rslora = {pair.rslora for pair in pairs.values()} | {own.rslora for own in at_experts.values()}
    if len(rslora) > 1:
        raise GraftError(
            "a PEFT folder scales all of its LoRAs by alpha / rank or all by alpha / sqrt(rank); this adapter does both"
        )
    biases = {path for path, pair in pairs.items() if pair.bias is not None}
    if biases and biases != set(pairs):
        raise GraftError(
            "PEFT's lora_bias holds for all layers of a folder; this adapter learns biases at some of them"
        )
    dropout = max(held.config.dropout for held in installs)
    if experts and biases:
        raise GraftError(
            "PEFT's LoRAs on experts do not go with lora_bias: train without train_bias, or keep Graft's format"
        )
    if experts and dropout:
        folder.notes.append("dropout is not written: PEFT takes none beside LoRAs on experts")
        dropout = 0.0
    transposed = {is_transposed(root.get_submodule(path)) for path in pairs}
    folder.config |= {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora.pop(), "use_dora": dora,
        "lora_dropout": dropout, "bias": "none", "lora_bias": bool(biases),
        "fan_in_fan_out": transposed == {True}, "init_lora_weights": True,
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
        **shortest_names(root, list(pairs)),
    }  # fmt: skip
    if experts:
        write_parameters(root, experts, folder)
    for path, pair in pairs.items():
        if isinstance(root.get_submodule(path), nn.Embedding):
            folder.tensors |= {f"{path}.lora_embedding_A": pair.A, f"{path}.lora_embedding_B": pair.B}
            continue
        folder.tensors |= {f"{path}.lora_A.weight": pair.A, f"{path}.lora_B.weight": pair.B}
        if pair.bias is not None:
            folder.tensors[f"{path}.lora_B.bias"] = pair.bias
        if dora:
            folder.tensors[f"{path}.lora_magnitude_vector"] = pair.magnitude


@dataclass
class Pair:
    """LoRA's matrices at one module: A [R, I], B [O, R], and what goes with them."""

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool
    bias: Tensor | None = None
    magnitude: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def _pair(host: Any, installs: Sequence[Held]) -> Pair:
    """One LoRA for all that an adapter has at a module: as it is where it is alone, else blocks side by side, the scales in B."""
    parts = [(_tensors(held), held) for held in installs]
    (own, held), *others = parts
    config: Any = held.config.to_lora() if held.config.kind == "pissa" else held.config
    if not others and held.installed.site.rows is None:
        bias = own.get("bias")
        return Pair(own["A"], own["B"], config.alpha, config.rslora, None if bias is None else bias / held.module.scale,
                    own.get("magnitude", torch.empty(0)))  # fmt: skip
    if held.config.kind == "dora" or any("bias" in tensors for tensors, _ in parts):
        raise GraftError(
            f"'{held.path}' has a {held.config.kind} with magnitudes or biases on a slice or beside another: PEFT can hold one whole layer"
        )
    out = host.weight.shape[1 if is_transposed(host) else 0]
    blocks = []
    for tensors, each in parts:
        block = torch.zeros(out, tensors["B"].shape[1], dtype=tensors["B"].dtype)
        rows = slice(None) if each.installed.site.rows is None else each.installed.site.rows
        block[rows] = each.module.scale * tensors["B"].cpu()
        blocks.append(block)
    B = torch.cat(blocks, 1)
    return Pair(torch.cat([tensors["A"].cpu() for tensors, _ in parts]), B, float(B.shape[1]), False)


def _tensors(held: Held) -> dict[str, Tensor]:
    module: Any = held.module
    return module.to_lora() if held.config.kind == "pissa" else dict(module.named_parameters())


@torch.no_grad()
def write_wholes(root: nn.Module, installs: Sequence[Held], folder: Folder, alone: bool) -> None:
    """Full modules as PEFT's modules_to_save, rows of tokens as its trainable tokens."""
    names, tokens = [], {}
    for held in installs:
        host = root.get_submodule(held.path)
        if getattr(held.config, "tokens", ()):
            if held.module.follows is None:
                tokens[held.path] = list(held.config.tokens)
                folder.tensors[f"{held.path}.token_adapter.trainable_tokens_delta"] = held.module.rows_now()
            continue
        names.append(held.path)
        folder.tensors |= {f"{held.path}.{name}": whole for name, whole in _whole_tensors(host, held.module).items()}
    if alone:
        raise GraftError(
            "PEFT holds whole modules and token rows beside another kind only (modules_to_save, trainable_token_indices): "
            "stack them with a lora, or keep Graft's format"
        )
    if names:
        folder.config["modules_to_save"] = names
    if tokens:
        folder.config["trainable_token_indices"] = tokens


def _whole_tensors(host: Any, module: Adapter) -> dict[str, Tensor]:
    folded = module.fold_all()
    if folded is not None:
        return folded
    weight = host.weight.detach()
    stored = weight.t() if is_transposed(host) else weight
    bias = getattr(host, "bias", None)
    whole, whole_bias = module.fold(stored.float(), None if bias is None else bias.detach().float())
    found = {"weight": whole.t() if is_transposed(host) else whole}
    return found if whole_bias is None else {**found, "bias": whole_bias}
