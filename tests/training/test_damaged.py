"""Damaged files of a run: the newest whole checkpoint counts, what is wrong is named, and nothing is trained over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graft.config import load_run
from graft.errors import GraftError
from graft.runs.folder import RunFolder
from graft.training import resume, train
from graft.training.checkpoints import newest
from graft.training.tensor_files import load_tensors, save_tensors
from tests.small import save_small
from tests.training.conftest import losses


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven steps with checkpoints 3, 6 and 7, put back to before its end."""
    made = tmp_path_factory.mktemp("damaged")
    save_small(made / "base")
    rows = [{"instruction": f"say {number}", "output": f"it is {number * number}"} for number in range(20)]
    (made / "d.json").write_text(json.dumps(rows))
    config = {
        "base": {"model": str(made / "base"), "device": "cpu"},
        "adapter": {"kind": "lora", "rank": 2, "dropout": 0.1, "sites": "attn.q"},
        "data": {"train": str(made / "d.json"), "template": "plain", "validation": 4, "cache": False},
        "train": {"steps": 7, "batch_size": 4, "lr": 1e-2, "save_every": 3, "validate_every": 2, "keep": 3},
    }
    return train(load_run(config), made / "run", quiet=True).path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    folder = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    folder.status({**folder.read_status(), "state": "stopped"})
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


SPOILT: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut weights": (lambda folder: cut(folder / "lora.safetensors"), "lora.safetensors cannot be read"),
    "one bit": (lambda folder: flip(folder / "lora.safetensors"), "lora.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "lora.safetensors").unlink(), "lora.safetensors cannot be read"),
    "empty weights": (lambda folder: (folder / "lora.safetensors").write_bytes(b""), "lora.safetensors cannot be read"),
    "empty state": (lambda folder: (folder / "state.json").write_text(""), "state.json is not a JSON file"),
    "other state": (lambda folder: (folder / "state.json").write_text("{}"), "state.json has no step, layout"),
    "no state": (lambda folder: (folder / "state.json").unlink(), "state.json cannot be read"),
    "no generators": (lambda folder: (folder / "rng.safetensors").unlink(), "rng.safetensors cannot be read"),
    "half pruned": (lambda folder: [path.unlink() for path in folder.iterdir()], "cannot be read"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    run: RunFolder, finished: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = SPOILT[how]
    steps = run.checkpoints()
    spoil(run.checkpoint_dir(steps[-1]))
    resume(run)
    shown = capsys.readouterr().err
    assert f"Checkpoint {steps[-1]} is damaged: " in shown and said in shown
    assert f"The run goes on from step {steps[-2]}." in shown
    assert losses(run.path) == losses(finished) and run.checkpoints() == steps
    for name in ("adapters/lora/adapter_model.safetensors", f"checkpoints/{steps[-1]:06d}/lora.safetensors"):
        assert (run.path / name).read_bytes() == (finished / name).read_bytes()
    assert len([line for line in run.metrics.read() if "loss" in line]) == 7


def test_without_a_whole_checkpoint_nothing_is_touched(run: RunFolder) -> None:
    for step in run.checkpoints():
        cut(run.checkpoint_dir(step) / "lora.safetensors")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(GraftError, match=r"none of its checkpoints can be read \(7: .*; 6: .*--overwrite"):
        resume(run)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_needs_the_best_weights_that_it_points_to(run: RunFolder) -> None:
    """The best validation was at step 6, say; without those weights the run could not publish them at its end."""
    path = run.checkpoint_dir(7) / "state.json"
    state = json.loads(path.read_text())
    state["jobs"]["lora"]["best_at"] = 6
    path.write_text(json.dumps(state))
    flip(run.checkpoint_dir(6) / "lora.safetensors")
    step, notes = newest(run)
    assert step != 7 and len(notes) == 2 and "000006/lora.safetensors is damaged" in notes[0]


def test_leftovers_of_a_killed_process_go(run: RunFolder, finished: Path) -> None:
    for name in (
        "checkpoints/.last.json.4711.tmp",
        ".status.json.1.tmp",
        "checkpoints/.000009.old/x",
        "aside/lora.safetensors",
    ):
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("{")
    shutil.rmtree(run.checkpoint_dir(7))
    resume(run, quiet=True)
    left = [path for path in run.path.rglob("*") if path.name.endswith((".tmp", ".old")) or path.name == "aside"]
    assert losses(run.path) == losses(finished) and not left


def test_a_finished_run_whose_checkpoints_are_gone_is_not_trained_over(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run.path / "checkpoints")
    before = (run.path / "adapters/lora/adapter_model.safetensors").stat().st_mtime_ns
    resume(run)
    assert "is finished: there is nothing to resume" in capsys.readouterr().err
    assert (run.path / "adapters/lora/adapter_model.safetensors").stat().st_mtime_ns == before
    run.status({**run.read_status(), "state": "stopped"})
    with pytest.raises(GraftError, match="it took 7 steps, but its checkpoints are gone"):
        resume(run)
    assert len(losses(run.path)) == 7


def test_tensors_come_back_bit_for_bit_in_memory_of_their_own(tmp_path: Path) -> None:
    given = {
        "a": torch.randn(3, 5),
        "b": torch.tensor(3.5),
        "c": torch.randn(7).bfloat16(),
        "d": torch.empty(0),
        "e": torch.arange(3),
    }
    save_tensors(given, tmp_path / "t.safetensors")
    found = load_tensors(tmp_path / "t.safetensors")
    assert found.keys() == given.keys() and all(torch.equal(found[name], given[name]) for name in given)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
