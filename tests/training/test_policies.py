"""Runs on answers that a model drew: every loss and its gradient against autograd written apart, whole runs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import graft
from graft.cli import main
from graft.config import RunConfig
from graft.data.datasets import TokenDataset
from graft.data.samples import Example
from graft.errors import GraftError
from graft.generation.loaded import load_candidates
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import set_training
from graft.training.forward.scoring import Scorer
from graft.training.step import begin
from graft.training.updates.rules import rule_of
from tests.training.conftest import VOCABULARY, attach, batcher, data, job_on, tiny

OBJECTIVES: list[Any] = [
    "importance_sampling",
    {"kind": "ppo", "clip_low_threshold": 0.7, "clip_high_threshold": 1.1},
    {"kind": "cispo", "clip_low_threshold": 0.6, "clip_high_threshold": 1.5},
    {"kind": "dro", "beta": 0.4},
    {"kind": "gspo", "clip_low_threshold": 0.9, "clip_high_threshold": 1.05},
]


def rollouts(count: int, seed: int = 0) -> list[Example]:
    draw, found = np.random.default_rng(seed), []
    for row in range(count):
        asked, answer = int(draw.integers(1, 5)), int(draw.integers(2, 9))
        ids = draw.integers(3, VOCABULARY, asked + answer).astype(np.int32)
        numbers = [draw.normal(size=answer).astype(np.float32) for _ in range(2)]
        numbers[0] = numbers[0] * 0.3 - 4.6  # about the log-probability of a token of 97
        made = Example(ids, np.arange(len(ids)) >= asked, "r", row + 1, logprobs=numbers[0], advantages=numbers[1])
        found.append(made)
    return found


def written_apart(objective: Any, logp: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The loss of one answer, by the table of the losses."""
    kind = objective if isinstance(objective, str) else objective["kind"]
    low, high = (
        (0.0, 9.0)
        if isinstance(objective, str)
        else (objective.get(f"clip_{end}_threshold", 0) for end in ("low", "high"))
    )
    ratio = torch.exp(logp - old)
    if kind == "importance_sampling":
        return -torch.dot(ratio, advantage)
    if kind == "dro":
        return -(logp * advantage).sum() + 0.2 * torch.pow(logp - old, 2).sum()
    if kind == "cispo":
        return -torch.dot(torch.clip(ratio, low, high).detach() * logp, advantage)
    if kind == "gspo":
        ratio = torch.exp((logp - old).mean()).detach() * torch.exp(logp - logp.detach())
    return -torch.min(ratio * advantage, torch.clip(ratio, low, high) * advantage).sum()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: each if isinstance(each, str) else each["kind"])
def test_a_step_is_autograd_written_apart(objective: Any) -> None:
    examples = rollouts(6)
    model = attach(tiny("gpt2", torch.float64))
    job = job_on(model, train=TokenDataset.of(examples), objective=objective, batch_size=6, clip=None)
    forward = Forward(model)
    assert decide(forward, [job], "auto", batcher()).layout == "flat"
    set_training(model, ["a"])
    with laid_out(model, "flat"):
        gradient = rule_of(job).prepare(forward, [job], batcher("flat", 30))["a"]
    found = {key: each.grad.clone() for key, each in job.params.items() if each.grad is not None}
    total, count = torch.zeros((), dtype=torch.float64), sum(len(each.logprobs) for each in examples)  # type: ignore[arg-type]
    with graft.use(model, "a"):
        for each in examples:
            logits = model(torch.from_numpy(each.input_ids).long()[None]).logits[0].log_softmax(-1)
            at = torch.from_numpy(each.supervised.nonzero()[0])
            logp = logits[at - 1].gather(1, torch.from_numpy(each.input_ids).long()[at][:, None])[:, 0]
            old, advantage = (torch.from_numpy(numbers).double() for numbers in (each.logprobs, each.advantages))
            total = total + written_apart(objective, logp, old, advantage) / count
    assert gradient.scores["loss"] == pytest.approx(float(total.detach()), abs=1e-12)
    wanted = torch.autograd.grad(total, list(job.params.values()), allow_unused=True)
    for key, grad in zip(job.params, wanted, strict=True):
        assert grad is not None
        torch.testing.assert_close(found[key], grad, atol=1e-12, rtol=1e-9)
    assert begin(forward, [job], batcher()).sizes["a"].targets == count


