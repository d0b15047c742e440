"""Generation of encoder-decoders: against transformers' own, in batches, with several adapters, greedy and with beams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.bases import load_base
from graft.config import load_run
from graft.config.base import BaseConfig
from graft.errors import GraftError
from graft.evaluation import evaluate
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Request, limits
from graft.generation.selfcheck import self_check
from graft.training import train
from tests.task_bases import answered_rows, save_task_base

TEXTS = ["say ab", "a much longer question, of many words", "x"]


@pytest.fixture(scope="module", params=["t5", "bart"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_task_base(tmp_path_factory.mktemp("bases") / request.param, request.param)
    loaded = load_base(BaseConfig(model=str(folder), device="cpu"), "seq2seq")
    graft.attach(loaded.model, {"a": graft.LoRA(rank=4, sites="linear"), "b": graft.Series(bottleneck=4, sites="mlp")})
    torch.manual_seed(3)
    for name in ("a", "b"):
        with torch.no_grad():
            for _, parameter in graft.parameters(loaded.model, name):
                parameter.normal_(std=0.3)
    return loaded


def requests(base: Any, adapters: list[str | None]) -> list[Request]:
    return [
        Request(tuple(base.tokenizer(text)["input_ids"]), who, frozenset({1})) for text in TEXTS for who in adapters
    ]


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_in_a_batch_are_those_of_transformers_one_at_a_time(base: Any, beams: int) -> None:
    asked = requests(base, [None, "a", "b"])
    found = dict(generate(base.model, asked, Decoding(max_new_tokens=8, beams=beams)))
    for number, request in enumerate(asked):
        with graft.use(base.model, request.adapter), torch.no_grad():
            ids = torch.tensor([request.ids])
            out = base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=beams, do_sample=False
            )[0, 1:].tolist()
        wanted = out[: out.index(1)] if 1 in out else out
        assert list(found[number].ids) == wanted
    assert len({found[number].ids for number in range(3)}) > 1, (
        "the adapters must differ for this test to say something"
    )


def test_the_self_check_compares_batches_with_single_questions(base: Any) -> None:
    assert self_check(base.model, requests(base, [None, "a", "b"])) >= 6


def test_a_decoder_has_the_whole_context_for_its_answer(base: Any) -> None:
    asked = [Request((5,) * 100, None, frozenset({1})), Request((5,) * 200, None, frozenset({1}))]
    found = limits(base.model, asked, Decoding(max_new_tokens=1000))
    assert found == ([128, 0] if base.model.config.model_type == "bart" else [1000, 1000])


def test_a_static_cache_is_refused(base: Any) -> None:
    with pytest.raises(GraftError, match="dynamic"):
        list(generate(base.model, requests(base, [None]), cache="static"))


def test_a_trained_encoder_decoder_is_evaluated_by_its_answers(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with graft-llm[eval]")
    save_task_base(tmp_path / "base", "t5", scale=1.0)
    rows = answered_rows(8)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base": {"model": str(tmp_path / "base"), "device": "cpu"},
        "adapter": {"kind": "lora", "rank": 16, "alpha": 64, "sites": "linear"},
        "data": {"task": "seq2seq", "train": str(data), "cache": False},
        "train": {"steps": 60, "lr": 1e-2, "batch_size": 8},
    }
    folder = train(load_run(config), tmp_path / "run", quiet=True)
    losses = [line["loss"] for line in folder.metrics.read() if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    bare, lora = evaluate(folder, data)["results"]
    assert lora["loss"] == pytest.approx(losses[-1], abs=0.5) and lora["loss"] < bare["loss"]
    assert 0 <= lora["text_bleu"] <= 100 and lora["text_bleu"] >= bare["text_bleu"]
    assert lora["loss_tokens"] == sum(len(row["target"]) + 1 for row in rows)
