"""(IA)3, prompt tuning, P-tuning and prefix tuning as PEFT stores them.

Legend: P virtual tokens, L layers, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graft.architectures.layers import is_transposed
from graft.errors import GraftError
from graft.formats.peft.folder import Folder, Held
from graft.formats.peft.naming import shortest_names


def write_ia3(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """(IA)3; a folder says by endings which modules are scaled on their input."""
    if any(held.installed.site.rows is not None for held in installs):
        raise GraftError(
            "PEFT's (IA)3 scales whole layers; this one acts on slices of a fused projection: name attn.qkv instead"
        )
    inner = {held.path for held in installs if not hasattr(held.module, "inside")}
    names = shortest_names(root, [held.path for held in installs])
    if "layers_to_transform" in names:
        names = {"target_modules": sorted(held.path for held in installs)}
    endings = shortest_names(root, sorted(inner))
    inputs = sorted(inner) if "layers_to_transform" in endings else endings["target_modules"]
    if {name.rsplit(".", 1)[-1] for name in inputs} & {
        held.path.rsplit(".", 1)[-1] for held in installs if held.path not in inner
    }:
        inputs = sorted(inner)
        names = {"target_modules": sorted(held.path for held in installs)}
    transposed = any(is_transposed(root.get_submodule(held.path)) for held in installs)
    folder.config |= {"peft_type": "IA3", "feedforward_modules": [n for n in _as_targets(inputs, names) if inner],
                      "fan_in_fan_out": transposed, "init_ia3_weights": True, "modules_to_save": None, **names}  # fmt: skip
    for held in installs:
        scale = held.module.scale
        folder.tensors[f"{held.path}.ia3_l"] = scale[None, :] if held.path in inner else scale[:, None]


def _as_targets(inputs: Sequence[str], names: dict[str, Any]) -> list[str]:
    """PEFT wants every feedforward module among the targets, written the same way."""
    targets = names["target_modules"]
    return [
        name
        for name in targets
        if any(name == each or name.endswith(f".{each}") or each.endswith(f".{name}") for each in inputs)
    ]


def write_prompt(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """Prompt tuning; P-tuning as the prompt that its encoder makes."""
    (held,) = installs
    with torch.no_grad():
        vectors, tokens = held.module.prompt(), held.module.tokens
    config: Any = root.config
    if held.module.behind_positions:
        raise GraftError("in PEFT virtual tokens have positions; this adapter was trained with enters: blocks")
    _refuse_shown(config, installs)
    stacks = 2 if getattr(config, "is_encoder_decoder", False) else 1
    folder.config |= {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": tokens, "token_dim": vectors.shape[1],
                      "num_transformer_submodules": stacks, "num_layers": config.num_hidden_layers,
                      "num_attention_heads": config.num_attention_heads, "prompt_tuning_init": "RANDOM"}  # fmt: skip
    folder.beside["prompt_embeddings"] = vectors.repeat(stacks, 1)  # of an encoder-decoder's two it reads the first


def _refuse_shown(config: Any, installs: Sequence[Held]) -> None:
    if getattr(config, "sliding_window", None) and not all(held.module.windowed for held in installs):
        raise GraftError(
            "in PEFT a sliding window hides virtual tokens, and this base has one; this adapter was trained with window: shows and would "
            "compute something else there. Train with window: hides to export it"
        )


def write_prefix(root: nn.Module, installs: Sequence[Held], folder: Folder) -> None:
    """Prefix tuning, the projection folded away: [P, 2 L K D], keys of layer l in slot 2 l and its values in slot 2 l + 1."""
    config: Any = root.config
    if any(held.config.positions != "after_prefix" for held in installs):
        raise GraftError(
            "in PEFT the sequence's positions start behind the prefix; this adapter was trained with positions: zero and would compute "
            "something else there. Train with positions: after_prefix to export it"
        )
    _refuse_shown(config, installs)
    if getattr(config, "is_encoder_decoder", False) or len(installs) != config.num_hidden_layers:
        raise GraftError(
            "PEFT's prefix tuning is for every layer of a decoder or an encoder; this adapter names other places"
        )
    slots = [part.detach() for held in installs for part in held.module.keys_values()]
    flat = torch.stack(slots, 1).flatten(1)
    kv_width = slots[0].shape[1] * slots[0].shape[2]
    folder.config |= {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": len(flat), "token_dim": kv_width,
                      "num_transformer_submodules": 1, "num_layers": len(installs), "num_attention_heads": slots[0].shape[1],
                      "encoder_hidden_size": kv_width, "prefix_projection": False}  # fmt: skip
    folder.beside["prompt_embeddings"] = flat
