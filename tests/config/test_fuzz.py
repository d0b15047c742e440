"""`graft check` on broken runs: each ends with a word and exit 2, or is a run that trains."""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from pathlib import Path

import pytest

from graft.cli import main
from graft.config import load_run
from graft.errors import GraftError
from tests.config.broken_yaml import broken_runs
from tests.small import save_small

SECONDS = 60.0
"""A check that takes longer counts as a hang."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_small(folder / "base")
    rows = [{"instruction": f"Add {number} to it", "output": f"It is {number}"} for number in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Return the exit code of a call and what it said on stderr."""
    try:
        main(arguments)
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    except BaseException as error:  # a fault: everything ends in SystemExit
        return type(error).__name__, capsys.readouterr().err
    return None, capsys.readouterr().err


def fuzz(world: Path, capsys: pytest.CaptureFixture[str], seed: int, count: int, trained_every: int) -> Counter[str]:
    """Check broken runs and count the outcomes; train some that are accepted. Faults are counted under the words that tell them."""
    found: Counter[str] = Counter()
    here = Path.cwd()
    os.chdir(world)
    try:
        for number, (content, changes) in enumerate(broken_runs(seed, count, "base", "train.jsonl")):
            (world / "run.yaml").write_bytes(content)
            start = time.monotonic()
            code, said = outcome(["check", "run.yaml", *changes], capsys)
            took = time.monotonic() - start
            if code not in (0, 2) or "Traceback" in said or (code == 2 and not said.strip() and not changes):
                found[f"fault {number}: exit {code}, {changes}: {said.strip()[-300:]}"] += 1
            if took > SECONDS:
                found[f"fault {number}: {took:.0f} seconds, {changes}"] += 1
            found["accepted" if code == 0 else "refused"] += 1
            if code == 0 and found["accepted"] % trained_every == 0:
                code, said = outcome(["train", "run.yaml", *changes, "train.steps=2", "--out", f"run-{number}"], capsys)
                if code != 0 and "is not finite" not in said:
                    found[
                        f"fault {number}: accepted, but training ends with {code}, {changes}: {said.strip()[-300:]}"
                    ] += 1
                found["trained"] += 1
    finally:
        os.chdir(here)
    return found


def faults(found: Counter[str]) -> list[str]:
    return [text for text in found if text.startswith("fault")]


def test_broken_runs_end_with_a_word(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fuzz(world, capsys, seed=0, count=40, trained_every=5)
    assert not faults(found), "\n".join(faults(found))
    assert found["accepted"] and found["refused"]


def test_reading_a_broken_run_raises_nothing_else(tmp_path: Path) -> None:
    for content, changes in broken_runs(1, 300, "base", "train.jsonl"):
        (tmp_path / "run.yaml").write_bytes(content)
        try:
            load_run(tmp_path / "run.yaml", changes)
        except GraftError as error:
            assert str(error).strip()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_thousand_broken_runs(world: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, before[1]))  # a fault must not take the machine with it
    try:
        found = fuzz(world, capsys, seed=10 + seed, count=300, trained_every=4)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    with capsys.disabled():
        print({name: number for name, number in found.items() if not name.startswith("fault")})
    assert not faults(found), "\n".join(faults(found))
