"""PEFT's LoRA, read and written, with the variants that change what is computed: rsLoRA, DoRA, `lora_bias`, patterns, embeddings, experts.

Legend: R rank, I input, O output features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.dora import DoRA
from graft.adapters.kinds.lora import LoRA
from graft.architectures.layers import is_linear, is_transposed, widths
from graft.errors import GraftError
from graft.formats.composing import Piece, difference
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.experts import parameter_pieces, write_parameters
from graft.formats.peft.file import PeftFile
from graft.formats.peft.naming import patterns, shortest_names
from graft.formats.peft.old_experts import old_expert_pieces
from graft.formats.peft.residuals import as_pissa, init_of
from graft.formats.peft.targets import by_pattern, targets


def read_lora(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read LoRA or DoRA. Raises `GraftError` for variants without an equal."""
    config = file.config
    start = init_of(file)
    settings = {"dropout": config.get("lora_dropout") or 0.0, "rslora": bool(config.get("use_rslora"))}
    pieces = parameter_pieces(file, model, settings) + old_expert_pieces(file, model, settings)
    if start is not None and (pieces or config.get("use_dora")):
        raise GraftError(
            f"{file.folder}: init_lora_weights '{start}' together with DoRA or LoRAs on experts has no equal in Graft"
        )
    if pieces and not _at_modules(file):
        return pieces
    marks = (".lora_A.", ".lora_embedding_A")
    read = [(_piece(file, path, module, settings), module) for path, module in targets(file, model, marks)]
    return [piece if start is None else as_pissa(file, piece, module, start) for piece, module in read] + pieces


def _at_modules(file: PeftFile) -> bool:
    """Whether a file with LoRAs at parameters has others at modules."""
    wanted = file.config.get("target_modules")
    return any(".lora_" in name for name in file.left) if wanted is None else bool(wanted)


def _piece(file: PeftFile, path: str, module: nn.Module, settings: dict[str, Any]) -> Piece:
    """Read the LoRA of one module. settings: the fields that all of the file's LoRAs share."""
    config = file.config
    fields: dict[str, Any] = {
        "rank": by_pattern(path, config.get("rank_pattern"), file.field("r")),
        "alpha": float(by_pattern(path, config.get("alpha_pattern"), file.field("lora_alpha"))),
        **settings,
    }
    if isinstance(module, nn.Embedding):
        tensors = {"A": file.take(f"{path}.lora_embedding_A"), "B": file.take(f"{path}.lora_embedding_B")}
        return Piece(path, LoRA(**fields), tensors, "embedding")
    if not is_linear(module):
        raise GraftError(
            f"{file.folder}: '{path}' is a {type(module).__name__}; LoRA is read at linear layers and embeddings"
        )
    tensors = {"A": file.take(f"{path}.lora_A.weight"), "B": file.take(f"{path}.lora_B.weight")}
    # PEFT knows two trained biases. `lora_bias` is B's own, which the scale multiplies too; `bias` is the layer's, stored whole.
    bias = torch.zeros(())
    if config.get("lora_bias"):
        bias = bias + file.take(f"{path}.lora_B.bias") * LoRA(**fields).scale
    if config.get("bias", "none") != "none" and getattr(module, "bias", None) is not None:
        bias = bias + difference(file.take(_bias_name(file, path)), module.bias)  # pyright: ignore[reportArgumentType]
    if bias.dim():
        tensors["bias"] = bias
    fields["train_bias"] = "bias" in tensors
    if not config.get("use_dora"):
        return Piece(path, LoRA(**fields), tensors)
    return Piece(path, DoRA(**fields), {**tensors, "magnitude": file.take(f"{path}.lora_magnitude_vector")})


def _bias_name(file: PeftFile, path: str) -> str:
    inner = f"{path}.base_layer.bias"
    return inner if inner in file.left else f"{path}.bias"


