"""Fit a PEFT folder to a server. vLLM, SGLang and TGI read less than PEFT writes, and some of them ignore the rest in silence:

    all      LoRA only: no DoRA, biases, modules_to_save, trainable tokens or embeddings
    vLLM     one rank and one alpha for all layers (patterns are ignored)
    SGLang   the same, scaled by alpha / rank; LoRAs at all of q, k, v or none of them, and at both of gate and up or neither
    TGI      no patterns, and every adapted layer type in every layer (one gap drops the type everywhere)

Three conversions are exact: zero rows and columns bring all LoRAs to one rank, each layer's scale moves into its B, and zero LoRAs fill
gaps. Any other adapter that changes linear weights becomes LoRAs by a truncated singular value decomposition (SVD), which reports
its error.

Legend: R rank, I input, O output features.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.architectures.layers import is_linear, is_transposed, widths
from graft.architectures.walk import base_submodules
from graft.errors import GraftError, did_you_mean, listed
from graft.formats.folder import Folder, SiteAdapter, base_name
from graft.formats.peft.naming import ROOT, shortest_names
from graft.formats.weight_change import nearest_lora, weight_change
from graft.injection.state import site_table_of

Server = Literal["vllm", "sglang", "tgi"]
SERVERS: tuple[Server, ...] = ("vllm", "sglang", "tgi")
PARTNERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that SGLang fuses."""


def fitted(root: nn.Module, folder: Folder, server: str, *, convert: bool) -> Folder:
    """Return a folder that the server reads whole. convert: apply the exact conversions if they are needed.

    Raises `GraftError` for an unknown server and for everything in the folder that the server would ignore or misread.
    """
    if server not in SERVERS:
        raise GraftError(f"unknown server '{server}'.{did_you_mean(server, SERVERS)} There are: {', '.join(SERVERS)}")
    _refuse(folder, server)
    pairs = _pairs(folder)
    uniform = not folder.config["rank_pattern"] and not folder.config["alpha_pattern"]
    folder.notes += _left_out(root, list(pairs), server)
    absent = _absent(root, set(pairs), server)
    needs = [] if uniform else ["one rank and one alpha for all layers"]
    # SGLang scales by alpha / r, whatever the config says.
    needs += (
        ["the scale alpha / rank (this adapter has alpha / sqrt(rank))"]
        if folder.config["use_rslora"] and server == "sglang"
        else []
    )
    needs += [f"LoRAs at {listed(absent, 4)} too"] if absent else []
    if not needs:
        return folder
    if not convert:
        raise GraftError(
            f"{server} needs {' and '.join(needs)}. --convert adds zero rows, columns and LoRAs and moves scales into "
            "B, which changes no output"
        )
    return _uniform(root, folder, pairs, absent)


def _refuse(folder: Folder, server: str) -> None:
    config = folder.config
    if config.get("peft_type") != "LORA":
        raise GraftError(
            f"{server} serves LoRA only; this adapter is {config.get('peft_type')}. --svd RANK writes a LoRA that approximates it"
        )
    wrong = [
        what
        for field, what in {"use_dora": "DoRA's magnitudes", "lora_bias": "biases", "modules_to_save": "whole modules",
                            "target_parameters": "LoRAs on experts", "trainable_token_indices": "trained tokens"}.items()
        if config.get(field)
    ]  # fmt: skip
    wrong += ["a LoRA on the embedding"] if any(".lora_embedding_" in name for name in folder.tensors) else []
    if wrong:
        raise GraftError(
            f"{server} ignores {' and '.join(wrong)} in a LoRA folder, so it would serve a different model. Merge the adapter into the "
            "base (graft merge), or approximate it by a LoRA with --svd RANK if it changes linear layers only"
        )


def _left_out(root: nn.Module, paths: Sequence[str], server: str) -> list[str]:
    """Return notes on LoRAs that the server applies only where it is told so. Raises `GraftError` for those that it never applies."""
    head, table = (getattr(root, f"get_{which}_embeddings", lambda: None)() for which in ("output", "input"))
    if head is not None and table is not None and head is not table and head.weight is table.weight:
        tied = [path for path in paths if root.get_submodule(path) is head]
        if tied:
            raise GraftError(
                f"'{tied[0]}' shares its weight with the embedding in this base, and {server} then leaves out its LoRA: adapt other "
                "sites, or merge the adapter into the base (graft merge)"
            )
    sites = site_table_of(root)
    blocks = [f"{block.path}." for block in sites.blocks if block.stack not in sites.towers]
    ends = {site.module for name in ("head", "embed") for site in sites.by_name.get(name, [])}
    outside = (
        [path for path in paths if path not in ends and not path.startswith(tuple(blocks))] if sites.towers else []
    )
    if outside and server != "vllm":
        raise GraftError(
            f"{server} applies LoRAs to the language model only, and would leave out {len(outside)} of this adapter's, such as "
            f"'{outside[0]}': merge the adapter into the base (graft merge)"
        )
    if not outside:
        return []
    return [
        f"{len(outside)} LoRAs are outside of the language model, such as '{outside[0]}': vLLM applies them only if it is started with "
        "--enable-tower-connector-lora, and leaves them out otherwise"
    ]


