"""The report of a federation, in three forms: the rounds with their scores and bytes, the clients, and who was left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.errors import counted
from graft.federation.definition import Federation
from graft.federation.store import Store
from graft.runs.surroundings import surroundings
from graft.study.report import drawing, page
from graft.study.report.figures import Figure
from graft.study.report.markdown import table
from graft.utils.files import write_json_atomic, write_text_atomic

SCORES = {"loss": "validation loss", "rougeL": "ROUGE-L (%)"}


def report_of(federation: Federation, store: Store) -> dict[str, Any]:
    """Return the report of a federation as far as it has run, as JSON values."""
    rounds = store.rounds()
    rows = []
    for each in rounds:
        down, up = store.bytes_per_client(each.number)
        scores = {**each.scores, **each.notes}
        rows.append(
            {
                "round": each.number,
                "clients": len(each.chosen),
                **scores,
                "down": down,
                "up": up,
                "seconds": each.seconds,
            }
        )
    return {
        "name": federation.name,
        "method": federation.config.method.kind,
        "done": rounds[-1].number if rounds else 0,
        "of": federation.config.rounds,
        "rounds": rows,
        "clients": [{**each, "rows": store.clients().get(each["client"])} for each in store.traffic()],
        "left_out": store.left_out(),
        "federation": federation.document.data,
        "environment": surroundings(),
        "notes": _notes(federation, store, rows),
    }


def _notes(federation: Federation, store: Store, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    config, clients = federation.config, store.clients()
    notes = [
        f"{config.method.kind} on {config.base.model}: {counted(len(clients), 'client')} with "
        f"{counted(sum(clients.values()), 'row')}, {counted(config.local.steps, 'local step')} a round"
    ]
    scored = [row for row in rows if "loss" in row]
    if scored:
        notes.append(
            f"validation loss {scored[0]['loss']:.4f} at first, {scored[-1]['loss']:.4f} after round {scored[-1]['round']}"
        )
    taken = [row for row in rows if row["round"]]
    if taken:
        down, up = (sum(row[way] for row in taken) / len(taken) for way in ("down", "up"))
        notes.append(f"bytes of messages per client and round: {down:,.0f} down, {up:,.0f} up")
    lost = store.left_out()
    if lost:
        notes.append(f"{counted(len(lost), 'time')} a client was left out of a round")
    return notes


def write_reports(federation: Federation, store: Store, out: Path) -> dict[str, Any]:
    """Write report.html, report.md and report.json, and return the report. Raises `MissingExtra` without matplotlib."""
    report = report_of(federation, store)
    tables = list(_tables(report))
    body = page.listed(report["notes"]) + page.charts(_figures(report))
    body += "".join(f"<h2>{title}</h2>{page.table(columns, rows)}" for title, columns, rows in tables)
    body += page.details("The federation", report["federation"]) + page.details("Environment", report["environment"])
    title = f"{report['name']}: {report['method']}"
    write_text_atomic(out / "report.html", page.framed(title, body, report["done"] < report["of"]))
    parts = [f"# {title}", "\n".join(f"- {note}" for note in report["notes"])]
    parts += [f"## {name}\n\n{table(columns, rows)}" for name, columns, rows in tables]
    write_text_atomic(out / "report.md", "\n\n".join(parts) + "\n")
    write_json_atomic(out / "report.json", report)
    return report


def _tables(report: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    keys = tuple(dict.fromkeys(key for row in report["rounds"] for key in row))
    found = [("Rounds", keys, [[shown(row.get(key)) for key in keys] for row in report["rounds"]])]
    for title, rows in (("Clients", report["clients"]), ("Left out", report["left_out"])):
        if rows:
            found.append((title, tuple(rows[0]), [[shown(each) for each in row.values()] for row in rows]))
    return found


def shown(value: Any) -> str:
    """Put a value of a table into words."""
    return (
        ""
        if value is None
        else f"{value:,.4g}"
        if isinstance(value, float) and value < 1e4
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def _figures(report: Mapping[str, Any]) -> list[Figure]:
    """The curves over rounds that have more than one point."""
    found = []
    for key, name in SCORES.items():
        points = [(float(row["round"]), float(row[key])) for row in report["rounds"] if key in row]
        if len(points) > 1:
            said = "The global model on the validation data, after each round; round 0 is before the first one."
            found.append((name.capitalize(), said, drawing.lines({report["method"]: points}, "round", name)))
    return found
