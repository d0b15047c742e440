"""`graft eval` and `graft predict` in several processes give what one process gives, to the last bit, and go on in any number of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graft.evaluation import tasks
from tests.runs_at_hand import make_run, write_rows

ADAPTERS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 2, "sites": "attn.q mlp.down"},
    "series": {"kind": "series", "bottleneck": 4},
}
ROWS = [{"question": f"What is {n} plus {n}?" * (1 + n % 3), "answer": f"#### {2 * n}"} for n in range(12)]
JOBS = """
base: {model: math-base}
data: {train: asked.jsonl, template: plain, validation: 2}
train: {steps: 4, batch_size: 4}
jobs:
  a: {adapter: {kind: lora, rank: 2, sites: attn.q}, train: {batch_size: 6}}
  b: {adapter: {kind: series, bottleneck: 4}}
"""
SMALL = ("--token-budget", "150", "--max-new-tokens", "6")
"""Options that make many batches."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_run(tmp_path_factory.mktemp("runs") / "math", ADAPTERS)
    write_rows(made.parent / "asked.jsonl", ROWS)
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "no"} for row in ROWS]
    write_rows(made.parent / "pairs.jsonl", pairs)
    (made.parent / "piqa").mkdir()
    write = tasks.get("piqa").wording.write  # type: ignore[union-attr]
    piqa = [
        {"instruction": write(f"What is {n}?", (str(n), "a needle")), "answer": f"solution{1 + n % 2}"}
        for n in range(70)
    ]
    (made.parent / "piqa" / "test.json").write_text(json.dumps(piqa))
    return made


def started(run: Path, *words: object) -> subprocess.Popen[str]:
    """The command line, one thread a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "graft", *map(str, words)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=run.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it wrote to stdout, or to stderr where it fails."""
    out, said = process.communicate(timeout=240)
    assert process.returncode == code, out + said
    return said if code else out


def answers(folder: Path) -> list[dict[str, Any]]:
    """The lines of answers.jsonl by candidate and question; there are no parts beside it."""
    (path,) = folder.glob("*/answers.jsonl*")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["contestant"], line["number"]))


def result(folder: Path) -> dict[str, Any]:
    """result.json without what depends on the clock and on earlier commands."""
    (path,) = folder.glob("*/result.json")
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "continued_from")}


WAYS = {
    "questions": ("--data", "asked.jsonl", *SMALL),
    "beams": ("--data", "asked.jsonl", *SMALL, "--beams", "2"),
    "pairs": ("--data", "pairs.jsonl", "--token-budget", "150"),
    "choices": ("--tasks", "piqa", "--data", ".", "--protocol", "rank"),
}


@pytest.mark.parametrize(
    "name", ["questions", *(pytest.param(each, marks=pytest.mark.slow) for each in WAYS if each != "questions")]
)
def test_two_processes_write_the_results_of_one(run: Path, tmp_path: Path, name: str) -> None:
    way = WAYS[name]
    one, two = (started(run, "eval", run, *way, "--out", tmp_path / str(n), "--json", "--processes", n) for n in (1, 2))
    shown = json.loads(ended(two))
    ended(one)
    assert answers(tmp_path / "1") == answers(tmp_path / "2")
    assert result(tmp_path / "1") == result(tmp_path / "2")
    shown = shown["tasks"][0] if "tasks" in shown else shown
    assert shown["results"] == result(tmp_path / "2")["results"]


@pytest.mark.slow
def test_an_evaluation_whose_process_dies_goes_on_in_another_number_of_them(run: Path, tmp_path: Path) -> None:
    way = ("eval", run, "--data", "asked.jsonl", "--token-budget", 40, "--max-new-tokens", 8)
    process = started(run, *way, "--out", tmp_path / "killed", "--processes", 3)
    until = time.monotonic() + 120
    while time.monotonic() < until and sum(map(count_lines, tmp_path.glob("killed/*/answers.jsonl*"))) < 4:
        time.sleep(0.01)
    (rank, *_) = children(process.pid)
    os.kill(rank, signal.SIGKILL)
    said = ended(process, 128 + signal.SIGKILL)
    assert "was ended by SIGKILL" in said and "Traceback" not in said
    before = sum(map(count_lines, tmp_path.glob("killed/*/answers.jsonl*")))
    assert 4 <= before < len(ROWS) * 3 and not list(tmp_path.glob("killed/*/result.json"))
    kept = json.loads(ended(started(run, *way, "--out", tmp_path / "killed", "--processes", 2, "--json")))
    assert kept["continued_from"] == before
    ended(started(run, *way, "--out", tmp_path / "one"))
    assert answers(tmp_path / "killed") == answers(tmp_path / "one")  # every question is a batch of its own


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["spread", "ddp", "fsdp2"])
def test_a_check_measures_a_step_on_every_process(run: Path, tmp_path: Path, mode: str) -> None:
    (run.parent / "jobs.yaml").write_text(JOBS)
    words = ("check", "jobs.yaml", "--processes", 2, f"distributed.mode={mode}", "--json")
    jobs = json.loads(ended(started(run, *words)))["jobs"]
    each = [sorted(job["ranks"]) for job in jobs.values()]
    assert each == [["0"], ["1"]] if mode == "spread" else each == [["0", "1"]] * 2
    for job in jobs.values():
        assert job["dealt"].startswith(f"2 processes, {mode}") and job["problems"] == []
        assert all(
            trial["peak_bytes"] > 1e8 and trial["tokens"] / trial["seconds"] > 1 for trial in job["ranks"].values()
        )
    alone = json.loads(ended(started(run, "check", "jobs.yaml", "--json")))["jobs"]
    for name, job in jobs.items():
        assert job["trial"]["loss"] == pytest.approx(alone[name]["trial"]["loss"], rel=1e-6)
        assert (job["trial"]["memory"]["weights"] < alone[name]["trial"]["memory"]["weights"]) == (mode == "fsdp2")


@pytest.mark.slow
def test_predictions_of_two_processes_are_those_of_one(run: Path, tmp_path: Path) -> None:
    words = ("predict", run, "asked.jsonl", "--use", "lora", *SMALL)
    for n in (1, 2):
        ended(started(run, *words, "--out", tmp_path / f"{n}.jsonl", "--processes", n))
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("eval", "--harness", "arc_easy"), "lm-eval asks itself"),
        (("predict", "asked.jsonl"), "name it with --out"),
        (("eval", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_what_is_wrong_is_said_once(run: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    verb, *more = words
    wrong = ended(started(run, verb, run, *more, "--processes", 2), 2)
    assert said in wrong and len(wrong.strip().splitlines()) == 1, wrong


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def children(parent: int) -> list[int]:
    """The ranks that a launcher started."""
    found = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return [each for each in found if b"\0RANK=" in Path(f"/proc/{each}/environ").read_bytes()]
