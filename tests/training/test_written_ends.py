"""`graft check` lets the model write a few answers: how many end is what transformers' own generation says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from graft.config import load_run
from graft.training import ends
from graft.training.check import CheckReport, check
from tests.small import save_small


@pytest.fixture(scope="module", params=[1.0, 8.0], ids=["fluent", "wild"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ends") / "base"
    save_small(folder, scale=request.param)
    return folder


def report_of(base: Path, rows: list[dict[str, Any]], **data: Any) -> CheckReport:
    (base.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"train": str(base.parent / "rows.jsonl"), "template": "plain", "cache": False, **data}
    return check(
        load_run(
            {
                "base": {"model": str(base), "device": "cpu"},
                "adapter": {"kind": "lora", "rank": 2, "sites": "attn.q"},
                "data": given,
                "train": {"steps": 1, "batch_size": 4},
            }
        )
    )


def test_the_answers_that_end_are_those_of_transformers(base: Path) -> None:
    rows = [{"prompt": f"what is {n}{'?' * n}", "completion": "x" * n} for n in range(1, 13)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ended = 0
    for row in rows[: ends.ASKED]:
        asked = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        out = model.generate(asked, max_new_tokens=ends.MOST, do_sample=False, pad_token_id=0)
        ended += tokenizer.eos_token_id in out[0, asked.shape[1] :].tolist()
    assert report_of(base, rows).ends == {"ended": ended, "asked": ends.ASKED, "max_new_tokens": ends.MOST}


def test_nothing_is_written_for_texts_for_long_answers_and_where_it_would_take_long(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert report_of(base, [{"text": f"some text {n}"} for n in range(4)]).ends is None
    rows = [{"prompt": f"{n}?", "completion": "y" * 33} for n in range(4)]
    assert report_of(base, rows).ends is None
    monkeypatch.setattr(ends, "SECONDS", 0.0)
    assert report_of(base, [{"prompt": f"{n}?", "completion": "y"} for n in range(4)]).ends is None


def test_a_model_that_cannot_write_is_a_question(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise KeyError("cache")

    monkeypatch.setattr(ends, "generate", fails)
    report = report_of(base, [{"prompt": f"{n}?", "completion": "y"} for n in range(4)])
    assert report.ends is None and not report.problems
    assert any("writes no answers here (KeyError: 'cache')" in question for question in report.questions)
