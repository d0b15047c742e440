"""graft train: train the run that a YAML file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, Changes, Force, Target, finish, run_config


def command(
    target: Target,
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run folder to write. Default: runs/<name of the YAML>.", show_default=False),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is already in the folder. Other files there stay.")
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train the adapter, or the jobs, that a YAML file describes, and write a run folder.

    Ctrl-C saves a checkpoint and stops; `graft resume` continues from it.

    Example: graft train run.yaml adapter.rank=32 --out runs/rank-32
    """
    config = run_config(target, changes)
    if out is None and target.is_dir():
        raise typer.BadParameter("to train the run of a run folder again, name a new folder", param_hint="--out")
    from graft.evaluation.while_training import judge
    from graft.training import train

    finish(train(config, out or Path("runs") / target.stem, overwrite=overwrite, force=force, judge=judge), as_json)
