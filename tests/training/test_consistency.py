"""The objective consistency: its loss and gradient written out, however a step is cut; resuming; what does not go with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graft.attaching.active import running
from graft.config import RunConfig
from graft.training.engine import Engine
from graft.training.forward.causal import Forward
from graft.training.forward.layout import laid_out
from graft.training.forward.modes import set_training
from graft.training.forward.tasks import forward_of
from graft.training.job import Job
from graft.training.step import Outcome
from tests.contract.table import randomise
from tests.task_bases import save_task_base
from tests.training.conftest import (
    PowerCut,
    assert_same_gradient,
    attach,
    batcher,
    breaks_at,
    data,
    exact_norm,
    fresh,
    gradients,
    job_on,
    losses,
    take_step,
    tiny,
)
from tests.training.test_task_forward import job_on as labelled_job
from tests.training.test_task_forward import labelled, loaded

MIXTURE = {
    "kind": "mixture",
    "of": {"kind": "series", "bottleneck": 5, "init": "bert", "dropout": 0.2, "sites": "mlp"},
    "share": "up",
}
OBJECTIVE = {"kind": "consistency", "weight": 3.0, "label_smoothing": 0.1}


@pytest.fixture(autouse=True)
def _norms_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)


def world(objective: Any = OBJECTIVE, adapter: Any = MIXTURE, **settings: Any) -> tuple[Any, Job]:
    model = attach(tiny(dtype=torch.float64), adapter=adapter)
    settings = {"clip": None, "lr": 1e-30, "weight_decay": 0.0, **settings}
    job = job_on(model, train=data(12, seed=2), objective=objective, **settings)
    set_training(model, ["a"])
    return model, job


def written_out(model: Any, job: Job) -> tuple[Tensor, Tensor]:
    """The loss and mean divergence of the next step, from the model's logits of one sample at a time."""
    found: list[dict[str, Tensor]] = []
    for row in job.rows():
        batch, context = batcher().inputs([row], torch.device("cpu"))
        with running(model, context):
            logits = model(input_ids=batch.input_ids).logits[0]
        example = row.example
        targets = torch.from_numpy(example.input_ids[example.supervised]).long()
        found.append({row.view: logits[batch.target_index], "target": targets})
    firsts = [each for each in found if "adapter" in each]
    agains = [each for each in found if "again" in each]
    assert len(firsts) == len(agains)
    entropy, apart, count = 0.0, 0.0, 0
    for first, again in zip(firsts, agains, strict=True):
        z, w = (F.log_softmax(each, 1) for each in (first["adapter"], again["again"]))
        entropy = entropy + F.cross_entropy(first["adapter"], first["target"], label_smoothing=0.1, reduction="sum")
        apart = apart + F.kl_div(z, w.detach().exp(), reduction="sum") / 2
        apart = apart + F.kl_div(w, z.detach().exp(), reduction="sum") / 2
        count += len(first["target"])
    return (entropy + 3.0 * apart) / count, apart / count  # pyright: ignore


@pytest.mark.parametrize("layout, budget", [("flat", 4096), ("flat", 40), ("padded", 4096), ("padded", 60)])
def test_the_loss_and_gradient_of_a_step_are_those_written_out(layout: str, budget: int) -> None:
    model, job = world()
    wanted, apart = written_out(model, job)
    wanted.backward()
    slope = gradients(job).clone()
    for parameter in job.params.values():
        parameter.grad = None
    forward = Forward(model)
    with laid_out(model, layout):  # pyright: ignore
        outcome: Outcome = take_step(forward, [job], layout, budget)["a"]
    assert outcome.loss == pytest.approx(float(wanted), rel=1e-10)
    assert outcome.scores["divergence"] == pytest.approx(float(apart), rel=1e-10) and float(apart) > 1e-6
    assert_same_gradient(gradients(job), slope, 1e-9)


