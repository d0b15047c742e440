"""Runs of many jobs: failures that harm nobody, jobs set aside and brought back, windows, rungs, orders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.attaching.parameters import names as attached
from graft.config import HalvingConfig, SchedulerConfig
from graft.runs.folder import RunFolder
from graft.training.engine import Engine
from graft.training.job import Job
from graft.training.job_pool import JobPool
from graft.training.offload import offload, reload
from tests.training.conftest import PowerCut, attach, batcher, data, engine_for, job_on, tiny

KINDS: dict[str, Any] = {
    "a": {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.2},
    "b": {"kind": "series", "bottleneck": 4, "sites": "mlp", "dropout": 0.1},
    "c": {"kind": "lora", "rank": 2, "sites": "attn.q"},
    "d": {"kind": "parallel", "bottleneck": 3, "sites": "mlp"},
}


def job_of(model: Any, name: str, **changes: Any) -> Job:
    number = "abcd".index(name)
    settings = {"steps": 6 + number, "batch_size": 2 + number, "seed": number, **changes}
    return job_on(model, name, data(20, seed=number, longest=8 + 3 * number), **settings)


def world(
    path: Path,
    names: str = "abc",
    scheduler: dict[str, Any] | None = None,
    more: dict[str, dict[str, Any]] | None = None,
) -> tuple[Engine, dict[str, dict[str, Tensor]]]:
    """An engine, and where the parameters appear that it publishes."""
    model, published = tiny(), {}
    for name in names:
        attach(model, name, KINDS[name], seed=ord(name))
    jobs = [job_of(model, name, **(more or {}).get(name, {})) for name in names]

    def publish(job: Job) -> None:
        published[job.name] = {key: parameter.detach().clone() for key, parameter in job.params.items()}

    return engine_for(
        jobs, model, path, publish, scheduler=SchedulerConfig(**(scheduler or {})), save_every=4
    ), published


def losses(path: Path, job: str, key: str = "loss") -> list[float]:
    return [line[key] for line in RunFolder(path).metrics.read() if line["job"] == job and key in line]


def alone(path: Path, name: str) -> tuple[list[float], dict[str, Tensor]]:
    engine, published = world(path, name)
    engine.run()
    return losses(path, name), published[name]


def breaks(job: Job, at: int) -> Any:
    """Rows of a job that cannot be read from one step on."""
    plain = job.rows
    return lambda: plain() if job.step < at else [][0]


def assert_same(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert all(torch.equal(given[key], tensor) for key, tensor in wanted.items()) and given.keys() == wanted.keys()


def test_a_loss_that_is_not_finite_takes_out_its_job_alone(tmp_path: Path) -> None:
    engine, published = world(tmp_path / "run")
    bad = engine.jobs[1]
    plain = bad.rows

    def poisoned() -> Any:
        rows = plain()
        if bad.step == 3:
            with torch.no_grad():  # a token that only this job meets
                rows[0].example.input_ids[0] = 1
                engine.model.get_input_embeddings().weight[1] = float("nan")
        return rows

    bad.rows = poisoned  # type: ignore[method-assign]
    assert engine.run() == "finished"
    status = engine.folder.read_status()
    assert {name: job["ended"] for name, job in status["jobs"].items()} == {
        "a": "finished",
        "b": "failed",
        "c": "finished",
    }
    assert "infinite or not a number in step 4" in status["jobs"]["b"]["error"] and status["jobs"]["b"]["mistake"]
    assert attached(engine.model) == ("a", "c") and (tmp_path / "run/failed_batch-b/batch.safetensors").is_file()
    for name in "ac":
        wanted, _ = alone(tmp_path / name, name)
        assert losses(tmp_path / "run", name) == pytest.approx(wanted, rel=1e-5)
    assert len(losses(tmp_path / "run", "b")) == 3 and all(bool(p.isfinite().all()) for p in published["b"].values())


def test_an_adapter_that_breaks_takes_out_its_job_alone_and_its_trace_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = world(tmp_path / "run", more={"b": {"steps": 9}})
    module, job = engine.jobs[1].modules[0], engine.jobs[1]
    plain = module.adapt

    def broken(*given: Any) -> Any:
        if job.step == 5:
            raise ZeroDivisionError("by a bug in one kind")
        return plain(*given)

    monkeypatch.setattr(module, "adapt", broken)
    assert engine.run() == "finished"
    record = engine.folder.read_status()["jobs"]["b"]
    assert (record["ended"], record["step"], record["mistake"]) == ("failed", 5, False)
    lost = next(each for each in engine.folder.events.read() if each["event"] == "job_failed")
    assert "ZeroDivisionError: by a bug" in lost["trace"] and lost["job"] == "b"
    assert [len(losses(tmp_path / "run", name)) for name in "abc"] == [6, 5, 8]


def test_the_only_job_takes_the_run_with_it_and_a_run_whose_jobs_all_fail_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = world(tmp_path / "one", "a")
    monkeypatch.setattr(engine.jobs[0], "rows", breaks(engine.jobs[0], at=0))
    with pytest.raises(IndexError):
        engine.run()
    engine, _ = world(tmp_path / "all", "ab")
    for job in engine.jobs:
        monkeypatch.setattr(job, "rows", breaks(job, at=2))
    assert engine.run() == "failed" and engine.folder.read_status()["state"] == "failed"


def test_a_job_that_is_set_aside_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = attach(tiny(), "a", KINDS["a"])
    job = job_of(model, "a")
    lone = engine_for([job], model, tmp_path / "lone")
    lone.run()
    before = {name: tensor.clone() for name, tensor in {**job.params, **job.tensors()}.items()}
    identities = {name: id(parameter) for name, parameter in job.params.items()}
    offload(lone.folder, job)
    assert (
        all(parameter.numel() == 0 for parameter in job.params.values())
        and not job.optimizer.state
        and not job.resident
    )
    reload(lone.folder, job)
    after = {**job.params, **job.tensors()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()) and job.resident
    assert {name: id(parameter) for name, parameter in job.params.items()} == identities


@pytest.mark.parametrize(
    "scheduler", [{"resident": 1}, {"resident": 2}, {"together": 1}, {"together": 2}, {"memory": 0.001}]
)
def test_whoever_shares_memory_or_a_step_each_job_is_what_it_is_alone(
    tmp_path: Path, scheduler: dict[str, Any]
) -> None:
    engine, published = world(tmp_path / "run", scheduler=scheduler, more={"c": {"steps": 12}})
    engine.jobs[2].priority, said = 1, []
    engine.reporter.say = said.append  # type: ignore[method-assign]
    assert engine.run() == "finished"
    single = scheduler in ({"resident": 1}, {"together": 1}, {"memory": 0.001})
    told = [text for text in said if "above the 0.00 GB that this run may use, and so do those of 2 more" in text]
    assert len(told) == (scheduler == {"memory": 0.001})
    for name in "ab":
        wanted, parameters = alone(tmp_path / name, name)
        found = losses(tmp_path / "run", name)
        if single:
            assert found == wanted
            assert_same(published[name], parameters)
        assert found == pytest.approx(wanted, rel=1e-5)
    first = [line["job"] for line in engine.folder.metrics.read() if "loss" in line]
    if single:
        assert first == ["c"] * 12 + ["a"] * 6 + ["b"] * 7 or "together" in scheduler
    assert not (tmp_path / "run/aside").exists()


def test_a_limit_of_memory_holds_as_many_jobs_as_the_model_of_a_step_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With peaks of a megabyte per token and room for two of three jobs, the last that came waits until it has priority."""
    monkeypatch.setattr(JobPool, "observe", lambda *_: None)
    engine, _ = world(tmp_path / "run", scheduler={"memory": 0.1})
    engine.pool.memory.seen = [(tokens, tokens, tokens * 10**6) for tokens in (1, 10, 100)]
    tokens = {job.name: sum(row.tokens for row in batcher("flat").longest(job)) for job in engine.jobs}
    assert tokens["a"] + tokens["b"] <= 97 and tokens["c"] + tokens["a"] <= 97 < min(100, sum(tokens.values()))
    plain = engine.jobs[0].rows

    def asks() -> Any:
        if engine.jobs[0].step == 2 and not engine.queue.pending() and not engine.queue.done:
            engine.queue.put("priority", "c", priority=1)
        return plain()

    engine.jobs[0].rows = asks  # type: ignore[method-assign]
    assert engine.run() == "finished"
    together: dict[int, str] = {}
    for line in engine.folder.metrics.read():
        together[line["step"]] = together.get(line["step"], "") + line["job"]
    assert [*together.values()] == [*["ab"] * 3, *["ac"] * 3, *["bc"] * 4, "c"]


