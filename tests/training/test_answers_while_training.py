"""Answers that are written at a validation are those that the published adapter gives afterwards, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.config import load_run
from graft.errors import GraftError
from graft.evaluation import evaluate
from graft.evaluation.while_training import judge
from graft.training import train
from tests.small import save_small


@pytest.mark.parametrize("changes", [{"layout": "padded"}, {"layout": "flat", "activations": "recompute"}])
def test_the_share_equals_that_of_an_evaluation(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_small(tmp_path / "base")
    rows = [{"question": f"{at}?", "answer": "a"} for at in range(18)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base": {"model": str(tmp_path / "base"), "device": "cpu", "dtype": "float32"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "validation": 6, "template": "plain"},
        "train": {"steps": 60, "batch_size": 6, "lr": 3e-2, "validate_every": 20, "answers": 6, **changes},
        "eval": {"max_new_tokens": 3, "metric": "exact"},
        "jobs": {
            "one": {"adapter": {"kind": "lora", "rank": 4, "sites": "linear"}},
            "two": {"adapter": {"kind": "prefix", "tokens": 2}},
        },
    }
    run = train(load_run(config), tmp_path / "run", quiet=True, judge=judge)
    last = {line["job"]: line for line in run.metrics.read() if "answer_accuracy" in line}
    found = {each["name"]: each["accuracy"] for each in evaluate(run)["results"]}
    best = {name: job["best"]["step"] for name, job in run.read_status()["jobs"].items()}
    shares = {
        line["job"]: line["answer_accuracy"]
        for line in run.metrics.read()
        if "answer_accuracy" in line and line["job_step"] == best[line["job"]]
    }
    assert shares == {name: found[name] for name in ("one", "two")} and len(last) == 2
    assert shares["one"] > 0, "it has learnt something, so that the numbers say something"


def test_what_has_no_answers_is_refused() -> None:
    base = {"base": {"model": "seedling"}, "adapter": "lora", "data": {"train": "x"}}
    with pytest.raises(GraftError, match="train.answers has no effect without validation data"):
        load_run({**base, "train": {"answers": 4}})
    with pytest.raises(GraftError, match="train.answers is for data.task causal"):
        load_run({**base, "data": {"train": "x", "validation": 2, "task": "classification"}, "train": {"answers": 4}})
    with pytest.raises(GraftError, match="does not have: set it to exact or numeric"):
        judge("text", ["a"])
    with pytest.raises(GraftError, match="nothing to compare"):
        judge("numeric", ["no number"])
    right = judge("auto", ["4", "#### 5"])
    assert right("#### 5", "it is 5.0") and not right("4", "5")
