"""The widths and heads of one transformer block, from its modules, or from the config if they do not say."""

from __future__ import annotations

from typing import Any

from graft.architectures.blocks import Block
from graft.architectures.layers import is_linear, is_norm, widths
from graft.errors import GraftError


def sublayer_widths(block: Block, name: str) -> tuple[int, int]:
    """Return the input and output width of a sublayer."""
    firsts = ("mlp.up", "mlp.gate_up") if name == "mlp" else (f"{name}.q", f"{name}.qkv")
    linears, hidden = block.family.linears, hidden_width(block)
    into = next((site for site in firsts if site in linears), None)
    last = "mlp.down" if name == "mlp" else f"{name}.o"
    if into is None or block.family.sublayers[name].source == block.family.sublayers[name].out:
        return hidden, hidden
    return _widths(block, into)[0], _widths(block, last)[1] if last in linears else hidden


def hidden_width(block: Block) -> int:
    """Return the width of the residual stream: that of the block's norm, else of the config, else the input of its first linear layer."""
    for path, module in block.module.named_children():
        if is_norm(module):
            return widths(module, path)[0]
    return block.hidden or next(
        widths(module, path)[0] for path, module in block.module.named_modules() if is_linear(module)
    )


def latent_sizes(attention: Any) -> tuple[int, int, int] | None:
    """Return the heads, key size and value size of multi-head latent attention (DeepSeek), None for any other.

    Its keys and values are made of one small vector, and each head gets its own: a key of two parts (one rotated), and a value.
    """
    value_dim, key_dim = _first(attention, "v_head_dim"), _first(attention, "qk_head_dim", "q_head_dim")
    plain, rotated = _first(attention, "qk_nope_head_dim"), _first(attention, "qk_rope_head_dim")
    key_dim = key_dim or (plain + rotated if plain and rotated else None)
    heads = _first(attention, "num_heads", "num_attention_heads", "n_heads")
    return (heads, key_dim, value_dim) if heads and key_dim and value_dim else None


def head_sizes(block: Block, name: str, config: Any) -> tuple[int, int, int]:
    """Return the query heads, key-value heads and head size of an attention, from its module, or else from the config."""
    attention: Any = block.module.get_submodule(block.family.attentions[name])
    if (latent := latent_sizes(attention)) is not None:
        return latent[0], latent[0], latent[1]
    heads = _first(attention, "num_heads", "num_attention_heads", "n_heads") or getattr(
        config, "num_attention_heads", None
    )
    if heads is None:
        raise GraftError(
            f"'{block.at(block.family.attentions[name])}' ({type(attention).__name__}) has no heads that Graft knows"
        )
    head_dim = (
        _first(attention, "head_dim", "attention_head_size", "key_value_proj_dim")
        or getattr(config, "head_dim", None)
        or config.hidden_size // heads
    )
    if f"{name}.k" in block.family.linears:
        return heads, _widths(block, f"{name}.k")[1] // head_dim, head_dim
    kv_heads = _first(attention, "num_kv_heads") if block.family.fused == "groups" else None
    return heads, kv_heads or getattr(config, "num_key_value_heads", None) or heads, head_dim


def _widths(block: Block, name: str) -> tuple[int, int]:
    path = block.family.linears[name]
    return widths(block.module.get_submodule(path), path)


def _first(module: Any, *names: str) -> int | None:
    """Return the first of these attributes that is a number other than 0, None if there is none."""
    return next((value for name in names if isinstance(value := getattr(module, name, None), int) and value), None)
