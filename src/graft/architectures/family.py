"""A model family: where the sites of one transformer block are.

It gives, relative to the block, the linear layers by site name; the sublayers (`attn`, `cross`, `mlp`); the order of features in a fused
qkv projection; and how the model makes positions. A sublayer has a module with the input x, a module with the output h that is added to
the residual stream (the last projection in LLaMA, BLOOM and BERT, the post-norm in Gemma 2 and 3), and a norm.

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
    """One sublayer of a block: h = out(... source(x)), which is added to the residual stream."""

    source: str
    """The module with the input x. In `attn` and `cross` it is the one that computes attention."""
    out: str
    """The module with the output h, before dropout."""
    norm: str = ""
    """The sublayer's norm."""
    residual: str = ""
    """The module with the residual stream as its first input, empty if it is not known."""
    post: bool = False
    """Whether `norm` acts on h + residual (BERT), and not on the residual before the sublayer."""


def pre_norm(source: str, out: str, norm: str) -> Sublayer:
    """Return a sublayer with x = norm(residual), as in LLaMA."""
    return Sublayer(source, out, norm, norm)


def post_norm(source: str, out: str, norm: str) -> Sublayer:
    """Return a sublayer with the residual as x and norm(h + x) as the next residual, as in BERT."""
    return Sublayer(source, out, norm, source, post=True)


@dataclass(frozen=True)
class Family:
    """The modules of one block that are its sites."""

    linears: Mapping[str, str]
    sublayers: Mapping[str, Sublayer] = field(default_factory=dict)
    fused: Layout = "none"
    """The order of output features in attn.qkv. `heads`: q, k, v of head 0, then of head 1, ... (BLOOM, NeoX). `blocks`: all q, all k, all
    v (GPT-2, Phi-3). `groups`: per key-value head its queries, then k, then v (Falcon)."""
    positions: Literal["arange", "mask", "padding", "none"] = "arange"
    """How the model makes positions if it is given none. `arange`: it counts all tokens. `mask`: it counts the tokens that the mask allows.
    `padding`: it counts the tokens that are not padding, from the padding id + 1 on (RoBERTa). `none`: it has no positions (ALiBi, T5)."""
    unless: str = ""
    """An attribute of the block. A block where it is true is not of this family."""

    @property
    def attentions(self) -> dict[str, str]:
        """Return the modules that compute attention, by sublayer."""
        return {name: self.sublayers[name].source for name in ("attn", "cross") if name in self.sublayers}

    def fits(self, block: nn.Module) -> bool:
        """Whether a block has every module that the family names."""
        paths = {*self.linears.values()}
        for sublayer in self.sublayers.values():
            paths |= {sublayer.source, sublayer.out, sublayer.norm, sublayer.residual} - {""}
        return all(has(block, path) for path in paths) and not (self.unless and getattr(block, self.unless, False))


def has(block: nn.Module, path: str) -> bool:
    """Whether a block has a module at a path."""
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
