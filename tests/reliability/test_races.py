"""What else happens to a run while it trains: a second process, signals, a reader that goes away, a folder that moves, a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.conftest import Unbroken
from tests.reliability.processes import Child, graft
from tests.reliability.runs import torn, wrong

TRAIN = ["train", "run.yaml", "--out"]


@pytest.fixture
def place(unbroken: Unbroken, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A run folder that is not there yet, beside the unbroken run."""
    unbroken.of(False)
    run = unbroken.folder / request.node.name.translate(str.maketrans("[] ", "---"))
    yield run
    shutil.rmtree(run, ignore_errors=True)


def slow(run: Path, words: list[Any] | None = None, step: int = 4, pause: float = 0.15, **how: Any) -> Child:
    """A run that pauses before each step, once it has taken so many."""
    child = Child(words or [*TRAIN, run.name], run.parent, pause=pause, **how)
    wait_for(run, step)
    return child


def wait_for(run: Path, step: int) -> None:
    until = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < until, "the run does not get there"
        time.sleep(0.02)


def killed(run: Path) -> None:
    """A run that was killed after its fourth step."""
    child = slow(run)
    child.process.kill()
    assert child.end() == -signal.SIGKILL


def state(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def resumed(run: Path, unbroken: Unbroken) -> list[str]:
    """What is wrong after `graft resume`."""
    code, said = graft(["resume", run.name], run.parent)
    return [f"resume ends with {code}: {said}"] if code else wrong(run, unbroken.of(False))


@pytest.mark.parametrize(
    "gap", [0.0, pytest.param(0.3, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_of_two_trainings_in_one_folder_one_trains(unbroken: Unbroken, place: Path, gap: float) -> None:
    first = Child([*TRAIN, place.name], place.parent)
    time.sleep(gap)
    second = Child([*TRAIN, place.name], place.parent)
    ends = {first.end(): first, second.end(): second}
    # the second finds the other at work, or what it left
    refusals = ("another process trains in this folder", "already holds a run")
    assert sorted(ends) == [0, 2] and any(each in ends[2].said for each in refusals)
    assert wrong(place, unbroken.of(False)) == []


@pytest.mark.slow
@pytest.mark.parametrize("gap", [0.0, 0.3])
def test_of_two_resumes_one_goes_on(unbroken: Unbroken, place: Path, gap: float) -> None:
    killed(place)
    first = Child(["resume", place.name], place.parent)
    time.sleep(gap)
    second = Child(["resume", place.name], place.parent)
    codes = sorted((first.end(), second.end()))
    assert codes == [0, 2] or (codes == [0, 0] and "nothing to resume" in first.said + second.said)
    assert wrong(place, unbroken.of(False)) == []


@pytest.mark.slow
def test_a_run_that_trains_is_neither_resumed_nor_overwritten_and_can_be_read(unbroken: Unbroken, place: Path) -> None:
    child = slow(place, step=2, pause=2.0)  # it is still at work when the last of the others has started
    for words in (
        ["resume", place.name],
        [*TRAIN, place.name, "--overwrite"],
        [*TRAIN, place.name, "--overwrite", "--force"],
    ):
        code, said = graft(words, place.parent)
        assert code == 2 and "is still running" in said
    for words in (["show", place.name], ["show", "."], ["jobs", "list", place.name]):
        assert graft(words, place.parent)[0] == 0
    assert child.end() == 0 and wrong(place, unbroken.of(False)) == []


@pytest.mark.parametrize(
    "sent",
    [
        (signal.SIGHUP,),
        pytest.param((signal.SIGTERM,), marks=pytest.mark.slow),
        pytest.param((signal.SIGINT,), marks=pytest.mark.slow),
        pytest.param((signal.SIGHUP, signal.SIGHUP), marks=pytest.mark.slow),
    ],
    ids=lambda sent: "-".join(each.name for each in sent),
)
def test_a_signal_stops_a_run_with_everything_saved(
    unbroken: Unbroken, place: Path, sent: tuple[signal.Signals, ...]
) -> None:
    child = slow(place)
    for each in sent:
        child.send(each)
        time.sleep(0.01)
    assert child.end() == 130 and state(place)["state"] == "stopped"
    assert resumed(place, unbroken) == []


@pytest.mark.slow
def test_a_second_signal_ends_at_once_and_the_status_says_so(unbroken: Unbroken, place: Path) -> None:
    child = slow(place, step=2)
    for _ in range(2):
        child.send(signal.SIGINT)
        time.sleep(0.01)
    assert child.end() in (1, 130) and state(place)["state"] == "failed"
    assert resumed(place, unbroken) == []


@pytest.mark.slow
def test_a_signal_before_the_first_step_leaves_nothing(unbroken: Unbroken, place: Path) -> None:
    child = Child([*TRAIN, place.name], place.parent)
    time.sleep(0.4)
    child.send(signal.SIGINT)
    child.process.join(60)
    words = ["resume", place.name] if (place / "config.yaml").exists() else [*TRAIN, place.name]
    assert graft(words, place.parent)[0] == 0 and wrong(place, unbroken.of(False)) == []


@pytest.mark.parametrize("when", [pytest.param("from the start", marks=pytest.mark.slow), "in between"])
def test_a_run_goes_on_when_nobody_reads_what_it_says(unbroken: Unbroken, place: Path, when: str) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    script = f"cd {place.parent} && exec {_python()} -m graft {' '.join(TRAIN)} {place.name}"
    process = subprocess.Popen(["bash", "-c", script], stdout=write, stderr=write)
    os.close(write)
    if when == "in between":
        while not (place / "checkpoints/000001").exists() and process.poll() is None:
            time.sleep(0.02)
    os.close(read)
    assert process.wait(300) == 0 and state(place)["state"] == "finished"
    assert wrong(place, unbroken.of(False)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "who", [{"host": "another-node"}, {"pid": os.getpid()}, {"host": "another-node", "pid": 1}], ids=str
)
def test_a_killed_run_goes_on_whatever_its_status_names(unbroken: Unbroken, place: Path, who: dict[str, Any]) -> None:
    killed(place)
    (place / "status.json").write_text(json.dumps({**state(place), **who}))
    assert resumed(place, unbroken) == []


@pytest.mark.slow
def test_a_folder_that_moves_or_goes_is_named(unbroken: Unbroken, place: Path) -> None:
    child = slow(place)
    moved = place.rename(place.with_name(f"{place.name}-moved"))
    assert child.end() == 2 and "was moved or deleted while its run trained" in child.said
    shutil.rmtree(place, ignore_errors=True)
    assert resumed(moved, unbroken) == []
    child = slow(place)
    shutil.rmtree(place.rename(place.with_name(f"{place.name}-gone")))
    assert child.end() == 2 and "was moved or deleted while its run trained" in child.said


@pytest.mark.slow
@pytest.mark.parametrize("limit", [300, 3000, 30_000, 60_000])
def test_a_full_disk_ends_in_a_word_and_the_run_goes_on_later(unbroken: Unbroken, place: Path, limit: int) -> None:
    """Every file stops growing at a limit, as on a disk that is full."""
    child = Child([*TRAIN, place.name], place.parent, limit=limit)
    assert child.end() in (0, 2) and not torn(place)
    words = ["resume", place.name] if (place / "config.yaml").exists() else [*TRAIN, place.name]
    assert graft(words, place.parent)[0] == 0 and wrong(place, unbroken.of(False)) == []


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("free", [8, 40, 120, 200, 280, 360, 440, 520])
def test_a_small_disk(unbroken: Unbroken, place: Path, free: int, tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        (tmp_path / "filler").write_bytes(bytes((1024 - free) * 1024))
        child = Child([*TRAIN, tmp_path / "run"], place.parent)
        code = child.end()
        assert code == 0 or (code == 2 and "the disk is full" in child.said)
        assert not (tmp_path / "run").exists() or not torn(tmp_path / "run")
        (tmp_path / "filler").unlink()
        if (tmp_path / "run").exists():
            shutil.copytree(tmp_path / "run", place)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    words = ["resume", place.name] if (place / "config.yaml").exists() else [*TRAIN, place.name]
    assert graft(words, place.parent)[0] == 0 and wrong(place, unbroken.of(False)) == []


@pytest.mark.slow
def test_commands_of_six_processes_are_all_taken_once(place: Path) -> None:
    (place.parent / "late.yaml").write_text("adapter: {kind: lora, rank: 2}\ntrain: {steps: 1}\n")
    child = slow(place, step=2)
    givers = [
        Child(["jobs", "submit", place.name, "late.yaml", "--name", f"job{number}"], place.parent)
        for number in range(6)
    ]
    assert [giver.end() for giver in givers] == [0] * 6
    assert child.end() == 0 and graft(["resume", place.name], place.parent)[0] == 0
    journal = [json.loads(line)["job"] for line in (place / "jobs/journal.jsonl").read_text().splitlines()]
    assert sorted(journal) == [f"job{number}" for number in range(6)]
    assert len(list(place.glob("adapters/job*/adapter_model.safetensors"))) == 6
    assert not list((place / "jobs/inbox").iterdir())


def _python() -> str:
    import sys

    return sys.executable
