"""Samplers: they keep to the space, go on where they were, learn, and leave what does not fit alone."""

from __future__ import annotations

import math
from statistics import median

import pytest

from graft.config.study import SearchConfig
from graft.study.samplers.base import Known
from graft.study.samplers.choosing import sampler_of
from graft.study.samplers.space import Codes, Space

SPACE = Space.of(
    SearchConfig.model_validate(
        {
            "space": {
                "rank": [4, 8, 16, 32],
                "kind": ["a", "b"],
                "width": {"low": 3, "high": 90, "log": True},
                "lr": {"low": 1e-5, "high": 1e-1, "log": True},
                "dropout": {"low": 0.0, "high": 0.5},
            },
            "budget": 1,
        }
    )
)


def score(codes: Codes) -> float:
    return (math.log10(codes["lr"]) + 3) ** 2 + (codes["rank"] - 2) ** 2 + (codes["kind"] == 1) + codes["dropout"]


def searched(name: str, budget: int, batch: int, seed: int = 0) -> list[Known]:
    known: list[Known] = []
    while len(known) < budget:
        new = [
            each
            for each in sampler_of(name, SPACE, 1, seed).ask(known, batch)
            if all(each != one.codes for one in known)
        ]
        known += [Known(each, "done", (score(each),)) for each in new[: budget - len(known)]]
    return known


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("name", ["random", "optuna", "nomad"])
def test_points_are_of_the_space_and_repeat_with_the_seed(name: str, batch: int) -> None:
    first, second = (searched(name, 15, batch) for _ in range(2))
    assert first == second != searched(name, 15, batch, seed=1)
    for each in first:
        codes = each.codes
        assert set(codes) == {dimension.key for dimension in SPACE.dimensions}
        assert codes["rank"] in range(4) and codes["kind"] in range(2)
        assert isinstance(codes["width"], int) and 3 <= codes["width"] <= 90
        assert 1e-5 <= codes["lr"] <= 1e-1 and 0 <= codes["dropout"] <= 0.5


@pytest.mark.parametrize("name", ["optuna", pytest.param("nomad", marks=pytest.mark.slow)])
def test_a_sampler_learns(name: str) -> None:
    """In most searches it finds more than chance finds in any."""
    found = [min(each.values[0] for each in searched(name, 40, 1, seed)) for seed in range(3)]
    by_chance = [min(each.values[0] for each in searched("random", 40, 1, seed)) for seed in range(3)]
    assert median(found) < min(by_chance)


@pytest.mark.parametrize("name", ["random", "optuna", "nomad"])
def test_failures_and_what_does_not_fit_are_taken_in(name: str) -> None:
    known: list[Known] = []
    states = ("failed", "infeasible", "pending", "done")
    for at in range(12):
        new = [each for each in sampler_of(name, SPACE, 1, 0).ask(known, 2) if all(each != one.codes for one in known)]
        state = states[at % 4]
        known += [Known(each, state, (score(each),) if state == "done" else ()) for each in new]
    assert len(known) > 12


def test_several_objectives() -> None:
    known: list[Known] = []
    for _ in range(12):
        known += [
            Known(each, "done", (score(each), float(each["rank"])))
            for each in sampler_of("optuna", SPACE, 2, 0).ask(known, 1)
        ]
    assert len({str(each.codes) for each in known}) > 10
