"""The couplings of MEFT from their equations, on an ordinary model under ordinary autograd.

Each block of a plain model gets a forward that takes one step of the coupling. Nothing of `graft.reversible` is used.

    y1 = lambda x1 + F(x2)      y2 = beta x2 + G(y1)      next (x1, x2) = (y2, y1), for meft3 (y1, y2)

Legend: [B, L, D] batch, length, hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

FACTORS = {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1)}


def blocks_of(model: Any) -> Any:
    """The list of blocks."""
    return next(m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and "graft" not in n)


def attention_half(block: Any, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The attention with its residual, by the block's class."""
    kind = type(block).__name__
    if kind in ("BertLayer", "RobertaLayer"):
        return block.attention(x, args[0] if args else kwargs["attention_mask"])[0]
    if kind == "GPT2Block":
        return x + block.attn(block.ln_1(x), attention_mask=args[1] if len(args) > 1 else kwargs["attention_mask"])[0]
    if kind == "OPTDecoderLayer":
        before = block.do_layer_norm_before
        h = block.self_attn(
            hidden_states=block.self_attn_layer_norm(x) if before else x, attention_mask=kwargs["attention_mask"]
        )[0]
        return x + h if before else block.self_attn_layer_norm(x + h)
    names = "attention_mask", "position_embeddings", "position_ids"
    return x + block.self_attn(hidden_states=block.input_layernorm(x), **{name: kwargs[name] for name in names})[0]


def mlp_half(block: Any, a: Tensor) -> Tensor:
    """The MLP with its residual, by the block's class."""
    kind = type(block).__name__
    if kind in ("BertLayer", "RobertaLayer"):
        return block.output(block.intermediate(a), a)
    if kind == "GPT2Block":
        return a + block.mlp(block.ln_2(a))
    if kind == "OPTDecoderLayer":
        before = block.do_layer_norm_before
        h = block.fc2(torch.relu(block.fc1(block.final_layer_norm(a) if before else a)))
        return a + h if before else block.final_layer_norm(a + h)
    return a + block.mlp(block.post_attention_layernorm(a))


class Reference:
    """A plain model whose blocks are coupled. partners: what G (meft1) or F (meft2) is in each block, None for zero."""

    def __init__(self, model: Any, variant: Any, partners: Sequence[nn.Module] | None = None) -> None:
        self.model, self.variant, self.partners = model, variant, partners
        self.lam, self.beta = FACTORS[variant]
        self.streams: Any = None
        self.blocks = blocks_of(model)
        for number, block in enumerate(self.blocks):
            own = type(block).forward.__get__(block)
            block.forward = self._coupled(number, block, own)

    def _coupled(self, number: int, block: Any, own: Any) -> Any:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x1, x2 = (hidden, hidden) if number == 0 else self.streams
            partner = self.partners[number] if self.partners else lambda x: 0.0 * x
            if self.variant == "meft3":
                y1 = self.lam * x1 + attention_half(block, x2, args, kwargs)
                y2 = self.beta * x2 + mlp_half(block, y1)
                self.streams = y1, y2
            else:
                whole = lambda x: own(x, *args, **kwargs)  # noqa: E731
                first, second = (whole, partner) if self.variant == "meft1" else (partner, whole)
                y1 = self.lam * x1 + first(x2)
                y2 = self.beta * x2 + second(y1)
                self.streams = y2, y1
            return (self.streams[0] + self.streams[1]) / 2

        return forward


class Partner(nn.Module):
    """The adapter of the papers with a copy of an adapter's weights: gelu between two linear layers, without dropout."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        for name in ("down", "up"):
            given = getattr(adapter.f, name)
            layer = nn.Linear(given.in_features, given.out_features, dtype=given.weight.dtype)
            layer.load_state_dict(given.state_dict())
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(nn.functional.gelu(self.down(x)))  # pyright: ignore[reportCallIssue]