def write_lora(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write LoRA and DoRA, and PiSSA as a LoRA of twice the rank.

    Several LoRAs at one module, and LoRAs on slices of a fused projection, are written as one LoRA of the summed rank, which computes the
    same. Raises `GraftError` for combinations that one PEFT folder cannot hold.
    """
    experts = [adapter for adapter in adapters if adapter.installed.site.type == "experts"]
    by_module: dict[str, list[SiteAdapter]] = defaultdict(list)
    for adapter in adapters:
        if adapter.installed.site.type != "experts":
            by_module[adapter.path].append(adapter)
    pairs = {path: _pair(root.get_submodule(path), own) for path, own in by_module.items()}
    at_experts = {f"{adapter.path}.{adapter.module.parameter}": adapter.config for adapter in experts}
    # The fields of the config hold for the whole folder: ranks and alphas may have exceptions, everything else must agree.
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
            "PEFT's lora_bias holds for all layers of a folder; this adapter trains biases at some of them only"
        )
    dropout = max(adapter.config.dropout for adapter in adapters)
    if experts and biases:
        raise GraftError(
            "PEFT cannot combine LoRAs on experts with lora_bias: train without train_bias, or keep Graft's format"
        )
    if experts and dropout:
        folder.notes.append("dropout is not written: PEFT allows none together with LoRAs on experts")
        dropout = 0.0
    transposed = {is_transposed(root.get_submodule(path)) for path in pairs}
    folder.config |= {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora.pop(), "use_dora": adapters[0].config.kind == "dora",
        "lora_dropout": dropout, "bias": "none", "lora_bias": bool(biases),
        "fan_in_fan_out": transposed == {True}, "init_lora_weights": True,
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
        **shortest_names(root, list(pairs)),
    }  # fmt: skip
    if experts:
        write_parameters(root, experts, folder)
    _write_pairs(root, pairs, folder)


def _write_pairs(root: nn.Module, pairs: Mapping[str, Pair], folder: Folder) -> None:
    for path, pair in pairs.items():
        if isinstance(root.get_submodule(path), nn.Embedding):
            folder.tensors |= {f"{path}.lora_embedding_A": pair.A, f"{path}.lora_embedding_B": pair.B}
            continue
        folder.tensors |= {f"{path}.lora_A.weight": pair.A, f"{path}.lora_B.weight": pair.B}
        if pair.bias is not None:
            folder.tensors[f"{path}.lora_B.bias"] = pair.bias
        if pair.magnitude is not None:
            folder.tensors[f"{path}.lora_magnitude_vector"] = pair.magnitude


@dataclass
class Pair:
    """LoRA's matrices at one module, A [R, I] and B [O, R], and what goes with them."""

    A: Tensor
    B: Tensor
    alpha: float
    rslora: bool
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@torch.no_grad()
def _pair(host: Any, adapters: Sequence[SiteAdapter]) -> Pair:
    """Return one LoRA for all that an adapter has at a module.

    A single LoRA on the whole module stays as it is. Several become blocks of one: A is all of theirs stacked, and B holds each one's B,
    times its scale, in the columns of its block and at the output features of its slice, with zeros elsewhere. E.g. two LoRAs of rank 2, on
    q and on v of a fused projection with 3 x 8 output features:

        A [4, I] = [A_q; A_v]        B [24, 4] = [[B_q, 0], [0, 0], [0, B_v]], each block [8, 2]
    """
    parts = [(_tensors(adapter), adapter) for adapter in adapters]
    (own, adapter), *others = parts
    config: Any = adapter.config.to_lora() if adapter.config.kind == "pissa" else adapter.config
    if not others and adapter.installed.site.features is None:
        bias = own.get("bias")
        return Pair(own["A"], own["B"], config.alpha, config.rslora, None if bias is None else bias / adapter.module.scale,
                    own.get("magnitude"))  # fmt: skip
    if adapter.config.kind == "dora" or any("bias" in tensors for tensors, _ in parts):
        raise GraftError(
            f"'{adapter.path}' has a {adapter.config.kind} with magnitudes or biases on a slice of a layer, or several at one layer: PEFT "
            "holds one for a whole layer"
        )
    out = widths(host, adapter.path)[1]
    blocks = []
    for tensors, each in parts:
        block = torch.zeros(out, tensors["B"].shape[1], dtype=tensors["B"].dtype)
        block[each.features] = each.module.scale * tensors["B"].cpu()
        blocks.append(block)
    B = torch.cat(blocks, 1)
    # alpha is the rank, so that the scale is 1: each block holds its own.
    return Pair(torch.cat([tensors["A"].cpu() for tensors, _ in parts]), B, float(B.shape[1]), False)


def _tensors(adapter: SiteAdapter) -> dict[str, Tensor]:
    module: Any = adapter.module
    return module.to_lora() if adapter.config.kind == "pissa" else dict(module.named_parameters())
