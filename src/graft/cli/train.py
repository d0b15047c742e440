"""graft train: train what a YAML describes, into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, Changes, Target, run_config
from graft.cli.finishing import finish


def command(
    target: Target,
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run; runs/<name of the YAML> by default.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is in the folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train an adapter. Ctrl-C saves and stops; `graft resume` goes on."""
    config = run_config(target, changes)
    if out is None and target.is_dir():
        raise typer.BadParameter("training what a run folder describes needs a folder of its own", param_hint="--out")
    from graft.training import train

    finish(train(config, out or Path("runs") / target.stem, overwrite=overwrite), as_json)
