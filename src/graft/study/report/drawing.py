"""Charts by matplotlib as SVG texts: small enough for a telephone, and told apart without colour, by marker, line and lightness."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import cycle
from typing import Any

from graft.errors import require

WIDTH, HEIGHT = 4.4, 3.1
"""Inches. On a telephone of 360 pixels a chart is shown at about nine tenths of its size."""
GREYS = ("#111111", "#5b5b5b", "#1f5fa8", "#d07a1a", "#3c8c5a", "#9a9a9a")
"""Colours of different lightness."""
MARKERS = "os^DvPX*"
LINES: Sequence[Any] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
Points = Sequence[tuple[float, float]]


def styles() -> Iterator[dict[str, Any]]:
    """Yield one style per line of a chart."""
    for colour, marker, line in zip(cycle(GREYS), cycle(MARKERS), cycle(LINES), strict=False):
        yield {"color": colour, "marker": marker, "linestyle": line, "markersize": 4, "linewidth": 1.3}


@contextmanager
def chart(height: float = HEIGHT) -> Iterator[tuple[Any, list[str]]]:
    """Open axes; the SVG text is in the list afterwards. The same data give the same text."""
    matplotlib = require("matplotlib", "report")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "report")
    options = {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "graft",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    found: list[str] = []
    with matplotlib.rc_context(options):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
        try:
            yield axes, found
            text = StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            found.append(text.getvalue()[text.getvalue().index("<svg") :])
        finally:
            pyplot.close(figure)


def lines(series: Mapping[str, Points], xlabel: str, ylabel: str, log_x: bool = False) -> str:
    """Draw one line per series."""
    with chart(HEIGHT + 0.17 * len(series)) as (axes, found):
        for style, (name, points) in zip(styles(), series.items(), strict=False):
            if len(points) > 12:
                style |= {"marker": style["marker"], "markevery": max(1, len(points) // 6)}
            axes.plot(*zip(*points, strict=True), label=name, **style)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log_x:
            axes.set_xscale("log")
        _legend_below(axes, len(series))
    return found[0]


def scatter(
    points: Sequence[tuple[float, float, str, bool]],
    bars: Sequence[tuple[float, float] | None],
    xlabel: str,
    ylabel: str,
) -> str:
    """Draw points (x, y, label, on the front). Those of the front are filled and joined."""
    with chart() as (axes, found):
        front = sorted((x, y) for x, y, _, best in points if best)
        axes.plot(*zip(*front, strict=True), color="#9a9a9a", linewidth=1, zorder=1) if front else None
        order = sorted(
            range(len(points)), key=lambda at: points[at][0]
        )  # neighbours have their labels on different sides
        sides = {at: 4 if place % 2 else -10 for place, at in enumerate(order)}
        for at, ((x, y, label, best), bar) in enumerate(zip(points, bars, strict=True)):
            if bar is not None:
                axes.plot([x, x], bar, color="#b8b8b8", linewidth=1, zorder=0)
            axes.plot(
                [x], [y], marker="o", markersize=5, color="#111111", fillstyle="full" if best else "none", zorder=2
            )
            axes.annotate(label, (x, y), xytext=(4, sides[at]), textcoords="offset points", fontsize=8)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if all(x > 0 for x, *_ in points):
            axes.set_xscale("log")
    return found[0]


def bars(values: Mapping[str, float], xlabel: str) -> str:
    """Draw horizontal bars, the first on top."""
    with chart(0.9 + 0.3 * len(values)) as (axes, found):
        names = list(values)[::-1]
        axes.barh(names, [values[name] for name in names], color="#5b5b5b", height=0.6)
        axes.set(xlabel=xlabel, xlim=(0, max(1e-9, *values.values()) * 1.1))
    return found[0]


def heat(
    rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], float], form: str, high: bool
) -> str:
    """Draw a table of numbers on grey: the darker, the better. A cell without a number is empty."""
    numbers = list(cells.values())
    low, top = min(numbers), max(numbers)
    with chart(0.9 + 0.42 * len(rows)) as (axes, found):
        for at, row in enumerate(rows):
            for place, column in enumerate(columns):
                if (row, column) not in cells:
                    continue
                share = (cells[row, column] - low) / ((top - low) or 1)
                dark = share if high else 1 - share
                shade = str(round(0.95 - 0.6 * dark, 3))
                axes.add_patch(
                    require("matplotlib.patches", "report").Rectangle(
                        (place, at), 1, 1, facecolor=shade, edgecolor="white"
                    )
                )
                ink = "white" if dark > 0.6 else "black"
                axes.text(place + 0.5, at + 0.5, form.format(cells[row, column]), ha="center", va="center", color=ink)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.set_xticks([at + 0.5 for at in range(len(columns))], [_wrapped(each) for each in columns])
        axes.set_yticks([at + 0.5 for at in range(len(rows))], rows)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return found[0]


def _wrapped(text: str) -> str:
    return "\n".join(text.split()) if len(text) > 12 else text


def _legend_below(axes: Any, count: int) -> None:
    if count > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize=8, handlelength=3)
