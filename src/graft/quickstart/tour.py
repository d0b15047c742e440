"""The tour: four kinds of adapter learn word problems on the embedded base, and are measured on problems they never saw.

What it leaves behind are ordinary run folders: `graft chat`, `graft show` and `graft eval` take them like any other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graft
from graft.config import load_run
from graft.config.schema import BaseConfig, EvalConfig
from graft.errors import GraftError
from graft.evaluation.contestants import assemble
from graft.evaluation.evaluating import evaluate_on
from graft.quickstart.problems import generate
from graft.runs import RunFolder
from graft.training import train

Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    rows: int
    heldout: int
    steps: int


FULL = Size(rows=7040, heldout=250, steps=220)
TINY = Size(rows=64, heldout=8, steps=6)
"""For tests: shows that everything runs, not that it learns."""
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 16, "alpha": 32, "sites": "linear"},
    "series": {"kind": "series", "bottleneck": 64, "sites": "attn mlp"},
    "parallel": {"kind": "parallel", "bottleneck": 64, "sites": "attn mlp"},
    "prefix": {"kind": "prefix", "tokens": 16},
}
LEARNING_RATES = {"lora": 3e-3, "series": 3e-3, "parallel": 6e-3, "prefix": 3e-2}


@dataclass(frozen=True)
class Tour:
    """What the tour found."""

    result: dict[str, Any]
    """Accuracy and interval of base and adapters, as `graft eval` gives them."""
    parameters: dict[str, int]
    """Of each adapter."""
    runs: dict[str, RunFolder]
    seconds: float


def take_tour(out: Path, *, tiny: bool = False, overwrite: bool = False, say: Say = lambda text: None) -> Tour:
    """Write the problems, train each adapter into out/<name>, and evaluate them with the bare base in one pass.

    Raises `GraftError` for a folder that holds something already, unless `overwrite`.
    """
    start = time.perf_counter()
    size = TINY if tiny else FULL
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise GraftError(f"{out} is not empty: choose another folder with --out, or add --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.jsonl" for name in ("train", "heldout")}
    files["train"].write_text(_lines(generate("train", size.rows)), encoding="utf-8")
    files["heldout"].write_text(_lines(generate("heldout", size.heldout)), encoding="utf-8")
    runs = {}
    for name in ADAPTERS:
        say(f"Training {name} ({size.steps} steps)")
        runs[name] = train(
            load_run(run_mapping(name, files["train"], size), ()), out / name, overwrite=overwrite, quiet=True
        )
    say(f"Asking the base and {len(runs)} adapters {size.heldout} new problems")
    adapters = [f"{name}={run.adapter_dir(run.adapters()[0])}" for name, run in runs.items()]
    bench = assemble(base=BaseConfig(model="seedling"), adapters=adapters)
    settings = EvalConfig(max_new_tokens=40, metric="numeric")
    result = evaluate_on(bench, files["heldout"], out / "eval", settings=settings)
    return Tour(result, graft.summary(bench.base.model).adapter_parameters, runs, time.perf_counter() - start)


def run_mapping(name: str, data: Path, size: Size) -> dict[str, Any]:
    """The run of one adapter, as its YAML would say it."""
    return {
        "base": {"model": "seedling", "dtype": "float32"},
        "adapter": ADAPTERS[name],
        "data": {"train": str(data), "template": "chat", "max_length": 128},
        "train": {
            "steps": size.steps,
            "batch_size": 32,
            "lr": LEARNING_RATES[name],
            "schedule": "cosine",
            "warmup": 0.05,
        },
    }


def _lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps({"instruction": row["instruction"], "output": row["output"]}) + "\n" for row in rows)
