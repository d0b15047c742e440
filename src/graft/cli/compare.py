"""graft compare: compare two evaluations question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_json, print_table
from graft.cli.wording import between

_SIDE = "Run or folder of results. FOLDER:NAME picks one of several adapters. Separate several seeds by commas."


def command(
    first: Annotated[str, typer.Argument(metavar="A", help=_SIDE, show_default=False)],
    second: Annotated[str, typer.Argument(metavar="B", help=_SIDE, show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations on the same questions: is B better than A?

    The output lists the difference of every score with its 95 % interval and p-value, and the settings that differ.

    Example: graft compare runs/lora runs/series
    """
    from graft.evaluation.differences import compare

    found = compare(first, second)
    if as_json:
        print_json(found)
        return
    for name, side in (("A", found["first"]), ("B", found["second"])):
        typer.echo(f"{name} is {', '.join(dict.fromkeys(side['contestants']))} in {side['given']}")
    columns = ("task", "score", "protocol", "questions", "A", "B", "B - A", "95 % interval", "p", "only A", "only B")
    seeds = any("seeds" in each for each in found["tasks"])
    print_table([*columns, *(["seeds"] if seeds else [])], [_row(each, seeds) for each in found["tasks"]])
    for each in found["skipped"]:
        what = f"{each['task']}, {each['metric']}" if "metric" in each else each["task"]
        typer.echo(f"not compared: {what} under {each['protocol_hash']}: {each['reason']}")
    _show_settings(found["settings"])


def _show_settings(settings: Mapping[str, Sequence[Any]]) -> None:
    """Print the settings that differ, one per line. Settings that only one side has share a line (another kind has others)."""
    typer.echo("The settings are the same." if not settings else "Settings that differ (A, B):")
    for name, (a, b) in settings.items():
        if a is not None and b is not None:
            typer.echo(f"  {name}: {a}, {b}")
    for side, place in (("A", 0), ("B", 1)):
        own = [f"{name} {both[place]}" for name, both in settings.items() if both[1 - place] is None]
        if own:
            typer.echo(f"  only {side}: {', '.join(own)}")


def _row(each: Mapping[str, Any], seeds: bool) -> list[Any]:
    metric = each["metric"]
    form = "{:.1%}" if metric in ("accuracy", "normalised") else "{:.2f}" if "bleu" in metric else "{:.4f}"
    signed = form.replace(":", ":+")
    interval, p_value = each["interval"], each["p_value"]
    return [
        each["task"],
        {"normalised": "by length", "bleu": "BLEU", "text_bleu": "BLEU", "f1": "F1"}.get(metric, metric.title()),
        f"{each['protocol']} {each['protocol_hash']}",
        each["total"],
        form.format(each["first"]),
        form.format(each["second"]),
        signed.format(each["difference"]),
        between(interval, signed),
        None if p_value is None else f"{p_value:.3g}",
        each.get("only_first"),
        each.get("only_second"),
        *([each.get("seeds", 1)] if seeds else []),
    ]
