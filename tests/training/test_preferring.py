"""Jobs that prefer: they learn, share steps with jobs that write, and compare with their reference in every family and under every kind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import graft
from graft.attaching.active import set_trainable
from graft.errors import GraftError
from graft.training.forward.activations import holding
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import set_training
from graft.training.job import Job
from graft.training.objectives import Pairs, Preference, objective_of
from graft.training.updates.gradients import Gradients
from tests.training.conftest import attach, batcher, data, job_on, pairs, take_step, tiny
from tests.training.test_objectives import CASES, compare, job_config, step_of, written_out

LEARNT: list[Any] = [
    ("dpo", 1.0),
    ("ipo", 1.0),
    ({"kind": "cpo", "beta": 1.0, "nll": 0.1}, 0.85),  # its sums also have to make up for the longer answer
    ({"kind": "orpo", "beta": 1.0}, 1.0),
    ({"kind": "simpo", "beta": 2.0}, 1.0),
]
"""Objectives, and the share of pairs they get right in the end."""


@pytest.mark.parametrize(("objective", "right"), LEARNT)
def test_a_job_learns_to_tell_the_answers_apart(objective: Any, right: float) -> None:
    model = tiny()
    graft.attach(model, {"a": {"kind": "lora", "rank": 8, "sites": "linear"}})
    job = job_on(model, train=pairs(8, longest=2), objective=objective, batch_size=8, steps=40)
    forward = Forward(model)
    decide(forward, [job], "auto", batcher())
    set_training(model, ["a"])
    with laid_out(model, "flat"):
        told = [take_step(forward, [job])["a"] for _ in range(40)]
    assert told[-1].scores["accuracy"] >= right and told[-1].loss < told[0].loss
    assert told[-1].scores["margin"] > told[0].scores["margin"] + 0.1


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    mean = torch.tensor([0.0, -1e-3], dtype=torch.float64, requires_grad=True)
    one = torch.ones(2, dtype=torch.float64)
    preference = objective_of(job_config("orpo"))
    assert isinstance(preference, Preference)
    loss = preference._rule(preference.config, Pairs(mean, -one, one, one))[0].sum()
    loss.backward()
    assert bool(loss.isfinite()) and mean.grad is not None and bool(mean.grad.isfinite().all())


def test_jobs_that_write_and_jobs_that_prefer_share_a_step_and_stay_themselves() -> None:
    """The whole table of objectives is in the tests of company; here both are in one micro-batch."""
    spec = {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.2}

    def world(names: str) -> tuple[Any, list[Job]]:
        model = tiny(dtype=torch.float64)
        for name in names:
            attach(model, name, spec, seed=ord(name))
        set_trainable(model, list(names))
        made = {"w": (data(9), None), "p": (pairs(9), "dpo"), "q": (pairs(9, seed=4), "orpo")}
        return model, [job_on(model, name, made[name][0], objective=made[name][1], clip=None) for name in names]

    def gradients(names: str) -> dict[str, Any]:
        model, jobs = world(names)
        forward = Forward(model)
        decide(forward, jobs, "auto", batcher())
        set_training(model, list(names))
        with laid_out(model, "flat"):
            scores = {name: found.scores for name, found in Gradients().prepare(forward, jobs, batcher("flat")).items()}
        return {job.name: (scores[job.name], [p.grad for p in job.params.values()]) for job in jobs}

    together = gradients("wpq")
    for name in "wpq":
        scores, alone = gradients(name)[name]
        assert together[name][0] == pytest.approx(scores, rel=1e-12)
        for one, other in zip(alone, together[name][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_pairs_without_an_objective_and_an_objective_without_pairs_are_refused() -> None:
    with pytest.raises(GraftError, match="'a' has pairs of answers but no train.objective"):
        job_on(attach(tiny()), train=pairs(4))
    with pytest.raises(GraftError, match="'a' has no pairs of answers for its train.objective"):
        job_on(attach(tiny()), objective="dpo")


@pytest.mark.parametrize("family", ["gemma2", "gptj", "bloom", "opt", "gpt2", "mpt"])
def test_every_family_compares_with_its_own_base_in_either_layout(family: str) -> None:
    model, rows = attach(tiny(family)), pairs(5)
    for layout in ("padded",) if family == "mpt" else ("flat", "padded"):
        compare(step_of(model, rows, CASES["dpo"], layout), written_out(model, rows, CASES["dpo"]), model, 1e-5)


ADAPTERS: dict[str, Any] = {
    "prefix": {"kind": "prefix", "tokens": 3},
    "prompt": {"kind": "prompt", "tokens": 3},
    "llama-adapter": {"kind": "llama-adapter"},
    "stack": [{"kind": "lora", "rank": 2}, {"kind": "prefix", "tokens": 2}],
}


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_reference_sees_nothing_of_an_adapter_inside_attention(kind: str, layout: str) -> None:
    model, rows = attach(tiny(dtype=torch.float64), adapter=ADAPTERS[kind]), pairs(5)
    compare(step_of(model, rows, CASES["ipo"], layout), written_out(model, rows, CASES["ipo"]), model, 1e-9)


def test_recomputed_blocks_keep_the_reference_apart() -> None:
    found = []
    for again in (False, True):
        model, rows = attach(tiny(dtype=torch.float64)), pairs(5)
        job = job_on(model, train=rows, objective="dpo", batch_size=5, clip=None)
        forward = Forward(model)
        decide(forward, [job], "auto", batcher())
        with laid_out(model, "flat"), holding(model, "recompute") if again else nullcontext():
            set_training(model, ["a"])
            Gradients().prepare(forward, [job], batcher("flat"))
        found.append(torch.cat([p.grad.flatten() for p in job.params.values() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)
