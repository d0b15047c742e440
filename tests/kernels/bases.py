"""Tiny models of the families whose norms and rotary positions differ, with random norm weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=6),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=6),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97),
}
NORMS = {"llama": 5, "mistral": 5, "qwen3": 9, "gemma": 5, "gemma3": 13, "olmo2": 9, "gpt_neox": 0, "gpt2": 0}
"""RMS norms of each: two, four or six per layer and one behind the last."""
ROTARY = {"gpt2": 0}
"""Attention modules whose positions the kernel takes, where that is not one per layer."""


def base(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose numbers are large enough to tell one computation from another."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
                elif parameter.dim() > 1:
                    parameter.mul_(4.0)
    return model.to(dtype).eval()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def loss_and_gradient(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a language model on its own input: the loss, and the gradient of all that trains in one vector."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(input_ids=ids, labels=ids).loss
    grads = torch.autograd.grad(loss, trained, allow_unused=True)
    flat = [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(trained, grads, strict=True)]
    return loss.detach(), torch.cat(flat)
