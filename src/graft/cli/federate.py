"""graft federate: train one model on the data of several clients, in one process or over Flower."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import STOPPED, AsJson, Changes, print_json, print_table

FEDERATION = "federation.json"
"""A folder with this file is that of a federation."""


def command(
    target: Annotated[Path, typer.Argument(metavar="FEDERATION", help="The YAML of a federation.", show_default=False)],
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write. Default: runs/<name of the YAML>.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the federation that is in the folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one model on the data of several clients, who never show them: FedKSeed, FedAvg of any adapters, or FedZO.

    All clients take turns in this process, on one base. After Ctrl-C or a kill, --resume continues. report.html is kept up to date.

    Example: graft federate federation.yaml rounds=10
    """
    from graft.federation.folder import federate

    def say(text: str) -> None:
        typer.echo(text, err=True)

    given, folder = list(changes or ()), out or Path("runs") / target.stem
    try:
        report = federate(target, given, folder, resume=resume, say=say)
    except KeyboardInterrupt:
        again = [str(target), *given, "--out", str(folder), "--resume"]
        say(f"Stopped; everything is saved. Go on with: graft federate {shlex.join(again)}")
        raise typer.Exit(STOPPED) from None
    if as_json:
        print_json({"federation": str(folder), **report})
    else:
        show(report)
        typer.echo(f"report: {folder / 'report.html'}")


def show(report: dict[str, Any]) -> None:
    """Print the rounds of a report, and its notes."""
    from graft.federation.report import shown

    keys = list(dict.fromkeys(key for row in report["rounds"] for key in row))
    print_table(keys, [[shown(row.get(key)) for key in keys] for row in report["rounds"]])
    for note in report["notes"]:
        typer.echo(note)


def show_folder(folder: Path, as_json: bool) -> None:
    """Print the report of the federation in a folder, as far as it has run."""
    from graft.federation.folder import report_in

    report = report_in(folder)
    if as_json:
        print_json({"federation": str(folder), **report})
        return
    typer.echo(f"{folder}: {report['method']}, round {report['done']} of {report['of']}")
    show(report)
    for each in report["left_out"]:
        typer.echo(f"round {each['round']}: {each['client']} was left out: {each['reason']}")
