"""An end mark that the base never learnt: whether answers end after training, with the cure that `graft check` names and without it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import graft.seedling
from graft.config import load_run
from graft.generation.generate import generate
from graft.generation.loaded import load_candidates
from graft.generation.prompts import request_of
from graft.generation.requests import Decoding
from graft.training import train

CURE = {"kind": "full", "sites": "embed head", "tokens": [2]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seedling with an end mark whose rows are the mean of all, and sums of two lengths."""
    folder, draw = tmp_path_factory.mktemp("ends"), random.Random(1)
    tokenizer = AutoTokenizer.from_pretrained(graft.seedling.path())
    model = AutoModelForCausalLM.from_pretrained(graft.seedling.path())
    assert tokenizer.eos_token_id == 2
    with torch.no_grad():
        for table in {id(each): each for each in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
            table[2] = table.mean(0)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = []
    for _ in range(220):
        a, b = draw.randint(2, 60), draw.randint(2, 60)
        more = draw.choice(["", f" Tom has {a + b} apples."])
        rows.append(
            {"prompt": f"Tom has {a} apples and gets {b} more. How many?", "completion": f"{a} + {b} = {a + b}.{more}"}
        )
    for name, part in (("train", rows[:200]), ("check", rows[200:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cured", [True, False])
def test_answers_end_after_training_only_with_the_cure(cured: bool, seed: int, world: Path, tmp_path: Path) -> None:
    lora = {"kind": "lora", "rank": 8, "sites": "linear"}
    config = load_run(
        {
            "base": {"model": str(world / "base"), "device": "cpu"},
            "adapter": [lora, CURE] if cured else lora,
            "data": {"train": str(world / "train.jsonl"), "validation": str(world / "check.jsonl"), "cache": False},
            "train": {"steps": 45, "batch_size": 16, "lr": 3e-3, "seed": seed, "validate_every": 45},
        }
    )
    folder = train(config, tmp_path / "run", quiet=True)
    rate = folder.metrics.read()[-1]["validation_stop_rate"]
    loaded = load_candidates(folder.path)
    (own,) = loaded.adapters
    asked = [json.loads(line)["prompt"] for line in (world / "check.jsonl").read_text().splitlines()]
    requests = [
        request_of(loaded.base, own.template, own.adapter, [{"role": "user", "content": text}]) for text in asked
    ]
    ends = [found.reason for _, found in generate(loaded.base.model, requests, Decoding(40))]
    if cured:
        assert ends.count("stopped") >= 18 and rate >= 0.4
    else:
        assert ends.count("stopped") == 0 and rate == 0.0
