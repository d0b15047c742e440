"""Write tables of results as CSV (one line per score) and as LaTeX (one tabular per protocol, for booktabs)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from graft.errors import GraftError
from graft.evaluation.tables import Table
from graft.utils.files import explain_write_errors

COLUMNS = ("protocol", "task", "questions", "candidate", "score", "value", "low", "high")
_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    sign: f"\\{sign}" for sign in "&%$#_{}"
}


def as_csv(tables: Sequence[Table]) -> str:
    """Return all scores with the bounds of their 95 % intervals, unrounded. Accuracies are shares of 1."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(COLUMNS)
    for table in tables:
        for score in table.scores():
            low, high = score.interval or (None, None)
            lines.writerow(
                [table.protocol, score.task, score.total, score.candidate, score.name, score.value, low, high]
            )
    return out.getvalue()


def as_latex(tables: Sequence[Table]) -> str:
    """Return the tables with the rows and rounding of the terminal. They need the package booktabs."""
    return "\n".join(_tabular(table) for table in tables)


def _tabular(table: Table) -> str:
    head = ["task", "questions", *table.candidates]
    rows = [["" if cell is None else str(cell) for cell in row] for row in table.rows()]
    body = [" & ".join(map(_escaped, row)) + r" \\" for row in rows]
    if len(rows) > len(table.results) and rows[-1][1] == "":
        body.insert(-1, r"\midrule")
    return "\n".join(
        [
            f"% protocol {table.protocol}",
            rf"\begin{{tabular}}{{lr{'r' * len(table.candidates)}}}",
            r"\toprule",
            " & ".join(map(_escaped, head)) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return "".join(_SPECIAL.get(sign, sign) for sign in " ".join(text.split()))


def write_tables(tables: Sequence[Table], csv_file: Path | None, latex_file: Path | None) -> None:
    """Write the files that are asked for. Raises `GraftError` for a folder, and for a place that cannot be written."""
    for path, text in ((csv_file, as_csv), (latex_file, as_latex)):
        if path is None:
            continue
        if path.is_dir():
            raise GraftError(f"{path} is a folder: name a file for the table")
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text(tables), encoding="utf-8")
