"""graft resume: continue a run from its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, Force, finish


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Continue a run from its last checkpoint, after it was stopped or killed."""
    from graft.training import resume

    finish(resume(run, force=force), as_json)
