"""Tiny random models and a tokenizer of single bytes, for tests that need a whole base but not a good one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

BOS, EOS = "<s>", "</s>"


def small_tokenizer() -> PreTrainedTokenizerFast:
    """258 tokens: every byte, and the two ends of a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {BOS: 0, EOS: 1} | {character: number for number, character in enumerate(alphabet, start=2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def small_config(family: str, context: int = 256, **changes: Any) -> PreTrainedConfig:
    """Two layers of width 32 with four heads; llama has two key-value heads."""
    ends = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1}
    if family == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": context}
        return LlamaConfig(**{**ends, **sizes, **changes})
    if family == "gpt2":
        return GPT2Config(**{**ends, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context, **changes})
    if family == "gptj":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": context, "rotary_dim": 4}
        return GPTJConfig(**{**ends, **sizes, **changes})
    if family == "bloom":
        return BloomConfig(**{**ends, "hidden_size": 32, "n_layer": 2, "n_head": 4, **changes})
    raise ValueError(family)


def small_model(family: str = "llama", context: int = 256, scale: float = 8.0, **changes: Any) -> Any:
    """A random model; its weights are large, so that its outputs depend strongly on its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small_config(family, context, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
    return model.eval()


def save_small(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A base on disk."""
    small_model(family, **changes).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder
