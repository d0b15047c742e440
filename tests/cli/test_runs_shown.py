"""What the verbs say of runs that did not end well: killed, diverged, damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from graft.cli import main
from graft.config import load_run
from graft.errors import GraftError
from graft.runs.folder import RunFolder
from graft.training import resume, train
from tests.small import save_small


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = tmp_path_factory.mktemp("shown")
    save_small(made / "base")
    rows = [{"instruction": f"say {number}", "output": f"it is {number * number}"} for number in range(20)]
    rows += [{"instruction": "say nothing", "output": ""}, {"instruction": "say much", "output": "much " * 60}]
    (made / "d.json").write_text(json.dumps(rows))
    return {
        "base": {"model": str(made / "base"), "device": "cpu"},
        "adapter": {"kind": "lora", "rank": 2, "sites": "attn.q"},
        "data": {
            "train": str(made / "d.json"),
            "template": "plain",
            "overlong": "drop",
            "max_length": 64,
            "cache": False,
        },
        "train": {"steps": 2, "batch_size": 4, "save_every": 1},
    }


@pytest.fixture(scope="module")
def finished(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(load_run(config), tmp_path_factory.mktemp("runs") / "run", quiet=True).path


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert not ended.value.code
    return capsys.readouterr().out


def test_a_killed_run_is_listed_as_killed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any]
) -> None:
    run = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    job = {"state": "running", "step": 1, "steps": 2, "loss": 1.0, "best": None, "ended": None, "priority": 0}
    run.status({"state": "running", "step": 1, "jobs": {"lora": job, "done": {**job, "ended": "early"}}})
    shown = said(capsys, "jobs", "list", run.path)
    assert "killed" in shown and "early" in shown and "running" not in shown
    assert f"The run was killed. Continue it with: graft resume {run.path}" in shown
    run.status({"state": "running", "step": 0, "jobs": {}})  # killed while it began
    shown = said(capsys, "jobs", "list", run.path)
    assert "lora" in shown and "killed" in shown and "0/?" in shown
    with pytest.raises(SystemExit):
        main(["jobs", "submit", str(run.path), str(write_job(tmp_path)), "--name", "lora"])
    assert "already has a job 'lora'" in capsys.readouterr().err
    with run.claim():
        assert "running" in said(capsys, "jobs", "list", run.path)


def write_job(folder: Path) -> Path:
    (folder / "late.yaml").write_text("train: {steps: 1}\n")
    return folder / "late.yaml"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.yaml", "a: [1"),
        ("config.yaml", ""),
        ("config.yaml", "base: 3\nadapter: [1]\n"),
        ("status.json", "{"),
        ("status.json", "[]"),
        ("metrics.jsonl", "{half\n"),
        ("metrics.jsonl", "3\n"),
        ("metrics.jsonl", "\x00\x00\x00\n"),
        ("lock.json", ""),
    ],
)
def test_one_damaged_run_does_not_hide_the_others(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str
) -> None:
    for name in ("good", "bad"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    (tmp_path / "runs/bad" / file).write_text(text)
    shown = said(capsys, "show", tmp_path / "runs")
    assert "runs/good" in shown and "runs/bad" in shown
    found = {
        run["run"].rsplit("/", 1)[1]: run["status"]["state"]
        for run in json.loads(said(capsys, "show", tmp_path / "runs", "--json"))
    }
    assert found["good"] == "finished" and found["bad"] in ("damaged", "finished")


def test_a_run_that_diverged_says_so_when_it_is_resumed(config: dict[str, Any], tmp_path: Path) -> None:
    diverging = {**config, "train": {**config["train"], "lr": 1e30, "steps": 6, "warmup": 0}}
    for layout in ("auto", "flat"):
        with pytest.raises(GraftError, match="became infinite or not a number in step"):
            train(load_run(diverging, [f"train.layout={layout}"]), tmp_path / layout, quiet=True)
        with pytest.raises(GraftError, match=r"has diverged and cannot go on from step \d: the .* became infinite"):
            resume(tmp_path / layout, quiet=True)


def test_rows_that_are_left_out_are_counted_in_the_terminal_and_in_the_card(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(load_run(config), tmp_path / "run")
    sentence = "2 of 22 rows are left out: 1 longer than 64 tokens, 1 with an empty answer."
    assert sentence in capsys.readouterr().err
    assert f"| Left out | {sentence} |" in (folder.adapter_dir("lora") / "README.md").read_text()


def test_what_usually_follows_a_run(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    run = tmp_path / "run"
    shown = said(capsys, "train", tmp_path / "run.yaml", "--out", run)
    for line in (f"graft eval {run} --data FILE", f"graft chat {run}", f"graft show {run}"):
        assert f"next: {line}" in shown


def test_several_jobs_name_their_counters(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps of the run, and those of a job."""
    several = {
        **config,
        "data": {**config["data"], "validation": 4},
        "jobs": {"one": None, "two": {"train": {"steps": 3}}},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(several))
    with pytest.raises(SystemExit):
        main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert "job steps 5/5  " in captured.err and "run step 2  one: validation loss" in captured.err
    assert "two: finished at job step 3/3" in captured.out
    shown = said(capsys, "show", tmp_path / "run")
    for line in ("checkpoints at run steps  1,", "  run step  ", "  job step  ", "| job step | loss", "\njob step;"):
        assert line in re.sub("[┃│]", "|", shown), line
    assert set(re.findall(r"^  (run |job |)step +\d", shown, re.MULTILINE)) == {"run ", "job "}
    last = json.loads(said(capsys, "show", tmp_path / "run", "--json"))["last_metrics"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    own = [line for line in lines if line["job"] == last["job"] and line["step"] == last["step"]]
    assert last == {key: value for line in own for key, value in line.items()}
