"""What several verbs share: their arguments, and how they print."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from graft.config import RunConfig

Target = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the YAML of a run.", show_default=False)]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the YAML, such as adapter.rank=32.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def run_config(target: Path, changes: Sequence[str] | None = None) -> RunConfig:
    """The configuration in a YAML or a run folder, with changes on top."""
    from graft.config import load_run
    from graft.runs.folder import RunFolder

    path = RunFolder(target).existing().config_path if target.is_dir() else target
    return load_run(path, changes or ())


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    from graft.utils.files import to_json

    sys.stdout.write(to_json(value, indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """A table on stdout; None is an empty cell."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    terminal = sys.stdout.isatty()
    Console(width=None if terminal else 400).print(table)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one per line, aligned."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        typer.echo(f"{name:<{width}}  {'' if value is None else value}")
