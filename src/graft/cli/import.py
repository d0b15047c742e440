"""graft import: convert another library's adapter to Graft's format."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.loading import Device, Dtype, Resize, load_plain_base
from graft.errors import GraftError


def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="An adapter folder of PEFT, AdapterHub (an AdapterFusion too) or LLM-Adapters, or a loralib file.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str,
        typer.Option("--base", help="Base that the adapter is for: folder, hub name or seedling.", show_default=False),
    ],
    to: Annotated[Path, typer.Option("--to", help="Empty or new folder for the adapter.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="Name of the adapter.")] = "default",
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="LoRA's alpha; loralib files do not store it.", show_default=False),
    ] = None,
    resize: Resize = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter of PEFT, AdapterHub, LLM-Adapters or loralib to Graft's format.

    Example: graft import peft-adapter --base seedling --to adapters/math
    """
    if to.exists() and any(to.iterdir()):
        raise GraftError(f"{to} is not empty: name a new folder")
    model = load_plain_base(base, device, dtype)
    from graft.attaching.saving import save
    from graft.attaching.summary import summary
    from graft.formats.adapterhub import fusion
    from graft.formats.loading import load
    from graft.generation.beside import BELONGING, template_source

    # What the importer warns about is useful to the user, but not as Python warnings with file and line.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if fusion.detect(source):
            if alpha is not None or resize:
                raise GraftError("--alpha and --resize have no meaning for an AdapterFusion: leave them out")
            fusion.convert(model, source, to, name)
            to = to / fusion.OUT
        else:
            load(model, source, name=name, alpha=alpha, resize=resize)
            save(model, name, to)
    notes = [str(warning.message) for warning in caught]
    taken = [file for file in BELONGING if (source / file).is_file()]
    for file in taken:
        shutil.copyfile(source / file, to / file)
    template = template_source(to)
    if as_json:
        counts = summary(model).adapter_parameters
        facts = {"source": source, "to": to, "name": name, "parameters": counts[name]}
        print_json({**facts, "template": template, "files": taken, "notes": notes})
        return
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(summary(model))
    typer.echo(f"{source} -> {to}")
    typer.echo(
        f"template: {'none beside the adapter' if template is None else template} ({len(taken)} files of template and tokenizer)"
    )
