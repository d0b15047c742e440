"""One optimiser step: accumulation, token weighting, company, dropout, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import graft
from graft.attaching.active import set_trainable
from graft.data.datasets import TokenDataset
from graft.data.samples import Example
from graft.errors import GraftError
from graft.training.forward.causal import Forward
from graft.training.forward.layout import laid_out
from graft.training.forward.modes import set_training
from graft.training.job import Job
from graft.training.step import NonFinite
from tests.training.conftest import (
    assert_same_gradient,
    attach,
    batcher,
    data,
    gradients,
    job_on,
    step,
    take_step,
    tiny,
)

DROPOUT = {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.4}
WITH_PROMPT = [{"kind": "prompt", "tokens": 3}, DROPOUT]
"""Virtual tokens run once for all rows of a pass, and drop the same in each pass of a step."""


@pytest.mark.parametrize("adapter", [None, DROPOUT, WITH_PROMPT], ids=["plain", "dropout", "dropout and a prompt"])
@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_one_pass_of_eight_samples_equals_eight_passes_of_one(layout: str, adapter: Any) -> None:
    found = []
    for budget in (10_000, 40, 1):
        model = attach(tiny(dtype=torch.float64), adapter=adapter)
        job = job_on(model, clip=None)
        count = len(batcher(layout, budget).cut(job.rows()))
        assert count == {10_000: 1, 40: count, 1: 8}[budget]
        found.append((step(model, [job], budget, layout)["a"].loss, gradients(job)))
    tolerance = 1e-7 if adapter is WITH_PROMPT else 1e-10  # the norms of transformers round to float32
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=tolerance / 100)
        assert_same_gradient(gradient, found[0][1], tolerance)


def test_loss_is_the_mean_over_the_supervised_tokens_of_the_whole_step() -> None:
    """A sample with nine targets counts nine times one with a single target."""
    model = attach(tiny(dtype=torch.float64))
    made = [
        Example(np.arange(3, 15, dtype=np.int32), np.arange(12) >= 3, "f", 1),
        Example(np.arange(20, 26, dtype=np.int32), np.arange(6) >= 5, "f", 2),
    ]
    each: list[float] = []
    for example in made:
        logits = model(input_ids=torch.as_tensor(example.input_ids).long()[None]).logits[0].detach()
        losses = F.cross_entropy(logits[:-1], torch.as_tensor(example.input_ids[1:]).long(), reduction="none")
        each += losses[torch.as_tensor(example.supervised[1:])].tolist()
    assert len(each) == 10
    for budget in (1, 100):
        fresh = attach(tiny(dtype=torch.float64))
        outcome = step(fresh, [job_on(fresh, train=TokenDataset.of(made), batch_size=2)], budget)["a"]
        assert outcome.loss == pytest.approx(sum(each) / 10, rel=1e-12)
        assert (outcome.tokens, outcome.targets) == (18, 10)


def test_dropout_is_the_same_in_both_layouts() -> None:
    found = []
    for layout, budget in (("flat", 4096), ("padded", 4096), ("flat", 30), ("padded", 1)):
        model = attach(tiny(dtype=torch.float64), adapter=DROPOUT)
        job = job_on(model, clip=None)
        found.append((step(model, [job], budget, layout)["a"].loss, gradients(job)))
    plain = attach(tiny(dtype=torch.float64), adapter={**DROPOUT, "dropout": 0.0})
    assert step(plain, [job_on(plain)])["a"].loss != pytest.approx(found[0][0], rel=1e-6)
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        assert_same_gradient(gradient, found[0][1], 1e-10)


def test_dropout_differs_from_step_to_step_and_from_seed_to_seed() -> None:
    model = attach(tiny(), adapter=DROPOUT)
    job = job_on(model)
    first = [row.seed for row in job.rows()]
    assert len(set(first)) == len(first)
    assert not set(first) & {row.seed for row in job_on(model, seed=1).rows()}
    job.step += 1
    assert not set(first) & {row.seed for row in job.rows()}


KINDS: dict[str, Any] = {
    "low": DROPOUT,
    "series": {"kind": "series", "bottleneck": 6, "sites": "mlp"},
    "parallel": {"kind": "parallel", "bottleneck": 5, "sites": "attn mlp"},
    "prefix": {"kind": "prefix", "tokens": 3},
}


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_a_job_in_company_equals_the_job_alone(layout: Any) -> None:
    """Jobs of unequal kind, batch size and data; every parameter after three steps."""
    names = [name for name in KINDS if name != "prefix" or layout == "padded"]
    sizes = {"low": 8, "series": 3, "parallel": 5, "prefix": 4}

    def world(names: list[str]) -> tuple[Any, list[Job]]:
        model = tiny(dtype=torch.float64)
        for name in names:
            attach(model, name, KINDS[name], seed=len(name))
        set_trainable(model, names)
        seeds = {name: number for number, name in enumerate(KINDS)}
        return model, [
            job_on(model, name, data(30, seeds[name]), batch_size=sizes[name], seed=seeds[name]) for name in names
        ]

    model, jobs = world(names)
    together = [step(model, jobs, 64, layout) for _ in range(3)]
    for name in names:
        lone, (job,) = world([name])
        for at in range(3):
            assert step(lone, [job], 64, layout)[name].loss == pytest.approx(together[at][name].loss, rel=1e-10)
        for (key, alone), (_, company) in zip(graft.parameters(lone, name), graft.parameters(model, name), strict=True):
            torch.testing.assert_close(alone, company, rtol=1e-9, atol=1e-12, msg=f"{name} {key}")


def test_clipping_bounds_the_gradient_and_reports_the_norm_before() -> None:
    model = attach(tiny())
    job = job_on(model, clip=0.01)
    outcome = step(model, [job])["a"]
    assert outcome.grad_norm > 0.01
    assert float(gradients(job).norm()) == pytest.approx(0.01, rel=1e-4)


def test_update_equals_adamw_written_out() -> None:
    model = attach(tiny(dtype=torch.float64))
    job = job_on(model, clip=None, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    weights = {name: parameter.detach().clone() for name, parameter in job.params.items()}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for t in (1, 2):
        step(model, [job])
        for name, parameter in job.params.items():
            gradient = parameter.grad
            assert gradient is not None
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            weights[name] *= 1 - 1e-2 * 0.1
            weights[name] -= 1e-2 * (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-6)
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rate_warms_up_and_falls(schedule: str) -> None:
    model = attach(tiny())
    job = job_on(model, schedule=schedule, warmup=2, steps=6, lr=1.0)
    rates = [step(model, [job])["a"].lr for _ in range(6)]
    falling = [1.0, 0.75, 0.5, 0.25] if schedule == "linear" else [0.5 + 0.5 * np.cos(np.pi * x / 4) for x in range(4)]
    assert rates == pytest.approx([0.0, 0.5, *falling])


def test_warmup_may_be_a_fraction_and_ends_before_the_run() -> None:
    model = attach(tiny())
    job = job_on(model, schedule="linear", warmup=0.5, steps=6, lr=1.0)
    assert [step(model, [job])["a"].lr for _ in range(4)] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    for warmup in (6, 7):
        with pytest.raises(GraftError, match=f"warmup is {warmup} steps.*only 6"):
            job_on(model, schedule="linear", warmup=warmup, steps=6)


def test_epochs_may_be_broken_and_steps_override_them() -> None:
    model = attach(tiny())
    assert (job_on(model, steps=None, epochs=2.5, train=data(20)).steps, job_on(model, steps=3, epochs=9).steps) == (
        8,
        3,
    )


def test_a_parameter_without_gradient_is_named_at_the_second_step() -> None:
    model = attach(tiny())
    job = job_on(model)
    step(model, [job])
    lost = next(iter(job.params))
    job.params[lost].requires_grad_(False)
    with pytest.raises(GraftError, match=f"1 of 28 parameters of 'a' get no gradient, among them '{lost}'"):
        step(model, [job])


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_a_loss_that_is_not_finite_names_the_sample_and_changes_nothing(layout: Any) -> None:
    model = attach(tiny())
    job = job_on(model, train=data(8))
    step(model, [job], layout=layout)
    rows = job.rows()
    bad = rows[2]
    with torch.no_grad():  # a token that only this sample has
        bad.example.input_ids[0] = 1
        model.get_input_embeddings().weight[1] = float("nan")
    before = {name: parameter.detach().clone() for name, parameter in job.params.items()}
    set_training(model, ["a"])
    forward = Forward(model)
    with (
        laid_out(model, layout),
        pytest.raises(NonFinite, match="the loss of 'a' became infinite or not a number in step 2") as caught,
    ):
        take_step(forward, [job], layout, 30)
    assert [row.where for row in caught.value.suspects] == [bad.where]
    assert f"Samples: {bad.where}." in str(caught.value)
    assert len(caught.value.rows) == 8 and job.step == 1
    assert all(torch.equal(parameter, before[name]) for name, parameter in job.params.items())


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    model = attach(tiny())
    job = job_on(model)
    name = list(job.params)[3]
    job.params[name].register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFinite, match=rf"the gradient \(of {name}\) of 'a'"):
        step(model, [job])
