"""Checkpoints: what they hold, which stay, a full disk, and runs that go on from them as if nothing had been."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.errors import GraftError
from graft.training import checkpoints as state_module
from graft.training import engine as engine_module
from graft.training import saving as saving_module
from graft.training.checkpoints import verify_checkpoint
from graft.training.engine import Engine
from tests.training.conftest import LORA, PowerCut, attach, breaks_at, data, engine_for, fresh, job_on, losses, tiny


def test_the_latest_checkpoints_stay(tmp_path: Path) -> None:
    engine = fresh(tmp_path / "run", steps=9, settings={"save_every": 2, "keep": 3})
    engine.run()
    assert engine.folder.checkpoints() == [6, 8, 9]
    assert json.loads((tmp_path / "run/checkpoints/last.json").read_text()) == {"step": 9}
    assert not [path for path in (tmp_path / "run/checkpoints").iterdir() if path.name.startswith(".")]


def test_a_checkpoint_holds_what_trains_and_nothing_of_the_base(tmp_path: Path) -> None:
    engine = fresh(tmp_path / "run", steps=2)
    engine.run()
    folder = engine.folder.checkpoint_dir(2)
    assert {path.name for path in folder.iterdir()} == {"state.json", "a.safetensors", "rng.safetensors"}
    tensors = load_file(folder / "a.safetensors")
    names = set(engine.jobs[0].params)
    assert {name.removeprefix("adapter/") for name in tensors if name.startswith("adapter/")} == names
    assert len(tensors) == 4 * len(names)
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["layout"], state["jobs"]["a"]["epoch"], state["jobs"]["a"]["batch"]) == (
        2,
        "flat",
        0,
        2,
    )


def test_a_checkpoint_that_does_not_hold_what_was_written_is_found_out(tmp_path: Path) -> None:
    engine = fresh(tmp_path / "run", steps=1)
    engine.run()
    with torch.no_grad():
        next(iter(engine.jobs[0].params.values())).add_(1.0)
    with pytest.raises(GraftError, match="does not hold what was written.*'a' differs"):
        verify_checkpoint(engine.folder.checkpoint_dir(1), engine.jobs)


def test_weights_that_are_no_numbers_are_not_laid_at_the_disks_door(tmp_path: Path) -> None:
    engine = fresh(tmp_path / "run", steps=1)
    engine.run()
    with torch.no_grad():
        next(iter(engine.jobs[0].params.values())).fill_(torch.nan)
    with pytest.raises(GraftError, match="of 'a' became infinite or not a number: lower train.lr"):
        verify_checkpoint(engine.folder.checkpoint_dir(1), engine.jobs)


def test_a_full_disk_is_the_users_to_mend_and_the_checkpoint_before_still_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plain, count = fresh(tmp_path / "run", settings={"save_every": 2}), state_module.save_tensors, [0]

    def full(tensors: Any, path: Any) -> None:
        count[0] += 1
        if count[0] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(tensors, path)

    monkeypatch.setattr(state_module, "save_tensors", full)
    with pytest.raises(GraftError, match="the disk is full"):
        engine.run()
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["000001", "last.json"]
    assert engine.folder.read_status()["state"] == "failed"
    monkeypatch.setattr(state_module, "save_tensors", plain)
    assert fresh(tmp_path / "run").run(checkpoint=1) == "finished"


def test_without_a_number_of_steps_a_long_run_is_saved_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving_module, "SAVE_SECONDS", 0.0)
    engine = fresh(tmp_path / "run", steps=4)
    engine.run()
    assert engine.folder.checkpoints() == [2, 3, 4]


def test_two_jobs_of_unequal_length_run_together_and_are_resumed(tmp_path: Path) -> None:
    def world(path: Path) -> Engine:
        model = attach(attach(tiny(), "a", LORA), "b", {"kind": "series", "bottleneck": 4, "sites": "mlp"})
        jobs = [job_on(model, "a", steps=3), job_on(model, "b", train=data(20, seed=2), steps=6, batch_size=3, seed=4)]
        return engine_for(jobs, model, path, save_every=2)

    whole = world(tmp_path / "whole")
    assert whole.run() == "finished" and [job.step for job in whole.jobs] == [3, 6]
    parted = world(tmp_path / "parted")
    parted.jobs[1].rows, plain = breaks_at(parted.jobs[1], 5), parted.jobs[1].rows  # type: ignore[method-assign]
    with pytest.raises(PowerCut):
        parted.run()
    again = world(tmp_path / "parted")
    again.folder.metrics.keep(lambda line: line["step"] <= 4)
    assert again.run(checkpoint=4) == "finished"
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole")
    del plain


def test_base_dropout_is_drawn_from_the_seed_and_survives_a_resume(tmp_path: Path) -> None:
    def world(path: Path) -> Engine:
        model = attach(tiny("gpt2"))
        torch.manual_seed(7)
        return engine_for([job_on(model, steps=6)], model, path, base_dropout=True, save_every=3)

    world(tmp_path / "whole").run()
    parted = world(tmp_path / "parted")
    parted.jobs[0].rows = breaks_at(parted.jobs[0], 4)  # type: ignore[method-assign]
    with pytest.raises(PowerCut):
        parted.run()
    torch.manual_seed(99)
    again = world(tmp_path / "parted")
    again.folder.metrics.keep(lambda line: line["step"] <= 3)
    again.run(checkpoint=3)
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole")
    quiet = attach(tiny("gpt2"))
    engine_for([job_on(quiet, steps=6)], quiet, tmp_path / "quiet").run()
    assert losses(tmp_path / "quiet") != losses(tmp_path / "whole")


def test_ctrl_c_saves_and_stops_and_a_resume_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fresh(tmp_path / "whole", steps=8)
    whole.run()
    engine = fresh(tmp_path / "run", steps=8)
    plain = engine_module.joint_step

    def interrupted(*given: Any) -> Any:
        if engine.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*given)

    monkeypatch.setattr(engine_module, "joint_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    said: list[str] = []
    engine.reporter.say = said.append  # type: ignore[method-assign]
    assert engine.run() == "stopped"
    assert signal.getsignal(signal.SIGINT) is before
    assert f"Stopped at step 5; everything is saved. Continue with: graft resume {tmp_path / 'run'}" in said
    assert engine.folder.read_status()["state"] == "stopped" and engine.folder.checkpoints()[-1] == 5
    monkeypatch.setattr(engine_module, "joint_step", plain)
    again = fresh(tmp_path / "run", steps=8)
    assert again.run(checkpoint=5) == "finished"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, parameter in again.jobs[0].params.items():
        assert torch.equal(parameter, whole.jobs[0].params[name])
