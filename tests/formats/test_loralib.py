"""loralib's files: the published one loads onto a RoBERTa and adds alpha / rank B A; what does not fit is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RobertaConfig, RobertaForSequenceClassification

import graft

FILE = "models/lora-checkpoint-roberta-base-mnli/roberta_base_lora_mnli.bin"


def roberta(**changes: Any) -> Any:
    torch.manual_seed(0)
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=60, num_labels=3, **changes)).eval()


def test_the_published_file_computes_what_its_equation_says(shared: Path) -> None:
    model, reference = roberta(), roberta()
    graft.load(model, shared / FILE, name="mnli", alpha=16)
    stored = torch.load(shared / FILE, weights_only=True, map_location="cpu")
    state = reference.state_dict()
    for name, tensor in stored.items():
        if name.endswith("lora_A"):
            state[name.replace("lora_A", "weight")] += 16 / 8 * stored[name.replace("lora_A", "lora_B")] @ tensor
        elif "lora" not in name:
            state[name].copy_(tensor)
    ids = torch.randint(4, 60, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-4, rtol=0)


def small(tmp_path: Path, **more: Any) -> Path:
    name = "roberta.encoder.layer.0.attention.self.query"
    torch.save(
        {f"{name}.lora_A": torch.randn(2, 8), f"{name}.lora_B": torch.randn(8, 2), **more}, tmp_path / "lora.bin"
    )
    return tmp_path / "lora.bin"


TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def test_alpha_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(graft.GraftError, match="do not hold alpha"):
        graft.load(roberta(**TINY), small(tmp_path))


def test_tensors_without_a_module_are_listed(tmp_path: Path) -> None:
    path = small(tmp_path, **{"nowhere.lora_A": torch.zeros(2, 8)})
    with pytest.raises(graft.GraftError, match="1 unexpected: nowhere.lora_A"):
        graft.load(roberta(**TINY), path, alpha=4)


def test_another_file_is_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "x.bin")
    with pytest.raises(graft.GraftError, match="not a loralib file"):
        graft.load(roberta(**TINY), tmp_path / "x.bin", alpha=4)
