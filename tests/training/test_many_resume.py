"""A run of many jobs that is killed with SIGKILL restores them all, waiting, running and set aside, and ends bit for bit the same."""

from __future__ import annotations

import json
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.runs.folder import RunFolder
from graft.training import resume
from tests.small import save_small
from tests.training.killing import many_work

RUN = """
base: {{model: {folder}/base, device: cpu}}
adapter: {{kind: lora, rank: 4, dropout: 0.1, sites: linear}}
data: {{train: {folder}/data.json, validation: 6, template: alpaca, cache: false}}
train: {{steps: 5, batch_size: 4, lr: 0.01, warmup: 2, schedule: cosine, validate_every: 4, save_every: 3, seed: 3}}
scheduler: {{resident: 2}}
jobs:
  first: {{adapter: {{rank: 2}}, train: {{steps: 9}}}}
  second: {{adapter: {{kind: prefix, tokens: 3}}, train: {{steps: 7, lr: 0.1}}}}
  third: {{adapter: {{kind: series, bottleneck: 4}}, train: {{seed: 4}}}}
  fourth: {{train: {{batch_size: 2}}}}
"""
LATE = "adapter: {kind: parallel, bottleneck: 4}\ntrain: {steps: 4}\npriority: 9\n"


@pytest.fixture(scope="module")
def context() -> Any:
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["graft.training", "datasets", "tests.training.killing", "torch.optim.adamw"])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("many")
    save_small(made / "base")
    rows = [{"instruction": f"say {number}", "input": "", "output": f"it is {number * number}"} for number in range(30)]
    (made / "data.json").write_text(json.dumps(rows))
    (made / "run.yaml").write_text(RUN.format(folder=made))
    (made / "late.yaml").write_text(LATE)
    return made


def run(context: Any, folder: Path, name: str, kill_at: int | None = None, go_on: bool = False) -> int:
    given = (str(folder / "run.yaml"), str(folder / name), str(folder / "late.yaml"), kill_at, go_on)
    process = context.Process(target=many_work, args=given)
    process.start()
    process.join(300)
    return process.exitcode


@pytest.fixture(scope="module")
def unbroken(context: Any, folder: Path) -> Path:
    assert run(context, folder, "unbroken") == 0
    return folder / "unbroken"


def curve(path: Path) -> list[tuple[Any, ...]]:
    lines = RunFolder(path).metrics.read()
    return [(line["step"], line["job"], line.get("loss"), line.get("validation_loss")) for line in lines]


def test_the_unbroken_run_sets_jobs_aside_for_those_that_go_first(unbroken: Path) -> None:
    steps = {}
    for step, job, loss, _ in curve(unbroken):
        if loss is not None:
            steps.setdefault(job, []).append(step)
    assert steps["late"] == [6, 7, 8, 9] and steps["third"] == [6, 7, 8, 9, 10]
    assert steps["first"][:5] == [1, 2, 3, 4, 5] and steps["first"][5] == 10  # set aside for four steps
    assert steps["second"][:6] == [1, 2, 3, 4, 5, 11]
    assert min(steps["fourth"]) > 10 and len(steps["fourth"]) == 5


@pytest.mark.parametrize("kill_at", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (9, 12))])
def test_killed_between_checkpoints_all_jobs_go_on_bit_for_bit(
    context: Any, folder: Path, unbroken: Path, kill_at: int
) -> None:
    """Before step 6 the orders have been taken and are in no checkpoint; before step 9 two jobs are set aside and one waits."""
    name = f"killed-{kill_at}"
    assert run(context, folder, name, kill_at) == -signal.SIGKILL
    assert RunFolder(folder / name).read_status()["state"] == "killed"
    assert run(context, folder, name, go_on=True) == 0
    assert curve(folder / name) == curve(unbroken)
    for path in sorted(unbroken.glob("adapters/*/*.safetensors")) + sorted(unbroken.glob("checkpoints/*[0-9]/*")):
        if path.suffix == ".safetensors":
            own, wanted = load_file(folder / name / path.relative_to(unbroken)), load_file(path)
            assert own.keys() == wanted.keys() and all(torch.equal(own[key], wanted[key]) for key in wanted), path
    here, there = (RunFolder(path).read_status()["jobs"] for path in (folder / name, unbroken))
    assert here == there and set(there) == {"first", "second", "third", "fourth", "late"}


def test_a_job_can_be_submitted_to_a_run_that_has_ended(context: Any, folder: Path, unbroken: Path) -> None:
    from graft.cli import main

    with pytest.raises(SystemExit) as ended:
        main(
            [
                "jobs",
                "submit",
                str(unbroken),
                str(folder / "late.yaml"),
                "train.steps=2",
                "train.warmup=1",
                "--name",
                "after",
            ]
        )
    assert ended.value.code == 0
    resume(unbroken, quiet=True)
    status = RunFolder(unbroken).read_status()["jobs"]
    assert (status["after"]["ended"], status["after"]["step"]) == ("finished", 2)
    assert (unbroken / "adapters/after/adapter_model.safetensors").is_file()
