"""Whole runs that train a base: what joins them, new tokens, and what the terminal says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.config import load_run
from graft.errors import GraftError
from graft.training.assembly import build, build_job
from graft.training.start import train
from graft.training.trained_base import rounding_note
from tests.task_bases import answered_rows, save_task_base

RUN: dict[str, Any] = {
    "base": {"model": "base", "device": "cpu", "dtype": "float32"},
    "data": {"train": "data.json", "template": "alpaca"},
    "train": {"method": "full", "steps": 1, "batch_size": 4},
}


@pytest.fixture(autouse=True)
def _here(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


def test_no_job_joins_a_base_that_trains_and_it_joins_no_run() -> None:
    parts = build(load_run(RUN))
    with pytest.raises(
        GraftError, match="job 'b' cannot join: train.method full trains the base itself, which jobs share"
    ):
        build_job(parts, "b", {"adapter": {"kind": "lora"}, "train": {"method": "adapter"}})
    plain = build(load_run({**RUN, "adapter": {"kind": "lora"}, "train": {"steps": 1}}))
    whole = {"train": {"method": {"kind": "mezo", "parts": "all"}}, "adapter": None}
    with pytest.raises(GraftError, match="job 'b'"):
        build_job(plain, "b", whole)


def test_new_tokens_train_with_the_embedding(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="which train.method does not train: add embed"):
        build(load_run({**RUN, "train": {"method": {"kind": "full", "parts": "attn"}}}, ["base.new_tokens=['<tool>']"]))
    folder = train(load_run(RUN, ["base.new_tokens=['<tool>']"]), tmp_path / "out", quiet=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder.path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder.path / "model")
    assert len(model.get_input_embeddings().weight) >= len(tokenizer) > tokenizer.convert_tokens_to_ids("<tool>")


def test_what_bfloat16_loses_is_said() -> None:
    for method, said in (("full", True), ({"kind": "full", "rounding": "stochastic"}, False), ("qft", False)):
        parts = build(load_run({**RUN, "train": {**RUN["train"], "method": method}}, ["base.dtype=bfloat16"]))
        note = rounding_note(parts.base, parts.jobs[0])
        assert (note is not None and "With lr 0.0003 this concerns most weights above 0.15" in note) == said


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_trains_whole(family: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(answered_rows()))
    run = {
        "base": {"model": str(save_task_base(tmp_path / "base", family)), "device": "cpu", "dtype": "float32"},
        "data": {"task": "seq2seq", "train": str(tmp_path / "rows.json")},
    }
    for method in ("full", "qft"):
        config = load_run({**run, "train": {"method": method, "steps": 4, "batch_size": 12, "lr": 1e-3}})
        folder = train(config, tmp_path / method, quiet=True)
        taken = [line["loss"] for line in folder.metrics.read()]
        assert taken[-1] < taken[0]
