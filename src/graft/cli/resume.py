"""graft resume: continue a run that was stopped or killed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, finish


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Continue a run that was stopped or killed, from its last checkpoint."""
    from graft.training import resume

    finish(resume(run), as_json)
