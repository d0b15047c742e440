"""graft import: read another library's adapter and write it as Graft's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from graft.cli.foreign import BaseOnly, loaded_base
from graft.cli.loading import Device, Dtype
from graft.errors import GraftError


def command(
    source: Annotated[
        Path,
        typer.Argument(help="A folder of PEFT, AdapterHub or LLM-Adapters, or a loralib file.", show_default=False),
    ],
    base: BaseOnly,
    to: Annotated[Path, typer.Option("--to", help="New folder for the adapter.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="Name of the adapter.")] = "default",
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="LoRA's alpha, which a loralib file does not say.", show_default=False),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Read an adapter that PEFT, AdapterHub, LLM-Adapters or loralib wrote, and write it as Graft's own."""
    if to.exists() and any(to.iterdir()):
        raise GraftError(f"{to} is not empty: name a new folder")
    model = loaded_base(base, device, dtype)
    import graft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        graft.load(model, source, name=name, alpha=alpha)
    for warning in caught:
        typer.secho(f"note: {warning.message}", err=True)
    graft.save(model, name, to)
    typer.echo(graft.summary(model))
    typer.echo(f"{source} -> {to}")
