"""The tour in one plot: the losses in training, and the share of new problems that each adapter solves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graft.errors import require
from graft.quickstart.tour import JOBS, Tour

SMOOTH = 0.9
"""Weight of the previous value in the running mean of the loss."""


def plot_tour(tour: Tour, path: Path) -> Path:
    """Write the plot as a PNG file and return its path. Raises `MissingExtra` without matplotlib."""
    require("matplotlib", "report").use("Agg")
    pyplot = require("matplotlib.pyplot", "report")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = {name: f"C{number}" for number, name in enumerate(JOBS)}
    lines = [line for line in tour.run.metrics.read() if "loss" in line]
    for name, colour in colours.items():
        own = [(line["job_step"], line["loss"]) for line in lines if line["job"] == name]
        steps, losses = zip(*own, strict=True)
        left.plot(steps, _smoothed(losses), label=name, color=colour)
    left.set(xlabel="optimiser step", ylabel="loss per supervised token (running mean)", title="Training", yscale="log")
    left.legend()
    scores = tour.result["results"]
    names = [score["name"] for score in scores]
    values = [100 * score["accuracy"] for score in scores]
    below, above = zip(*(score["interval"] for score in scores), strict=True)
    errors = [
        [v - 100 * low for v, low in zip(values, below, strict=True)],
        [100 * high - v for v, high in zip(values, above, strict=True)],
    ]
    bars = right.bar(names, values, yerr=errors, capsize=4, color=[colours.get(name, "0.6") for name in names])
    right.bar_label(bars, fmt="%.0f %%", padding=6)
    right.set(ylabel="new problems solved, %", ylim=(0, 112), title="Held-out templates and numbers (95 % intervals)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _smoothed(losses: tuple[Any, ...]) -> list[float]:
    """Return the running mean of the losses."""
    smooth, value = [], float(losses[0])
    for loss in losses:
        value = SMOOTH * value + (1 - SMOOTH) * float(loss)
        smooth.append(value)
    return smooth
