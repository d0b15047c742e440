"""graft export: write an adapter in another library's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.loading import AnyBase, Device, Dtype, Only, load_model, load_plain_base, one_of
from graft.errors import GraftError


def command(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="A run folder or an adapter folder.", show_default=False)
    ],
    to: Annotated[Path, typer.Option("--to", help="Empty or new folder to write.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base of the adapter; a run folder knows its own.", show_default=False),
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="Format to write: peft, adapterhub or llm-adapters.")
    ] = "peft",
    serving: Annotated[
        str | None,
        typer.Option(
            "--serving",
            help="Server that will load the adapter: vllm, sglang or tgi. What it would misread is an error.",
            show_default=False,
        ),
    ] = None,
    convert: Annotated[
        bool,
        typer.Option(
            "--convert",
            help="Convert exactly what the server needs: pad LoRAs with zeros to one rank, and add missing ones as zeros.",
        ),
    ] = False,
    svd: Annotated[
        int | None,
        typer.Option(
            "--svd",
            min=1,
            help="Approximate the adapter by LoRAs of this rank, and report the error.",
            show_default=False,
        ),
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(
            "--base-name",
            help="What the files call the base: a hub name, or a folder where PEFT finds it. By default no more than a folder's last part.",
            show_default=False,
        ),
    ] = None,
    use: Only = None,
    any_base: AnyBase = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in the format of PEFT, AdapterHub or LLM-Adapters.

    If the format cannot hold the adapter, nothing is written and the message says why.

    Example: graft export runs/math --to math-peft --format peft
    """
    model, name = _attached(source, base, use, any_base, device, dtype)
    from graft.formats import exporting

    notes = list(
        exporting.export(model, name, to, format=format, serving=serving, convert=convert, svd=svd, base_name=base_name)
    )
    written = sorted(path.name for path in to.iterdir())
    if as_json:
        print_json({"source": source, "to": to, "format": format, "files": written, "notes": notes})
        return
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"{source} -> {to} ({format}: {', '.join(written)})")


def _attached(
    source: Path, base: str | None, use: str | None, any_base: bool, device: str | None, dtype: str | None
) -> tuple[Any, str]:
    """Load the adapter of a run or of an adapter folder; return the model with the adapter on it, and the adapter's name."""
    if (source / "config.yaml").is_file():
        loaded = load_model(source, base, None, None, device, dtype, any_base)
        candidate = one_of(loaded, use)
        if candidate.adapter is None and loaded.config is not None and loaded.config.adapter is None:
            raise GraftError(
                f"{source} trained the base itself, so there is no adapter to export: {loaded.base.name} is a plain model of transformers"
            )
        if candidate.adapter is None:
            raise GraftError("there is no adapter to export: choose one with --use")
        return loaded.base.model, candidate.adapter
    if base is None:
        raise GraftError(f"{source} is not a run folder: name the adapter's base with --base")
    model = load_plain_base(base, device, dtype)
    from graft.formats.loading import load

    load(model, source, name="adapter", any_base=any_base)
    return model, "adapter"
