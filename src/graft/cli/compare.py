"""graft compare: is the second better than the first? Paired, question by question."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_json, print_table

_SIDE = "A run or a folder of results; FOLDER:NAME for one of several adapters; several seeds with commas between."


def command(
    first: Annotated[str, typer.Argument(metavar="A", help=_SIDE, show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help=_SIDE, show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations: paired difference, exact McNemar test, and the settings that differ."""
    from graft.evaluation.results import compare

    found = compare(first, second)
    if as_json:
        print_json(found)
        return
    columns = ("task", "protocol", "questions", "A", "B", "B - A", "95 % interval", "p", "only A", "only B", "seeds")
    print_table(columns, [_row(each) for each in found["tasks"]])
    for each in found["skipped"]:
        typer.echo(f"not compared: {each['task']} under {each['protocol_hash']}, {each['reason']}")
    typer.echo("The settings are the same." if not found["settings"] else "Settings that differ (A, B):")
    for name, (a, b) in found["settings"].items():
        typer.echo(f"  {name}: {a}, {b}")


def _row(each: dict[str, Any]) -> list[Any]:
    low, high = each["interval"]
    return [
        each["task"],
        f"{each['protocol']} {each['protocol_hash']}",
        each["total"],
        f"{each['first']:.1%}",
        f"{each['second']:.1%}",
        f"{each['difference']:+.1%}",
        f"{low:+.1%} to {high:+.1%}",
        f"{each['p_value']:.3g}",
        each.get("only_first"),
        each.get("only_second"),
        each.get("seeds", 1),
    ]
