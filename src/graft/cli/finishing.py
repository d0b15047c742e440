"""How a run ends for the command line: its outcome on stdout, and an exit code that says whether it was stopped or a job failed."""

from __future__ import annotations

from typing import Any

import typer

from graft.cli.common import print_json
from graft.runs.folder import RunFolder

STOPPED = 130
"""Exit code of a run that Ctrl-C ended, as shells have it."""


def finish(folder: RunFolder, as_json: bool) -> None:
    """Say where things are."""
    status = folder.read_status()
    adapters = {name: str(folder.adapter_dir(name)) for name in folder.adapters()}
    if as_json:
        print_json({"run": str(folder.path), **status, "adapters": adapters})
    else:
        for name, job in status["jobs"].items():
            typer.echo(f"{name}: {job['ended'] or 'stopped'} at step {job['step']}/{job['steps']}{_losses(job)}")
            if "error" in job:
                typer.echo(f"{name}: {job['error']}", err=True)
        for path in adapters.values():
            typer.echo(f"adapter: {path}")
    if status["state"] == "stopped":
        raise typer.Exit(STOPPED)
    failed = [job for job in status["jobs"].values() if job["ended"] == "failed"]
    if failed:
        raise typer.Exit(2 if all(job["mistake"] for job in failed) else 1)


def _losses(job: dict[str, Any]) -> str:
    loss, best = job["loss"], job["best"]
    return (f", loss {loss:.4f}" if loss is not None else "") + (
        f", best validation loss {best['loss']:.4f} at step {best['step']}" if best else ""
    )
