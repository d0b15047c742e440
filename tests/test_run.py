"""graft.Run: the same run from a YAML, a folder and a mapping."""

from __future__ import annotations

from pathlib import Path

import pytest

import graft
from graft.config import load_run
from graft.runs.folder import RunFolder

RUN = {"base": {"model": "m"}, "adapter": "lora", "data": {"train": "a.json"}}


def test_a_run_is_the_same_from_a_mapping_a_yaml_and_a_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "math").create()
    folder.write_config(load_run(RUN))
    written = tmp_path / "math.yaml"
    written.write_text("{base: {model: m}, adapter: lora, data: {train: a.json}}")
    runs = [graft.Run.load(source, "train.lr=0.5") for source in (RUN, written, folder.path)]
    assert all(run.config == load_run(RUN, ["train.lr=0.5"]) for run in runs)
    assert [run.out for run in runs] == [Path("runs/run"), Path("runs/math"), folder.path]
    assert [run.folder and run.folder.path for run in runs] == [None, None, folder.path]


def test_what_needs_a_trained_run_says_so(tmp_path: Path) -> None:
    run = graft.Run.load(RUN)
    for step in (run.eval, run.resume):
        with pytest.raises(graft.GraftError, match="not been trained yet"):
            step()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(graft.GraftError, match="not a run folder"):
        graft.Run.load(tmp_path)
