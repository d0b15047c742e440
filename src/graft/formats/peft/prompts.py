"""PEFT's prompt tuning, P-tuning and prefix tuning, read and written.

Legend: P virtual tokens, L layers, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.prefix import Prefix
from graft.adapters.kinds.prompt import PromptTuning
from graft.errors import GraftError
from graft.formats.composing import Piece
from graft.formats.folder import Folder, SiteAdapter
from graft.formats.peft.file import PeftFile
from graft.injection.state import site_table_of, sites_of


def read_prompt(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read prompt tuning, and P-tuning, of which PEFT stores the prompt that the encoder computed."""
    vectors, tokens = file.take("prompt_embeddings"), file.field("num_virtual_tokens")
    embedding = site_table_of(model).end("embed")
    if embedding is None:
        raise GraftError(f"{file.folder} holds virtual tokens, but this base has no token embedding")
    window: Any = "hides"
    return [
        Piece(embedding.module, PromptTuning(tokens=tokens, window=window), {"vectors": vectors[:tokens]}, "embedding")
    ]


def read_prefix(file: PeftFile, model: nn.Module) -> list[Piece]:
    """Read prefix tuning: one tensor [P, 2 L K D] for all layers, and positions of the sequence that start after the prefix.

    Viewed as [P, 2 L, K, D], it has the keys of layer l in slot 2 l and its values in slot 2 l + 1. In an encoder-decoder PEFT adapts the
    decoder and counts four slots per layer, of which the last two, for attention over the encoder, go unused. The tensor has only 2 L
    slots, and PEFT repeats it, so layer l reads slots 4 l and 4 l + 1 modulo 2 L: with 4 layers these are 0, 4, 0, 4 and the ones after.
    """
    flat, tokens = file.take("prompt_embeddings"), file.field("num_virtual_tokens")
    stride = 4 if "decoder" in site_table_of(model).stacks and len(site_table_of(model).stacks) > 1 else 2
    prefix = Prefix(tokens=tokens, init_std=1.0, positions="after_prefix", window="hides",
                    sites="decoder.attn" if stride == 4 else "attn")  # fmt: skip
    sites = sites_of(model, prefix)
    heads, head_dim = sites[0].num_kv_heads, sites[0].head_dim
    wanted = (tokens, 2 * len(sites) * heads * head_dim)
    if not flat.numel():
        return []
    if tuple(flat.shape) != wanted:
        raise GraftError(
            f"{file.folder}: prompt_embeddings has shape {tuple(flat.shape)}, but {tokens} virtual tokens for {len(sites)} layers of "
            f"{heads} key-value heads of size {head_dim} need {wanted}"
        )
    slots = flat.view(tokens, -1, heads, head_dim).transpose(0, 1)  # [2 L, P, K, D]
    return [Piece(site.module, prefix, _slots(slots, stride * number), site.part) for number, site in enumerate(sites)]


def _slots(slots: Tensor, first: int) -> dict[str, Tensor]:
    return {name: slots[(first + n) % len(slots)].contiguous() for n, name in enumerate(("keys", "values"))}


def write_prompt(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write prompt tuning. P-tuning is written as the prompt that its encoder computes."""
    (adapter,) = adapters
    with torch.no_grad():
        vectors, tokens = adapter.module.prompt(), adapter.module.tokens
    config: Any = site_table_of(root).text_config
    if adapter.module.after_positions:
        raise GraftError("in PEFT virtual tokens have positions; this adapter was trained with enters: blocks")
    _refuse_shown(config, adapters)
    stacks = 2 if getattr(root.config, "is_encoder_decoder", False) else 1
    folder.config |= {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": tokens, "token_dim": vectors.shape[1],
                      "num_transformer_submodules": stacks, "num_layers": config.num_hidden_layers,
                      "num_attention_heads": config.num_attention_heads, "prompt_tuning_init": "RANDOM"}  # fmt: skip
    folder.unprefixed["prompt_embeddings"] = vectors.repeat(
        stacks, 1
    )  # for an encoder-decoder PEFT reads the first half


def _refuse_shown(config: Any, adapters: Sequence[SiteAdapter]) -> None:
    """Raise `GraftError` if a sliding window of this base shows the virtual tokens, which PEFT's would hide."""
    if getattr(config, "sliding_window", None) and not all(adapter.module.windowed for adapter in adapters):
        raise GraftError(
            "in PEFT a sliding window hides virtual tokens, and this base has one; this adapter was trained with window: shows and would "
            "compute something else there. Train with window: hides to export it"
        )


def write_prefix(root: nn.Module, adapters: Sequence[SiteAdapter], folder: Folder) -> None:
    """Write prefix tuning as the keys and values that a projection computes: [P, 2 L K D], in the slots that `read_prefix` explains."""
    config: Any = site_table_of(root).text_config
    if any(adapter.config.positions != "after_prefix" for adapter in adapters):
        raise GraftError(
            "in PEFT the sequence's positions start after the prefix; this adapter was trained with positions: zero and would compute "
            "something else there. Train with positions: after_prefix to export it"
        )
    _refuse_shown(config, adapters)
    if getattr(root.config, "is_encoder_decoder", False) or len(adapters) != config.num_hidden_layers:
        raise GraftError(
            "PEFT's prefix tuning needs every layer of a decoder-only or encoder-only model; this adapter names other sites"
        )
    slots = [part.detach() for adapter in adapters for part in adapter.module.keys_values()]
    if len({part.shape for part in slots}) > 1:
        raise GraftError(
            "PEFT keeps keys and values of one size, and this base has several (latent attention, or layers with other heads)"
        )
    flat = torch.stack(slots, 1).flatten(1)
    kv_width = slots[0].shape[1] * slots[0].shape[2]
    folder.config |= {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": len(flat), "token_dim": kv_width,
                      "num_transformer_submodules": 1, "num_layers": len(adapters), "num_attention_heads": slots[0].shape[1],
                      "encoder_hidden_size": kv_width, "prefix_projection": False}  # fmt: skip
    folder.unprefixed["prompt_embeddings"] = flat
