"""The loop: checkpoints, validation, early stopping, Ctrl-C, a loss that is not finite, bfloat16."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import graft
from graft.errors import GraftError
from graft.training import engine as engine_module
from graft.training.engine import Engine
from graft.training.layout import laid_out
from graft.training.state import verify_checkpoint
from graft.training.step import NonFinite, lay_out, pass_of
from graft.training.validation import validation_loss
from tests.training.conftest import attach, data, engine_for, job_on, losses, tiny

LORA = {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.2}


def fresh(
    path: Path, adapter: Any = LORA, publish: Any = None, settings: dict[str, Any] | None = None, **job: Any
) -> Engine:
    model = attach(tiny(), adapter=adapter)
    return engine_for([job_on(model, **job)], model, path, publish, **(settings or {}))


def events(path: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (path / "events.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_its_files(tmp_path: Path) -> None:
    published: list[int] = []
    engine = fresh(tmp_path / "run", publish=lambda job: published.append(job.step), steps=20, lr=3e-2, train=data(16))
    assert engine.run() == "finished"
    found = losses(tmp_path / "run")
    assert len(found) == 20 and np.mean(found[-4:]) < np.mean(found[:4]) - 0.05
    assert published == [1, 20]
    assert events(tmp_path / "run") == ["start", "checkpoint", "checkpoint", "finished"]
    status = engine.folder.read_status()
    assert (status["state"], status["step"], status["layout"]) == ("finished", 20, "flat")
    line = engine.folder.metrics.read()[3]
    assert set(line) >= {
        "step",
        "job",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "targets",
        "tokens_per_second",
        "memory_bytes",
    }
    assert line["step"] == 4 and line["epoch"] == 2.0


def test_a_family_that_runs_padded_learns_too_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = attach(tiny("mpt"), adapter=LORA)
    engine = engine_for([job_on(model, steps=3)], model, tmp_path / "run")
    said: list[str] = []
    engine.reporter.say = said.append  # type: ignore[method-assign]
    assert engine.run() == "finished" and engine.folder.read_status()["layout"] == "padded"
    assert len([line for line in said if "runs padded" in line]) == 1


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
        verify_checkpoint(engine.folder.checkpoint_dir(1), engine.model, engine.jobs)


def test_validation_loss_weighs_tokens_and_ignores_dropout_and_batching() -> None:
    model = attach(tiny(dtype=torch.float64), adapter=LORA)
    job = job_on(model, validation=data(11, seed=5))
    engine_forward = engine_module.Forward(model)
    summed, count = 0.0, 0
    for index, example in enumerate(job.validation or ()):
        from graft.training.job import Row

        row = Row(job, example, index, index)
        batch = lay_out([row], "padded", 0)
        with torch.no_grad():
            _, each = engine_forward.losses(
                batch, pass_of([row], "padded", seeded=False), torch.ones(batch.num_targets)
            )
        summed, count = summed + float(each.sum()), count + len(each)
    engine_module.set_training(model, ["a"])
    for layout, budget in (("flat", 4096), ("flat", 1), ("padded", 50)):
        with laid_out(model, layout):
            assert validation_loss(engine_forward, job, budget, layout, 0) == pytest.approx(summed / count, rel=1e-10)
    assert any(module.training for module in model.modules())


def test_validation_comes_every_so_often_or_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    for every, wanted in ((3, [3, 6, 7]), (None, [4, 7])):
        engine = fresh(tmp_path / f"run{every}", validation=data(6, seed=3), steps=7, validate_every=every)
        engine.run()
        assert [line["step"] for line in engine.folder.metrics.read() if "validation_loss" in line] == wanted


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Validation losses that a test decides."""
    given = iter(values)
    monkeypatch.setattr(engine_module, "validation_loss", lambda *_: next(given))


def test_the_best_validation_is_pointed_to_kept_and_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [3.0, 1.0, 2.0, 2.5, 2.2, 2.1])
    seen: list[dict[str, torch.Tensor]] = []
    engine = fresh(
        tmp_path / "run", validation=data(4), steps=6, validate_every=1, settings={"keep": 2},
        publish=lambda job: seen.append({name: parameter.detach().clone() for name, parameter in job.params.items()}),
    )  # fmt: skip
    engine.run()
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text()) == {"a": {"step": 2, "loss": 1.0}}
    assert engine.folder.checkpoints() == [2, 5, 6]
    stored = load_file(engine.folder.checkpoint_dir(2) / "a.safetensors")
    assert all(torch.equal(stored[f"adapter/{name}"], tensor) for name, tensor in seen[-1].items())


