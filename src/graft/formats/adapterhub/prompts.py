"""AdapterHub's prefix tuning and prompt tuning, read and written.

Legend: P virtual tokens, L layers, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.prefix import Prefix
from graft.adapters.kinds.prompt import PromptTuning
from graft.architectures.sites import SiteTable
from graft.errors import GraftError
from graft.formats.adapterhub.file import HubFile
from graft.formats.adapterhub.gates import gated
from graft.formats.adapterhub.places import DENSE, T5_TYPES, differing, model_type, outer, refuse
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.injection.state import site_table_of, sites_of

STACKS = {"encoder_prefix": "encoder.attn", "self_prefix": "decoder.attn", "cross_prefix": "decoder.cross"}
"""The sites of an encoder-decoder's prefixes."""


def _prefix_sites(site_table: SiteTable) -> dict[str, str]:
    """Return the sites of each prefix that the library has in this model."""
    return STACKS if len(site_table.stacks) > 1 else {"self_prefix": "attn"}


def read_prefix(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Read the keys and values of every layer. If the file has a reparametrisation, they are computed from it."""
    if config.get("use_gating") and not config.get("shared_gating", True):
        raise GraftError(
            f"{file.folder} has a gate for keys and one for values (shared_gating: false), which has no equal in Graft"
        )
    leave_out = config.get("leave_out") or ()
    # The library's positions start at 0. In T5 they move the keys of the sequence after the prefix, but not the queries.
    relative = any(hasattr(module, "relative_attention_bias") for module in file.model.modules())
    prefix, pieces = Prefix(tokens=config["prefix_length"], positions="moved_keys" if relative else "zero"), []
    for part, names in _prefix_sites(file.site_table).items():
        if part != "self_prefix" and not config.get(part, True):
            continue
        sites = [
            site
            for site in sites_of(file.model, prefix.model_copy(update={"sites": names}))
            if site.layer not in leave_out
        ]
        keys = [key for key in file.left if f".{part}." in key and f".{file.name}." in key]
        flat = _computed(file, part, keys, prefix.tokens)
        slots = flat.view(prefix.tokens, 2 * len(sites), sites[0].num_kv_heads, sites[0].head_dim).transpose(0, 1)
        for n, site in enumerate(sites):
            tensors = {"keys": slots[2 * n].contiguous(), "values": slots[2 * n + 1].contiguous()}
            piece = Piece(site.module, prefix, tensors, site.part)
            gate = f"{site.module}.prefix_tuning.prefix_gates.{file.name}"
            pieces.append(gated(file, piece, gate) if config.get("use_gating") else piece)
    return pieces


def _computed(file: HubFile, part: str, keys: list[str], tokens: int) -> Tensor:
    """Return the prefix [P, 2 L K D]. The library stores the same tensors once per layer and once more; they must agree."""
    own: dict[str, Tensor] = {}
    for key in keys:
        name, tensor = key.split(f".{part}.", 1)[1], file.take(key)
        if not torch.equal(own.setdefault(name, tensor), tensor):
            raise GraftError(f"{file.folder} holds two different tensors for {part}.{name}")
    if "wte.weight" not in own:
        return own["control_trans"].view(tokens, -1)
    hidden = torch.tanh(own["wte.weight"] @ own["control_trans.0.weight"].t() + own["control_trans.0.bias"])
    return hidden @ own["control_trans.2.weight"].t() + own["control_trans.2.bias"]


@torch.no_grad()
def write_prefix(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write the keys and values (the library calls this flat); a projection is folded away. Return the config.

    The library also stores them once per layer, but does not read these copies, so they are not written.
    """
    config: Any = adapters[0].config
    positions = "moved_keys" if model_type(root) in T5_TYPES else "zero"
    sites = {
        part: [site.module for site in sites_of(root, config.model_copy(update={"sites": names}))]
        for part, names in _prefix_sites(site_table_of(root)).items()
    }
    paths = [adapter.path for adapter in adapters]
    present = {part: [path for path in own if path in paths] for part, own in sites.items()}
    refuse("prefix tuning", {
        "settings that differ between sites": differing(adapters),
        f"positions: {config.positions} (on this base it computes positions: {positions})": config.positions != positions,
        "some layers of an encoder-decoder only": len(sites) > 1 and any(own and own != sites[part] for part, own in present.items()),
        "two prefixes in one layer": len(paths) != len(set(paths)),
        "an encoder-decoder without a prefix in its decoder": not present["self_prefix"],
        "keys and values of several sizes": len({half.shape for each in adapters for half in each.module.keys_values()}) > 1,
    })  # fmt: skip
    by_path = {adapter.path: adapter for adapter in adapters}
    every = (
        {site.layer for site in sites_of(root, config.model_copy(update={"sites": "attn"}))}
        if len(sites) == 1
        else set()
    )
    left = sorted(every - {adapter.installed.site.layer for adapter in adapters}, key=lambda layer: layer or 0)
    for part, own in present.items():
        if own:
            slots = [half for path in own for half in by_path[path].module.keys_values()]
            flat = torch.stack(slots).transpose(0, 1).flatten()  # [2 L, P, K, D] -> [P, 2 L, K, D]
            folder.tensors[f"{outer(root)}prefix_tuning.prefix_tunings.{name}.{part}.control_trans"] = flat
    return {
        "architecture": "prefix_tuning", "encoder_prefix": bool(present.get("encoder_prefix", True)),
        "cross_prefix": bool(present.get("cross_prefix", True)), "leave_out": left, "flat": True, "prefix_length": config.tokens,
        "bottleneck_size": 512, "non_linearity": "tanh", "dropout": 0.0, "use_gating": False, "shared_gating": True,
        "init_weights_seed": None,
    }  # fmt: skip


def read_prompt(file: HubFile, config: Mapping[str, Any]) -> list[Piece]:
    """Read prompt tuning with the prompt before the sequence."""
    if config.get("combine", "prefix") != "prefix":
        raise GraftError(
            f"{file.folder}: a prompt after the first token (combine: {config['combine']}) has no equal in Graft"
        )
    tail = f"prompt_tuning.prompt_tunings.{file.name}.prompt_embedding.weight"
    vectors = file.take(next((name for name in file.left if name.endswith(tail)), tail))
    embedding = file.site_table.end("embed")
    if embedding is None:
        raise GraftError(f"{file.folder} holds virtual tokens, but this base has no token embedding")
    # In models like BERT the prompt enters after the position embeddings. T5, DeBERTa-v2 and causal models add none before the blocks.
    enters: Any = "blocks" if hasattr(file.model.base_model, "embeddings") else "embedding"
    prompt = PromptTuning(tokens=config["prompt_length"], enters=enters)
    return [Piece(embedding.module, prompt, {"vectors": vectors}, "embedding")]


@torch.no_grad()
def write_prompt(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder, name: str) -> dict[str, Any]:
    """Write prompt tuning, and P-tuning as the prompt that its encoder computes. Return the config."""
    (adapter,) = adapters
    refuse("prompt tuning", {
        f"a base of type {model_type(root)}, where the library has none": model_type(root) not in DENSE,
        "virtual tokens with positions of their own (it computes enters: blocks)": not adapter.module.after_positions,
    })  # fmt: skip
    key = f"{outer(root)}prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight"
    folder.tensors[key] = adapter.module.prompt()
    return {"architecture": "prompt_tuning", "prompt_length": adapter.module.tokens, "prompt_init": "random_uniform",
            "prompt_init_text": None, "combine": "prefix", "init_weights_seed": None}  # fmt: skip
