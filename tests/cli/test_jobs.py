"""graft jobs, and what graft train says of a run in which a job fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graft.cli import main
from graft.runs.commands import CommandQueue
from graft.runs.folder import RunFolder
from tests.small import save_small


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data, a run of two jobs, and a folder in which it is half done."""
    folder = tmp_path_factory.mktemp("jobs")
    save_small(folder / "base")
    rows = [{"instruction": f"say {number}", "input": "", "output": f"it is {number}"} for number in range(16)]
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / "run.yaml").write_text(
        f"base: {{model: {folder}/base, device: cpu}}\nadapter: {{kind: lora, rank: 2}}\n"
        f"data: {{train: {folder}/data.json, template: alpaca, cache: false}}\ntrain: {{steps: 2, batch_size: 4}}\n"
        "jobs:\n  one:\n  two: {adapter: {kind: series, bottleneck: 3}, priority: 1}\n"
    )
    (folder / "late.yaml").write_text("train:\n  lr: 1e-2\n")
    (folder / "empty.yaml").write_text("")
    return folder


@pytest.fixture
def half(world: Path, tmp_path: Path) -> Iterator[Path]:
    """A run folder in which one job trains and the other has ended."""
    from graft.config import load_run

    folder = RunFolder(tmp_path / "run").create()
    folder.write_config(load_run(world / "run.yaml"))
    common = {"steps": 2, "loss": 1.0, "best": None, "priority": 0}
    jobs = {
        "one": {"state": "running", "step": 1, "ended": None, **common},
        "two": {"state": "finished", "step": 2, "ended": "finished", **common},
    }
    folder.status({"state": "running", "step": 1, "jobs": jobs})
    with folder.claim():
        yield folder.path


def graft(*words: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)


def test_orders_are_placed_and_listed(half: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert graft("jobs", "submit", half, world / "late.yaml", "adapter.rank=7") == 0
    assert "submit late: takes effect before the next step" in capsys.readouterr().out
    assert graft("jobs", "priority", half, "late", "3") == 0 and graft("jobs", "cancel", half, "one") == 0
    found = [{key: value for key, value in order.items() if key != "id"} for order in CommandQueue(half).pending()]
    config = {"adapter": {"rank": 7}, "data": {}, "train": {"lr": 0.01}, "eval": {}, "priority": 0}
    assert found == [
        {"do": "submit", "job": "late", "config": config},
        {"do": "priority", "job": "late", "priority": 3},
        {"do": "cancel", "job": "one"},
    ]
    capsys.readouterr()
    assert graft("jobs", "list", half) == 0
    said = capsys.readouterr().out
    assert "waiting: cancel one" in said and "finished" in said
    assert graft("jobs", "list", half, "--json") == 0
    assert json.loads(capsys.readouterr().out)["jobs"]["one"]["state"] == "running"


def test_a_clone_starts_from_the_adapter_of_a_job_that_has_ended(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert graft("jobs", "clone", half, "one") == 2 and "has not ended" in capsys.readouterr().err
    adapter = RunFolder(half).adapter_dir("two")
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    assert graft("jobs", "clone", half, "two", "train.lr=0.5") == 0
    assert graft("jobs", "clone", half, "two", "--name", "one") == 2
    (order,) = CommandQueue(half).pending()
    assert (order["do"], order["job"]) == ("submit", "two-2")
    assert order["config"]["train"] == {"lr": 0.5, "init_from": str(adapter.resolve())}
    assert order["config"]["adapter"]["bottleneck"] == 3 and order["config"]["priority"] == 1


def test_a_job_that_was_taken_is_known_before_the_status_names_it(
    half: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert graft("jobs", "submit", half, world / "late.yaml") == 0
    CommandQueue(half).take(1)  # as the run does
    assert "late" not in RunFolder(half).read_status()["jobs"] and CommandQueue(half).pending() == []
    assert graft("jobs", "priority", half, "late", "2") == 0
    assert graft("jobs", "submit", half, world / "late.yaml") == 2
    assert "already has a job 'late'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cancel", "onne"], "no job 'onne'. Did you mean 'one'?"),
        (["cancel", "two"], "the job 'two' of"),
        (["submit", "late.yaml", "--name", "one"], "already has a job 'one'"),
        (["submit", "late.yaml", "train.lrr=3"], "Did you mean 'lr'?"),
        (["submit", "late.yaml", "train.layout=flat"], "train.layout is shared by all jobs"),
        (["submit", "nothing.yaml"], "there is no file"),
        (
            ["submit", "empty.yaml"],
            "a job must be a mapping with any of adapter, data, train, eval and priority, but the file is empty",
        ),
        (["submit", "late.yaml", "--name", "a b"], "'a b' cannot name a job"),
    ],
)
def test_orders_that_cannot_be_are_refused(
    half: Path, world: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [world / word if word.endswith(".yaml") else word for word in words[1:]]
    assert graft("jobs", words[0], half, *given) == 2
    assert said in capsys.readouterr().err and CommandQueue(half).pending() == []


def test_failing_data_of_one_job_is_an_error_before_anything_trains(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, said in (
        ("jobs.two.data.train=nowhere.json", "job 'two': "),
        ("jobs.two.data.max_length=8", "job 'two': "),
        ("jobs.two.data.task=regression", "one run has one task"),
        ("scheduler.halving={rungs: [1]}", "job 'one': scheduler.halving compares validation losses"),
    ):
        assert graft("train", world / "run.yaml", change, "--out", tmp_path / "run") == 2
        assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_job_that_fails_shows_in_the_exit_code_and_the_other_is_there(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    late = world / "broken.yaml"
    late.write_text("data: {train: nowhere.json}\n")
    out = tmp_path / "run"
    assert graft("train", world / "run.yaml", "--out", out) == 0
    assert graft("jobs", "submit", out, late) == 0 and graft("resume", out) == 2
    assert "nowhere.json" in capsys.readouterr().err
    status = RunFolder(out).read_status()
    assert status["state"] == "finished" and status["jobs"]["broken"]["ended"] == "failed"
    assert RunFolder(out).adapters() == ["one", "two"]
    assert (
        graft("jobs", "submit", out, world / "late.yaml") == 0 and graft("resume", out) == 2
    )  # one job has still failed
    assert RunFolder(out).adapters() == ["late", "one", "two"]
