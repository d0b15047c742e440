"""Tiny bases of the families that can be made reversible, with random weights as transformers draws them, and without dropout."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from graft.testing.bases import BERT_NO_DROPOUT, GROUPED, NO_DROPOUT, VOCABULARY, WIDE

GPT = {"n_embd": 32, "n_head": 4, "n_positions": 64, **NO_DROPOUT}
OPT = {
    "hidden_size": 32, "ffn_dim": 40, "num_attention_heads": 4, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "opt-post": ("OPTForCausalLM", "OPTConfig", {**OPT, "do_layer_norm_before": False}),
    "bert": ("BertForMaskedLM", "BertConfig", {**WIDE, **BERT_NO_DROPOUT}),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**WIDE, **BERT_NO_DROPOUT, "max_position_embeddings": 64}),
}
CAUSAL = [name for name in FAMILIES if name not in ("bert", "roberta")]
VARIANTS = ("meft1", "meft2", "meft3")


def tiny(family: str, layers: int = 2, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random base in evaluation mode."""
    model, config, sizes = FAMILIES[family]
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    ends = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = getattr(transformers, model)(
            getattr(transformers, config)(**{**ends, **sizes, depth: layers, **changes})
        )
    return made.eval().to(dtype).requires_grad_(False)


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Random token ids without the special ones, [rows, length]."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))
