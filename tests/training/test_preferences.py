"""Whole runs over pairs of answers: from YAML to adapter, references, resuming, mixing with other jobs, evaluating, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.config import load_run
from graft.errors import GraftError
from graft.evaluation import evaluate
from graft.runs.folder import RunFolder
from graft.training import check_each, resume, train
from graft.training.assembly import build, build_job
from graft.training.start import reference_note
from tests.small import save_small
from tests.task_bases import save_task_base

STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs, and rows to write."""
    folder = tmp_path_factory.mktemp("preferences")
    save_small(folder / "base")
    pairs = [
        {"prompt": f"say {number}", "chosen": f"it is {number}", "rejected": f"no {number} for you"}
        for number in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows = [{"instruction": row["prompt"], "input": "", "output": row["chosen"]} for row in pairs]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def config(place: Path, data: dict[str, Any] | None = None, **settings: Any) -> Any:
    plain = {
        "task": "preference",
        "train": str(place / "pairs.jsonl"),
        "validation": 6,
        "template": "plain",
        "cache": False,
    }
    return load_run(
        {
            "base": {"model": str(place / "base"), "device": "cpu"},
            "adapter": {"kind": "lora", "rank": 4, "dropout": 0.1, "sites": "linear"},
            "data": {**plain, **(data or {})},
            "train": {"objective": "dpo", "steps": STEPS, "batch_size": 4, "lr": 1e-2, "validate_every": 3, **settings},
        }
    )


def lines(folder: RunFolder, key: str) -> list[float]:
    return [line[key] for line in folder.metrics.read() if key in line]


def test_a_run_writes_what_its_pairs_say_and_the_fresh_adapter_is_its_reference(place: Path, tmp_path: Path) -> None:
    made = train(config(place), tmp_path / "run", quiet=True)
    assert lines(made, "loss")[0] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert lines(made, "margin")[0] == 0.0 and lines(made, "margin")[-1] > 0
    for name in ("rewards_chosen", "rewards_rejected", "logps_chosen", "logps_rejected", "accuracy"):
        assert len(lines(made, name)) == STEPS and len(lines(made, f"validation_{name}")) == 2
    shown = made.samples.read()[0]
    assert shown["trained_on"].strip().startswith("it is") and shown["rejected"].strip().startswith("no ")
    card = (made.adapter_dir("lora") / "README.md").read_text()
    assert "objective dpo (beta 0.1, label_smoothing 0.0, reference base)" in card and "AutoModelForCausalLM" in card
    status = made.read_status()["jobs"]["lora"]
    assert status["best"]["loss"] == min(lines(made, "validation_loss"))


def test_a_run_that_stops_goes_on_bit_for_bit(place: Path, tmp_path: Path) -> None:
    """With dropout and a reference of its own, which is kept in the run's folder: what it came from may be gone."""
    first = train(
        config(place, objective=None, data={"task": "causal", "train": str(place / "rows.json")}),
        tmp_path / "sft",
        quiet=True,
    )
    origin = tmp_path / "origin"
    shutil.copytree(first.adapter_dir("lora"), origin)
    settings = {"objective": {"kind": "dpo", "reference": "init"}, "init_from": str(origin), "save_every": 3}
    whole = train(config(place, **settings), tmp_path / "whole", quiet=True)
    broken = tmp_path / "broken"
    shutil.copytree(whole.path, broken)
    shutil.rmtree(origin)
    shutil.rmtree(broken / "checkpoints/000006")
    (broken / "checkpoints/last.json").write_text('{"step": 3}')
    status = json.loads((broken / "status.json").read_text())
    (broken / "status.json").write_text(json.dumps({**status, "state": "stopped"}))
    again = resume(broken, quiet=True)
    assert lines(again, "loss") == lines(whole, "loss") and len(lines(again, "loss")) == STEPS
    ours, theirs = (load_file(run.adapter_dir("lora") / "adapter_model.safetensors") for run in (again, whole))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert lines(whole, "margin")[0] == pytest.approx(0.0, abs=0.2)  # dropout is all that parts it from its start
    assert whole.adapters() == ["lora"] and (whole.reference_dir("lora") / "adapter_config.json").is_file()


def test_an_adapter_that_starts_elsewhere_than_its_reference_is_told(place: Path, tmp_path: Path) -> None:
    apart = config(place, init_from="somewhere")
    assert "compared with the bare base" in str(reference_note(apart))
    assert (
        reference_note(config(place)) is None and reference_note(config(place, objective="orpo", init_from="x")) is None
    )
    same = config(place, objective={"kind": "ipo", "reference": "init"}, init_from="x")
    assert reference_note(same) is None


def test_jobs_over_pairs_and_over_rows_train_in_one_run_as_alone(place: Path, tmp_path: Path) -> None:
    alone = train(config(place), tmp_path / "alone", quiet=True)
    top = config(place).model_dump(mode="json", exclude={"scheduler"})
    write = {"data": {"task": "causal", "train": str(place / "rows.json")}, "train": {"objective": None}}
    jobs = {"lora": {}, "write": write, "simpo": {"train": {"objective": "simpo"}, "adapter": {"kind": "series"}}}
    together = train(load_run({**top, "jobs": jobs}), tmp_path / "together", quiet=True)
    own = [line["loss"] for line in together.metrics.read() if line["job"] == "lora" and "loss" in line]
    assert own == pytest.approx(lines(alone, "loss"), rel=1e-5)
    assert together.adapters() == ["lora", "simpo", "write"]


def test_a_job_over_pairs_joins_a_run_that_writes(place: Path, tmp_path: Path) -> None:
    rows = {"task": "causal", "train": str(place / "rows.json")}
    top = config(place, data=rows, objective=None).model_dump(mode="json", exclude={"scheduler"})
    run = load_run({**top, "jobs": {"write": {}}})
    out = tmp_path / "run"
    pairs = {"data": {"task": "preference", "train": str(place / "pairs.jsonl")}, "train": {"objective": "ipo"}}
    made = train(load_run({**top, "jobs": {"write": {}, "late": {**pairs, "adapter": {"rank": 2}}}}), out, quiet=True)
    parts = build(run)
    job = build_job(parts, "late", {**pairs, "adapter": {"rank": 2}})
    assert (
        job.objective.compares and job.train.digest == json.loads((made.path / "lock.json").read_text())["data"]["late"]
    )


def test_check_measures_a_step_and_names_the_objective(place: Path) -> None:
    (report,) = check_each(config(place, objective={"kind": "cpo", "nll": 0.0})).values()
    lengths = report.parts.data.train.lengths
    assert report.problems == ()  # the last step of an epoch has fewer pairs
    assert report.parts.jobs[0].step_tokens == pytest.approx(float(lengths.sum()) / math.ceil(len(lengths) / 4))
    assert report.parts.data.report.learnt.startswith("pairs of answers")
    (dpo,) = check_each(config(place)).values()
    assert dpo.trial.loss == pytest.approx(0.6931, abs=1e-3) and dpo.trial.tokens == 2 * report.trial.tokens


def test_evaluation_tells_which_answer_is_likelier_and_which_gained(place: Path, tmp_path: Path) -> None:
    made = train(config(place, steps=20, lr=3e-2), tmp_path / "run", quiet=True)
    result = evaluate(made, place / "pairs.jsonl")
    base, lora = result["results"]
    assert (base["total"], lora["total"], lora["gained"]) == (24, 24, 1.0) and "gained" not in base
    answers = [json.loads(line) for line in Path(result["folder"], "answers.jsonl").read_text().splitlines()]
    by = {(line["contestant"], line["number"]): line for line in answers}
    for number in range(1, 25):
        one, other = by["base", number], by["lora", number]
        gained = other["logp_chosen"] - other["logp_rejected"] - one["logp_chosen"] + one["logp_rejected"]
        assert other["margin"] == pytest.approx(gained, rel=1e-4)
    held_out = evaluate(made)
    margins = lines(made, "validation_margin")
    best = lines(made, "validation_loss").index(min(lines(made, "validation_loss")))
    assert held_out["results"][1]["margin"] * 0.1 == pytest.approx(margins[best], rel=1e-3)


def test_an_encoder_decoder_is_refused(place: Path, tmp_path: Path) -> None:
    save_task_base(tmp_path / "t5", "t5")
    asked = config(place)
    wrong = asked.model_copy(update={"base": asked.base.model_copy(update={"model": str(tmp_path / "t5")})})
    with pytest.raises(GraftError, match="is an encoder-decoder: preferences need a causal model"):
        train(wrong, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"objective": None},
            "data.task is preference but train.objective is not set: choose one of dpo, ipo",
        ),
        ({"objective": "dop"}, r"one of dpo, ipo, cpo, orpo, simpo, .*did you mean 'dpo'\?"),
        ({"objective": {"kind": "simpo", "gama": 1.0}}, "'train.objective.gama'. Did you mean 'gamma'"),
        ({"objective": {"kind": "orpo", "reference": "base"}}, "unknown key 'train.objective.reference'"),
        ({"objective": {"kind": "dpo", "reference": "init"}}, "train.init_from is not set"),
        ({"objective": {"kind": "cpo", "loss": "hinge", "label_smoothing": 0.1}}, "no effect on loss: hinge"),
        ({"objective": {"kind": "dpo", "beta": 0.0}}, "train.objective.beta must be greater than 0"),
    ],
)
def test_a_wrong_objective_is_an_error_that_says_what_is_right(place: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(GraftError, match=said):
        config(place, **changes)


def test_an_objective_over_pairs_is_refused_where_answers_are_written(place: Path) -> None:
    with pytest.raises(GraftError, match="train.objective dpo learns from pairs of answers, but data.task is causal"):
        config(place, data={"task": "causal"})


def test_the_reference_stays_as_it_was(place: Path, tmp_path: Path) -> None:
    first = train(config(place, objective="simpo"), tmp_path / "first", quiet=True)
    settings = {"objective": {"kind": "ipo", "reference": "init"}, "init_from": str(first.adapter_dir("lora"))}
    second = train(config(place, **settings), tmp_path / "second", quiet=True)
    kept = load_file(second.reference_dir("lora") / "adapter_model.safetensors")
    start = load_file(first.adapter_dir("lora") / "adapter_model.safetensors")
    ended = load_file(second.adapter_dir("lora") / "adapter_model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in start.items())
    assert any(not torch.equal(ended[name], tensor) for name, tensor in start.items())
