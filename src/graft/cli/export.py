"""graft export: write an adapter in another library's format, or so that a server reads it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.foreign import BaseName, loaded_base
from graft.cli.loading import AnyBase, Device, Dtype, Only, load_model, one_of
from graft.errors import GraftError


def command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, or an adapter's folder.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", help="New folder for what is written.", show_default=False)],
    base: BaseName = None,
    format: Annotated[str, typer.Option("--format", help="peft, adapterhub or llm-adapters.")] = "peft",
    serving: Annotated[
        str | None,
        typer.Option(
            "--serving", help="vllm, sglang or tgi: refuse what that server would misread.", show_default=False
        ),
    ] = None,
    convert: Annotated[
        bool,
        typer.Option("--convert", help="Make what can be made exactly: one rank, partners (zero rows and columns)."),
    ] = False,
    svd: Annotated[
        int | None,
        typer.Option(
            "--svd", min=1, help="LoRAs of this rank in place of the kind; says what is lost.", show_default=False
        ),
    ] = None,
    use: Only = None,
    any_base: AnyBase = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Write an adapter as PEFT, AdapterHub or LLM-Adapters store it; what they cannot hold is refused with the reason."""
    model, name = _attached(source, base, use, any_base, device, dtype)
    import graft

    for note in graft.export(model, name, to, format=format, serving=serving, convert=convert, svd=svd):
        typer.echo(f"note: {note}")
    written = sorted(path.name for path in to.iterdir())
    typer.echo(f"{source} -> {to} ({format}: {', '.join(written)})")


def _attached(
    source: Path, base: str | None, use: str | None, any_base: bool, device: str | None, dtype: str | None
) -> tuple[Any, str]:
    """The model with the adapter on it, and the adapter's name."""
    if (source / "config.yaml").is_file():
        loaded = load_model(source, base, None, None, device, dtype, any_base)
        candidate = one_of(loaded, use)
        if candidate.adapter is None:
            raise GraftError("there is no adapter to export: choose one with --use")
        return loaded.base.model, candidate.adapter
    if base is None:
        raise GraftError(f"{source} is no run folder: name the adapter's base with --base")
    model = loaded_base(base, device, dtype)
    import graft

    graft.load(model, source, name="adapter", any_base=any_base)
    return model, "adapter"
