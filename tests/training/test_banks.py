"""Jobs whose tensors are rows of one bank train as each alone, whatever comes and goes beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.attaching.active import set_trainable
from graft.injection.state import state_of
from graft.ops import low_rank_stack
from graft.training.banking import arrange
from graft.training.forward.causal import Forward
from graft.training.forward.layout import laid_out
from graft.training.job import Job
from graft.training.step import Outcome
from tests.training.conftest import attach, data, engine_for, job_on, pairs, take_step, tiny

LORA = {"kind": "lora", "rank": 2, "sites": "linear"}
PLUS = {**LORA, "lr_ratio": 4.0, "alpha": 3.0}
JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (LORA, {}),
    "scaled": ({**LORA, "alpha": 7.0}, {"lr": 3e-3, "clip": 0.1, "steps": 3}),
    "dropped": ({**LORA, "dropout": 0.3}, {"betas": (0.8, 0.9), "weight_decay": 0.1, "clip": None}),
    "pairs": ({**LORA, "dropout": 0.1}, {"objective": "dpo", "batch_size": 3}),
    "twice": (LORA, {"objective": "consistency", "batch_size": 2}),
    "plus": (PLUS, {"batch_size": 1}),
    "plus-too": (PLUS, {"lr": 2e-3, "batch_size": 5}),
    "prefix": ({"kind": "prefix", "tokens": 3}, {}),
    "prefix-too": ({"kind": "prefix", "tokens": 3}, {"lr": 1e-3, "steps": 3}),
    "routed": ({"kind": "mixture", "of": LORA}, {}),
    "routed-too": ({"kind": "mixture", "of": LORA}, {"weight_decay": 0.2}),
    "lion": (LORA, {"optimizer": "lion"}),
}
STEPS = 4
Ended = dict[str, dict[str, Tensor]]


def world(names: list[str]) -> tuple[Any, list[Job]]:
    model, jobs = tiny(dtype=torch.float64), []
    for name in names:
        attach(model, name, JOBS[name][0], seed=len(name))
    set_trainable(model, names)
    for name in names:
        number, settings = list(JOBS).index(name), {"batch_size": 4, "lr": 5e-3, "steps": STEPS, **JOBS[name][1]}
        make = pairs if name == "pairs" else data
        jobs.append(job_on(model, name, make(20, seed=number, longest=6 + number), seed=number, **settings))
    return model, jobs


def publisher(ended: Ended) -> Any:
    def publish(job: Job) -> None:
        ended[job.name] = {key: parameter.detach().clone() for key, parameter in job.params.items()}

    return publish


def trained(names: list[str], path: Path, **settings: Any) -> tuple[Ended, dict[str, list[float]]]:
    """Parameters at the end and losses, by job."""
    ended: Ended = {}
    model, jobs = world(names)
    engine = engine_for(jobs, model, path, publisher(ended), token_budget=128, **settings)
    assert engine.run() == "finished"
    return ended, losses_of(engine)


def losses_of(engine: Any) -> dict[str, list[float]]:
    lines = [line for line in engine.folder.metrics.read() if "loss" in line]
    return {job.name: [line["loss"] for line in lines if line["job"] == job.name] for job in engine.jobs}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every job by itself."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("alone")
    found = [trained([name], path / name) for name in JOBS]
    return {name: own for each, _ in found for name, own in each.items()}, {
        n: o for _, each in found for n, o in each.items()
    }


def assert_same(ended: Ended, losses: dict[str, list[float]], alone: Any) -> None:
    for name, own in ended.items():
        assert losses[name] == pytest.approx(alone[1][name], rel=1e-12), name
        for key, parameter in own.items():
            assert float((parameter - alone[0][name][key]).abs().max()) <= 1e-12, (name, key)


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_jobs_in_banks_train_as_alone(layout: str, alone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, add = [], low_rank_stack.StackedUpdate.add_
    monkeypatch.setattr(
        low_rank_stack.StackedUpdate,
        "add_",
        lambda self, out, x: (taken.append(len(self.block.counts)), add(self, out, x))[1],
    )
    ended, losses = trained(list(JOBS), tmp_path / "run", layout=layout)
    assert ended.keys() == JOBS.keys() and max(taken) >= 3
    assert_same(ended, losses, alone)


def test_a_bank_has_the_jobs_of_one_shape_and_optimiser(tmp_path: Path) -> None:
    model, jobs = world(list(JOBS))
    engine = engine_for(jobs, model, tmp_path / "run")
    engine._set_modes()
    found: dict[Any, set[str]] = {}
    for job in jobs:
        found.setdefault(job.bank, set()).add(job.name)
    assert found.pop(None) == {"lion"}
    assert sorted(map(sorted, found.values())) == [
        ["dropped", "pairs", "plain", "scaled", "twice"], ["plus", "plus-too"], ["prefix", "prefix-too"], ["routed", "routed-too"],
    ]  # fmt: skip
    for job in jobs:
        if job.bank is not None:
            place = job.bank.masters.untyped_storage().data_ptr()
            assert {each.untyped_storage().data_ptr() for each in job.params.values()} == {place}


def test_who_fails_or_is_set_aside_moves_nobody_else(alone: Any, tmp_path: Path) -> None:
    names = ["plain", "scaled", "dropped", "plus", "plus-too", "prefix"]
    model, jobs = world([*names, "twice"])
    broken, plain = jobs[-1], jobs[-1].rows

    def rows() -> Any:
        if broken.step == 2:
            with torch.no_grad():
                next(iter(broken.params.values())).fill_(float("nan"))
        return plain()

    broken.rows = rows  # pyright: ignore[reportAttributeAccessIssue]
    ended: Ended = {}
    scheduler = graft.config.scheduling.SchedulerConfig(resident=3)
    engine = engine_for(jobs, model, tmp_path / "run", publisher(ended), token_budget=128, scheduler=scheduler)
    assert engine.run() == "finished" and set(engine.pool.failed) == {"twice"}
    assert not state_of(model).slots_in_stacks  # a loop of the user's own finds gradients where autograd puts them
    assert_same({name: ended[name] for name in names}, losses_of(engine), alone)


def test_a_run_in_banks_resumes_to_the_same_numbers(alone: Any, tmp_path: Path) -> None:
    names = ["plain", "scaled", "dropped", "plus", "plus-too"]
    model, jobs = world(names)
    engine = engine_for(jobs, model, tmp_path / "run", token_budget=128, save_every=2)
    engine_step = engine._step

    def stopping(chosen: Any) -> None:
        if engine.step == 2:
            raise KeyboardInterrupt
        engine_step(chosen)

    engine._step = stopping  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    ended: Ended = {}
    model, jobs = world(names)
    engine = engine_for(jobs, model, tmp_path / "run", publisher(ended), token_budget=128)
    assert engine.run(2) == "finished"
    assert_same(ended, losses_of(engine), alone)


def test_grouped_products_add_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a device with a kernel for them, which pads nothing."""
    names = ["plain", "scaled", "dropped"]
    for name in names:
        monkeypatch.setitem(JOBS, name, ({**JOBS[name][0], "rank": 8}, JOBS[name][1]))
    wanted, _ = trained(names, tmp_path / "padded")
    monkeypatch.setattr(low_rank_stack, "has_kernel", lambda x: True)
    monkeypatch.setattr(low_rank_stack, "grouped_product", lambda a, b, ends: _by_group(a, b, ends.tolist()))
    found, _ = trained(names, tmp_path / "grouped")
    for name in names:
        for key, parameter in wanted[name].items():
            assert float((parameter - found[name][key]).abs().max()) <= 1e-12, (name, key)


