"""The two halves of a block: its attention and its MLP, each with its residual and norm. The block is one after the other.

Each half calls the block's own modules, so that adapters at them act. What the block's forward does between them is written here, a few
lines for each family, and `making.py` compares the halves with the block's forward when a base becomes reversible.

Legend: [B, L, D] batch, length, hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

Given = Mapping[str, Any]
"""The arguments of the block's call by name, without the hidden states."""
CROSS = ("encoder_hidden_states", "encoder_attention_mask")


@dataclass(frozen=True)
class Halves:
    """The halves of the blocks of one family. The MLP may have the whole block's input shape to restore (OPT flattens it)."""

    attention: Callable[[Any, Tensor, Given], Tensor]
    mlp: Callable[[Any, Tensor], Tensor]


def _without(given: Given, *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def _pre_norm(norm: str, attn: str, mlp_norm: str, mlp: str) -> Halves:
    """Return the halves x + attn(norm(x)) and a + mlp(norm(a)), for blocks that add nothing else."""

    def attention_half(block: Any, x: Tensor, given: Given) -> Tensor:
        normed = getattr(block, norm)(x)
        return x + getattr(block, attn)(hidden_states=normed, **_without(given, *CROSS))[0]

    def mlp_half(block: Any, a: Tensor) -> Tensor:
        return a + getattr(block, mlp)(getattr(block, mlp_norm)(a))

    return Halves(attention_half, mlp_half)


def _bert_attention(block: Any, x: Tensor, given: Given) -> Tensor:
    return block.attention(x, **_without(given, *CROSS))[0]


def _bert_mlp(block: Any, a: Tensor) -> Tensor:
    return block.output(block.intermediate(a), a)


def _opt_attention(block: Any, x: Tensor, given: Given) -> Tensor:
    normed = block.self_attn_layer_norm(x) if block.do_layer_norm_before else x
    h = block.self_attn(hidden_states=normed, **_without(given, "use_cache"))[0]
    a = x + F.dropout(h, block.dropout, block.training)
    return a if block.do_layer_norm_before else block.self_attn_layer_norm(a)


def _opt_mlp(block: Any, a: Tensor) -> Tensor:
    a_TD = a.reshape(
        -1, a.shape[-1]
    )  # OPT's adapters expect batch and length in one dimension, as its own forward has them
    normed = block.final_layer_norm(a_TD) if block.do_layer_norm_before else a_TD
    h = F.dropout(block.fc2(block.activation_fn(block.fc1(normed))), block.dropout, block.training)
    out = (a_TD + h).view(a.shape)
    return out if block.do_layer_norm_before else block.final_layer_norm(out)


_LLAMA = _pre_norm("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_BERT = Halves(_bert_attention, _bert_mlp)
HALVES: Mapping[str, Halves] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "gpt2": _pre_norm("ln_1", "attn", "ln_2", "mlp"),
    "opt": Halves(_opt_attention, _opt_mlp),
    **dict.fromkeys(("bert", "roberta"), _BERT),
}
"""Model type -> its halves. These are the families of which a base can be made reversible."""
