"""Model families: one row maps the site language to the modules of one transformer block.

A row gives, relative to the block: the linear layers by site name; the sublayers' inputs (`attn`, `mlp`: the module whose input is x) and
outputs (`attn_out`, `mlp_out`: the module whose output is h, what is added to the residual: the last projection in LLaMA and BLOOM,
the post-norm in Gemma 2/3); how a fused qkv projection lays out its rows; and where positions come from. `family_of` finds the row by the
config's model_type; a family that is not in the table is resolved from its structure by the field's usual names.

Legend: H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

Layout = Literal["none", "heads", "blocks", "groups"]


@dataclass(frozen=True)
class Family:
    """Where the sites of one block lie."""

    linears: Mapping[str, str]
    attn: str = ""
    attn_out: str = ""
    mlp: str = ""
    mlp_out: str = ""
    fused: Layout = "none"
    """Rows of attn.qkv. heads: q, k, v of head 0, then of head 1, ... (BLOOM, NeoX). blocks: all q, all k, all v (GPT-2, Phi-3). groups:
    per key-value head its queries, then k, then v (Falcon)."""
    positions: Literal["arange", "mask", "none"] = "arange"
    """What the model does without position ids: count from the left, count real tokens by the mask, or use no positions (ALiBi)."""


def _gated(attn: str = "self_attn", mlp: str = "mlp", out: str = "o_proj") -> dict[str, str]:
    return {
        "attn.q": f"{attn}.q_proj", "attn.k": f"{attn}.k_proj", "attn.v": f"{attn}.v_proj", "attn.o": f"{attn}.{out}",
        "mlp.gate": f"{mlp}.gate_proj", "mlp.up": f"{mlp}.up_proj", "mlp.down": f"{mlp}.down_proj",
    }  # fmt: skip


def _fused(attn: str, qkv: str, out: str, up: str, down: str) -> dict[str, str]:
    return {"attn.qkv": f"{attn}.{qkv}", "attn.o": f"{attn}.{out}", "mlp.up": up, "mlp.down": down}


_LLAMA = Family(_gated(), attn="self_attn", attn_out="self_attn.o_proj", mlp="mlp", mlp_out="mlp.down_proj")
_GEMMA = replace(_LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
_BLOOM = Family(
    _fused("self_attention", "query_key_value", "dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    attn="self_attention", attn_out="self_attention.dense", mlp="mlp", mlp_out="mlp.dense_4h_to_h", fused="heads", positions="none",
)  # fmt: skip
_PHI = Family(
    {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.dense",
     "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    attn="self_attn", attn_out="self_attn.dense", mlp="mlp", mlp_out="mlp.fc2",
)  # fmt: skip
_PHI3 = Family(
    {"attn.qkv": "self_attn.qkv_proj", "attn.o": "self_attn.o_proj", "mlp.gate_up": "mlp.gate_up_proj", "mlp.down": "mlp.down_proj"},
    attn="self_attn", attn_out="self_attn.o_proj", mlp="mlp", mlp_out="mlp.down_proj", fused="blocks",
)  # fmt: skip
_OPT = Family(
    {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.out_proj",
     "mlp.up": "fc1", "mlp.down": "fc2"},
    attn="self_attn", attn_out="self_attn.out_proj", mlp="fc1", mlp_out="fc2", positions="mask",
)  # fmt: skip
_GPT2 = Family(
    _fused("attn", "c_attn", "c_proj", "mlp.c_fc", "mlp.c_proj"),
    attn="attn", attn_out="attn.c_proj", mlp="mlp", mlp_out="mlp.c_proj", fused="blocks",
)  # fmt: skip
_NEOX = Family(
    _fused("attention", "query_key_value", "dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    attn="attention", attn_out="attention.dense", mlp="mlp", mlp_out="mlp.dense_4h_to_h", fused="heads",
)  # fmt: skip
_GPTJ = Family(
    {"attn.q": "attn.q_proj", "attn.k": "attn.k_proj", "attn.v": "attn.v_proj", "attn.o": "attn.out_proj",
     "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"},
    attn="attn", attn_out="attn.out_proj", mlp="mlp", mlp_out="mlp.fc_out",
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
    "gemma": _LLAMA, "gemma2": _GEMMA, "gemma3_text": _GEMMA,
    "phi": _PHI, "phi3": _PHI3, "opt": _OPT, "gpt2": _GPT2, "gpt_neox": _NEOX, "gptj": _GPTJ,
    "bloom": _BLOOM, "falcon": replace(_BLOOM, fused="groups", positions="arange"),
}  # fmt: skip

_ATTENTION = ("attn", "attention", "self_attn", "self_attention", "attn_layer")
_NAMES: dict[str, tuple[str, ...]] = {
    "attn.q": ("q_proj", "query", "q", "wq", "q_lin", "query_proj", "c_q"),
    "attn.k": ("k_proj", "key", "k", "wk", "k_lin", "key_proj", "c_k"),
    "attn.v": ("v_proj", "value", "v", "wv", "v_lin", "value_proj", "c_v"),
    "attn.qkv": ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "in_proj"),
    "attn.o": ("o_proj", "out_proj", "dense", "c_proj", "wo", "o", "out_lin", "proj"),
    "mlp.gate": ("gate_proj", "wi_0", "w1"),
    "mlp.up": ("up_proj", "wi_1", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "wi", "lin1", "linear1"),
    "mlp.gate_up": ("gate_up_proj",),
    "mlp.down": ("down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "wo", "lin2", "linear2"),
}

_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
"""Pairs of norms that stand between a sublayer and its residual (alone, the first is LLaMA's norm before the MLP)."""


def family_of(model_type: str | None, block: nn.Module) -> Family:
    """The table's row for a model type when its modules are there, else what the block's structure says."""
    row = FAMILIES.get(model_type or "")
    if row is not None and all(_has(block, path) for path in row.linears.values()):
        return row
    return resolve_structure(block)


def resolve_structure(block: nn.Module) -> Family:
    """A family read off one block: linear layers by their usual names, inside or outside the attention module."""
    attention = next((name for name, child in block.named_children() if _is_attention(name, child)), "")
    linears: dict[str, str] = {}
    for path, module in block.named_modules():
        if not is_linear(module):
            continue
        inside = bool(attention) and path.startswith(f"{attention}.")
        last = path.rsplit(".", 1)[-1]
        for site, names in _NAMES.items():
            if site.startswith("attn.") == inside and last in names and site not in linears:
                linears[site] = path
                break
    if "mlp.gate" in linears and "mlp.up" not in linears:
        linears["mlp.up"] = linears.pop("mlp.gate")
    up = linears.get("mlp.gate") or linears.get("mlp.up") or linears.get("mlp.gate_up") or ""
    mlp = up.rsplit(".", 1)[0] if "." in up else up
    outs = linears.get("attn.o", ""), linears.get("mlp.down", "")
    attn_out, mlp_out = next((norms for norms in _POST_NORMS if all(_has(block, norm) for norm in norms)), outs)
    return Family(linears, attn=attention, attn_out=attn_out, mlp=mlp, mlp_out=mlp_out if mlp else "")


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its kin (quantised ones too), and the transposed linear layer of GPT-2."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [in, out] (transformers' Conv1D)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def fused_rows(
    layout: Layout, heads: int, kv_heads: int, head_dim: int, out_features: int
) -> dict[str, slice | Tensor]:
    """Rows of a fused projection that are q, k and v: a slice where they lie together, else a long tensor of row numbers."""
    if layout == "blocks":
        q, k = heads * head_dim, kv_heads * head_dim
        return {"attn.q": slice(0, q), "attn.k": slice(q, q + k), "attn.v": slice(q + k, q + 2 * k)}
    groups = {"heads": heads, "groups": kv_heads}[layout]
    rows = torch.arange(out_features).view(groups, -1, head_dim)  # per group: queries, one key, one value
    parts = {"attn.q": rows[:, :-2], "attn.k": rows[:, -2], "attn.v": rows[:, -1]}
    return {name: part.reshape(-1) for name, part in parts.items()}


def _is_attention(name: str, child: nn.Module) -> bool:
    named = name in _ATTENTION or "Attention" in type(child).__name__
    return named and any(is_linear(module) for module in child.modules())


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True
