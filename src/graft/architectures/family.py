"""What a model family is: where the sites of one transformer block lie.

A family gives, relative to the block: the linear layers by site name; the sublayers (`attn`, `cross`, `mlp`) with the module whose input
is x, the module whose output is h (what is added to the residual: the last projection in LLaMA, BLOOM and BERT, the post-norm in Gemma 2/3)
and the norm; how a fused qkv projection lays out its rows; and where positions come from.

Legend: H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Layout = Literal["none", "heads", "blocks", "groups"]


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a block: h = out(... source(x)), and h is added to the residual stream."""

    source: str
    """The module whose first input is x; of `attn` and `cross`, the one that computes attention."""
    out: str
    """The module whose output is h, before dropout."""
    norm: str = ""
    """The sublayer's norm."""
    residual: str = ""
    """The module whose first input is the residual stream; empty where that is not known."""
    post: bool = False
    """Whether `norm` is applied to h + residual (BERT), and not to the residual before the sublayer."""


def pre_norm(source: str, out: str, norm: str) -> Sublayer:
    """x = norm(residual)."""
    return Sublayer(source, out, norm, norm)


def post_norm(source: str, out: str, norm: str) -> Sublayer:
    """x is the residual, and the stream goes on as norm(h + x)."""
    return Sublayer(source, out, norm, source, post=True)


@dataclass(frozen=True)
class Family:
    """Where the sites of one block lie."""

    linears: Mapping[str, str]
    sublayers: Mapping[str, Sublayer] = field(default_factory=dict)
    fused: Layout = "none"
    """Rows of attn.qkv. heads: q, k, v of head 0, then of head 1, ... (BLOOM, NeoX). blocks: all q, all k, all v (GPT-2, Phi-3). groups:
    per key-value head its queries, then k, then v (Falcon)."""
    positions: Literal["arange", "mask", "padding", "none"] = "arange"
    """What the model does without position ids: count from the left, count real tokens by the mask or by the padding's id from that id
    on (RoBERTa), or use no positions (ALiBi, T5)."""
    unless: str = ""
    """An attribute of the block; a row does not hold where it is true."""

    @property
    def attentions(self) -> dict[str, str]:
        """The modules that compute attention, by sublayer."""
        return {name: self.sublayers[name].source for name in ("attn", "cross") if name in self.sublayers}

    def fits(self, block: nn.Module) -> bool:
        """Whether a block has every module that the row names."""
        paths = {*self.linears.values()}
        for sublayer in self.sublayers.values():
            paths |= {sublayer.source, sublayer.out, sublayer.norm, sublayer.residual} - {""}
        return all(has(block, path) for path in paths) and not (self.unless and getattr(block, self.unless, False))


def has(block: nn.Module, path: str) -> bool:
    """Whether a module lies at a path."""
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def fused_features(
    layout: Layout, heads: int, kv_heads: int, head_dim: int, out_features: int
) -> dict[str, slice | Tensor]:
    """Return the output features of a fused projection that are q, k and v: a slice where they are contiguous, else their numbers.

    E.g. 2 query heads and 2 key-value heads of size 2 give 12 features. `blocks`: q is 0-3, k 4-7 and v 8-11. `heads`: head 0 has q 0-1,
    k 2-3 and v 4-5, head 1 has q 6-7, k 8-9 and v 10-11, so q is [0, 1, 6, 7]. `groups` with 4 query heads and 1 key-value head: q is
    [0 .. 7], k [8, 9] and v [10, 11].
    """
    if layout == "blocks":
        q, k = heads * head_dim, kv_heads * head_dim
        return {"attn.q": slice(0, q), "attn.k": slice(q, q + k), "attn.v": slice(q + k, q + 2 * k)}
    groups = {"heads": heads, "groups": kv_heads}[layout]
    numbers = torch.arange(out_features).view(groups, -1, head_dim)  # per group: its query heads, one key, one value
    parts = {"attn.q": numbers[:, :-2], "attn.k": numbers[:, -2], "attn.v": numbers[:, -1]}
    return {name: part.reshape(-1) for name, part in parts.items()}
