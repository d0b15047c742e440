"""Adapters with added tokens on a base that lacks them: `graft.load(..., resize=True)` gives it the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import graft
from tests.formats.peft_folders import llama, loaded, logits, off, saved

IDS = torch.tensor([[3, 64, 65, 9, 12, 64]])
SETTINGS: dict[str, tuple[dict[str, Any], bool]] = {
    "rows": ({"trainable_token_indices": [64, 65]}, False),
    "tables": ({}, True),
    "modules": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "lora on the tables": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, True),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_base_computes_what_peft_computes(name: str, tied: bool, tmp_path: Path) -> None:
    settings, tables = SETTINGS[name]
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    want = saved(llama(tied, 2), config, tmp_path / "a", 0.05, IDS, save_embedding_layers=tables)
    found = loaded(llama(tied), tmp_path / "a", IDS, resize=True)
    known = 64 if name == "rows" and not tied else 66  # the rows of an untied head are in nobody's file
    assert off(found[..., :known], want[..., :known]) < 1e-5


def test_a_base_that_has_the_rows_stays(tmp_path: Path) -> None:
    want = saved(llama(True), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]), tmp_path / "a")
    assert off(loaded(llama(True), tmp_path / "a", resize=True), want) < 1e-5


def test_new_rows_are_the_same_each_time_and_a_failure_takes_them_back(tmp_path: Path) -> None:
    saved(llama(True, 2), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[65]), tmp_path / "a")
    one, two = (graft.load(llama(True), tmp_path / "a", resize=True) for _ in range(2))
    assert torch.equal(logits(one, IDS), logits(two, IDS))
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"short")
    model = llama(True)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(graft.GraftError):
        graft.load(model, tmp_path / "a", resize=True)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(each, after[name]) for name, each in before.items())
    assert model.config.vocab_size == 64


def test_grafts_own_folder_brings_its_rows(tmp_path: Path) -> None:
    model = llama(True, 2)
    graft.attach(model, {"a": [graft.LoRA(rank=2, sites="attn.q"), graft.Full(tokens=(64, 65), sites="embed head")]})
    for _, parameter in graft.parameters(model, "a"):
        parameter.data.normal_(std=0.1)
    graft.save(model, "a", tmp_path / "a")
    assert off(loaded(llama(True), tmp_path / "a", IDS, resize=True), logits(model, IDS)) < 1e-5
    other = graft.load(llama(True), tmp_path / "a", name="one", resize=True)
    graft.load(other, tmp_path / "a", name="two", resize=True)
    with pytest.raises(graft.GraftError, match="has 64 rows and needs 66, but it has adapters"):
        graft.load(graft.attach(llama(True), {"b": graft.LoRA()}), tmp_path / "a", name="a", resize=True)
