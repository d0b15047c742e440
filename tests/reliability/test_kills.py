"""Runs that are killed without warning, one to three times, and resumed until they end, are the run that nobody killed.

file    SIGKILL just before the n-th file operation in the run folder
torn    the system kills the process in the middle of a write
timed   SIGKILL after a random time
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from typing import Any

import pytest

from tests.reliability.conftest import Unbroken
from tests.reliability.processes import Child
from tests.reliability.runs import torn, wrong

WAYS = ("file", "torn", "file", "timed")


def chain(unbroken: Unbroken, number: int) -> tuple[int, list[str]]:
    """Kill one run and resume it until it ends: how often it was killed, and what is wrong afterwards."""
    draw, way, commands = random.Random(number), WAYS[number % 4], number % 3 == 2
    truth, run = unbroken.of(commands), unbroken.folder / f"killed-{number}"
    told: dict[str, Any] = {"orders": str(run)} if commands else {}
    kills, said = 0, []
    for turn in range(draw.choice((1, 1, 2, 3))):
        last = 0.98 if turn == 0 else 0.4
        how = dict(told)
        if way == "file":
            how |= {"watch": str(run), "kill_at": draw.randint(1, int(unbroken.operations[commands] * last))}
        elif way == "torn":
            how["tear"] = draw.choice((500, 1500, 3000, 9000, 20_000, 40_000)) + draw.randint(0, 400)
        child = Child(_words(run), unbroken.folder, **how)
        if way == "timed":
            time.sleep(draw.uniform(0.1, 4))
            child.process.kill()
        code = child.end()
        if code >= 0:
            return kills, [*said, *([f"ended with {code}: {child.said}"] if code else wrong(run, truth))]
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ)
        kills += 1
        said += torn(run) if run.exists() else []
    child = Child(_words(run), unbroken.folder, **told)
    code = child.end()
    said += wrong(run, truth) if code == 0 else [f"ended with {code}: {child.said}"]
    if not said:
        shutil.rmtree(run)
    return kills, said


def _words(run: Any) -> list[Any]:
    """What a user would type: go on with what is there, or begin."""
    return ["resume", run.name] if (run / "config.yaml").exists() else ["train", "run.yaml", "--out", run.name]


@pytest.mark.parametrize("number", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(unbroken: Unbroken, number: int) -> None:
    assert chain(unbroken, number)[1] == []


@pytest.mark.slow
def test_seventy_kills(unbroken: Unbroken) -> None:
    kills, faults, number = 0, [], 2
    while kills < 70:
        count, said = chain(unbroken, number)
        kills, number = kills + count, number + 1
        faults += [f"chain {number - 1}: {each}" for each in said]
    print(f"{number - 2} chains, {kills} kills, {len(faults)} faults")
    assert faults == []
