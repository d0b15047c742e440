"""Validation: the loss, when it is taken, the best pointer, and early stopping."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from graft.training import engine as engine_module
from graft.training.forward.causal import Forward
from graft.training.forward.layout import laid_out
from graft.training.forward.modes import set_training
from graft.training.validation import validation_scores
from tests.training.conftest import LORA, attach, batcher, data, events, fresh, job_on, tiny


def test_validation_loss_weighs_tokens_and_ignores_dropout_and_batching() -> None:
    model = attach(tiny(dtype=torch.float64), adapter=LORA)
    job = job_on(model, validation=data(11, seed=5))
    engine_forward = Forward(model)
    summed, count = 0.0, 0
    for index, example in enumerate(job.validation or ()):
        (row,) = job.rows_of(example, index, index)
        with torch.no_grad():
            each = engine_forward.losses(*batcher().inputs([row], engine_forward.device, seeded=False))
        summed, count = summed + float(each.sum()), count + len(each)
    set_training(model, ["a"])
    ways: list[tuple[Any, int]] = [("flat", 4096), ("flat", 1), ("padded", 50)]
    for layout, budget in ways:
        with laid_out(model, layout):
            found = validation_scores(engine_forward, job, batcher(layout, budget))["validation_loss"]
            assert found == pytest.approx(summed / count, rel=1e-10)
    assert any(module.training for module in model.modules())


def test_validation_comes_every_so_often_or_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    for every, wanted in ((3, [3, 6, 7]), (None, [4, 7])):
        engine = fresh(tmp_path / f"run{every}", validation=data(6, seed=3), steps=7, validate_every=every)
        engine.run()
        assert [line["step"] for line in engine.folder.metrics.read() if "validation_loss" in line] == wanted


def test_validation_of_a_prompt_sees_what_was_learnt_since_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, pairs = engine_module.measured, []

    def twice(forward: Forward, *given: Any) -> Any:
        copied = plain(Forward(copy.deepcopy(forward.model)), *given)()  # which has kept nothing from before
        pairs.append((plain(forward, *given)()["validation_loss"], copied["validation_loss"]))
        return lambda: copied

    monkeypatch.setattr(engine_module, "measured", twice)
    settings = {"adapter": {"kind": "prompt", "tokens": 3}, "settings": {"layout": "padded"}}
    fresh(tmp_path / "run", validation=data(6, seed=3), steps=3, lr=0.1, validate_every=1, **settings).run()
    assert len({copied for _, copied in pairs}) == 3
    assert [found for found, _ in pairs] == pytest.approx([copied for _, copied in pairs], rel=1e-6)


def scripted(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Validation losses that a test decides."""
    given = iter(values)
    monkeypatch.setattr(engine_module, "measured", lambda *_: lambda: {"validation_loss": next(given)})


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


def test_a_validation_that_is_not_finite_is_never_the_best_not_even_the_first_before_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [float("nan")])
    settings = {"validation": data(4), "steps": 8, "validate_every": 2, "patience": 3}
    with pytest.raises(StopIteration):
        fresh(tmp_path / "run", **settings).run()
    scripted(monkeypatch, [float("inf"), 2.0, float("inf")])
    again = fresh(tmp_path / "run", **settings)
    assert again.run(checkpoint=2) == "finished" and again.jobs[0].best == {"step": 6, "loss": 2.0}
    assert json.loads((tmp_path / "run/checkpoints/best.json").read_text()) == {"a": {"step": 6, "loss": 2.0}}
