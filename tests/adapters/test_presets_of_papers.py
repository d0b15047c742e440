"""Presets of papers other than LLM-Adapters: as large as published, and attachable where they belong."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graft
from tests.contract.table import base

T5 = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
BUILD = {
    "bert-large": lambda: BertModel(BertConfig(**LARGE)),
    "t5-base": lambda: T5ForConditionalGeneration(T5Config(**T5)),
    "llama-7b": lambda: LlamaForCausalLM(LlamaConfig()),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig()),
}


@pytest.mark.parametrize(
    ("preset", "model", "count"),
    [
        ("papers/houlsby", "bert-large", 6_444_032),
        ("papers/compacter", "t5-base", 161_728),
        ("papers/compacter++", "t5-base", 104_704),
        ("papers/loretta-adp", "llama-7b", 876_800),
        ("papers/loretta-rep", "llama-7b", 516_096),
        ("papers/distilbert", "distilbert", 599_424),
    ],
)
def test_presets_are_as_large_as_published(preset: str, model: str, count: int) -> None:
    with torch.device("meta"):
        built = BUILD[model]()
    total = sum(p.numel() for p in built.parameters())
    graft.attach(built, {"a": preset})
    assert sum(p.numel() for _, p in graft.parameters(built, "a")) == count
    if preset == "papers/distilbert":
        assert total + count == 67_554_434


@pytest.mark.parametrize("preset", [name for name in graft.presets() if name.startswith("papers/")])
def test_presets_attach_and_take_changes_of_their_own_fields(preset: str) -> None:
    model = base("bert" if "unipelt" in preset else "llama")  # a gate for each row sees the whole row
    if "meft" in preset:
        graft.make_reversible(model, preset.removeprefix("papers/"))  # pyright: ignore[reportArgumentType]
    changes = {"papers/loretta-rep": {}, "papers/adamix-lora": {"rank": 3}}.get(preset, {"bottleneck": 8})
    graft.attach(model, {"a": {"preset": preset, **changes}})
    assert graft.names(model) == ("a",)