def test_a_job_with_a_higher_priority_sets_another_aside_and_it_comes_back(tmp_path: Path) -> None:
    engine, published = world(tmp_path / "run", "ab", {"resident": 1})
    one, other = engine.jobs
    plain = one.rows

    def asks() -> Any:
        if one.step == 3 and other.priority == 0:
            engine.queue.put("priority", "b", priority=2)
        return plain()

    one.rows = asks  # type: ignore[method-assign]
    assert engine.run() == "finished"
    order = [line["job"] for line in engine.folder.metrics.read() if "loss" in line]
    assert order == ["a"] * 4 + ["b"] * 7 + ["a"] * 2
    for name in "ab":
        wanted, parameters = alone(tmp_path / name, name)
        assert losses(tmp_path / "run", name) == wanted
        assert_same(published[name], parameters)


def test_a_preempted_job_is_resumed_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    def run(path: Path, cut: bool, checkpoint: int | None = None) -> tuple[Engine, Any]:
        engine, published = world(path, "abc", {"resident": 1})
        engine.jobs[2].priority = 0
        if checkpoint is None:
            plain = engine.jobs[0].rows

            def asks() -> Any:
                if engine.jobs[0].step == 3 and not engine.queue.pending() and not engine.queue.done:
                    engine.queue.put("priority", "b", priority=2)
                return plain()

            engine.jobs[0].rows = asks  # type: ignore[method-assign]
        if cut:
            other = engine.jobs[1].rows
            engine.jobs[1].rows = lambda: (_ for _ in ()).throw(PowerCut) if engine.jobs[1].step == 5 else other()  # type: ignore[method-assign,assignment]
            with pytest.raises(PowerCut):
                engine.run()
        else:
            assert engine.run(checkpoint) == "finished"
        return engine, published

    _, wanted = run(tmp_path / "whole", cut=False)
    run(tmp_path / "parted", cut=True)
    last = RunFolder(tmp_path / "parted").checkpoints()[-1]
    states = json.loads((tmp_path / f"parted/checkpoints/{last:06d}/state.json").read_text())["jobs"]
    assert last == 8 and [states[name]["step"] for name in "abc"] == [4, 4, 0]  # preempted, running, waiting
    folder = RunFolder(tmp_path / "parted")
    folder.metrics.keep(lambda line: line["step"] <= last)
    _, found = run(tmp_path / "parted", cut=False, checkpoint=last)
    for name in "abc":
        assert losses(tmp_path / "parted", name) == losses(tmp_path / "whole", name)
        assert_same(found[name], wanted[name])


