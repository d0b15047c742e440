"""Folders for servers: what they would misread is refused or converted, and the conversion computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graft
from tests.contract.table import base, ids, logits, randomise


def attached(spec: Any) -> Any:
    model = base("llama")
    graft.attach(model, {"a": spec})
    randomise(model, "a")
    return model


@pytest.mark.parametrize("server", ["vllm", "sglang", "tgi"])
def test_patterns_and_gaps_become_one_rank_that_computes_the_same(server: str, tmp_path: Path) -> None:
    spec = graft.LoRA(
        rank=4, alpha=3, rslora=True, rank_pattern={"mlp.up": 2}, alpha_pattern={"attn.q": 5}, sites="attn.q mlp.up@0"
    )
    model = attached(spec)
    with pytest.raises(graft.GraftError, match="--convert adds zero rows"):
        graft.export(model, "a", tmp_path / "strict", serving=server)
    notes = graft.export(model, "a", tmp_path / "out", serving=server, convert=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and "rank 4" in notes[0]
    names = {name.split(".")[-3] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    if server == "sglang":
        assert names == {"q_proj", "k_proj", "v_proj", "up_proj", "gate_proj"}
    again = graft.load(base("llama"), tmp_path / "out", name="a")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (graft.DoRA(rank=2), "DoRA's magnitudes"),
        (graft.LoRA(rank=2, train_bias=True), "biases"),
        (graft.IA3(), "serves LoRA only"),
        ([graft.LoRA(rank=2), graft.Full(sites="head")], "whole modules"),
    ],
)
def test_what_a_server_would_not_read_is_refused(spec: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(graft.GraftError, match=reason):
        graft.export(attached(spec), "a", tmp_path / "out", serving="vllm")
    assert not (tmp_path / "out").exists()


def test_svd_of_full_rank_is_the_adapter_and_of_less_says_what_is_lost(tmp_path: Path) -> None:
    model = attached(graft.DoRA(rank=2, sites="attn.q mlp.down"))
    notes = graft.export(model, "a", tmp_path / "whole", serving="vllm", svd=40)
    again = graft.load(base("llama"), tmp_path / "whole", name="a")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=1e-4, rtol=0)
    assert "0.00% of the adapter" in notes[0]
    notes = graft.export(model, "a", tmp_path / "less", serving="vllm", svd=1)
    assert "0.00%" not in notes[0]


def test_an_unknown_server_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(graft.GraftError, match="unknown server 'vlm'. Did you mean 'vllm'"):
        graft.export(attached(graft.LoRA(rank=2)), "a", tmp_path / "out", serving="vlm")
