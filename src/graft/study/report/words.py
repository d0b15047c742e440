"""The words that the forms of a report share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = (
    "rank", "setting", "score", "95 % interval", "seeds", "p (Holm)", "test accuracy", "parameters", "tokens", "seconds", "forgetting",
)  # fmt: skip
"""forgetting: the loss on unrelated text, less the base's."""
STARRED = "Settings with * are not beaten in both the objective and the number of parameters (or the second objective)."


def title_of(report: Mapping[str, Any]) -> str:
    return f"{report['name']}: {report['objective'].replace('_', ' ')}"


def ranking_table(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The columns of the ranking, and the cells of each setting. Columns in which no setting has anything are left out."""
    rows = [_cells(row) for row in report["ranking"]]
    kept = [at for at in range(len(COLUMNS)) if any(row[at] for row in rows) or not rows]
    return [COLUMNS[at] for at in kept], [[row[at] for at in kept] for row in rows]


def _cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of one setting, for `COLUMNS`."""
    forgetting = row["forgetting"]
    return [
        f"{row['rank']}{' *' if row['pareto'] else ''}",
        row["setting"],
        row["shown"],
        row["interval_shown"],
        str(row["trials"]),
        row["p_shown"],
        "" if row["test_accuracy"] is None else f"{row['test_accuracy']:.1%}",
        row["parameters_shown"],
        f"{row['tokens']:,}",
        f"{row['seconds']:.1f}",
        "" if forgetting is None else f"{forgetting:+.3f}",
    ]


def cost_in_words(report: Mapping[str, Any]) -> str:
    cost = report["cost"]
    peak = "" if cost["peak_bytes"] is None else f", with a peak of {cost['peak_bytes'] / 1e9:.2f} GB"
    hits = f" The sampler proposed {report['hits']} points that were known already." if report["hits"] else ""
    return (
        f"{cost['joint_runs']} joint runs took {cost['seconds']:,.0f} seconds of training steps for {cost['tokens']:,} tokens{peak}. "
        "The seconds of a row are its share by tokens." + hits
    )
