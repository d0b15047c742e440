"""Successive halving: who waits, who goes on, who ends, and those that come late."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from graft.config import HalvingConfig
from graft.training.scheduling.halving import Halving


def job(name: str, step: int = 0, steps: int = 100, data: str = "d") -> Any:
    return SimpleNamespace(name=name, step=step, steps=steps, ended=None, validation=SimpleNamespace(digest=data))


def reach(halving: Halving, each: Any, rung: int, loss: float) -> None:
    each.step = rung
    assert halving.at_rung(each)
    halving.note(each, loss)


def test_the_best_half_goes_on_once_all_are_there() -> None:
    halving, jobs = Halving(HalvingConfig(rungs=(10, 20))), [job(name) for name in "abcd"]
    for each, loss in zip(jobs[:3], (3.0, 1.0, 2.0), strict=True):
        reach(halving, each, 10, loss)
    assert halving.decide(jobs) == [] and [halving.holds(each) for each in jobs] == [True, True, True, False]
    reach(halving, jobs[3], 10, 4.0)
    assert [each.name for each in halving.decide(jobs)] == ["a", "d"]
    assert [each.ended for each in jobs] == ["halved", None, None, "halved"]
    assert not any(halving.holds(each) for each in jobs if each.ended is None)
    reach(halving, jobs[1], 20, 1.0)
    assert halving.decide(jobs) == [] and halving.holds(jobs[1])
    reach(halving, jobs[2], 20, 0.5)
    assert [each.name for each in halving.decide(jobs)] == ["b"]


def test_a_job_that_ends_on_the_way_is_not_waited_for_and_other_data_are_not_compared() -> None:
    halving = Halving(HalvingConfig(rungs=(10,), keep=0.5))
    jobs = [job("a"), job("b"), job("c", data="other"), job("short", steps=10)]
    reach(halving, jobs[0], 10, 3.0)
    reach(halving, jobs[2], 10, 9.0)
    assert not halving.at_rung(job("short", step=10, steps=10))
    assert halving.decide(jobs) == [] and not halving.holds(jobs[2]) and halving.holds(jobs[0])
    jobs[1].ended = "failed"
    assert halving.decide(jobs) == [] and not halving.holds(jobs[0])


def test_who_comes_late_is_measured_against_the_record_which_survives_a_checkpoint() -> None:
    for loss, ended in ((5.0, "halved"), (0.5, None)):
        first = Halving(HalvingConfig(rungs=(10,)))
        jobs = [job("a"), job("b")]
        reach(first, jobs[0], 10, 1.0)
        reach(first, jobs[1], 10, 2.0)
        assert [each.name for each in first.decide(jobs)] == ["b"]
        halving, late = Halving(first.config, json.loads(json.dumps(first.state()))), job("late")
        reach(halving, late, 10, loss)
        halving.decide([*jobs, late])
        assert late.ended == ended and jobs[0].ended is None


def test_without_rungs_nothing_waits_and_nothing_ends() -> None:
    halving = Halving(None)
    assert halving.decide([job("a")]) == [] and not halving.holds(job("a", step=10))


def test_rungs_that_no_job_comes_by_are_said() -> None:
    halving = Halving(HalvingConfig(rungs=(10, 20)))
    said = halving.idle([job("a", steps=5), job("b", steps=10)])
    assert said is not None and "its first rung is step 10, the longest job has 10 steps" in said
    assert halving.idle([job("a", steps=5), job("b", steps=11)]) is None
    assert Halving(None).idle([job("a")]) is None
