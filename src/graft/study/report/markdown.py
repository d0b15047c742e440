"""The report as Markdown: the same words and tables; the charts are in the HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from graft.study.report.words import STARRED, cost_in_words, ranking_table, title_of


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    parts = [f"# {title_of(report)}", "\n".join(f"- {note}" for note in report["notes"]), "## Ranking"]
    parts += [table(*ranking_table(report)), STARRED]
    if report["importance"]:
        rows = [[key, f"{share:.2f}"] for key, share in report["importance"].items()]
        parts += ["## What matters", table(("key", "share of variance"), rows)]
    parts += ["## Cost", cost_in_words(report)]
    if report["failed"]:
        rows = [[str(each[key]) for key in ("trial", "setting", "seed", "state", "error")] for each in report["failed"]]
        parts += ["## Trials without a result", table(("trial", "setting", "seed", "state", "why"), rows)]
    parts += ["## What differs between trials", _code(report["differs"]), "## The run", _code(report["run"])]
    first = report["ranking"][0]["rerun"] if report["ranking"] else None
    if first is not None:
        parts += ["Save the run as run.yaml to train the best setting alone:", f"    {first}"]
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(
        [
            *lines,
            *("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows),
        ]
    )


def _code(value: Any) -> str:
    return "```json\n" + json.dumps(value, indent=2, ensure_ascii=False) + "\n```"
