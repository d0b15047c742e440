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
    address: Annotated[
        str | None,
        typer.Option(
            "--serve",
            metavar="HOST:PORT",
            help="Be the server for clients that join over Flower, such as 127.0.0.1:8400.",
        ),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            "--clients",
            min=1,
            help="With --serve: how many clients to wait for; the server then reads none of their rows. Default: those of data.train.",
        ),
    ] = None,
    join: Annotated[
        str | None, typer.Option("--join", metavar="HOST:PORT", help="Be a client of the server at this address.")
    ] = None,
    client: Annotated[
        str | None,
        typer.Option("--client", help="With --join: which client this is, where the data are those of several."),
    ] = None,
    tls: Annotated[
        Path | None,
        typer.Option(
            "--tls",
            help="Encrypt. With --serve: a folder with ca.crt, server.crt and server.key. With --join: the authority's certificate.",
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            help="With --serve: a folder of the public keys (.pub) that may join. With --join: the private key.",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Let messages travel unencrypted beyond this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train one model on the data of several clients, who never show them: FedKSeed, Ferret, FedZO, or FedAvg of any adapters.

    All clients take turns in this process, on one base. With --serve and --join they are processes of their own, connected by Flower.
    After Ctrl-C or a kill, --resume continues. report.html is kept up to date.

    Example: graft federate federation.yaml rounds=10
    """
    from graft.errors import GraftError

    given, folder = list(changes or ()), out or Path("runs") / target.stem
    connected = [name for name, value in (("--tls", tls), ("--keys", keys), ("--insecure", insecure or None)) if value]
    if (address and join) or (not address and not join and connected):
        raise GraftError(
            "--serve is for the server and --join for a client: give one of them"
            + (f" with {connected[0]}" if connected else "")
        )
    if (clients and not address) or (client and not join):
        raise GraftError("--clients is for --serve, and --client for --join")
    if join and (out or resume or as_json):
        raise GraftError(
            "--join writes nothing here, so it takes no --out, --resume or --json: those are for the server"
        )
    again = [str(target), *given, "--out", str(folder), *(["--serve", address] if address else []), "--resume"]
    try:
        report = _run(target, given, folder, resume, address, clients, join, client, tls, keys, insecure)
    except KeyboardInterrupt:
        typer.echo(
            "Stopped." if join else f"Stopped; everything is saved. Go on with: graft federate {shlex.join(again)}",
            err=True,
        )
        raise typer.Exit(STOPPED) from None
    if as_json:
        print_json({"federation": str(folder), **report})
    else:
        show(report)
        typer.echo(f"report: {folder / 'report.html'}")


def _run(
    target: Path, given: list[str], folder: Path, resume: bool, address: str | None, clients: int | None, join: str | None,
    client: str | None, tls: Path | None, keys: Path | None, insecure: bool,
) -> dict[str, Any]:  # fmt: skip
    """Run the server or a client, or all in this process; the report."""

    def say(text: str) -> None:
        typer.echo(text, err=True)

    if address is None and join is None:
        from graft.federation.folder import federate

        return federate(target, given, folder, resume=resume, say=say)
    from graft.federation.flower.launching import Connection, join_over_flower, serve_over_flower

    at = Connection(address or join or "", tls, keys, insecure)
    if join is not None:
        join_over_flower(target, given, client, at, say)
    return serve_over_flower(target, given, folder, at, resume=resume, expected=clients, say=say)


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