def test_the_two_passes_of_a_sample_draw_other_masks_and_experts() -> None:
    _, job = world()
    rows = job.rows()
    first, again = ([row for row in rows if row.view == view] for view in ("adapter", "again"))
    assert len(first) == len(again) == 8
    assert len({row.pass_seed for row in first}) == len({row.pass_seed for row in again}) == 1
    assert first[0].pass_seed != again[0].pass_seed
    assert len({row.seed for row in rows}) == 16
    assert {row.view for row in job.rows_of(job.train[0], 0, 0, learning=False)} == {"adapter"}
    assert all(row.smoothing == 0.0 for row in job.rows_of(job.train[0], 0, 0, learning=False))


def engine(path: Path) -> Engine:
    return fresh(path, MIXTURE, train=data(12, seed=2), objective=OBJECTIVE, settings={"save_every": 2}, steps=5)


def test_a_run_resumes_to_the_same_draws(tmp_path: Path) -> None:
    whole = engine(tmp_path / "whole")
    assert whole.run() == "finished"
    parted = engine(tmp_path / "parted")
    parted.jobs[0].rows = breaks_at(parted.jobs[0], 4)  # type: ignore[method-assign]
    with pytest.raises(PowerCut):
        parted.run()
    again = engine(tmp_path / "parted")
    again.folder.metrics.keep(lambda line: line["step"] <= 4)
    assert again.run(4) == "finished"
    assert losses(tmp_path / "parted") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 5
    for key, parameter in whole.jobs[0].params.items():
        assert torch.equal(parameter, again.jobs[0].params[key])


def test_two_passes_of_a_class_are_pulled_together(tmp_path: Path) -> None:
    """Labels have one target per row: the divergence of a step is that of its two logits."""
    base = loaded(save_task_base(tmp_path / "bert", "bert"))
    adapter = {"kind": "mixture", "of": {"kind": "lora", "dropout": 0.2}, "share": "up", "experts": 2}
    job = labelled_job(base, "a", labelled(base), adapter=adapter, objective="consistency")
    set_training(base.model, ["a"])
    randomise(base.model, "a")
    forward, rows = forward_of(base.model), job.rows()
    batch, context = batcher().inputs(rows, forward.device)
    losses_N, logits = forward.losses(batch, context), forward.logits(replace(batch, twins=None), context)  # pyright: ignore
    first, again = ([at for at, row in enumerate(rows) if row.view == view] for view in ("adapter", "again"))
    z, w = (F.log_softmax(logits[at].double(), 1) for at in (first, again))
    apart = ((z.exp() - w.exp()) * (z - w)).sum(1) / 2
    assert torch.allclose(losses_N[again].double(), apart, atol=1e-6) and float(apart.detach().max()) > 1e-5
    plain = F.cross_entropy(logits[first], batch.target_ids[first], reduction="none")
    assert torch.allclose(losses_N[first], plain, atol=1e-6)


RUN: dict[str, Any] = {"base": {"model": "base"}, "adapter": MIXTURE, "data": {"train": "data.json"}}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": {"train": "d.json", "task": "regression"}}, "one value has no distribution"),
        ({"data": {"train": "d.json", "task": "preference"}}, "it compares passes, not answers"),
        ({"adapter": {"kind": "lora"}}, "nothing in this run draws at random"),
        (
            {"train": {"objective": "consistency", "method": "mezo", "optimizer": "sgd"}},
            "train.method mezo draw nothing",
        ),
        ({"train": {"method": "mezo"}}, "a mixture would never use one expert"),
        (
            {"train": {"compile": True}, "adapter": {**MIXTURE, "of": "ia3", "share": "none"}},
            "its draws come from seeds",
        ),
        ({"train": {"objective": {"kind": "consistency", "weight": 0}}}, "weight"),
    ],
)
def test_what_does_not_go_with_it_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig.model_validate({**RUN, "train": {"objective": "consistency"}, **changes})


def test_dropout_alone_makes_two_passes() -> None:
    made = RunConfig.model_validate(
        {**RUN, "adapter": {"kind": "lora", "dropout": 0.1}, "train": {"objective": "consistency"}}
    )
    assert made.train.objective is not None
