"""A tiny model of every causal-LM type of the installed transformers.

The default configuration of a type, with every size that most types know made small (`SMALL`) and what one type needs besides (`CHANGES`).
What cannot be built is in `UNBUILT`, with the reason.

Legend: B rows, L tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
    "num_encoder_layers",
)  # fmt: skip
SMALL: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("head_dim", "global_head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "n_group": 1, "topk_group": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {"num_key_value_heads": 4, "head_dim": 4}
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v32", "glm_moe_dsa", "youtu"), MLA),
    "deepseek_v3": {**MLA, "first_k_dense_replace": 1},
    **dict.fromkeys(("codegen", "gptj"), {"rotary_dim": 4}),
    **dict.fromkeys(
        ("bamba", "granitemoehybrid"),
        {"mamba_n_heads": 4, "mamba_d_head": "auto", "mamba_n_groups": 1, "mamba_d_state": 8},
    ),
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {"num_experts_per_tok": 2, **MLA},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64, "intermediate_size": 48},
    "gemma4_text": {"vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0},
    "kimi_linear": {"num_experts_per_token": 2},
    "longcat_flash": {"zero_expert_num": 2, "moe_topk": 2, **MLA},
    **dict.fromkeys(("musicgen_decoder", "musicgen_melody_decoder"), {"num_codebooks": 1}),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}

UNBUILT: dict[str, str] = {
    "blt": "the sizes of its three stacks depend on each other and on tables of three million rows",
    "dots3_note": "its text part is dots3_note_text, which is built; the rest does not take fewer layers",
    "gemma3n": "needs the package timm; its text part is gemma3n_text, which is built",
    "gemma4_assistant": "a draft model: it has no keys and values of its own and takes another model's",
    "gemma4_unified_assistant": "a draft model: it has no keys and values of its own and takes another model's",
}
"""Types that this file does not build, with the reason."""


def _sizes(default: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """Small values for what a configuration has, in its parts too."""
    fields = vars(default)
    sizes: dict[str, Any] = {key: value for key, value in SMALL.items() if isinstance(fields.get(key), int)}
    sizes |= {key: layers for key in LAYERS if isinstance(fields.get(key), int)}
    parts = {key: value for key, value in fields.items() if isinstance(value, PreTrainedConfig)}
    return sizes | {key: _sizes(part, layers) | CHANGES.get(part.model_type, {}) for key, part in parts.items()}


def small_config(name: str, layers: int = 2) -> PreTrainedConfig:
    """The configuration of a tiny model of one type."""
    cls = CONFIG_MAPPING[name]
    config = cls(**{**_sizes(cls(), layers), **CHANGES.get(name, {})})
    wanted = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]).config_class
    return next((part for part in (config, *vars(config).values()) if isinstance(part, wanted)), config)


def build(name: str, device: str = "cpu") -> Any:
    """The model, in evaluation mode, with weights large enough for every site to show."""
    config = small_config(name)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])(config).eval()


@functools.cache
def tokens() -> torch.Tensor:
    """[B, L]"""
    return torch.arange(3, 15).view(2, 6)