def test_early_stopping_waits_for_its_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [3.0, 2.0, 2.5, 1.9, 2.1, 1.9, 0.1])
    engine = fresh(tmp_path / "run", validation=data(4), steps=20, validate_every=2, patience=2)
    assert engine.run() == "finished"
    assert (engine.step, engine.jobs[0].ended, engine.jobs[0].best) == (12, "early", {"step": 8, "loss": 1.9})
    assert "early_stop" in events(tmp_path / "run")


def test_early_stopping_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [3.0, 2.0, 2.5])
    settings = {"validation": data(4), "steps": 20, "validate_every": 2, "patience": 2}
    engine = fresh(tmp_path / "run", **settings)
    with pytest.raises(StopIteration):
        engine.run()
    scripted(monkeypatch, [2.1])
    again = fresh(tmp_path / "run", **settings)
    assert again.run(checkpoint=6) == "finished" and (again.step, again.jobs[0].ended) == (8, "early")


def test_ctrl_c_saves_and_stops_and_a_resume_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fresh(tmp_path / "whole", steps=8)
    whole.run()
    engine = fresh(tmp_path / "run", steps=8)
    plain = engine_module.take_step

    def interrupted(*given: Any) -> Any:
        if engine.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*given)

    monkeypatch.setattr(engine_module, "take_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    said: list[str] = []
    engine.reporter.say = said.append  # type: ignore[method-assign]
    assert engine.run() == "stopped"
    assert signal.getsignal(signal.SIGINT) is before
    assert f"Stopped at step 5; all is saved. Go on with: graft resume {tmp_path / 'run'}" in said
    assert engine.folder.read_status()["state"] == "stopped" and engine.folder.checkpoints()[-1] == 5
    monkeypatch.setattr(engine_module, "take_step", plain)
    again = fresh(tmp_path / "run", steps=8)
    assert again.run(checkpoint=5) == "finished"
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for name, parameter in again.jobs[0].params.items():
        assert torch.equal(parameter, whole.jobs[0].params[name])


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh(tmp_path / "run")

    def impatient(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(engine_module, "take_step", impatient)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    assert engine.folder.read_status()["state"] == "failed"


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_batch(tmp_path: Path) -> None:
    engine = fresh(tmp_path / "run", steps=9, train=data(24))
    job, rows = engine.jobs[0], []
    plain = job.rows

    def poisoned() -> Any:
        rows[:] = plain()
        if job.step == 3:
            with torch.no_grad():
                rows[4].example.input_ids[0] = 1
                engine.model.get_input_embeddings().weight[1] = float("inf")
        return rows

    job.rows = poisoned  # type: ignore[method-assign]
    with pytest.raises(NonFinite, match=r"step 4\. Samples: data\.jsonl:\d+\. Likely causes: a learning rate"):
        engine.run()
    bad = rows[4]
    saved = json.loads((tmp_path / "run/failed_batch/samples.json").read_text())
    assert [sample["row"] for sample in saved["samples"] if sample["suspect"]] == [bad.example.row]
    tensors = load_file(tmp_path / "run/failed_batch/batch.safetensors")
    start = int(tensors["lengths"][:4].sum())
    assert tensors["input_ids"][start : start + len(bad.example)].tolist() == bad.example.input_ids.tolist()
    status = engine.folder.read_status()
    assert status["state"] == "failed" and "infinite or not a number" in status["error"]
    assert engine.folder.checkpoints() == [1]


@pytest.mark.parametrize("kind", ["lora", "series", "parallel", "prefix"])
def test_a_bfloat16_base_trains_float32_masters(tmp_path: Path, kind: str) -> None:
    model = tiny(dtype=torch.bfloat16)
    graft.attach(model, {"a": {"kind": kind}})
    base = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".graft." not in name}
    engine = engine_for([job_on(model, steps=12, lr=3e-2)], model, tmp_path / "run")
    assert engine.run() == "finished"
    assert {parameter.dtype for parameter in engine.jobs[0].params.values()} == {torch.float32}
    found = losses(tmp_path / "run")
    assert np.mean(found[-3:]) < np.mean(found[:3]) - 0.02
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items() if ".graft." not in name)


