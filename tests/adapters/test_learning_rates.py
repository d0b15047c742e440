"""The table of learning rates: it has every kind, and each kind learns at its own on the embedded base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import graft
from graft.adapters.learning_rates import LEARNING_RATES, OTHERWISE, learning_rate
from graft.adapters.parsing import parse
from graft.adapters.registry import by_name_alone
from graft.config import load_run
from graft.quickstart.problems import generate
from graft.training import train

ADAPTERS = {kind: {"kind": kind} for kind in LEARNING_RATES if kind not in ("bitfit", "head")}
ADAPTERS["full"] = {"kind": "full", "sites": "linear"}


def test_every_kind_has_a_rate_and_a_stack_takes_the_smallest() -> None:
    assert set(LEARNING_RATES) == set(by_name_alone())
    assert learning_rate(parse([{"kind": "prompt"}, {"kind": "lora"}])) == LEARNING_RATES["lora"]
    assert all(learning_rate(parse(name)) in LEARNING_RATES.values() for name in graft.presets())
    assert OTHERWISE == 3e-4


def losses(
    folder: Path, adapter: dict[str, str], rates: dict[str, float], steps: int
) -> dict[str, tuple[float, float]]:
    """Return the losses of the first and last few steps on word problems, by the name of the rate."""
    data = folder / "data.jsonl"
    rows = [{"prompt": each["instruction"], "completion": each["output"]} for each in generate("train", 240)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = load_run(
        {
            "base": {"model": "seedling", "dtype": "float32", "device": "cpu"},
            "data": {"train": str(data), "template": "chat", "cache": False},
            "train": {"steps": steps, "batch_size": 4, "schedule": "constant"},
            "jobs": {name: {"adapter": adapter, "train": {"lr": rate}} for name, rate in rates.items()},
        }
    )  # fmt: skip
    lines = train(run, folder / "run", quiet=True).metrics.read()
    found = {
        name: [line["loss"] for line in lines if line.get("job", name) == name and "loss" in line] for name in rates
    }
    return {name: (sum(each[:3]) / 3, sum(each[-5:]) / 5) for name, each in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_kind_learns_at_its_own_rate(tmp_path: Path, kind: str) -> None:
    first, last = losses(tmp_path, ADAPTERS[kind], {"own": LEARNING_RATES[kind]}, steps=40)["own"]
    assert last < first - 0.5
