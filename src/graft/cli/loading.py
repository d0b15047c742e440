"""What the verbs that use adapters share: the run, or the base and the adapters that are named, and how they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.config.base import BaseConfig
    from graft.generation.loaded import Candidate, LoadedModel

RunFolderArgument = Annotated[
    Path | None, typer.Argument(metavar="RUN", help="A run folder (or give --base).", show_default=False)
]
BaseName = Annotated[
    str | None,
    typer.Option("--base", help="A base in place of a run: folder, hub name or seedling.", show_default=False),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="An adapter's folder, or NAME=FOLDER; repeat for several.", show_default=False),
]
TemplateName = Annotated[
    str | None,
    typer.Option("--template", help="A template in place of the one saved with the adapter.", show_default=False),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, mps, cuda or cuda:N.", show_default=False)]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"] | None,
    typer.Option("--dtype", help="Number format of the base.", show_default=False),
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Accept a base whose weights are not those the adapter was made for.")
]
Only = Annotated[
    str | None, typer.Option("--use", help="Which adapter, by name; 'base' is the bare base.", show_default=False)
]


def load_model(
    run: Path | None,
    base: str | None,
    adapters: Sequence[str] | None,
    template: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    any_base: bool = False,
) -> LoadedModel:
    """Load what the arguments name. The options change the run's own base where there is a run."""
    quiet()
    from graft.generation.loaded import load_candidates

    return load_candidates(run, base_of(run, base, device, dtype), adapters or (), template, any_base=any_base)


def base_of(run: Path | None, base: str | None, device: str | None, dtype: str | None) -> BaseConfig | None:
    from pydantic import ValidationError

    from graft.config.base import BaseConfig
    from graft.runs.folder import RunFolder

    if run is None and base is None:
        raise GraftError("name a run folder, or a base with --base")
    settings = {} if run is None else RunFolder(run).existing().config.base.model_dump()
    given = {"model": base, "device": device, "dtype": dtype}
    try:
        return BaseConfig.model_validate(
            {**settings, **{key: value for key, value in given.items() if value is not None}}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise GraftError(
            f"--{first['loc'][0]} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
        ) from error


def one_of(loaded: LoadedModel, name: str | None) -> Candidate:
    """The adapter of that name; without a name the only one, or the base where there is none."""
    if name is not None:
        return loaded.find(name)
    if len(loaded.adapters) > 1:
        raise GraftError(
            f"there are several adapters: choose with --use {', '.join(each.name for each in loaded.adapters)}"
        )
    return loaded.candidates[-1]


def quiet() -> None:
    """No bars of transformers' own: loading a base takes a moment, and what is printed is the verb's."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's stderr; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)
