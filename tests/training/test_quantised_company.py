"""Training on bases in few bits: jobs in company are the jobs alone, in every layout, for every objective and task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.attaching.active import set_trainable
from graft.bases import load_model
from graft.config.base import BaseConfig
from graft.runs.folder import RunFolder
from graft.training.job import Job
from tests.small import save_small
from tests.task_bases import answered_rows, labelled_rows, save_task_base
from tests.training.conftest import GATED, data, engine_for, job_on, pairs
from tests.walk import graft_command

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
STEPS = 6
JOBS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.3},
    "dora": {"kind": "dora", "rank": 2, "sites": "attn.q mlp.down", "dropout": 0.3},
    "pissa": {"kind": "pissa", "rank": 2},
    "hira": {"kind": "hira", "rank": 2, "dropout": 0.1},
    "oft": {"kind": "oft", "block_size": 8},
    "prefix": {"kind": "prefix", "tokens": 2},
    "series": {"kind": "series", "bottleneck": 4},
    "ia3": {"kind": "ia3"},
}
OBJECTIVES: dict[str, Any] = {"series": "dpo", "ia3": "simpo"}
NUMBER = {name: number for number, name in enumerate(JOBS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {key: value for key, value in GATED.items() if key != "pad_token_id"}
    return save_small(tmp_path_factory.mktemp("bases") / "llama", scale=2.0, **sizes)


def trained(
    folder: Path, bits: str, names: list[str], path: Path, **settings: Any
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[float]]]:
    """Parameters at the end and losses, by job."""
    model = load_model(BaseConfig.model_validate({"model": str(folder), "quantize": bits, "device": "cpu"}))
    for name in names:
        torch.manual_seed(NUMBER[name])
        graft.attach(model, {name: JOBS[name]})
    set_trainable(model, names)
    jobs = []
    for name in names:
        number = NUMBER[name]
        rows = (pairs if name in OBJECTIVES else data)(12 + number, seed=number, longest=8 + number)
        own = {"steps": STEPS, "lr": 1e-3 * (1 + number % 3), "objective": OBJECTIVES.get(name)}
        jobs.append(job_on(model, name, rows, batch_size=2 + number % 3, seed=number, **own))
    ended: dict[str, dict[str, Tensor]] = {}

    def publish(job: Job) -> None:
        ended[job.name] = {key: parameter.detach().clone() for key, parameter in job.params.items()}

    engine = engine_for(jobs, model, path, publish, **{"token_budget": 256, "layout": "flat", **settings})
    assert engine.run() == "finished"
    lines = [line for line in engine.folder.metrics.read() if "loss" in line]
    return ended, {name: [line["loss"] for line in lines if line["job"] == name] for name in names}


@pytest.mark.parametrize("bits", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_eight_jobs_of_mixed_kinds_are_each_job_alone(folder: Path, bits: str, tmp_path: Path) -> None:
    parameters, losses = trained(folder, bits, list(JOBS), tmp_path / "run")
    for name in JOBS:
        alone, wanted = trained(folder, bits, [name], tmp_path / name)
        torch.testing.assert_close(losses[name], wanted[name], rtol=2e-5, atol=1e-6)
        for key, tensor in alone[name].items():
            torch.testing.assert_close(parameters[name][key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name}.{key}")


@pytest.mark.parametrize("bits", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("changed", [{"layout": "padded"}, {"activations": "recompute"}, {"token_budget": 40}], ids=str)
def test_layout_recomputation_and_accumulation_change_no_loss(
    folder: Path, bits: str, changed: dict[str, Any], tmp_path: Path
) -> None:
    names = ["lora", "dora", "series"]
    _, wanted = trained(folder, bits, names, tmp_path / "plain")
    _, found = trained(folder, bits, names, tmp_path / "changed", **changed)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("classification", "bert"),
        pytest.param("seq2seq", "t5", marks=pytest.mark.slow),
        pytest.param("classification", "gpt2", marks=pytest.mark.slow),
    ],
)
def test_other_tasks_train_resume_and_answer(
    task: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    save_task_base(tmp_path / "base", family)
    rows = labelled_rows(12) if task == "classification" else answered_rows(12)
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("run.yaml").write_text(
        "base: {model: base, quantize: nf4, device: cpu}\nadapter: {kind: lora, rank: 2}\n"
        f"data: {{train: data.jsonl, validation: 4, task: {task}}}\n"
        "train: {steps: 3, batch_size: 4, lr: 1e-3, save_every: 2}\n"
    )
    graft_command("graft check run.yaml")
    graft_command("graft train run.yaml --out runs/a")
    graft_command("graft resume runs/a train.steps=5")
    steps = [line["step"] for line in RunFolder("runs/a").metrics.read() if "loss" in line]
    assert steps == [1, 2, 3, 4, 5]
    graft_command("graft merge runs/a --to merged")
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())
    graft_command("graft merge runs/a --to few --quantize int8")
    assert json.loads(Path("few/config.json").read_text())["quantization_config"]["load_in_8bit"]
