"""graft compare: compare two evaluations question by question, or rank several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_json, print_table
from graft.cli.wording import between

_SIDE = "Run or folder of results. FOLDER:NAME picks one of several adapters. Separate several seeds by commas."


def command(
    sides: Annotated[list[str], typer.Argument(metavar="A B...", help=_SIDE, show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare evaluations on the same questions: is B better than A, and which of several is best?

    Of two, the output lists the difference of every score with its 95 % interval and p-value, and the settings that differ. Of more,
    it is their ranking by accuracy, with tests against the best one, corrected by Holm's method. Result files of PEFT's
    method_comparison, or a folder of them, are ranked too.

    Example: graft compare runs/lora runs/series
    """
    from graft.errors import GraftError
    from graft.study.report.others import result_files

    files = [file for side in sides for file in result_files(Path(side))]
    if files:
        _rank_files(sides, files, as_json)
        return
    if len(sides) < 2:
        raise GraftError(f"a comparison needs two sides or more; given: {sides[0]}")
    if len(sides) > 2:
        _rank_sides(sides, as_json)
        return
    first, second = sides
    _two(first, second, as_json)


def _rank_files(sides: list[str], files: list[Path], as_json: bool) -> None:
    from graft.errors import GraftError
    from graft.study.report.others import read_results, result_files
    from graft.study.report.ranking import rank
    from graft.study.report.sides import row

    if others := [side for side in sides if not result_files(Path(side))]:
        raise GraftError(
            f"{others[0]} holds no result files of PEFT's, which the other sides are: compare like with like"
        )
    entries, notes = read_results(files)
    rows = [row(each) for each in rank(entries, high=True)]
    if as_json:
        print_json({"ranking": rows, "notes": notes})
        return
    _show_ranking(rows, parameters=True)
    for note in notes:
        typer.echo(note)


def _rank_sides(sides: list[str], as_json: bool) -> None:
    from graft.study.report.sides import rank_sides

    found = rank_sides(sides)
    if as_json:
        print_json({"tasks": found})
        return
    for each in found:
        typer.echo(f"{each['task']}, {each['protocol']}")
        _show_ranking(each["ranking"])


def _show_ranking(rows: Sequence[Mapping[str, Any]], parameters: bool = False) -> None:
    """Print a ranking, and how many differences from the best survive the correction."""
    columns = ["rank", "name", "accuracy", "95 % interval", "below the best", "p", "p (Holm)"]
    cells = [
        [
            each["rank"], each["name"], f"{each['accuracy']:.1%}", between(each["interval"], "{:.1%}"),
            None if each["difference"] is None else f"{-each['difference']:.1%}",
            None if each["p_value"] is None else f"{each['p_value']:.3g}",
            None if each["p_holm"] is None else f"{each['p_holm']:.3g}",
            *([None if each["parameters"] is None else f"{each['parameters']:,}"] if parameters else []),
        ]
        for each in rows
    ]  # fmt: skip
    print_table([*columns, *(["parameters"] if parameters else [])], cells)
    tested = [each for each in rows if each["p_holm"] is not None]
    surviving = [each for each in tested if each["p_holm"] < 0.05]
    tests = ", ".join(dict.fromkeys(str(each["test"]) for each in tested))
    if tested:
        typer.echo(
            f"{len(surviving)} of {len(tested)} differ from the best after Holm's correction (p < 0.05; {tests}); the other "
            f"{len(tested) - len(surviving)} cannot be told from it."
        )


def _two(first: str, second: str, as_json: bool) -> None:
    """Compare two sides score by score."""
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