def test_drawn_answers_and_objectives_go_together() -> None:
    model = attach(tiny())
    with pytest.raises(GraftError, match="answers that a model drew.*importance_sampling, ppo"):
        job_on(model, train=TokenDataset.of(rollouts(4)))
    with pytest.raises(GraftError, match="ppo learns from drawn answers, but 'a' has none"):
        job_on(model, train=data(4), objective="ppo")
    with pytest.raises(ValueError, match=r"clip_low_threshold \(1.5\) must be below"):
        job_on(model, train=data(4), objective={"kind": "ppo", "clip_low_threshold": 1.5})
    run: dict[str, Any] = {"base": {"model": "b"}, "adapter": {"kind": "lora"}, "train": {"objective": "gspo"}}
    with pytest.raises(ValueError, match="gspo learns from drawn answers, but data.task is preference"):
        RunConfig.model_validate({**run, "data": {"train": "x.jsonl", "task": "preference"}})


ROW = {"prompt_ids": [5, 6, 7], "completion_ids": [8, 9, 1], "logprobs": [-5.0, -5.5, -6.0], "advantage": 1.0}


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "drawn.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f"""
base: {{model: {folder / "base"}}}
adapter: {{kind: lora, rank: 4, sites: linear}}
data: {{train: {folder / "drawn.jsonl"}}}
train: {{objective: importance_sampling, batch_size: 4, steps: 12, lr: 1e-2}}
"""
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def test_a_run_makes_good_answers_likelier_and_bad_ones_less_likely(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    good, bad = [9, 10, 11, 1], [20, 21, 22, 1]
    rows: list[dict[str, Any]] = [
        {"prompt_ids": [5, 6, 7], "completion_ids": good, "logprobs": [-5.5] * 4, "advantages": [1.0, 1.0, 1.0, 0.5]},
        {"prompt_ids": [5, 6, 7], "completion_ids": bad, "logprobs": [-5.5] * 4, "advantage": -1.0},
    ]
    yaml = write(world, rows * 2)
    assert run("check", str(yaml)) == 0
    assert run("train", str(yaml), "--out", str(tmp_path / "run")) == 0  # its tokens come from the cache now
    loaded = load_candidates(tmp_path / "run")
    scorer = Scorer(loaded.base.model)

    def likely(name: str | None) -> list[float]:
        return [sum(scorer.logprobs([([5, 6, 7, *answer], 3)], [name])[0]) for answer in (good, bad)]

    before, after = (likely(each.adapter) for each in loaded.candidates)
    assert after[0] > before[0] + 0.5 and after[1] < before[1] - 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logprobs": [-1.0]}, "field 'logprobs': must be a list with a number for each of the 3"),
        ({"logprobs": [-1.0, None, -2.0]}, "field 'logprobs': must be finite numbers"),
        ({"advantages": [1.0, 1.0, 1.0]}, "field 'advantage': is needed"),
        ({"advantage": "high"}, "field 'advantage': must be a finite number"),
        ({"completion_ids": []}, "field 'completion_ids': must be a list of token ids, at least one"),
        ({"prompt_ids": [1.5]}, "field 'prompt_ids': must hold token ids"),
        ({"completion_ids": [8, 9, 5000]}, "5000"),
    ],
)
def test_rows_that_cannot_be_learnt_are_named(
    change: dict[str, Any],
    said: str,
    world: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    yaml = write(world, [ROW, {**ROW, **change}])
    assert run("check", str(yaml)) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told and "Traceback" not in told
