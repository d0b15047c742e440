"""The losses of a run as a curve: in characters for the terminal, and as a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.runs.curves import Points

MARKS = ".ox+*#%@"
"""The signs of the curves, in their order; with more curves they repeat."""
_FORMATS = (".png", ".svg", ".pdf")


def draw(curves: Mapping[str, Points], width: int = 64, height: int = 12) -> str:
    """Return the curves in characters, with the range of losses and steps at the axes; an empty text for fewer than two points."""
    points = [point for own in curves.values() for point in own]
    if len(points) < 2:
        return ""
    (left, right), (low, high) = ((min(side), max(side)) for side in zip(*points, strict=True))
    grid = [[" "] * width for _ in range(height)]
    for mark, own in zip(_marks(curves), curves.values(), strict=True):
        for step, loss in own:
            column = round((step - left) / ((right - left) or 1) * (width - 1))
            row = round((high - loss) / ((high - low) or 1) * (height - 1))
            grid[row][column] = mark
    labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} | {''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    steps = f"{left}{right:>{width - len(str(left))}}"
    unit = f"{_unit(curves)}; "
    named = [f"{mark} {name}" for mark, name in zip(_marks(curves), curves, strict=True)]
    signs = [unit + "   ".join(named)]
    if len(signs[0]) > width + margin:  # a line for each job
        signs = [unit.strip(), *(f"  {each}" for each in named)]
    return "\n".join([*lines, f"{' ' * margin} +{'-' * (width + 1)}", f"{' ' * margin}   {steps}", *signs])


def save(curves: Mapping[str, Points], path: Path) -> None:
    """Write the curves as a picture. Raises `GraftError` for another kind of file, for no losses, and without matplotlib."""
    from graft.errors import GraftError, require
    from graft.utils.files import explain_write_errors

    if path.suffix.lower() not in _FORMATS:
        raise GraftError(f"a loss curve is written as {', '.join(_FORMATS)}; given {path}")
    if not curves:
        raise GraftError("the run has no losses to draw yet")
    require("matplotlib", "report").use("Agg")
    pyplot = require("matplotlib.pyplot", "report")
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if "validation" in name else None, markersize=3)
    axes.set(xlabel=_unit(curves), ylabel="loss per supervised token")
    axes.legend()
    with explain_write_errors(path):
        figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _unit(curves: Iterable[str]) -> str:
    """The name of the steps that the curves count: only those of several jobs have the job's name in front."""
    return "job step" if any(": " in name for name in curves) else "step"


def _marks(curves: Sequence[str] | Mapping[str, Any]) -> list[str]:
    return [MARKS[at % len(MARKS)] for at in range(len(curves))]
