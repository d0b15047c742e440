"""The tour: four kinds of adapter learn word problems on the embedded base, and are measured on problems they never saw.

The four are jobs of one run: each step takes the rows of all through one pass over the base. What the tour leaves behind is an ordinary run
folder: `graft chat`, `graft show` and `graft eval` take it like any other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.attaching.summary import summary
from graft.config import load_run
from graft.errors import GraftError
from graft.evaluation.evaluating import Bars, evaluate_on
from graft.generation.loaded import load_candidates
from graft.quickstart.problems import generate
from graft.runs.folder import RunFolder
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
JOBS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 16, "alpha": 32, "sites": "linear"}, "train": {"lr": 3e-3}},
    "series": {"adapter": {"kind": "series", "bottleneck": 64, "sites": "attn mlp"}, "train": {"lr": 3e-3}},
    "parallel": {"adapter": {"kind": "parallel", "bottleneck": 64, "sites": "attn mlp"}, "train": {"lr": 6e-3}},
    "prefix": {"adapter": {"kind": "prefix", "tokens": 16, "init_std": 1.0}, "train": {"lr": 0.6}},
}
"""A prefix starts and moves at the size of the keys that it stands beside: with small numbers and steps attention hardly notices it."""


@dataclass(frozen=True)
class Tour:
    """What the tour found."""

    result: dict[str, Any]
    """Accuracy and interval of base and adapters, as `graft eval` gives them."""
    parameters: dict[str, int]
    """Of each adapter."""
    run: RunFolder
    seconds: float


def run_tour(
    out: Path, *, tiny: bool = False, overwrite: bool = False, quiet: bool = False,
    say: Say = lambda text: None, bars: Bars = lambda title: nullcontext(),
) -> Tour | None:  # fmt: skip
    """Write the problems, train the adapters as the jobs of out/run, and evaluate them with the bare base in one pass.

    None where the user stopped the training. `quiet`: training shows nothing. Raises `GraftError` for a folder that holds something
    already, unless `overwrite`, and for jobs that fail.
    """
    start = time.perf_counter()
    size = TINY if tiny else FULL
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise GraftError(f"{out} is not empty: choose another folder with --out, or add --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}.jsonl" for name in ("train", "heldout")}
    files["train"].write_text(_lines(generate("train", size.rows)), encoding="utf-8")
    files["heldout"].write_text(_lines(generate("heldout", size.heldout)), encoding="utf-8")
    say(f"Training {len(JOBS)} adapters together on {size.rows:,} word problems, {size.steps} steps each")
    run = train(load_run(run_mapping(files["train"], size), ()), out / "run", overwrite=overwrite, quiet=quiet)
    if not _ended(run):
        return None
    say(f"Asking the base and {len(JOBS)} adapters {size.heldout} new problems")
    loaded = load_candidates(run)
    with bars("answers") as progress:
        result = evaluate_on(loaded, files["heldout"], run.path / "eval", progress=progress)
    return Tour(result, summary(loaded.base.model).adapter_parameters, run, time.perf_counter() - start)


def run_mapping(data: Path, size: Size) -> dict[str, Any]:
    """The run of all four, as its YAML would say it."""
    return {
        "base": {"model": "seedling", "dtype": "float32"},
        "data": {"train": str(data), "template": "chat", "max_length": 128},
        "train": {"steps": size.steps, "batch_size": 32, "schedule": "cosine", "warmup": 0.05},
        "eval": {"max_new_tokens": 40, "metric": "numeric"},
        "jobs": JOBS,
    }


def _ended(run: RunFolder) -> bool:
    """Whether all jobs came to their end; False where the user stopped them."""
    status = run.read_status()
    wrong = [f"{name}: {job['error']}" for name, job in status["jobs"].items() if job["ended"] == "failed"]
    if wrong:
        raise GraftError(f"the run in {run.path} failed: {'; '.join(wrong)}")
    return status["state"] == "finished"


def _lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps({"instruction": row["instruction"], "output": row["output"]}) + "\n" for row in rows)
