"""graft resume: continue a run from its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, Changes, Force, finish
from graft.cli.launching import Processes, Restarts, launch


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    changes: Changes = None,
    force: Force = False,
    processes: Processes = None,
    restarts: Restarts = 0,
    as_json: AsJson = False,
) -> None:
    """Continue a run from its last checkpoint, after it was stopped or killed.

    A change says where base or data are by now (base.model=..., data.train=...), what is written (train.save_every=5), or how long
    the run is (train.steps=900, also for a finished run). The other settings stay.

    Example: graft resume runs/math
    """
    launch(processes, restarts)
    from graft.evaluation.while_training import judge
    from graft.training import resume

    finish(resume(run, changes or (), force=force, judge=judge), as_json)
