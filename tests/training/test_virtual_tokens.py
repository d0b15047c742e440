"""Runs of the kinds that act inside attention or before the sequence: token-flat and padded, and started from a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.config import load_run
from graft.training import train
from tests.small import small_model
from tests.training.conftest import losses


def run_of(world: Path, adapter: Any, **settings: Any) -> Any:
    data = {
        "train": str(world / "data.json"),
        "template": "alpaca",
        "cache": False,
        "max_length": 256,
        "overlong": "drop",
    }
    fields = {"steps": 3, "batch_size": 4, "lr": 1e-2, **settings}
    return load_run(
        {"base": {"model": str(world / "base"), "device": "cpu"}, "adapter": adapter, "data": data, "train": fields}
    )


ADAPTERS = {
    "prompt": {"kind": "prompt", "tokens": 4},
    "llama-adapter": {"kind": "llama-adapter", "tokens": 4},
    "stack": [{"kind": "prompt", "tokens": 3}, {"kind": "lora", "rank": 2, "alpha": 2, "dropout": 0.2}],
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_flat_and_padded_batches_train_the_same(world: Path, tmp_path: Path, name: str) -> None:
    flat, padded = (
        losses(train(run_of(world, ADAPTERS[name], layout=layout), tmp_path / layout, quiet=True).path)
        for layout in ("flat", "padded")
    )
    assert flat == pytest.approx(padded, abs=2e-4) and len(set(flat)) == 3


def test_a_prompt_starts_from_its_text_and_the_folder_says_the_token_ids(world: Path, tmp_path: Path) -> None:
    adapter = {"kind": "prompt", "tokens": 6, "init": "text", "init_text": "say"}
    folder = train(run_of(world, adapter, lr=1e-12), tmp_path / "run", quiet=True)
    saved = json.loads((folder.adapter_dir("prompt") / "adapter_config.json").read_text())["adapter"]
    table = small_model("llama").model.embed_tokens.weight
    model = graft.load(small_model("llama"), folder.adapter_dir("prompt"))
    ((_, vectors),) = graft.parameters(model, "prompt")
    assert saved["init_text"] == "say" and len(saved["init_ids"]) == 3
    torch.testing.assert_close(vectors, table[[*saved["init_ids"], *saved["init_ids"]]])