def test_successive_halving_ends_the_worst_at_their_rung(tmp_path: Path) -> None:
    model = tiny()
    rates = {"a": 1e-6, "b": 3e-2, "c": 1e-2, "d": 1e-7}
    for name in rates:
        attach(model, name, KINDS["c"], seed=3)
    rows, held = data(24, seed=5), data(8, seed=5)
    jobs = [job_on(model, name, rows, held, lr=lr, steps=12, seed=1) for name, lr in rates.items()]
    scheduler = SchedulerConfig(halving=HalvingConfig(rungs=(4, 8)), resident=2)
    engine = engine_for(jobs, model, tmp_path / "run", scheduler=scheduler)
    assert engine.run() == "finished"
    found = {job.name: (job.ended, job.step) for job in engine.jobs}
    assert found["a"] == found["d"] == ("halved", 4)
    assert sorted((found["b"], found["c"])) == [("finished", 12), ("halved", 8)]
    at = {name: losses(tmp_path / "run", name, "validation_loss") for name in rates}
    assert max(at["b"][0], at["c"][0]) < min(at["a"][0], at["d"][0])
    winner, loser = ("b", "c") if found["b"][0] == "finished" else ("c", "b")
    assert at[winner][1] <= at[loser][1]


def test_jobs_are_submitted_and_cancelled_while_others_train(tmp_path: Path) -> None:
    engine, published = world(tmp_path / "run", "ab")
    engine.commands.build_job = lambda name, given: job_of(
        attach(engine.model, name, KINDS[name], seed=ord(name)), name
    )
    plain = engine.jobs[0].rows

    def asks() -> Any:
        if engine.jobs[0].step == 2 and not engine.queue.done and not engine.queue.pending():
            engine.queue.put("submit", "c", config={})
            engine.queue.put("submit", "b", config={})
            engine.queue.put("cancel", "b")
            engine.queue.put("cancel", "nobody")
            engine.queue.put("submit", "z", config={})
            (engine.queue.inbox / "by-hand.json").write_text("{")
        return plain()

    engine.jobs[0].rows = asks  # type: ignore[method-assign]
    assert engine.run() == "finished"
    status = engine.folder.read_status()["jobs"]
    assert {name: (job["ended"], job["step"]) for name, job in status.items()} == {
        "a": ("finished", 6), "b": ("cancelled", 3), "c": ("finished", 8), "z": ("failed", 0),
    }  # fmt: skip
    reasons = [each["reason"] for each in engine.folder.events.read() if each["event"] == "ignored"]
    assert reasons[:2] == ["there is a job 'b' already", "there is no job 'nobody' that still trains"]
    assert len(reasons) == 3 and "by-hand.json is not a JSON file" in reasons[2]
    wanted, _ = alone(tmp_path / "c", "c")
    assert losses(tmp_path / "run", "c") == pytest.approx(wanted, rel=1e-5)
    assert [line["step"] for line in engine.folder.metrics.read() if line["job"] == "c"] == list(range(4, 12))
    assert set(published) == {"a", "b", "c"}