def _pairs(folder: Folder) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the LoRA matrices by module path: A [R, I] and B [O, R]."""
    ends = (".lora_A.weight", ".lora_B.weight")
    paths = [name.removeprefix(ROOT).removesuffix(ends[0]) for name in folder.tensors if name.endswith(ends[0])]
    return {
        path: (folder.tensors[f"{ROOT}{path}{ends[0]}"], folder.tensors[f"{ROOT}{path}{ends[1]}"]) for path in paths
    }


def _absent(root: nn.Module, have: set[str], server: str) -> list[str]:
    """Return the linear layers that have no LoRA but need one on this server. have: the paths that have one."""
    linears = [path for path, module in base_submodules(root) if is_linear(module)]
    types = {path.rsplit(".", 1)[-1] for path in have}
    if server == "tgi":
        return [path for path in linears if path not in have and path.rsplit(".", 1)[-1] in types]
    if server == "vllm":
        return []
    wanted = {f"{path.rpartition('.')[0]}.{other}" for path in have for group in PARTNERS
              if path.rsplit(".", 1)[-1] in group for other in group}  # fmt: skip
    return [path for path in linears if path in wanted - have]


def _uniform(root: nn.Module, folder: Folder, pairs: dict[str, tuple[Tensor, Tensor]], absent: list[str]) -> Folder:
    """Give all LoRAs one rank R and alpha R, and add zero LoRAs at the absent layers.

    With alpha = R the server's own scale, alpha / R, is 1; each layer's scale is in its B. Say R is 8, and a layer has rank 2 and alpha 4:
    its A [2, I] gets 6 zero rows, and 2 B [O, 2] gets 6 zero columns.
    """
    config = folder.config
    rank = max(A.shape[0] for A, _ in pairs.values())
    found: dict[str, Tensor] = {}
    for path, (A, B) in pairs.items():
        own = A.shape[0]
        alpha = _by_exact_pattern(config["alpha_pattern"], path, config["lora_alpha"])
        scale = alpha / (own**0.5 if config["use_rslora"] else own)
        found[f"{path}.lora_A.weight"] = torch.cat([A, A.new_zeros(rank - own, A.shape[1])])
        found[f"{path}.lora_B.weight"] = torch.cat([B * scale, B.new_zeros(len(B), rank - own)], 1)
    like = next(iter(pairs.values()))[0]
    for path in absent:
        into, out = widths(root.get_submodule(path), path)
        found[f"{path}.lora_A.weight"], found[f"{path}.lora_B.weight"] = (
            like.new_zeros(rank, into),
            like.new_zeros(out, rank),
        )
    # `shortest_names` leaves out the two fields about layers where they are not needed, so clear the old ones first.
    names = {"layers_to_transform": None, "layers_pattern": None, **shortest_names(root, [*pairs, *absent])}
    changed = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, **names}
    notes = [*folder.notes, f"all layers now have rank {rank}, with their scales in B (exact)"]
    notes += [f"{len(absent)} layers without a LoRA got a zero LoRA (exact)"] if absent else []
    return Folder({**config, **changed}, {ROOT + name: tensor for name, tensor in found.items()}, notes=notes)


def _by_exact_pattern(pattern: dict[str, Any], path: str, usual: float) -> float:
    """Return the pattern's value for a module. The patterns that `naming.patterns` writes match one module each."""
    return pattern.get("^" + path.replace(".", r"\."), usual)


@torch.no_grad()
def by_svd(root: nn.Module, adapters: list[SiteAdapter], rank: int) -> Folder:
    """Approximate any adapter that folds into linear weights by LoRAs of one rank.

    Each LoRA is the best approximation of that rank to the adapter's change of the weight (Eckart and Young 1936). The folder's notes say
    how much of the change is lost. Raises `GraftError` for adapters that do not fold or that change anything but linear weights.
    """
    by_path: dict[str, list[SiteAdapter]] = defaultdict(list)
    for adapter in adapters:
        if not adapter.installed.changes_weight:
            raise GraftError(
                f"'{adapter.config.kind}' at '{adapter.path}' does not change a linear layer's weight, so no LoRA can stand for it"
            )
        by_path[adapter.path].append(adapter)
    tensors, worst, missed, total = {}, 0.0, 0.0, 0.0
    for path, own in by_path.items():
        delta = weight_change(root.get_submodule(path), path, own)
        A, B = nearest_lora(delta, rank)
        tensors |= {f"{ROOT}{path}.lora_A.weight": A, f"{ROOT}{path}.lora_B.weight": B}
        lost, whole = float((delta - B @ A).square().sum()), float(delta.square().sum())
        worst, missed, total = max(worst, (lost / whole) ** 0.5 if whole else 0.0), missed + lost, total + whole
    config = {"auto_mapping": None, "inference_mode": True, "revision": None, "peft_version": "0.21.2", "peft_type": "LORA",
              "r": rank, "lora_alpha": rank, "use_rslora": False, "use_dora": False, "lora_dropout": 0.0, "bias": "none",
              "lora_bias": False, "fan_in_fan_out": all(is_transposed(root.get_submodule(path)) for path in by_path),
              "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None,
              "task_type": None, "base_model_name_or_path": base_name(root),
              **shortest_names(root, list(by_path))}  # fmt: skip
    error = (missed / total) ** 0.5 if total else 0.0
    note = (
        f"approximated by LoRAs of rank {rank} (SVD): {error:.2%} of the adapter's change to the weights is lost (Frobenius norm), "
        f"{worst:.2%} at the worst layer"
    )
    return Folder(config, tensors, notes=[note])
