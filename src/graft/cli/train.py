"""graft train: train the run that a YAML file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, Changes, Force, Target, finish, run_config
from graft.cli.launching import Processes, Restarts, launch
from graft.utils import launched


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
    processes: Processes = None,
    restarts: Restarts = 0,
    as_json: AsJson = False,
) -> None:
    """Train the adapter, or the jobs, that a YAML file describes, and write a run folder.

    Ctrl-C saves a checkpoint and stops; `graft resume` continues from it.

    Example: graft train run.yaml adapter.rank=32 --out runs/rank-32
    """
    if out is None and target.is_dir():
        raise typer.BadParameter("to train the run of a run folder again, name a new folder", param_hint="--out")
    launch(processes, restarts)
    from graft.distributed.group import together

    with together() as group:
        with group.agreed():
            config = run_config(target, changes)
        from graft.evaluation.while_training import judge
        from graft.runs.contents import is_run
        from graft.runs.folder import RunFolder
        from graft.training import resume, train

        folder = out or Path("runs") / target.stem
        # A launcher that starts lost processes again repeats the command: its run goes on, and no other that is in the folder.
        begun = launched.restarts() and is_run(folder) and RunFolder(folder).configured().model_dump(mode="json")
        if begun and begun == config.model_dump(mode="json"):
            done = resume(folder, force=force, judge=judge)
        else:
            done = train(config, folder, overwrite=overwrite, force=force, judge=judge)
    finish(done, as_json)
