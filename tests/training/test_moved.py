"""A run folder works from anywhere: paths that were relative where it was started go on to mean the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.cli import main
from graft.config import load_run, relocate
from graft.errors import GraftError
from graft.runs.folder import RunFolder
from graft.training import resume, train
from tests.small import save_small
from tests.training.conftest import losses

RUN: dict[str, Any] = {
    "base": {"model": "bases/small", "device": "cpu"},
    "adapter": {"kind": "lora", "rank": 2, "sites": "attn.q"},
    "data": {
        "train": [{"path": "d.json"}, "more*.json"],
        "validation": "held.json",
        "template": "t.yaml",
        "cache": False,
    },
    "train": {"steps": 4, "batch_size": 4, "save_every": 2},
}
TEMPLATE = 'user: "Q: {user}"\n'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with base, data, template and a run that was stopped after its second step; all paths are relative."""
    made = tmp_path / "project"
    save_small(made / "bases" / "small")
    rows = [{"instruction": f"say {number}", "output": f"it is {number * number}"} for number in range(12)]
    for name in ("d.json", "more-1.json", "held.json"):
        (made / name).write_text(json.dumps(rows))
    (made / "t.yaml").write_text(TEMPLATE)
    monkeypatch.chdir(made)
    folder = train(load_run(RUN), "runs/a", quiet=True)
    stop(folder)
    return made


def stop(folder: RunFolder) -> None:
    """Put a finished run back to its second step."""
    shutil.rmtree(folder.checkpoint_dir(4))
    folder.status({"state": "stopped", "jobs": folder.read_status()["jobs"]})


def test_a_run_goes_on_from_another_folder(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = losses(project / "runs/a")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume("../project/runs/a", quiet=True)
    assert losses(project / "runs/a") == wanted and len(wanted) == 4
    assert RunFolder(project / "runs/a").config.data.validation == "../project/held.json"
    assert main_code("eval", project / "runs/a", "--max-new-tokens", "2") == 0
    with monkeypatch.context() as other:  # answers that are there are used again, wherever the command is given
        other.chdir(project)
        assert main_code("eval", "runs/a", "--max-new-tokens", "2") == 0
    text = (project / "runs/a/config.yaml").read_text()
    assert "model: bases/small" in text and str(tmp_path) not in text
    run = graft.Run.load(project / "runs/a", "train.steps=1")
    assert len(losses(run.train("again").path)) == 1


def test_a_run_goes_on_in_a_project_that_moved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine: nothing is where it was, but all lies as it lay."""
    wanted = losses(project / "runs/a")
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "other")
    resume("other/runs/a", quiet=True)
    assert losses(tmp_path / "other/runs/a") == wanted


def test_a_run_folder_that_was_copied_alone_finds_its_files_where_they_were(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(project / "runs/a", tmp_path / "deep/er/copy"))
    monkeypatch.chdir(tmp_path)
    resume(copy, quiet=True)
    assert losses(copy) == losses(project / "runs/a")


def test_what_is_missing_is_named_and_can_be_said(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another machine, with base and data at other places."""
    wanted = losses(project / "runs/a")
    (tmp_path / "store").mkdir()
    for name in ("bases/small", "held.json", "d.json"):
        (project / name).rename(tmp_path / "store" / Path(name).name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        GraftError, match=r"bases/small, d\.json, held\.json are missing, here and where .*data\.train="
    ):
        resume("project/runs/a")
    data = "data.train=[{path: store/d.json}, project/more-1.json]"
    assert main_code("resume", "project/runs/a", "base.model=store/small", data, "data.validation=store/held.json") == 0
    assert losses(project / "runs/a") == wanted
    monkeypatch.chdir(tmp_path / "store")  # what was said is kept
    assert RunFolder("../project/runs/a").config.base.model == "small"


def test_other_data_and_other_settings_are_refused(project: Path) -> None:
    for change in ("train.lr=1", "adapter.rank=3", "data.max_length=9", "train.batch_size=9", "base.dtype=bfloat16"):
        with pytest.raises(GraftError, match="a run that goes on keeps its settings"):
            resume("runs/a", [change])
    rows = json.loads((project / "d.json").read_text())
    (project / "d.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(GraftError, match="the data of 'lora' changed since"):
        resume("runs/a")
    assert RunFolder("runs/a").read_status()["state"] == "stopped"


def test_another_base_under_the_same_name_is_refused(project: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = project / "bases/small/model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(GraftError, match="its base, bases/small, has changed since it began"):
        resume("runs/a")


def test_only_paths_that_lead_somewhere_are_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "there"
    for name in ("d.json", "plain", "a/b", "seedling", "t.jinja"):
        (there / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    data: dict[str, Any] = {
        "base": {"model": "a/b"},
        "data": {"train": ["d.json", {"path": "d.*"}, "hub/name"], "validation": 0.1, "template": "plain"},
        "jobs": {"x": {"data": {"train": "/abs/d.json", "template": "t.jinja"}, "base": None}, "y": None},
        "train": {"init_from": None},
    }
    relocate(data, [tmp_path / "gone", there])
    assert data == {
        "base": {"model": "there/a/b"},
        "data": {"train": ["there/d.json", {"path": "there/d.*"}, "hub/name"], "validation": 0.1, "template": "plain"},
        "jobs": {"x": {"data": {"train": "/abs/d.json", "template": "there/t.jinja"}, "base": None}, "y": None},
        "train": {"init_from": None},
    }


def main_code(*words: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return int(ended.value.code or 0)
