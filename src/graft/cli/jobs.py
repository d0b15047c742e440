"""graft jobs: the jobs of a run, and orders to it while it trains: submit, cancel, change the priority."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graft.cli.common import AsJson, Changes, print_json, print_table

if TYPE_CHECKING:
    from graft.runs.folder import RunFolder

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]
Name = Annotated[str, typer.Argument(metavar="JOB", help="The name of a job.", show_default=False)]

app = typer.Typer(
    help="List the jobs of a run; submit, cancel and rank jobs while it trains.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command("list")
def list_jobs(run: Folder, as_json: AsJson = False) -> None:
    """Where each job stands, in the order of coming, and the orders that the run has not taken yet."""
    status, placed = _known(run)[1:]
    if as_json:
        print_json({"run": str(run), "state": status.get("state"), "jobs": status.get("jobs", {}), "orders": placed})
        return
    show_jobs(status)
    for order in placed:
        typer.echo(f"not taken yet: {order['do']} {order['job']}")


def show_jobs(status: Mapping[str, Any]) -> None:
    """The jobs in status.json as a table."""
    rows = [
        [name, job.get("state"), job.get("priority"), f"{job['step']}/{job['steps']}", _digits(job["loss"]),
         _digits((job["best"] or {}).get("loss")), job.get("error")]
        for name, job in status.get("jobs", {}).items()
    ]  # fmt: skip
    print_table(("job", "state", "priority", "step", "loss", "best validation", "error"), rows)


@app.command()
def submit(
    run: Folder,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A YAML of one job: what stands under its name in `jobs`.", show_default=False
        ),
    ],
    changes: Changes = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="What the job is called; the file's name by default.", show_default=False),
    ] = None,
) -> None:
    """Add a job. What it does not say comes from the run; relative paths are relative to where the run was started."""
    from graft.config import load_job
    from graft.errors import GraftError

    folder, status, placed = _known(run)
    called = name or file.stem
    if called in _names(folder, status, placed):
        raise GraftError(f"{run} has a job '{called}' already: choose another name with --name")
    job = load_job(file, called, folder.config, changes or ())
    _place(folder, status, "submit", called, config=job.model_dump(mode="json"))


@app.command()
def cancel(run: Folder, job: Name) -> None:
    """End a job. Its adapter stays as it is, at its best validation where there is one."""
    folder, status = _of_live(run, job)
    _place(folder, status, "cancel", job)


@app.command()
def priority(
    run: Folder, job: Name, number: Annotated[int, typer.Argument(metavar="N", help="Higher goes first.")]
) -> None:
    """Change the priority of a job. A negative number goes behind a double dash: graft jobs priority RUN JOB -- -1."""
    folder, status = _of_live(run, job)
    _place(folder, status, "priority", job, priority=number)


def _known(run: Path) -> tuple[RunFolder, dict[str, Any], list[dict[str, Any]]]:
    from graft.runs.commands import CommandQueue
    from graft.runs.folder import RunFolder

    folder = RunFolder(run).existing()
    return folder, folder.read_status(), CommandQueue(folder.path).placed()


def _names(folder: RunFolder, status: dict[str, Any], placed: list[dict[str, Any]]) -> list[str]:
    from graft.runs.commands import CommandQueue

    taken = CommandQueue(folder.path).journal.read()  # a run writes its status every few seconds only
    submitted = [order["job"] for order in (*taken, *placed) if order["do"] == "submit"]
    return list(dict.fromkeys([*status.get("jobs", folder.config.each()), *submitted]))


def _of_live(run: Path, job: str) -> tuple[RunFolder, dict[str, Any]]:
    """The run of a job that still trains or waits."""
    from graft.errors import GraftError, did_you_mean

    folder, status, placed = _known(run)
    names = _names(folder, status, placed)
    if job not in names:
        raise GraftError(f"{run} has no job '{job}'.{did_you_mean(job, names)} Its jobs: {', '.join(names)}")
    ended = status.get("jobs", {}).get(job, {}).get("ended")
    if ended is not None:
        raise GraftError(f"the job '{job}' of {run} has ended already ({ended})")
    return folder, status


def _place(folder: RunFolder, status: dict[str, Any], do: str, job: str, **more: Any) -> None:
    from graft.runs.commands import CommandQueue

    CommandQueue(folder.path).place(do, job, **more)
    when = "before the next step" if status.get("state") == "running" else f"with: graft resume {folder.path}"
    typer.echo(f"{do} {job}: takes effect {when}")


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