def _by_group(a: Tensor, b: Tensor, ends: list[int]) -> Tensor:
    """What torch's grouped product computes, in float64: one product for each group."""
    starts = [0, *ends[:-1]]
    if b.dim() == 3:
        return torch.cat([a[start:end] @ own for start, end, own in zip(starts, ends, b, strict=True)])
    return torch.stack([a[:, start:end] @ b[start:end] for start, end in zip(starts, ends, strict=True)])


KINDS: list[Any] = [
    {"kind": "lora", "rank": 0}, {"kind": "dora", "rank": 0}, {"kind": "loha", "rank": 0},
    {"kind": "series", "bottleneck": 0}, {"kind": "parallel", "bottleneck": 0},
]  # fmt: skip


def of_many(number: int) -> Any:
    """The adapter of one job of many: five kinds, each in eight ranks."""
    kind = KINDS[number % len(KINDS)]
    return {key: 1 + number // len(KINDS) % 8 if each == 0 else each for key, each in kind.items()}


def stepped(numbers: list[int]) -> tuple[dict[str, Outcome], list[Job]]:
    """One step of these jobs on one base."""
    model = tiny(dtype=torch.float64)
    names = [f"job{number}" for number in numbers]
    for number, name in zip(numbers, names, strict=True):
        attach(model, name, of_many(number), seed=number)
    set_trainable(model, names)
    jobs = [
        job_on(model, name, data(2, seed=number, longest=6), batch_size=2, seed=number, lr=1e-3 * (1 + number % 3))
        for number, name in zip(numbers, names, strict=True)
    ]
    arrange(model, jobs)
    with laid_out(model, "flat"):
        return take_step(Forward(model), jobs), jobs


@pytest.mark.slow
def test_a_thousand_adapters_of_five_kinds_and_eight_ranks_step_as_alone() -> None:
    outcomes, jobs = stepped(list(range(1024)))
    assert None not in {job.bank for job in jobs}
    assert len({job.bank for job in jobs}) == 32  # series and parallel have the same shapes, so they lie together
    for number in range(0, 1024, 32):
        wanted, (alone,) = stepped([number])
        assert outcomes[alone.name].loss == pytest.approx(wanted[alone.name].loss, rel=1e-12)
        for key, parameter in alone.params.items():
            assert float((parameter - jobs[number].params[key]).detach().abs().max()) <= 1e-12, (of_many(number), key)
