"""Point 13: a new, copied or loaded adapter takes the mode, the device and the dtype of its parent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graft
from graft.testing.checks.parents import adapters_of, masters_fit_the_base, mode_is_that_of_the_parent
from tests.contract.table import Row, base, ids, logits, rows

FEW = "llama-lora-dropout llama-parallel-mam llama-prefix-projection llama-mam bloom-series-before-attn gpt2-lora-fused"


@rows(FEW)
@pytest.mark.parametrize("training", [False, True])
def test_new_copied_and_loaded_adapters_take_the_mode_of_their_parent(row: Row, training: bool) -> None:
    mode_is_that_of_the_parent(row, training)


def test_an_adapter_with_dropout_that_is_loaded_into_a_model_that_evaluates_does_not_drop(tmp_path: Path) -> None:
    model = base("llama")
    graft.attach(model, {"a": graft.LoRA(rank=4, dropout=0.9)})
    graft.load(model, graft.save(model, "a", tmp_path), name="b")
    graft.set_active(model, "b")
    assert torch.equal(logits(model, ids()), logits(model, ids()))


def test_each_adapter_follows_its_own_part_of_the_model() -> None:
    model = base("llama")
    model.model.layers[1].train()
    graft.attach(model, {"a": graft.LoRA(rank=2, dropout=0.1)})
    for number, layer in enumerate(model.model.layers):
        assert {module.training for module in adapters_of(layer)} == {number == 1}


@rows(FEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_masters_are_float32_or_the_float64_of_the_base(row: Row, dtype: torch.dtype) -> None:
    masters_fit_the_base(row, dtype)


def test_an_adapter_is_built_on_the_device_of_its_host() -> None:
    with torch.device("meta"):
        model = base("llama").to("meta")
    graft.attach(
        model, {"a": graft.LoRA(rank=2), "b": graft.Series(sites="mlp"), "c": graft.Prefix(tokens=2, projection=4)}
    )
    assert {p.device.type for name in "abc" for _, p in graft.parameters(model, name)} == {"meta"}