def test_every_job_ends_at_its_own_best_validation_however_the_run_counts_its_steps(tmp_path: Path) -> None:
    model, published = tiny(), {}
    for name in "ab":
        attach(model, name, KINDS[name], seed=1)
    jobs = [
        job_on(model, "a", data(24), data(6, seed=9), steps=12, lr=3e-1, validate_every=2),
        job_on(model, "b", data(24, seed=2), data(6, seed=8), steps=10, lr=1e-1, validate_every=3, patience=2),
    ]
    seen: dict[tuple[str, int], dict[str, Tensor]] = {}
    engine = engine_for(jobs, model, tmp_path / "run", scheduler=SchedulerConfig(resident=1), keep=1)
    engine.saver.publish = lambda job: published.update(
        {job.name: {k: p.detach().clone() for k, p in job.params.items()}}
    )
    validate = engine._validate

    def watched(job: Job, *scored: Any) -> bool:
        seen[job.name, job.step] = {key: parameter.detach().clone() for key, parameter in job.params.items()}
        return validate(job, *scored)

    engine._validate = watched  # type: ignore[method-assign]
    engine.run()
    for job in jobs:
        assert job.best is not None
        assert_same(published[job.name], seen[job.name, int(job.best["step"])])
    assert any(job.best and job.best["step"] != job.step for job in jobs)
