"""The table of families: by model type, the modules of one transformer block for each name of the site language.

A family that is not in the table is resolved from the structure of its block (`structure.py`).
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from graft.architectures.family import Family, Sublayer, post_norm, pre_norm
from graft.architectures.structure import resolve_structure


def _gated(attn: str = "self_attn", mlp: str = "mlp", out: str = "o_proj") -> dict[str, str]:
    return {
        "attn.q": f"{attn}.q_proj", "attn.k": f"{attn}.k_proj", "attn.v": f"{attn}.v_proj", "attn.o": f"{attn}.{out}",
        "mlp.gate": f"{mlp}.gate_proj", "mlp.up": f"{mlp}.up_proj", "mlp.down": f"{mlp}.down_proj",
    }  # fmt: skip


def _fused(attn: str, qkv: str, out: str, up: str, down: str) -> dict[str, str]:
    return {"attn.qkv": f"{attn}.{qkv}", "attn.o": f"{attn}.{out}", "mlp.up": up, "mlp.down": down}


def _two(attn: Sublayer, mlp: Sublayer) -> dict[str, Sublayer]:
    return {"attn": attn, "mlp": mlp}


IN, AFTER = "input_layernorm", "post_attention_layernorm"
_LLAMA = Family(_gated(), _two(pre_norm("self_attn", "self_attn.o_proj", IN), pre_norm("mlp", "mlp.down_proj", AFTER)))
_GEMMA = replace(
    _LLAMA,
    sublayers=_two(
        pre_norm("self_attn", AFTER, IN), pre_norm("mlp", "post_feedforward_layernorm", "pre_feedforward_layernorm")
    ),
)
_BLOOM = Family(
    _fused("self_attention", "query_key_value", "dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    _two(pre_norm("self_attention", "self_attention.dense", IN), pre_norm("mlp", "mlp.dense_4h_to_h", AFTER)),
    fused="heads", positions="none", unless="apply_residual_connection_post_layernorm",
)  # fmt: skip
_BLOOM_NORMED = replace(  # a variant that adds h to the norm's output, which is x
    _BLOOM, unless="", sublayers={name: replace(each, residual=each.source) for name, each in _BLOOM.sublayers.items()}
)
_FALCON = replace(_BLOOM, fused="groups", positions="arange", unless="")
_FALCON_TWO = replace(
    _FALCON,
    sublayers=_two(
        pre_norm("self_attention", "self_attention.dense", "ln_attn"), pre_norm("mlp", "mlp.dense_4h_to_h", "ln_mlp")
    ),
)
_FALCON_ONE = replace(
    _FALCON,
    sublayers=_two(pre_norm("self_attention", "self_attention.dense", IN), pre_norm("mlp", "mlp.dense_4h_to_h", IN)),
)
_PHI = Family(
    {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj", "attn.o": "self_attn.dense",
     "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    _two(pre_norm("self_attn", "self_attn.dense", IN), pre_norm("mlp", "mlp.fc2", IN)),
)  # fmt: skip
_PHI3 = Family(
    {"attn.qkv": "self_attn.qkv_proj", "attn.o": "self_attn.o_proj", "mlp.gate_up": "mlp.gate_up_proj", "mlp.down": "mlp.down_proj"},
    _two(pre_norm("self_attn", "self_attn.o_proj", IN), pre_norm("mlp", "mlp.down_proj", AFTER)), fused="blocks",
)  # fmt: skip
_GPT2 = Family(
    _fused("attn", "c_attn", "c_proj", "mlp.c_fc", "mlp.c_proj"),
    _two(pre_norm("attn", "attn.c_proj", "ln_1"), pre_norm("mlp", "mlp.c_proj", "ln_2")), fused="blocks",
)  # fmt: skip
_NEOX = Family(
    _fused("attention", "query_key_value", "dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    _two(pre_norm("attention", "attention.dense", IN), pre_norm("mlp", "mlp.dense_4h_to_h", AFTER)), fused="heads",
)  # fmt: skip
_GPTJ = Family(
    {"attn.q": "attn.q_proj", "attn.k": "attn.k_proj", "attn.v": "attn.v_proj", "attn.o": "attn.out_proj",
     "mlp.up": "mlp.fc_in", "mlp.down": "mlp.fc_out"},
    _two(pre_norm("attn", "attn.out_proj", "ln_1"), pre_norm("mlp", "mlp.fc_out", "ln_1")),
)  # fmt: skip


def _parts(site: str, attention: str, q: str, k: str, v: str, out: str) -> dict[str, str]:
    """Return the sites of q, k and v, given by name inside an attention module, and of the output projection, given by its full path."""
    return {
        f"{site}.q": f"{attention}.{q}",
        f"{site}.k": f"{attention}.{k}",
        f"{site}.v": f"{attention}.{v}",
        f"{site}.o": out,
    }


def _bart(cross: bool, post: bool) -> Family:
    """Return the family of a layer of BART's encoder or decoder. OPT's layers are those of a decoder without cross-attention."""
    make = post_norm if post else pre_norm
    names = "q_proj", "k_proj", "v_proj"
    linears = _parts("attn", "self_attn", *names, "self_attn.out_proj")
    sublayers = {"attn": make("self_attn", "self_attn.out_proj", "self_attn_layer_norm")}
    if cross:
        linears |= _parts("cross", "encoder_attn", *names, "encoder_attn.out_proj")
        sublayers["cross"] = make("encoder_attn", "encoder_attn.out_proj", "encoder_attn_layer_norm")
    linears |= {"mlp.up": "fc1", "mlp.down": "fc2"}
    return Family(linears, {**sublayers, "mlp": make("fc1", "fc2", "final_layer_norm")})


def _bert(cross: bool) -> Family:
    names = "query", "key", "value"
    linears = _parts("attn", "attention.self", *names, "attention.output.dense")
    sublayers = {"attn": post_norm("attention.self", "attention.output.dense", "attention.output.LayerNorm")}
    if cross:
        linears |= _parts("cross", "crossattention.self", *names, "crossattention.output.dense")
        sublayers["cross"] = post_norm(
            "crossattention.self", "crossattention.output.dense", "crossattention.output.LayerNorm"
        )
    linears |= {"mlp.up": "intermediate.dense", "mlp.down": "output.dense"}
    return Family(linears, {**sublayers, "mlp": post_norm("intermediate", "output.dense", "output.LayerNorm")})


def _t5(cross: bool, gated: bool) -> Family:
    last = f"layer.{1 + cross}"
    names = "q", "k", "v"
    linears = _parts("attn", "layer.0.SelfAttention", *names, "layer.0.SelfAttention.o")
    sublayers = {"attn": pre_norm("layer.0.SelfAttention", "layer.0.SelfAttention.o", "layer.0.layer_norm")}
    if cross:
        linears |= _parts("cross", "layer.1.EncDecAttention", *names, "layer.1.EncDecAttention.o")
        sublayers["cross"] = pre_norm("layer.1.EncDecAttention", "layer.1.EncDecAttention.o", "layer.1.layer_norm")
    mlp = f"{last}.DenseReluDense"
    linears |= {"mlp.gate": f"{mlp}.wi_0", "mlp.up": f"{mlp}.wi_1"} if gated else {"mlp.up": f"{mlp}.wi"}
    linears |= {"mlp.down": f"{mlp}.wo"}
    sublayers["mlp"] = pre_norm(mlp, f"{mlp}.wo", f"{last}.layer_norm")
    return Family(linears, sublayers, positions="none")


_OPT = tuple(
    replace(_bart(cross=False, post=post), positions="mask", unless="do_layer_norm_before" if post else "")
    for post in (True, False)
)
_BERTS = _bert(cross=True), _bert(cross=False)
_T5S = tuple(_t5(cross, gated) for cross in (True, False) for gated in (True, False))
_DISTILBERT = Family(
    {**_parts("attn", "attention", "q_lin", "k_lin", "v_lin", "attention.out_lin"), "mlp.up": "ffn.lin1", "mlp.down": "ffn.lin2"},
    _two(post_norm("attention", "attention.out_lin", "sa_layer_norm"), post_norm("ffn", "ffn.lin2", "output_layer_norm")),
)  # fmt: skip
_DEBERTA = replace(
    _bert(cross=False), fused="heads",
    linears=_fused("attention", "self.in_proj", "output.dense", "intermediate.dense", "output.dense"),
)  # fmt: skip
_DEBERTA2 = replace(
    _bert(cross=False),
    linears={**_parts("attn", "attention.self", "query_proj", "key_proj", "value_proj", "attention.output.dense"),
             "mlp.up": "intermediate.dense", "mlp.down": "output.dense"},
)  # fmt: skip
_MODERNBERT = Family(
    {"attn.qkv": "attn.Wqkv", "attn.o": "attn.Wo", "mlp.gate_up": "mlp.Wi", "mlp.down": "mlp.Wo"},
    _two(pre_norm("attn", "attn.Wo", "attn_norm"), pre_norm("mlp", "mlp.Wo", "mlp_norm")), fused="blocks",
)  # fmt: skip
_VIT = Family(
    {**_parts("attn", "attention", "q_proj", "k_proj", "v_proj", "attention.o_proj"), "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
    _two(pre_norm("attention", "attention.o_proj", "layernorm_before"), pre_norm("mlp", "mlp.fc2", "layernorm_after")),
)  # fmt: skip

FAMILIES: dict[str, tuple[Family, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), (_LLAMA,)),
    **dict.fromkeys(("gemma2", "gemma3_text"), (_GEMMA,)),
    "phi": (_PHI,), "phi3": (_PHI3,), "opt": _OPT, "gpt2": (_GPT2,), "gpt_neox": (_NEOX,), "gptj": (_GPTJ,),
    "bloom": (_BLOOM, _BLOOM_NORMED), "falcon": (_FALCON_TWO, _FALCON, _FALCON_ONE),
    **dict.fromkeys(("bert", "electra"), _BERTS),
    **dict.fromkeys(("roberta", "xlm-roberta"), tuple(replace(row, positions="padding") for row in _BERTS)),
    "distilbert": (_DISTILBERT,), "deberta": (_DEBERTA,), "deberta-v2": (_DEBERTA2,), "modernbert": (_MODERNBERT,), "vit": (_VIT,),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5S), "bart": (_bart(cross=True, post=True), _bart(cross=False, post=True)),
}  # fmt: skip
"""Model type -> the families to try in order. The first that fits a block is its family."""


def family_of(model_type: str | None, block: nn.Module) -> Family:
    """Return the family of a block: the first in the table that fits it, or else the one that its structure shows."""
    row = next((row for row in FAMILIES.get(model_type or "", ()) if row.fits(block)), None)
    return resolve_structure(block) if row is None else row
