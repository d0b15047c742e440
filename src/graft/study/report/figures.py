"""The charts of a report, from its values: each a title, a sentence that says how to read it, and an SVG text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graft.study.report import drawing

MOST_LINES = 8
"""Most learning curves, or lines of kinds, in one chart."""
Report = Mapping[str, Any]
Figure = tuple[str, str, str]


def figures(report: Report) -> list[Figure]:
    """Return the charts for which a report has the numbers."""
    makers: list[Callable[[Report], Figure | None]] = [_front, _rates, _placement, _curves, _search, _importance]
    return [made for make in makers if (made := make(report)) is not None]


def _scaled(report: Report, value: float) -> float:
    return 100 * value if _percent(report) else value


def _percent(report: Report) -> bool:
    return report["high"] and not report["objective"].endswith("margin")


def _label(report: Report) -> str:
    return report["objective"].replace("_", " ") + (" (%)" if _percent(report) else "")


def _front(report: Report) -> Figure | None:
    rows = report["ranking"]
    second = report["objectives"][1] if len(report["objectives"]) > 1 else "parameters"
    if len(rows) < 2:
        return None
    points = [
        (
            float(row["values"].get(second, row["parameters"])),
            _scaled(report, row["score"]),
            str(row["rank"]),
            row["pareto"],
        )
        for row in rows
    ]
    spans: list[tuple[float, float] | None] = [
        None if row["interval"] is None else (_scaled(report, row["interval"][0]), _scaled(report, row["interval"][1]))
        for row in rows
    ]
    name = second.replace("_", " ")
    said = f"Each point is a setting with its rank and 95 % interval. Filled points are not beaten in both {_label(report)} and {name}."
    shown = "trainable parameters" if second == "parameters" else name
    return f"{_label(report).capitalize()} against {shown}", said, drawing.scatter(points, spans, shown, _label(report))


def _rates(report: Report) -> Figure | None:
    tried = [each for each in report["tried"] if "train.lr" in each["settings"]]
    by: dict[str, dict[float, list[float]]] = {}
    for each in tried:
        by.setdefault(_kind(report, each["settings"]), {}).setdefault(each["settings"]["train.lr"], []).append(
            each["mean"]
        )
    choose = max if report["high"] else min
    series = {
        kind: [(rate, _scaled(report, choose(values))) for rate, values in sorted(own.items())]
        for kind, own in by.items()
    }
    series = {kind: points for kind, points in series.items() if len(points) > 1}
    if not series:
        return None
    split = [dict(list(series.items())[at : at + MOST_LINES]) for at in range(0, len(series), MOST_LINES)]
    said = "One line per kind: the best setting of the kind at each learning rate, as the mean over seeds."
    drawn = "".join(drawing.lines(part, "learning rate", _label(report), log_x=True) for part in split)
    return "Learning rates", said, drawn


def _placement(report: Report) -> Figure | None:
    cells: dict[tuple[str, str], float] = {}
    for row in report["ranking"]:
        settings = row["settings"]
        adapter = settings.get("adapter")
        sites = adapter.get("sites") if isinstance(adapter, dict) else settings.get("adapter.sites")
        if sites is not None:
            key = (_kind(report, settings), _place(str(sites)))
            value = _scaled(report, row["score"])
            kept = cells.get(key)
            cells[key] = value if kept is None or (value > kept) == report["high"] else kept
    rows, columns = (list(dict.fromkeys(key[at] for key in sorted(cells))) for at in (0, 1))
    if len(columns) < 2 or len(cells) < 3:
        return None
    said = "The best setting of each kind at each placement; the darker, the better."
    form = "{:.1f}" if _percent(report) else "{:.3f}"
    groups = _site_columns(columns, rows, cells)
    return (
        "Placement",
        said,
        "".join(drawing.heat(own, names, part, form, report["high"]) for own, names, part in groups),
    )


def _place(sites: str) -> str:
    """Name a placement: at attention, at the MLP, or at both, whatever sites a kind takes there; others by their sites."""
    parts = {site.split(".")[0].split("@")[0] for site in sites.split()}
    if parts in ({"attn", "mlp"}, {"linear"}, {"layer"}):
        return "both"
    return {"attn": "attention", "mlp": "MLP"}.get(next(iter(parts)), sites) if len(parts) == 1 else sites


def _site_columns(
    columns: Sequence[str], rows: Sequence[str], cells: Mapping[tuple[str, str], float]
) -> list[tuple[list[str], list[str], dict[tuple[str, str], float]]]:
    """Put kinds that take the same sites into one table: a LoRA's linear layers are no places for a bottleneck."""
    tables: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        tables.setdefault(tuple(column for column in columns if (row, column) in cells), []).append(row)
    return [
        (own, list(names), {key: value for key, value in cells.items() if key[0] in own})
        for names, own in tables.items()
    ]


def _curves(report: Report) -> Figure | None:
    chosen = report["curves"][:MOST_LINES]
    kind = "validation_loss" if all(len(each["validation_loss"]) > 1 for each in chosen) and chosen else "loss"
    series = {f"{at}. {each['setting']}": each[kind] for at, each in enumerate(chosen, start=1) if len(each[kind]) > 1}
    if not series:
        return None
    said = f"The {kind.replace('_', ' ')} of the first seed of the best {len(series)} settings."
    return "Learning curves", said, drawing.lines(series, "step", kind.replace("_", " "))


def _search(report: Report) -> Figure | None:
    if report["study"]["search"] is None or len(report["tried"]) < 2:
        return None
    means = [_scaled(report, each["mean"]) for each in report["tried"]]
    best, so_far = means[0], []
    for mean in means:
        best = max(best, mean) if report["high"] else min(best, mean)
        so_far.append(best)
    series = {"each point": list(enumerate(means, start=1)), "best so far": list(enumerate(so_far, start=1))}
    said = "What the search found, in the order in which points were proposed."
    return "The search", said, drawing.lines(series, "point", _label(report))


def _importance(report: Report) -> Figure | None:
    shares = report["importance"]
    if len(shares) < 2:
        return None
    said = "The share of the scores' variance that lies between the values of a key, each key by itself."
    return "What matters", said, drawing.bars(shares, "share of variance")


def _kind(report: Report, settings: Mapping[str, Any]) -> str:
    """The kind of a setting's adapter: its own, or that of the study's run."""
    adapter = settings.get("adapter", report["run"].get("adapter"))
    named = settings.get("adapter.kind") or settings.get("adapter.preset")
    if named is None and isinstance(adapter, dict):
        named = adapter.get("kind", adapter.get("preset"))
    return str(named or (adapter if isinstance(adapter, str) else "the run's"))
