"""The loop: learning, Ctrl-C, a loss that is not finite, bfloat16, the longest batch."""

from __future__ import annotations

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
from graft.training.dry_run import try_fullest
from graft.training.forward.layout import laid_out
from graft.training.step import NonFinite
from tests.training.conftest import LORA, attach, batcher, data, engine_for, events, fresh, job_on, losses, tiny


def test_a_run_learns_and_leaves_its_files(tmp_path: Path) -> None:
    published: list[int] = []
    engine = fresh(tmp_path / "run", publish=lambda job: published.append(job.step), steps=20, lr=3e-2, train=data(16))
    assert engine.run() == "finished"
    found = losses(tmp_path / "run")
    assert len(found) == 20 and np.mean(found[-4:]) < np.mean(found[:4]) - 0.02
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


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh(tmp_path / "run")

    def impatient(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(engine_module, "joint_step", impatient)
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


def test_gradient_checkpointing_is_a_setting_that_changes_nothing_but_memory(tmp_path: Path) -> None:
    for way in ("keep", "recompute"):
        fresh(tmp_path / way, steps=4, settings={"activations": way}).run()
    assert losses(tmp_path / "recompute") == pytest.approx(losses(tmp_path / "keep"), rel=1e-6)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_the_longest_batch_is_tried_without_a_trace_and_one_that_does_not_fit_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    engine = fresh(tmp_path / "run")
    given = (engine.forward, engine.jobs, batcher(layout))
    before, random = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}, torch.get_rng_state()
    with laid_out(engine.model, layout):
        try_fullest(*given)
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random) and engine.jobs[0].step == 0

        def full(*given: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(engine.forward, "losses", full)
        with pytest.raises(GraftError, match="does not fit.*token_budget.*activations"):
            try_fullest(*given)
