"""Tiny random base models, one per family, and what a test asks of them.

A base has two layers of width 32 with four heads, and grouped queries where the family has them. It has no dropout. Its weights are
large enough that every adapter shows in the output.

Legend: B rows of a batch, L length, V vocabulary.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from graft.attaching.summary import sites
from graft.bases.quantising import options_of, settle
from graft.config.base import BaseConfig

VOCABULARY, PAD = 61, 0
ENDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**WIDE, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BERT_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT, **NO_DROPOUT, "rotary_dim": 4}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**GPT, **NO_DROPOUT}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "bert": ("BertForMaskedLM", "BertConfig", {**WIDE, **BERT_NO_DROPOUT}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
}
"""Family -> (model class, config class, sizes)."""
QUANTISED = ("llama-nf4", "llama-int8", "gpt2-nf4", "bert-int8", "t5-nf4")
"""Families with their linear layers in few bits; they need bitsandbytes."""
DEFAULT_FAMILIES = ("llama", "bloom", "gptj", "bert", "t5")
"""Families of the contract when nobody names others: grouped queries, a fused qkv projection, a parallel block, an encoder, both."""
CAUSAL = frozenset(FAMILIES) - {"bert", "t5"}
"""Families that generate from a prompt."""


@functools.cache
def pristine(family: str, attention: str | None = None, layers: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """Return the one base of a family, in evaluation mode. Everybody shares it: never change it.

    family: a name in `FAMILIES` or `QUANTISED`. attention: "eager" or "sdpa"; None leaves the choice to the family. dtype: of a quantised
    family. Raises KeyError for an unknown family.
    """
    plain, _, bits = family.partition("-")
    if bits:
        return _quantised(pristine(plain, attention, layers), bits, attention, dtype)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = new_base(family, attention, layers)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1 if family == "t5" else 0.25)  # T5 does not scale its scores down
                elif "norm" in name or "ln_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                else:
                    parameter.normal_(std=0.1)
    return model.eval()


def _quantised(model: Any, bits: str, attention: str | None, dtype: torch.dtype) -> Any:
    """Return the base as `base.quantize` loads it."""
    settings = BaseConfig.model_validate({"model": "tiny", "quantize": bits})
    options = options_of(settings, model.config, model, dtype, labelled=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = type(model).from_pretrained(
            folder, dtype=dtype, device_map={"": "cpu"}, attn_implementation=attention, **options
        )
    settle(found, dtype, ())
    return found.requires_grad_(False).eval()


def new_base(family: str, attention: str | None = None, layers: int = 2) -> Any:
    """Build a base with the weights that transformers gives it, on torch's current device."""
    model_class, config_class, sizes = FAMILIES[family]
    config = getattr(transformers, config_class)(**ENDS, **sizes)
    config._attn_implementation = attention
    config.num_hidden_layers = layers
    return getattr(transformers, model_class)(config)


def tiny_base(family: str, attention: str | None = None, dtype: torch.dtype = torch.float32, *, layers: int = 2) -> Any:
    """Return a base of your own, in evaluation mode. The same arguments give the same weights."""
    if "-" in family:
        return copy.deepcopy(pristine(family, attention, layers, dtype))
    return copy.deepcopy(pristine(family, attention, layers)).to(dtype)


@functools.cache
def site_names(family: str) -> frozenset[str]:
    """Return the names that a family has in the site language."""
    return frozenset(sites(pristine(family)))


def ids(rows: int = 3, length: int = 7, seed: int = 5) -> Tensor:
    """Return random token ids [B, L] without special tokens."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def outputs(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    """Return logits [B, L, V]. An encoder-decoder reads the same tokens on both sides."""
    if model.config.is_encoder_decoder:
        kwargs["decoder_input_ids"] = inputs
    return model(input_ids=inputs, **kwargs).logits


def logits(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    """Return logits [B, L, V] without gradients."""
    with torch.no_grad():
        return outputs(model, inputs, **kwargs)


def loss(model: Any, inputs: Tensor, **kwargs: Any) -> Tensor:
    """Return a scalar loss that depends on every token's output."""
    out = outputs(model, inputs, **kwargs)
    return torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1).float(), inputs[:, 1:].flatten())


def base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for the base alone, without its adapters."""
    for name, tensor in model.state_dict().items():
        if "graft" not in name.split("."):
            yield name, tensor


def changed_tensors(
    model: nn.Module, family: str, attention: str | None = None, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Return the names of the base's tensors that changed, appeared or are gone."""
    original = pristine(family, attention, 2, dtype if "-" in family else torch.float32).state_dict()
    now = dict(base_tensors(model))
    return [
        name
        for name in dict.fromkeys((*original, *now))
        if name not in now or name not in original or not torch.equal(now[name], original[name].to(now[name].dtype))
    ]


def same_base(model: nn.Module, family: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the base is what it was: the same tensors bit for bit, under the same names in the same order."""
    in_order = [name for name, _ in base_tensors(model)] == list(pristine(family, attention).state_dict())
    return in_order and not changed_tensors(model, family, attention, dtype)
