"""Tiny models for the callers' tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    """A random LLaMA with grouped-query attention: vocabulary 64, hidden 32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def rows(count: int = 16, length: int = 12, seed: int = 1) -> list[dict[str, list[int]]]:
    """Rows of token ids with labels; four different ones, so that a few steps learn them."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(3, 64, (4, length), generator=generator).tolist() * count)[:count]
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in ids]
