"""PEFT's (IA)3, norm tuning and trainable tokens, prompt tuning, P-tuning and prefix tuning.

Legend: P virtual tokens, L layers, K key-value heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.kinds.full import Full
from graft.adapters.kinds.ia3 import IA3
from graft.adapters.kinds.prefix import Prefix
from graft.adapters.kinds.prompt import PromptTuning
from graft.architectures.language import resolve_sites
from graft.errors import GraftError
from graft.formats.composing import Piece, difference
from graft.formats.foreign import Checkpoint
from graft.formats.peft.lora import token_pieces
from graft.formats.peft.targets import matches, targets
from graft.injection.state import site_table_of


def read_ia3(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """Factors on the output, or on the input where `feedforward_modules` names the module."""
    inner = file.config.get("feedforward_modules") or []
    pieces = []
    for path, _ in targets(file, model, (".ia3_l",)):
        scale = file.take(f"{path}.ia3_l").flatten()
        pieces.append(Piece(path, IA3(inputs=(".*",) if matches(path, inner) else ()), {"scale": scale}))
    return pieces


def read_norms(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """LN tuning: whole norms, as differences."""
    pieces = []
    for path, module in targets(file, model, (".ln_tuning_layers.",)):
        own = {name: p for name, p in module.named_parameters() if "graft" not in name.split(".")}
        tensors = {name: difference(file.take(f"{path}.ln_tuning_layers.{name}"), p) for name, p in own.items()}
        pieces.append(Piece(path, Full(), tensors, "norm"))
    return pieces


def read_tokens(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """Rows of one table; a tied head, which the file has again, follows."""
    pieces = []
    for path, _ in targets(file, model, (".trainable_tokens_delta",)):
        rows = file.take(f"{path}.trainable_tokens_delta")
        for again in [name for name in file.left if name.endswith(".trainable_tokens_delta")]:
            if torch.equal(file.left[again].float(), rows):
                file.left.pop(again)
        pieces += token_pieces(model, path, rows, list(file.field("token_indices")))
    return pieces


def read_prompt(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """Prompt tuning and P-tuning, which is stored as the prompt that its encoder made."""
    vectors, tokens = file.take("prompt_embeddings"), file.field("num_virtual_tokens")
    embedding = site_table_of(model).end("embed")
    if embedding is None:
        raise GraftError(f"{file.folder} holds virtual tokens, and this base has no embedding of tokens")
    window: Any = "hides"
    return [
        Piece(embedding.module, PromptTuning(tokens=tokens, window=window), {"vectors": vectors[:tokens]}, "embedding")
    ]


def read_prefix(file: Checkpoint, model: nn.Module) -> list[Piece]:
    """[P, 2 L K D] seen as [P, 2 L, K, D]: keys of layer l in slot 2 l, its values in slot 2 l + 1; the sequence starts behind the prefix.

    Of an encoder-decoder, slots four to a layer, taken around again; half of them stood for attention over the encoder and are not used.
    """
    flat, tokens = file.take("prompt_embeddings"), file.field("num_virtual_tokens")
    stride = 4 if "decoder" in site_table_of(model).stacks and len(site_table_of(model).stacks) > 1 else 2
    prefix = Prefix(tokens=tokens, init_std=1.0, positions="after_prefix", window="hides",
                    sites="decoder.attn" if stride == 4 else "attn")  # fmt: skip
    sites = resolve_sites(site_table_of(model), prefix)
    heads, head_dim = sites[0].num_kv_heads, sites[0].head_dim
    wanted = (tokens, 2 * len(sites) * heads * head_dim)
    if not flat.numel():
        return []
    if tuple(flat.shape) != wanted:
        raise GraftError(
            f"{file.folder}: prompt_embeddings has shape {tuple(flat.shape)}, but {tokens} virtual tokens for {len(sites)} layers of "
            f"{heads} key-value heads of size {head_dim} need {wanted}"
        )
    slots = flat.view(tokens, -1, heads, head_dim).transpose(0, 1)
    return [Piece(site.module, prefix, _slots(slots, stride * number), site.part) for number, site in enumerate(sites)]


def _slots(slots: Tensor, first: int) -> dict[str, Tensor]:
    return {name: slots[(first + n) % len(slots)].contiguous() for n, name in enumerate(("keys", "values"))}
