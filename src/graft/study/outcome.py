"""What the run folder of a joint run says of each trial: its scores, its curves, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from graft.runs.folder import RunFolder

MOST_POINTS = 200
"""Most points of a learning curve that are kept."""
Outcome = tuple[str, dict[str, Any] | None, str | None]
"""(state, result, error)"""


def outcomes(folder: RunFolder, jobs: Sequence[str]) -> dict[str, Outcome]:
    """Return state, result and error of each job of a joint run that has ended."""
    status = folder.read_status().get("jobs", {})
    metrics = folder.metrics.read()
    tokens = {name: sum(line.get("tokens", 0) for line in metrics if line["job"] == name) for name in jobs}
    seconds = {line["step"]: line["seconds"] for line in metrics if "seconds" in line}
    total, spent = max(1, sum(tokens.values())), sum(seconds.values())
    peak = max((line["memory_bytes"] for line in metrics if "memory_bytes" in line), default=None)
    found: dict[str, Outcome] = {}
    for name in jobs:
        own = status.get(name, {})
        lines = [line for line in metrics if line["job"] == name]
        if own.get("ended") in ("failed", None):
            found[name] = ("failed", None, str(own.get("error") or "the run ended before this trial did"))
            continue
        result = {
            **_scores(lines, own.get("best")),
            "ended": own["ended"],
            "steps": own["step"],
            "parameters": _parameters(folder, name),
            "tokens": tokens[name],
            "seconds": spent * tokens[name] / total,
            "joint_seconds": spent,
            "joint_trials": len(jobs),
            "peak_bytes": peak,
            "curve": _thinned([(line["job_step"], line["loss"]) for line in lines if "loss" in line]),
            "validations": [(line["job_step"], line["validation_loss"]) for line in lines if "validation_loss" in line],
            "folder": str(folder.path.name),
        }
        unusable = [key for key in ("loss", "validation_loss") if not math.isfinite(float(result.get(key) or 0.0))]
        found[name] = (
            ("failed", None, f"its {unusable[0].replace('_', ' ')} is not finite")
            if unusable
            else ("done", result, None)
        )
    return found


def _scores(lines: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> dict[str, Any]:
    """The scores of the weights that the trial leaves: those of its best validation."""
    steps = [line for line in lines if "loss" in line]
    validated = [line for line in lines if "validation_loss" in line]
    chosen = next((line for line in reversed(validated) if best and line["job_step"] == best["step"]), None)
    chosen = chosen or (validated[-1] if validated else {})
    scores = {key: value for key, value in chosen.items() if key.startswith(("validation_", "answer_"))}
    return {"loss": float(steps[-1]["loss"]) if steps else None, "best_step": best and best["step"], **scores}


def _parameters(folder: RunFolder, name: str) -> int:
    """The number of values that a trial trained."""
    place = folder.adapter_dir(name)
    files = [place] if place.is_dir() else [folder.model_dir]
    return sum(_count(path) for each in files for path in sorted(each.glob("*.safetensors")))


def _count(path: Path) -> int:
    with safe_open(path, "numpy") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """A curve with at most `MOST_POINTS` points, its last one among them."""
    if len(points) <= MOST_POINTS:
        return points
    every = math.ceil(len(points) / MOST_POINTS)
    return points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
