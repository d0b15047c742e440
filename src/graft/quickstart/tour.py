"""The tour: four kinds of adapters learn word problems on the embedded base, and are evaluated on problems that they have not seen.

The four are jobs of one run: each step takes the rows of all jobs through the base in one forward pass. The tour writes an ordinary run
folder, so `graft chat`, `graft show` and `graft eval` work on it.
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
    """The size of a tour: training rows, held-out problems, and steps of each job."""

    rows: int
    heldout: int
    steps: int


FULL = Size(rows=7040, heldout=250, steps=220)
TINY = Size(rows=64, heldout=8, steps=6)
"""For tests: it shows that everything runs, not that anything is learnt."""
JOBS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 16, "alpha": 32, "sites": "linear"}, "train": {"lr": 3e-3}},
    "series": {"adapter": {"kind": "series", "bottleneck": 64, "sites": "attn mlp"}, "train": {"lr": 3e-3}},
    "parallel": {"adapter": {"kind": "parallel", "bottleneck": 64, "sites": "attn mlp"}, "train": {"lr": 6e-3}},
    "prefix": {"adapter": {"kind": "prefix", "tokens": 16, "init_std": 1.0}, "train": {"lr": 0.6}},
}
"""The prefix needs a large start and a large lr: attention compares it with the keys of the base, and hardly notices small numbers."""


@dataclass(frozen=True)
class Tour:
    """The results of the tour."""

    result: dict[str, Any]
    """Accuracy and interval of base and adapters, as `graft eval` returns them."""
    parameters: dict[str, int]
    """The number of parameters of each adapter."""
    run: RunFolder
    seconds: float


def run_tour(
    out: Path, *, tiny: bool = False, overwrite: bool = False, quiet: bool = False,
    say: Say = lambda text: None, bars: Bars = lambda title: nullcontext(),
) -> Tour | None:  # fmt: skip
    """Write the problems, train the adapters as the jobs of out/run, and evaluate them together with the base alone.

    Returns None if the user stopped the training. quiet: show no progress of the training. Raises `GraftError` for a folder that is not
    empty (unless `overwrite`), and if a job fails.
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
    if not _finished(run):
        return None
    say(f"Asking the base and {len(JOBS)} adapters {size.heldout} new problems")
    loaded = load_candidates(run)
    with bars("answers") as progress:
        result = evaluate_on(loaded, files["heldout"], run.path / "eval", progress=progress)
    return Tour(result, summary(loaded.base.model).adapter_parameters, run, time.perf_counter() - start)


def run_mapping(data: Path, size: Size) -> dict[str, Any]:
    """Return the run of all four jobs, as its YAML would have it."""
    return {
        "base": {"model": "seedling", "dtype": "float32"},
        "data": {"train": str(data), "template": "chat", "max_length": 128},
        "train": {"steps": size.steps, "batch_size": 32, "schedule": "cosine", "warmup": 0.05},
        "eval": {"max_new_tokens": 40, "metric": "numeric"},
        "jobs": JOBS,
    }


def _finished(run: RunFolder) -> bool:
    """Whether all jobs have finished; False if the user stopped them. Raises `GraftError` if a job failed."""
    status = run.read_status()
    failed = [f"{name}: {job['error']}" for name, job in status["jobs"].items() if job["ended"] == "failed"]
    if failed:
        raise GraftError(f"the run in {run.path} failed: {'; '.join(failed)}")
    return status["state"] == "finished"


def _lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps({"instruction": row["instruction"], "output": row["output"]}) + "\n" for row in rows)
