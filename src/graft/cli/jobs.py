"""graft jobs: list the jobs of a run; submit, clone, cancel and prioritise jobs while it trains."""

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
    help="List the jobs of a run, and submit, clone, cancel or prioritise jobs while it trains.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command("list")
def list_jobs(run: Folder, as_json: AsJson = False) -> None:
    """List the jobs in the order of their submission, and the commands that the run has not carried out yet.

    Example: graft jobs list runs/many
    """
    folder, status, placed = _known(run)
    if not status.get("jobs"):  # before its first step a run says nothing about them
        begun = {
            "state": status.get("state", "waiting"),
            "step": 0,
            "steps": None,
            "loss": None,
            "best": None,
            "ended": None,
        }
        status["jobs"] = {name: {**begun, "priority": folder.config.priority(name)} for name in folder.config.each()}
    if as_json:
        print_json({"run": str(run), "state": status.get("state"), "jobs": status.get("jobs", {}), "orders": placed})
        return
    show_jobs(status)
    for order in placed:
        typer.echo(f"waiting: {order['do']} {order['job']}")
    if (state := status.get("state")) in ("killed", "stopped", "failed"):
        how = f"failed: {status.get('error')}" if state == "failed" else f"was {state}"
        typer.echo(f"The run {how}. Continue it with: graft resume {run}")


def show_jobs(status: Mapping[str, Any]) -> None:
    """Print the jobs of a status.json as a table."""
    rows = [
        [name, job.get("state"), job.get("priority"), f"{job['step']}/{job['steps'] or '?'}", _digits(job["loss"]),
         _best(job["best"]), job.get("error")]
        for name, job in status.get("jobs", {}).items()
    ]  # fmt: skip
    print_table(("job", "state", "priority", "job step", "loss", "best validation at job step", "error"), rows)


def _best(best: Mapping[str, Any] | None) -> str | None:
    return None if not best else f"{_digits(best['loss'])} at {best['step']}"


@app.command()
def submit(
    run: Folder,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="YAML file of the job, with what `jobs` would hold under its name.", show_default=False
        ),
    ],
    changes: Changes = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the job. Default: the name of the file.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a job to a run.

    Settings that the file does not have come from the run. Relative paths are relative to the folder where the run was started.

    Example: graft jobs submit runs/many late.yaml train.lr=1e-4
    """
    from graft.config import load_job
    from graft.errors import GraftError

    folder, status, placed = _known(run)
    called = name or file.stem
    if called in _names(folder, status, placed):
        raise GraftError(f"{run} already has a job '{called}': choose another name with --name")
    job = load_job(file, called, folder.config, changes or ())
    _place(folder, status, "submit", called, as_json, config=job.model_dump(mode="json"))


@app.command()
def clone(
    run: Folder,
    job: Name,
    changes: Changes = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the new job. Default: the old one's with -2, -3, ...", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a job that starts from the adapter of a job that has ended, with its settings and the changes given.

    The new job has an optimiser and a schedule of its own.

    Example: graft jobs clone runs/many small train.lr=1e-4 --name small-on
    """
    from graft.config import load_job
    from graft.errors import GraftError, did_you_mean

    folder, status, placed = _known(run)
    names = _names(folder, status, placed)
    if job not in names:
        raise GraftError(f"{run} has no job '{job}'.{did_you_mean(job, names)} Its jobs: {', '.join(names)}")
    called = name or next(f"{job}-{number}" for number in range(2, len(names) + 3) if f"{job}-{number}" not in names)
    if called in names:
        raise GraftError(f"{run} already has a job '{called}': choose another name with --name")
    if status.get("jobs", {}).get(job, {}).get("ended") is None or job not in folder.adapters():
        raise GraftError(
            f"the job '{job}' of {run} has not ended, so its adapter is not there yet: wait, or cancel it first"
        )
    given = _settings_of(folder, job)
    given["train"] = {**given.get("train", {}), "init_from": str(folder.adapter_dir(job).resolve())}
    made = load_job(given, called, folder.config, changes or ())
    _place(folder, status, "submit", called, as_json, config=made.model_dump(mode="json"))


def _settings_of(folder: RunFolder, job: str) -> dict[str, Any]:
    """Return the settings that a job has of its own, as it was configured or submitted; a run's only job has them all from the run."""
    from graft.config import JobsConfig
    from graft.runs.commands import CommandQueue

    for order in CommandQueue(folder.path).journal.read():
        if order["do"] == "submit" and order["job"] == job:
            return folder.located(order["config"])
    config = folder.config
    return config.jobs[job].model_dump(mode="json") if isinstance(config, JobsConfig) else {}


@app.command()
def cancel(run: Folder, job: Name, as_json: AsJson = False) -> None:
    """Stop training a job. Its adapter is kept, at its best validation loss if the job validates.

    Example: graft jobs cancel runs/many small
    """
    folder, status = _of_live(run, job)
    _place(folder, status, "cancel", job, as_json)


@app.command()
def priority(
    run: Folder,
    job: Name,
    number: Annotated[int, typer.Argument(metavar="N", help="The new priority. Jobs with a higher one go first.")],
    as_json: AsJson = False,
) -> None:
    """Change the priority of a job.

    Write a negative number after a double dash: graft jobs priority RUN JOB -- -1.

    Example: graft jobs priority runs/many small 5
    """
    folder, status = _of_live(run, job)
    _place(folder, status, "priority", job, as_json, priority=number)


def _known(run: Path) -> tuple[RunFolder, dict[str, Any], list[dict[str, Any]]]:
    """Return the run folder, its status, and the commands that it has not carried out yet."""
    from graft.runs.commands import CommandQueue
    from graft.runs.folder import RunFolder

    folder = RunFolder(run).existing()
    return folder, folder.read_status(), CommandQueue(folder.path).pending()


def _names(folder: RunFolder, status: dict[str, Any], placed: list[dict[str, Any]]) -> list[str]:
    """Return the names of all jobs, including those that were submitted but are not in the status yet."""
    from graft.runs.commands import CommandQueue

    taken = CommandQueue(folder.path).journal.read()  # a run writes its status every few seconds only
    submitted = [order["job"] for order in (*taken, *placed) if order["do"] == "submit"]
    return list(dict.fromkeys([*(status.get("jobs") or folder.config.each()), *submitted]))


def _of_live(run: Path, job: str) -> tuple[RunFolder, dict[str, Any]]:
    """Return a run and its status, after checking that the job still trains or waits."""
    from graft.errors import GraftError, did_you_mean

    folder, status, placed = _known(run)
    names = _names(folder, status, placed)
    if job not in names:
        raise GraftError(f"{run} has no job '{job}'.{did_you_mean(job, names)} Its jobs: {', '.join(names)}")
    ended = status.get("jobs", {}).get(job, {}).get("ended")
    if ended is not None:
        raise GraftError(f"the job '{job}' of {run} has already ended ({ended}), so it cannot be changed")
    return folder, status


def _place(folder: RunFolder, status: dict[str, Any], do: str, job: str, as_json: bool, **more: Any) -> None:
    """Queue a command for the run and say when it takes effect."""
    from graft.runs.commands import CommandQueue

    CommandQueue(folder.path).put(do, job, **more)
    when = "before the next step" if status.get("state") == "running" else f"with: graft resume {folder.path}"
    if as_json:
        print_json({"run": folder.path, "do": do, "job": job, "takes_effect": when})
    else:
        typer.echo(f"{do} {job}: takes effect {when}")


def _digits(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"
