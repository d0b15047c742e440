"""The report as one HTML file that needs nothing else: its charts are inside, and it names no other address."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from graft.study.report.figures import Figure
from graft.study.report.words import STARRED, cost_in_words, ranking_table, title_of

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 62rem; padding: 1rem; color: #111; background: #fff; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #ccc; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 1rem 0 2rem; max-width: 34rem; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: #333; }
pre { overflow-x: auto; background: #f3f3f3; padding: .6rem; font-size: .8rem; } summary { cursor: pointer; }
.best td { font-weight: 600; }
"""


def page(report: Mapping[str, Any], figures: Sequence[Figure], running: bool) -> str:
    """Return the report as HTML. running: the page then loads itself anew every half minute."""
    body = (
        f"{listed(report['notes'])}<h2>Ranking</h2>{_ranking(report)}{charts(figures)}"
        f"<h2>Cost</h2><p>{escape(cost_in_words(report))}</p>{_lost(report)}{_again(report)}"
        f"{details('What differs between trials', report['differs'])}{details('The run', report['run'])}"
        f"{details('The study', report['study'])}{details('Environment', report['environment'])}"
    )
    return framed(title_of(report), body, running)


def framed(title: str, body: str, running: bool) -> str:
    """Put a body into a whole page."""
    again = '<meta http-equiv="refresh" content="30">' if running else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1">{again}<title>{escape(title)}</title><style>{STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def listed(notes: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def charts(figures: Sequence[Figure]) -> str:
    return "".join(
        f"<figure><h2>{escape(title)}</h2>{svg}<figcaption>{escape(said)}</figcaption></figure>"
        for title, said, svg in figures
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts; what follows the first column is set as numbers."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{"number" if at else "text"}">{escape(cell)}</td>' for at, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _ranking(report: Mapping[str, Any]) -> str:
    columns, table = ranking_table(report)
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = []
    for row, cells in zip(report["ranking"], table, strict=True):
        inner = "".join(
            f'<td class="{"text" if at == 1 else "number"}">{escape(cell)}</td>' for at, cell in enumerate(cells)
        )
        rows.append(f"<tr{' class=best' if row['rank'] == 1 else ''}>{inner}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div><p>{STARRED}</p>'


def _lost(report: Mapping[str, Any]) -> str:
    if not report["failed"]:
        return ""
    rows = "".join(
        f"<tr><td>{each['trial']}</td><td>{escape(each['setting'])}</td><td>{each['seed']}</td><td>{each['state']}</td>"
        f"<td>{escape(each['error'] or '')}</td></tr>"
        for each in report["failed"]
    )
    head = "<tr><th>trial</th><th>setting</th><th>seed</th><th>state</th><th>why</th></tr>"
    return f'<h2>Trials without a result</h2><div class="wide"><table>{head}{rows}</table></div>'


def _again(report: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<p>{row['rank']}. {escape(row['setting'])}: adapters in {escape(', '.join(row['adapters']))}</p>"
        f"<pre>{escape(row['rerun'])}</pre>"
        for row in report["ranking"]
    )
    said = "Save the run below as run.yaml; each command then trains the first seed of a setting alone."
    return f"<h2>Run a row again</h2><details><summary>Commands and adapters</summary><p>{said}</p>{rows}</details>"


def details(title: str, value: Any) -> str:
    text = escape(json.dumps(value, indent=2, ensure_ascii=False))
    return f"<h2>{escape(title)}</h2><details><summary>Show</summary><pre>{text}</pre></details>"
