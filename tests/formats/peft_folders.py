"""Folders that PEFT itself writes: small bases, a trained model's folder, and what PEFT and Graft compute from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import graft

Make = Callable[[], Any]
IDS = torch.arange(3, 15).view(2, 6)


def llama(tied: bool = False, added: int = 0) -> Any:
    """A LLaMA with large weights, so that differences show. added: rows beyond its 64 tokens, the same each time."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied, "pad_token_id": 0}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    if added:
        model.resize_token_embeddings(64 + added)
        with torch.no_grad():
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[64:] = torch.linspace(-2, 2, 32 * added).view(added, 32)
    model.name_or_path = ""
    return model


def small(config: type, cls: type, **more: Any) -> Make:
    """A maker of one small model of a class, equal each time."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip

    def make() -> Any:
        torch.manual_seed(0)
        return cls(config(**{**sizes, **more})).eval()

    return make


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder and hasattr(model, "lm_head") else {}
    return model(input_ids=ids, **more).logits.clone()


def saved(model: Any, config: Any, folder: Path, size: float = 0.1, ids: Tensor = IDS, **options: Any) -> Tensor:
    """Attach PEFT's adapter, move all that trains, save it, and return the logits. The model is used up."""
    import peft

    trained = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    trained.save_pretrained(folder, **options)
    return logits(trained, ids)


def loaded(model: Any, folder: Path, ids: Tensor = IDS, **options: Any) -> Tensor:
    """What Graft computes from the folder on a fresh base."""
    return logits(graft.load(model, folder, name="x", **options), ids)


def edited(folder: Path, **fields: Any) -> Path:
    """Change fields of a folder's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
