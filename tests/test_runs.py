"""The run folder: made once, never overwritten by accident, readable after a crash."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import graft
from graft.config import load_run
from graft.errors import GraftError
from graft.runs.folder import RunFolder, find_runs
from graft.runs.surroundings import git_revision
from graft.training import resume
from graft.utils.files import new_dir
from graft.utils.jsonl import read_json

RUN = {"base": {"model": "m"}, "adapter": "lora", "data": {"train": "a.json"}}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "math").create()
    run.lock()
    run.write_config(load_run(RUN))
    return run


def test_a_new_run_has_its_folders_and_its_configuration(folder: RunFolder) -> None:
    assert names(folder.path) == ["adapters", "checkpoints", "config.yaml", "eval", "lock.json"]
    assert folder.config == load_run(RUN)


def test_a_folder_with_a_run_is_refused_with_the_two_ways_on(folder: RunFolder) -> None:
    with pytest.raises(GraftError, match=rf"graft resume {folder.path}.*--overwrite"):
        RunFolder(folder.path).create()
    assert folder.config == load_run(RUN)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: RunFolder) -> None:
    """Write what a run leaves everywhere."""
    for place in (
        "status.json", "metrics.jsonl", "events.jsonl", "samples.jsonl", "adapters/lora/adapter_config.json",
        "adapters/lora/adapter_model.safetensors", "adapters/lora/template.json", "references/lora/adapter_config.json",
        "checkpoints/last.json", "checkpoints/000003/state.json", "checkpoints/000003/lora.safetensors",
        "checkpoints/000004.damaged/rng.safetensors", "eval/data.1234/answers.jsonl", "eval/data.1234/.lock",
        "jobs/journal.jsonl", "jobs/inbox/1-2.json", "aside/lora.safetensors", "failed_batch/batch.safetensors",
        "checkpoints/.000005.ab.tmp/lora.safetensors", "checkpoints/.last.json.4711.tmp", ".status.json.4711.tmp",
    ):  # fmt: skip
        path = folder.path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_overwrite_deletes_all_that_a_run_leaves(folder: RunFolder) -> None:
    filled(folder)
    folder.create(overwrite=True)
    assert names(folder.path) == ["adapters", "checkpoints", "eval"]
    assert not any(path.is_file() for path in folder.path.rglob("*"))


MINE = (
    ".git/HEAD", "notes.md", "thesis.tex", "adapters/lora/notes.md", "adapters/best/model.bin", "checkpoints/why.txt",
    "checkpoints/000003/plot.png", "eval/data.1234/mine.csv", "eval/mine.txt", ".hidden.tmp", "run/config.yaml", "aside/mine",
)  # fmt: skip


def test_overwrite_deletes_nothing_else(folder: RunFolder) -> None:
    filled(folder)
    for place in MINE:
        (folder.path / place).parent.mkdir(parents=True, exist_ok=True)
        (folder.path / place).write_text("mine")
    folder.create(overwrite=True)
    left = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert left == set(MINE)


@pytest.mark.parametrize(
    "file, said",
    [("federation.sqlite", "holds a federation, which goes on with graft federate"), ("study.sqlite", "holds a study")],
)
def test_what_a_folder_holds_instead_of_a_run_is_said(tmp_path: Path, file: str, said: str) -> None:
    (tmp_path / file).touch()
    with pytest.raises(GraftError, match=said):
        RunFolder(tmp_path).existing()


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "hello: 1", "thesis.tex": "years"},
        {"config.yaml": "base: {model: m}\nadapter: lora\ndata: {train: a.json}\n"},
        {"config.yaml": "hello: 1", "status.json": '{"state": "open"}', "lock.json": '{"packages": []}'},
        {"config.yaml": "hello: 1", "status.json": "{", "lock.json": "[1]"},
        {"adapters/lora/adapter_config.json": "{}"},
        {"checkpoints/000003/state.json": "{}"},
        {"metrics.jsonl": "{}"},
        {".git/HEAD": "ref"},
        {"lock.json": "{}"},
    ],
)
def test_a_folder_of_other_things_is_never_touched(tmp_path: Path, files: dict[str, str]) -> None:
    """A run is known by the files that Graft wrote, not by a config.yaml, which many tools have."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for overwrite in (False, True):
        with pytest.raises(GraftError, match="holds files that are not a run"):
            RunFolder(tmp_path).create(overwrite)
    with pytest.raises(GraftError, match="is not a run folder"):
        resume(tmp_path)
    assert find_runs(tmp_path) == []
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == files
    with pytest.raises(GraftError, match="is a file"):
        RunFolder(tmp_path / next(iter(files))).create(overwrite=True)


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "adapters/", "eval/"], [".lock", ".lock.json.ab12.tmp"]])
def test_a_run_begins_in_an_empty_folder_or_after_one_that_was_killed_before_it_began(
    tmp_path: Path, left: list[str]
) -> None:
    for name in left:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    RunFolder(tmp_path).create()
    assert {"adapters", "checkpoints", "eval"} <= set(names(tmp_path)) <= {"adapters", "checkpoints", "eval", ".lock"}


def test_a_run_killed_before_its_configuration_can_begin_again_beside_files_of_others(folder: RunFolder) -> None:
    """As after --overwrite of a run in whose folder the user keeps notes."""
    folder.config_path.unlink()
    (folder.path / "notes.md").write_text("mine")
    RunFolder(folder.path).create()
    assert names(folder.path) == ["adapters", "checkpoints", "eval", "notes.md"]


def test_an_empty_folder_serves(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).create().checkpoints() == []


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="holds no config.yaml"):
        _ = RunFolder(tmp_path).config
    with pytest.raises(GraftError, match="no such folder"):
        RunFolder(tmp_path / "absent").existing()


def test_the_status_tells_a_running_run_from_a_killed_one(folder: RunFolder) -> None:
    """By the lock, whatever process id and host the file names."""
    assert folder.read_status() == {}
    with folder.claim():
        for who in ({}, {"pid": 1, "host": "elsewhere"}):
            folder.status({"state": "running", "step": 3, **who})
            assert folder.read_status()["state"] == "running"
    for who in ({}, {"pid": os.getpid()}, {"pid": 1, "host": "elsewhere"}):
        folder.status({"state": "running", "step": 3, **who})
        assert folder.read_status()["state"] == "killed"
    folder.status({"state": "finished", "step": 4})
    assert (folder.read_status()["state"], folder.read_status()["step"]) == ("finished", 4)


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
