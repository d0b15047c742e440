"""Prefix tuning, prompt tuning and ReFT as AdapterHub stores them.

Legend: P virtual tokens, L layers, K key-value heads, D head size or hidden size, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.reft import orthonormal_rows
from graft.architectures.language import resolve_sites
from graft.formats.adapterhub.places import BEHIND, DENSE, differing, model_type, outer, refuse
from graft.formats.peft.folder import Folder, Held
from graft.injection.state import site_table_of


@torch.no_grad()
def write_prefix(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    """Keys and values themselves (flat), a projection folded away. The library stores them once per layer too, which it does not read."""
    config: Any = installs[0].config
    positions = "moved_keys" if model_type(root) in BEHIND else "zero"
    parts = (
        {"encoder_prefix": "encoder.attn", "self_prefix": "decoder.attn", "cross_prefix": "decoder.cross"}
        if len(site_table_of(root).stacks) > 1
        else {"self_prefix": "attn"}
    )
    sites = {
        part: [site.module for site in resolve_sites(site_table_of(root), config.model_copy(update={"sites": place}))]
        for part, place in parts.items()
    }
    paths = [held.path for held in installs]
    present = {part: [path for path in own if path in paths] for part, own in sites.items()}
    refuse("prefix tuning", {
        "settings that differ between sites": differing(installs),
        f"positions: {config.positions} (on this base it computes positions: {positions})": config.positions != positions,
        "some layers only": any(own and own != sites[part] for part, own in present.items()) or len(paths) != len(set(paths)),
        "an encoder-decoder whose decoder has none": not present["self_prefix"],
    })  # fmt: skip
    by_path = {held.path: held for held in installs}
    for part, own in present.items():
        if own:
            slots = [half for path in own for half in by_path[path].module.keys_values()]
            flat = torch.stack(slots).transpose(0, 1).flatten()  # [2L, P, K, D] -> [P, 2L, K, D]
            folder.tensors[f"{outer(root)}prefix_tuning.prefix_tunings.{name}.{part}.control_trans"] = flat
    return {
        "architecture": "prefix_tuning", "encoder_prefix": bool(present.get("encoder_prefix", True)),
        "cross_prefix": bool(present.get("cross_prefix", True)), "leave_out": [], "flat": True, "prefix_length": config.tokens,
        "bottleneck_size": 512, "non_linearity": "tanh", "dropout": 0.0, "use_gating": False, "shared_gating": True,
        "init_weights_seed": None,
    }  # fmt: skip


@torch.no_grad()
def write_prompt(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    """The prompt, P-tuning's as its encoder makes it."""
    (held,) = installs
    refuse("prompt tuning", {
        f"a base of type {model_type(root)}, where the library has none": model_type(root) not in DENSE,
        "virtual tokens with positions of their own (it computes enters: blocks)": not held.module.behind_positions,
    })  # fmt: skip
    key = f"{outer(root)}prompt_tuning.prompt_tunings.{name}.prompt_embedding.weight"
    folder.tensors[key] = held.module.prompt()
    return {"architecture": "prompt_tuning", "prompt_length": held.module.tokens, "prompt_init": "random_uniform", "prompt_init_text": None,
            "combine": "prefix", "init_weights_seed": None}  # fmt: skip


@torch.no_grad()
def write_reft(root: nn.Module, installs: Sequence[Held], folder: Folder, name: str) -> dict[str, Any]:
    """LoReFT and NoReFT, with what torch's orthogonal parametrisation keeps of R."""
    config: Any = installs[0].config
    blocks = {block.path: block.number for block in site_table_of(root).blocks}
    refuse("ReFT", {
        "settings that differ between sites": differing(installs),
        "direft, of which its file forgets that it is": config.form == "direft", "positions: all": config.positions == "all",
        "sites other than layer": any(held.path not in blocks for held in installs),
        f"a base of type {model_type(root)}, as far as is known here": model_type(root) in BEHIND,
    })  # fmt: skip
    numbers = _units(config.prefix, config.suffix, config.tied)
    for held in installs:
        for place in range(
            1 if config.tied else 2
        ):  # a unit for positions that it never changes is a copy of the other
            unit = held.module.units[numbers.index(place) if place in numbers else 0]
            prefix = f"{held.path}.reft_layer.refts.{name}.units.{place}."
            folder.tensors |= {f"{prefix}learned_source.{end}": getattr(unit.W, end) for end in ("weight", "bias")}
            folder.tensors |= {
                f"{prefix}projection.{end}": tensor for end, tensor in _projection(unit, config.form).items()
            }
    layers = sorted(blocks[held.path] for held in installs)
    return {"architecture": "reft", "layers": "all" if layers == sorted(blocks.values()) else layers, "prefix_positions": config.prefix,
            "suffix_positions": config.suffix, "r": config.rank, "orthogonality": config.form == "loreft", "tied_weights": config.tied,
            "dropout": config.dropout, "non_linearity": None, "dtype": None, "init_weights_seed": None, "output_reft": True}  # fmt: skip


def _units(prefix: int, suffix: int, tied: bool) -> list[int]:
    """The numbers there of the units that an adapter has here: of the first positions 0, of the last 1, one for both 0."""
    return [0] if tied else [number for number, length in enumerate((prefix, suffix)) if length]


def _projection(unit: Any, form: str) -> dict[str, Tensor]:
    if form != "loreft":
        return {"weight": unit.R}
    R = orthonormal_rows(unit.R)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # the rows that complete R to a basis are drawn
        linear: Any = nn.utils.parametrizations.orthogonal(nn.Linear(R.shape[1], R.shape[0], bias=False))
        linear.weight = R.float().cpu()
    stored = linear.state_dict()
    return {
        f"parametrizations.weight.{end}": stored[f"parametrizations.weight.{end}"] for end in ("original", "0.base")
    }
