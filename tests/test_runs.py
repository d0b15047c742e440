"""The run folder: made once, never overwritten by accident, readable after a crash."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import graft
from graft.config import load_run
from graft.errors import GraftError
from graft.runs.folder import RunFolder, find_runs, git_revision
from graft.utils.files import new_dir
from graft.utils.jsonl import read_json

RUN = {"base": {"model": "m"}, "adapter": "lora", "data": {"train": "a.json"}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "math").create()
    run.write_config(load_run(RUN))
    return run


def test_a_new_run_has_its_folders_and_its_configuration(folder: RunFolder) -> None:
    assert {path.name for path in folder.path.iterdir()} == {"adapters", "checkpoints", "eval", "config.yaml"}
    assert folder.config == load_run(RUN)


def test_a_folder_with_a_run_is_refused_with_the_two_ways_on(folder: RunFolder) -> None:
    with pytest.raises(GraftError, match=rf"graft resume {folder.path}.*--overwrite"):
        RunFolder(folder.path).create()
    assert folder.config == load_run(RUN)


def test_overwrite_empties_a_run_but_never_a_folder_of_other_things(folder: RunFolder, tmp_path: Path) -> None:
    (folder.path / "report.html").write_text("old")
    folder.create(overwrite=True)
    assert {path.name for path in folder.path.iterdir()} == {"adapters", "checkpoints", "eval"}
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(GraftError, match="not a run"):
        RunFolder(tmp_path).create(overwrite=True)
    with pytest.raises(GraftError, match="is a file"):
        RunFolder(tmp_path / "thesis.tex").create(overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_an_empty_folder_serves(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).create().checkpoints() == []


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="holds no config.yaml"):
        _ = RunFolder(tmp_path).config
    with pytest.raises(GraftError, match="no such folder"):
        RunFolder(tmp_path / "absent").existing()


def test_the_status_tells_a_running_run_from_a_killed_one(folder: RunFolder) -> None:
    assert folder.read_status() == {}
    folder.status({"state": "running", "step": 3})
    assert folder.read_status()["state"] == "running"
    with subprocess.Popen(["true"]) as finished:
        pass
    folder.status({"state": "running", "step": 3, "pid": finished.pid})
    assert folder.read_status()["state"] == "killed"
    folder.status({"state": "running", "step": 3, "pid": finished.pid, "host": "elsewhere"})
    assert folder.read_status()["state"] == "running"
    folder.status({"state": "finished", "step": 4})
    assert (folder.read_status()["state"], folder.read_status()["step"]) == ("finished", 4)


def test_a_run_that_is_running_is_not_overwritten(folder: RunFolder) -> None:
    folder.status({"state": "running"})
    with pytest.raises(GraftError, match="still running"):
        folder.create(overwrite=True)
    folder.status({"state": "stopped"})
    folder.create(overwrite=True)


def test_the_lock_holds_versions_and_the_callers_hashes(folder: RunFolder) -> None:
    import torch

    folder.lock(data="sha256:1", template="sha256:2")
    lock = read_json(folder.path / "lock.json")
    assert (lock["data"], lock["template"], lock["graft"]) == ("sha256:1", "sha256:2", graft.__version__)
    assert lock["versions"]["torch"] == torch.__version__
    assert lock["cpus"] == os.cpu_count()


def test_checkpoints_and_adapters_count_only_when_complete(folder: RunFolder) -> None:
    for step in (400, 20, 1_000_000):
        with new_dir(folder.checkpoint_dir(step)) as made:
            (made / "state.json").write_text("{}")
    (folder.path / "checkpoints" / ".000500.1.tmp").mkdir()
    assert folder.checkpoints() == [20, 400, 1_000_000]
    with new_dir(folder.adapter_dir("math")) as made:
        (made / "adapter_config.json").write_text("{}")
        assert folder.adapters() == []
    assert folder.adapters() == ["math"]


def test_an_adapter_whose_replacement_was_cut_short_is_found_again(folder: RunFolder) -> None:
    with new_dir(folder.adapter_dir("math")) as made:
        (made / "adapter_config.json").write_text("{}")
    path = folder.adapter_dir("math")
    os.rename(path, path.with_name(".math.old"))
    assert (folder.adapter_dir("math") / "adapter_config.json").exists()


def test_runs_are_found_in_a_folder_of_runs(folder: RunFolder) -> None:
    assert find_runs(folder.path.parent) == []
    folder.status({"state": "finished"})
    for place in (folder.path, folder.path.parent, folder.path.parent.parent):
        assert [run.path for run in find_runs(place)] == [folder.path]
    with pytest.raises(GraftError, match="no folder"):
        find_runs(folder.path / "absent")


def test_the_git_revision_is_that_of_git_and_none_outside_a_checkout(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision(tmp_path) == {"commit": head, "changed": False}
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == {"commit": head, "changed": True}