def test_two_jobs_of_unequal_length_run_together_and_are_resumed(tmp_path: Path) -> None:
    def world(path: Path) -> Engine:
        model = attach(attach(tiny(), "a", LORA), "b", {"kind": "series", "bottleneck": 4, "sites": "mlp"})
        jobs = [job_on(model, "a", steps=3), job_on(model, "b", train=data(20, seed=2), steps=6, batch_size=3, seed=4)]
        return engine_for(jobs, model, path, save_every=2)

    whole = world(tmp_path / "whole")
    assert whole.run() == "finished" and [job.step for job in whole.jobs] == [3, 6]
    parted = world(tmp_path / "parted")
    parted.jobs[1].rows, plain = _breaks_at(parted.jobs[1], 5), parted.jobs[1].rows  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        parted.run()
    again = world(tmp_path / "parted")
    again.folder.metrics.keep(lambda line: line["step"] <= 4)
    assert again.run(checkpoint=4) == "finished"
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole")
    del plain


def _breaks_at(job: Any, step: int) -> Any:
    plain = job.rows

    def rows() -> Any:
        if job.step == step:
            raise RuntimeError("power cut")
        return plain()

    return rows


def test_gradient_checkpointing_is_a_setting_that_changes_nothing_but_memory(tmp_path: Path) -> None:
    for recompute in (False, True):
        fresh(tmp_path / str(recompute), steps=4, settings={"gradient_checkpointing": recompute}).run()
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=1e-6)


def test_base_dropout_is_drawn_from_the_seed_and_survives_a_resume(tmp_path: Path) -> None:
    def world(path: Path) -> Engine:
        model = attach(tiny("gpt2"))
        torch.manual_seed(7)
        return engine_for([job_on(model, steps=6)], model, path, base_dropout=True, save_every=3)

    world(tmp_path / "whole").run()
    parted = world(tmp_path / "parted")
    parted.jobs[0].rows = _breaks_at(parted.jobs[0], 4)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        parted.run()
    torch.manual_seed(99)
    again = world(tmp_path / "parted")
    again.folder.metrics.keep(lambda line: line["step"] <= 3)
    again.run(checkpoint=3)
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole")
    quiet = attach(tiny("gpt2"))
    engine_for([job_on(quiet, steps=6)], quiet, tmp_path / "quiet").run()
    assert losses(tmp_path / "quiet") != losses(tmp_path / "whole")


def test_a_full_disk_is_the_users_to_mend_and_the_checkpoint_before_still_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft.training import state

    engine, plain, count = fresh(tmp_path / "run", settings={"save_every": 2}), state.save_file, [0]

    def full(tensors: Any, path: Any) -> None:
        count[0] += 1
        if count[0] > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(tensors, path)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(GraftError, match="the disk is full"):
        engine.run()
    assert [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())] == ["000001", "last.json"]
    assert engine.folder.read_status()["state"] == "failed"
    monkeypatch.setattr(state, "save_file", plain)
    assert fresh(tmp_path / "run").run(checkpoint=1) == "finished"


def test_without_a_number_of_steps_a_long_run_is_saved_by_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "SAVE_SECONDS", 0.0)
    engine = fresh(tmp_path / "run", steps=4)
    engine.run()
    assert engine.folder.checkpoints() == [2, 3, 4]


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_the_longest_batch_is_tried_without_a_trace_and_one_that_does_not_fit_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    engine = fresh(tmp_path / "run")
    engine.layout = layout
    before, random = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}, torch.get_rng_state()
    with laid_out(engine.model, layout):
        engine._try_longest()
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random) and engine.jobs[0].step == 0

        def full(*given: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(engine.forward, "losses", full)
        with pytest.raises(GraftError, match="does not fit.*token_budget.*gradient_checkpointing"):
            engine._try_longest()
