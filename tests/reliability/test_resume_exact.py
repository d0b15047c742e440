"""A job that was set aside in the run folder computes afterwards what it would have computed in memory, for several kinds and steps."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.reliability.processes import graft
from tests.reliability.runs import taken, write_run

LORA, PREFIX = (
    {"kind": "lora", "rank": 2, "dropout": 0.2, "sites": "attn.q"},
    {"kind": "prefix", "tokens": 3, "projection": 8},
)
SECOND = {
    "lora": LORA,
    "prefix": PREFIX,
    "stack": [LORA, PREFIX],
    "series": {"kind": "series", "bottleneck": 8, "dropout": 0.1, "sites": "mlp"},
    "gate": {"kind": "gate", "of": LORA, "per": "token"},
    "mixture": {"kind": "mixture", "of": LORA, "share": "up"},
    "mixphm": {
        "kind": "mixture",
        "of": {
            "kind": "series",
            "bottleneck": 8,
            "hidden_dropout": 0.5,
            "redundancy": 1e-3,
            "information": 0.1,
            "sites": "mlp",
        },
        "share": "down",
    },
    "sum": {"kind": "sum", "of": [LORA, {"kind": "series", "bottleneck": 4, "dropout": 0.1, "sites": "attn.q"}]},
    "dora": {"kind": "dora", "rank": 3, "sites": "linear"},
    "reft": {"kind": "reft", "rank": 2, "sites": "layer"},
    "compacter": {"kind": "compacter", "bottleneck": 8, "sites": "mlp"},
    "everywhere": {"kind": "lora", "rank": 5, "dropout": 0.1, "sites": "linear"},
}
FAST = [("stack", 5)]


def killed(folder: Path, name: str, steps: list[int]) -> list[int]:
    """Kill a run of two jobs, of which one waits, after each of these steps; those behind which it goes on otherwise."""
    write_run(folder)
    config = {
        "base": {"model": "seedling", "device": "cpu"},
        "data": {"train": "d.jsonl", "validation": 4, "template": "plain", "cache": False},
        "train": {"steps": 4, "batch_size": 2, "lr": 3e-3, "save_every": 1, "keep": 3},
        "jobs": {"first": {"adapter": "ia3"}, "second": {"adapter": SECOND[name], "train": {"seed": 14}}},
        "scheduler": {"resident": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    assert graft(["train", "run.yaml", "--out", "truth"], folder)[0] == 0
    differing = []
    for step in steps:
        run = f"killed-{step}"
        assert graft(["train", "run.yaml", "--out", run], folder, kill_after=step)[0] == -signal.SIGKILL
        code, said = graft(["resume", run], folder)
        assert code == 0, said
        if taken(folder / run) != taken(folder / "truth"):
            differing.append(step)
    return differing


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), FAST)
def test_a_job_that_was_set_aside_goes_on_bit_for_bit(tmp_path: Path, name: str, step: int) -> None:
    assert killed(tmp_path, name, [step]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SECOND)
def test_after_every_step(tmp_path: Path, name: str) -> None:
    assert killed(tmp_path, name, list(range(1, 8))) == []
