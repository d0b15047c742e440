"""Helpers of several verbs: common arguments, printing, and the way a training command ends."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from graft.utils import launched
from graft.utils.terminal import console, visible

if TYPE_CHECKING:
    from graft.config import RunConfig
    from graft.runs.folder import RunFolder

Target = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, or the YAML file of a run.", show_default=False)
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that replace those of the YAML, such as adapter.rank=32.",
        show_default=False,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Train even where a network file system cannot say whether another process trains in the folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

json_stream: ContextVar[TextIO | None] = ContextVar("json_stream", default=None)
"""Where `print_json` writes under `--json`; sys.stdout is then stderr, so that nothing else gets into the output."""
json_printed: ContextVar[bool] = ContextVar("json_printed", default=False)
"""Whether `print_json` has printed the value of this command."""
STOPPED = 130
"""Exit code of a run that Ctrl-C stopped, as shells use it."""


def run_config(target: Path, changes: Sequence[str] | None = None) -> RunConfig:
    """Load the configuration of a YAML file or a run folder and apply the changes. Raises `GraftError` for whatever is wrong in it."""
    from graft.config import load_run
    from graft.evaluation.settings import refuse_names
    from graft.runs.folder import RunFolder

    config = RunFolder(target).configured(changes or ()) if target.is_dir() else load_run(target, changes or ())
    refuse_names(config)
    return config


def print_json(value: Any) -> None:
    """Print one JSON value on stdout."""
    from graft.utils.files import to_json

    out = json_stream.get() or sys.stdout
    out.write(to_json(value, indent=2) + "\n")
    out.flush()
    json_printed.set(True)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print a table on stdout. None makes an empty cell.

    Nothing is cut off: a table that is wider than the terminal is printed as a list, one line per cell.
    """
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    cells = [["" if cell is None else visible(str(cell)) for cell in row] for row in rows]
    # `Text`, because rich reads markup such as [bold] in plain strings, and names may hold it.
    table = Table(title=None if title is None else Text(visible(title)), title_justify="left")
    columns = [visible(name) for name in columns]
    natural = [max(map(cell_len, column)) for column in zip(columns, *cells, strict=True)]
    frame = 3 * len(columns) + 1
    # A pipe has no width: keep rows on one line there, so that scripts can read them.
    screen = console(width=None if sys.stdout.isatty() else max(400, sum(natural) + frame))
    widths = _fitted(
        natural, [_longest_word(column) for column in zip(columns, *cells, strict=True)], screen.width - frame
    )
    if widths is None:
        _print_list(columns, cells, title)
        return
    for name, width in zip(columns, widths, strict=True):
        table.add_column(Text(name), width=width)
    for row in cells:
        table.add_row(*map(Text, row))
    screen.print(table)


def _longest_word(column: Sequence[str]) -> int:
    """Return the width of the longest part of a column that must stay on one line: a word, or a cell of digits."""
    from rich.cells import cell_len

    return max(
        cell_len(word) for cell in column for word in (cell.split() if any(map(str.isalpha, cell)) else [cell]) or [""]
    )


def _fitted(natural: Sequence[int], least: Sequence[int], room: int) -> list[int] | None:
    """Share the room among columns: each gets its least width, and what is left goes to those that need more. None: no room."""
    widths = list(least)
    if sum(widths) > room:
        return None
    while sum(widths) < min(room, sum(natural)):
        narrow = min((at for at in range(len(widths)) if widths[at] < natural[at]), key=widths.__getitem__)
        widths[narrow] += 1
    return widths


def _print_list(columns: Sequence[str], cells: Sequence[Sequence[str]], title: str | None) -> None:
    """Print each row of a table as its first cell, and below it a line for each other cell that is not empty."""
    if title is not None:
        typer.echo(visible(title))
    width = max(map(len, columns))
    for first, *others in cells:
        typer.echo(f"{columns[0]} {first}".strip())
        for name, cell in zip(columns[1:], others, strict=True):
            if cell:
                typer.echo(f"  {visible(name):<{width}}  {cell}")


def print_facts(facts: Mapping[str, Any]) -> None:
    """Print names and values, one per line, in two aligned columns."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        typer.echo(visible(f"{name:<{width}}  {'' if value is None else value}"))


def finish(folder: RunFolder, as_json: bool) -> None:
    """Print the outcome of a run and exit with its code: 0, 130 if it was stopped, 1 or 2 if a job failed.

    The code is 2 if every failed job failed because of a mistake of the user, which is what a `GraftError` means elsewhere.
    """
    status = folder.read_status()
    if launched.rank():  # the first process says it
        raise typer.Exit(_ending(status))
    adapters = {name: str(folder.adapter_dir(name)) for name in folder.adapters()}
    if as_json:
        whole = {} if folder.trained_model is None else {"model": str(folder.trained_model)}
        print_json({"run": str(folder.path), **status, "adapters": adapters, **whole})
    else:
        for name, job in status["jobs"].items():
            unit = "job step" if len(status["jobs"]) > 1 else "step"
            typer.echo(
                f"{name}: {job['ended'] or 'stopped'} at {unit} {job['step']}/{job['steps']}{_losses(job, unit)}"
            )
            if "error" in job:
                typer.echo(f"{name}: {job['error']}", err=True)
        for path in adapters.values():
            typer.echo(f"adapter: {path}")
        if folder.trained_model is not None:
            typer.echo(f"model: {folder.trained_model}")
        for line in _next(folder, status["state"]):
            typer.echo(f"next: {line}")
    if code := _ending(status):
        raise typer.Exit(code)


def _ending(status: Mapping[str, Any]) -> int:
    """The exit code of a run."""
    if status["state"] == "stopped":
        return STOPPED
    failed = [job for job in status["jobs"].values() if job["ended"] == "failed"]
    return (2 if all(job["mistake"] for job in failed) else 1) if failed else 0


def _next(folder: RunFolder, state: str) -> list[str]:
    """The commands that usually follow a run."""
    if state == "stopped":
        return [f"graft resume {folder.path}"]
    if not folder.adapters() and folder.trained_model is None:
        return []
    data = next(iter(folder.jobs().values())).data
    use = f"graft chat {folder.path}" if data.task in ("causal", "preference") else f"graft predict {folder.path} FILE"
    return [f"graft eval {folder.path}{'' if data.validation else ' --data FILE'}", use, f"graft show {folder.path}"]


def _losses(job: dict[str, Any], unit: str) -> str:
    loss, best = job["loss"], job["best"]
    return (f", loss {loss:.4f}" if loss is not None else "") + (
        f", best validation loss {best['loss']:.4f} at {unit} {best['step']}" if best else ""
    )
