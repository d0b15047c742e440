"""Helpers of the verbs that use adapters: their common options, loading what these name, and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graft.errors import GraftError
from graft.utils import launched
from graft.version import __version__

if TYPE_CHECKING:
    from graft.config.base import BaseConfig
    from graft.distributed.group import Group
    from graft.generation.loaded import Candidate, LoadedModel

RunFolderArgument = Annotated[
    Path | None, typer.Argument(metavar="RUN", help="A run folder. Without one, give --base.", show_default=False)
]
BaseName = Annotated[
    str | None,
    typer.Option(
        "--base", help="Base model: folder, hub name or seedling. Replaces the run's own.", show_default=False
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="Adapter folder, or NAME=FOLDER. Repeat it for several.", show_default=False),
]
TemplateName = Annotated[
    str | None,
    typer.Option("--template", help="Template that replaces the one saved with the adapter.", show_default=False),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Device of the base: auto, cpu, mps, cuda or cuda:N.", show_default=False),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"] | None,
    typer.Option("--dtype", help="Number format of the base's weights.", show_default=False),
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Accept an adapter that was trained on other base weights.")]
Resize = Annotated[
    bool,
    typer.Option("--resize", help="Give the base the rows, and the tokenizer, of an adapter with added tokens."),
]
Only = Annotated[
    str | None,
    typer.Option("--use", help="Name of the adapter to use; 'base' is the bare base.", show_default=False),
]


Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--fields",
        help="Column to rename, as EXPECTED=COLUMN (repeatable). The run's own fields are used too.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most new tokens of an answer.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="0 decodes greedily; above 0, tokens are sampled.")
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Sample only from the likeliest tokens that add up to this probability.")
]
Seed = Annotated[int, typer.Option("--seed", help="Random seed of the sampling.")]

ANSWERING = 7200.0
"""Seconds that processes which have no more to answer wait for the last batch of another before they take it for lost."""


def load_model(
    run: Path | None,
    base: str | None,
    adapters: Sequence[str] | None,
    template: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    any_base: bool = False,
    resize: bool = False,
    group: Group | None = None,
) -> LoadedModel:
    """Load the base and the adapters that the arguments name. With a run, the options change the run's own base.

    group: the ranks that load it and share the questions. Raises `GraftError` where they differ.
    """
    quiet()
    from dataclasses import replace

    from graft.architectures.two_streams import two_streams_of
    from graft.data.template import FILE as TEMPLATE
    from graft.generation.loaded import load_candidates

    config = base_of(run, base, device, dtype, resize)
    loaded = load_candidates(run, config, adapters or (), template, any_base=any_base)
    if group is not None and group.size > 1:
        loaded = replace(loaded, group=group)
        group.wait_at_most(ANSWERING)
        group.remedy = "The same command goes on with the answers that are there"
        group.same(
            {
                "the version of graft": __version__,
                "the base": [str(loaded.base.identity), str(loaded.base.dtype)],
                "the adapters": [[each.name, each.digest, each.template.digest] for each in loaded.candidates],
            }
        )
        if not group.leads:
            return loaded
    streams = two_streams_of(loaded.base.model)
    if streams is not None and config is not None and config.reversible is None:
        typer.echo(
            f"note: the adapters were trained on a reversible base ({streams.variant}), so the base is one", err=True
        )
    for each in loaded.adapters:
        if each.template_file not in (None, TEMPLATE):  # what Graft saved itself needs no word
            typer.echo(
                f"note: {each.name} is asked with the template that lies beside it ({each.template_file} in {each.folder}). "
                "--template names another",
                err=True,
            )
    return loaded


def base_of(
    run: Path | None, base: str | None, device: str | None, dtype: str | None, resize: bool = False
) -> BaseConfig | None:
    """Return the configuration of the base: that of the run, changed by the options. Raises `GraftError` for a wrong option."""
    from pydantic import ValidationError

    from graft.config.base import BaseConfig
    from graft.runs.folder import RunFolder

    if run is None and base is None:
        raise GraftError("name a run folder, or a base with --base")
    settings = {} if run is None else RunFolder(run).existing().config.base.model_dump()
    given = {"model": base, "device": device, "dtype": dtype, "resize": "auto" if resize else None}
    try:
        config = BaseConfig.model_validate(
            {**settings, **{key: value for key, value in given.items() if value is not None}}
        )
        if config.offload is None:
            return config
        from graft.bases.loading import check_device

        if check_device(config.device).type != "cpu":
            return config
        typer.echo("note: base.offload is for training and for GPUs: the base is loaded as a whole", err=True)
        return config.model_copy(update={"offload": None})
    except ValidationError as error:
        first = error.errors()[0]
        raise GraftError(
            f"--{first['loc'][0]} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
        ) from error


def load_plain_base(name: str, device: str | None, dtype: str | None) -> Any:
    """Load a base as the class that its own config names, for reading or writing an adapter of another library."""
    quiet()
    from graft.bases.loading import load_as_saved

    config = base_of(None, name, device, dtype)
    assert config is not None
    return load_as_saved(config)


def parse_fields(given: Sequence[str] | None) -> dict[str, str]:
    """Return the columns that --fields renames. Raises `GraftError` for one without `=`."""
    pairs = [text.partition("=") for text in given or ()]
    for ours, sign, theirs in pairs:
        if not (ours and sign and theirs):
            raise GraftError(
                f"--fields takes EXPECTED=COLUMN, as in instruction=question; given '{ours}{sign}{theirs}'"
            )
    return {ours: theirs for ours, _, theirs in pairs}


def one_of(loaded: LoadedModel, name: str | None) -> Candidate:
    """Return the adapter of this name. Without a name, return the only adapter, or the base if there is none."""
    if name is not None:
        return loaded.find(name)
    if len(loaded.adapters) > 1:
        raise GraftError(
            f"there are several adapters: choose with --use {', '.join(each.name for each in loaded.adapters)}"
        )
    return loaded.candidates[-1]


def quiet() -> None:
    """Switch off the progress bars of transformers, so that only the verb itself prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr if that is a terminal; yield the function (done, total) that moves it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from graft.utils.terminal import console as make_console

    console = make_console(stderr=True)
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, disable=launched.rank() > 0 or not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task(what)
        yield lambda done, total: progress.update(task, completed=done, total=total)
