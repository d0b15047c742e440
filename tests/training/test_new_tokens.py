"""`base.new_tokens`: a run adds tokens to its base, trains their rows, saves them with the adapter, and exports them to PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graft
from graft.config import load_run
from graft.generation.loaded import load_candidates
from graft.training import train
from tests.small import save_small

NEW = ["<tool>", "<call>"]
IDS = torch.tensor([[5, 258, 9, 259, 40, 258]])


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A base, the run that trained on it, and the config of that run."""
    world = tmp_path_factory.mktemp("world")
    save_small(world / "base", scale=3.0, tie_word_embeddings=request.param)
    rows = [{"instruction": f"say {number}", "output": f"<tool> {number} <call>"} for number in range(16)]
    (world / "data.json").write_text(json.dumps(rows))
    config = load_run({
        "base": {"model": str(world / "base"), "device": "cpu", "new_tokens": NEW},
        "adapter": {"kind": "lora", "rank": 2, "sites": "attn.q"},
        "data": {"train": str(world / "data.json"), "template": "alpaca", "cache": False},
        "train": {"steps": 3, "batch_size": 4, "lr": 1e-2},
    })  # fmt: skip
    return world, train(config, world / "run", quiet=True), config


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_rows_of_new_tokens_are_trained_and_saved_with_the_adapter(made: tuple[Path, Any, Any]) -> None:
    world, run, _ = made
    folder = run.adapter_dir("lora")
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(NEW) == [258, 259]
    loaded = load_candidates(run)
    assert loaded.base.added == (258, 259) and len(loaded.base.tokenizer) == 260
    rows = [each for name, each in graft.parameters(loaded.base.model, "lora") if each.shape == (2, 32)]
    assert rows and all(each.any() for each in rows)
    want = logits(loaded.base.model)
    fresh = AutoModelForCausalLM.from_pretrained(world / "base").eval()
    torch.testing.assert_close(logits(graft.load(fresh, folder, resize=True)), want, atol=1e-5, rtol=1e-5)


def test_peft_computes_the_same_from_the_export(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    world, run, _ = made
    loaded = load_candidates(run)
    graft.export(loaded.base.model, "lora", tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    base.resize_token_embeddings(260, mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), logits(loaded.base.model), atol=1e-5, rtol=1e-5)


def test_tokens_that_the_tokenizer_has_are_refused(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, _, config = made
    wrong = config.model_copy(update={"base": config.base.model_copy(update={"new_tokens": ("<tool>", "</s>")})})
    with pytest.raises(graft.GraftError, match=r"base.new_tokens: '</s>': the tokenizer has it already"):
        train(wrong, tmp_path / "run", quiet=True)


def test_another_tokenizer_brings_its_tokens(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """The tokenizer beside an adapter, for a second run with the same tokens."""
    _, run, config = made
    base = config.base.model_copy(
        update={"new_tokens": (), "tokenizer": str(run.adapter_dir("lora")), "resize": "auto"}
    )
    again = train(config.model_copy(update={"base": base}), tmp_path / "run", quiet=True)
    assert load_candidates(again).base.added == (258, 259)


def test_a_run_goes_on_from_an_adapter_with_added_tokens(made: tuple[Path, Any, Any], tmp_path: Path) -> None:
    _, run, config = made
    folder = run.adapter_dir("lora")
    base = config.base.model_copy(update={"new_tokens": (), "resize": "auto", "tokenizer": str(folder)})
    start = config.train.model_copy(update={"init_from": str(folder)})
    again = train(config.model_copy(update={"base": base, "train": start}), tmp_path / "run", quiet=True)
    assert load_candidates(again).base.added == (258, 259)
