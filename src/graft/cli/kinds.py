"""graft kinds: list the adapter kinds, explain one of them, or count the parameters of each on a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_facts, print_json, print_table


def command(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]", help="Explain this kind: its equation and all its settings.", show_default=False
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Count the parameters of each kind, at its defaults, on this model.",
            show_default=False,
        ),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            "--markdown", metavar="FOLDER", help="Write the table and a page per kind as Markdown.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapter kinds, or explain one of them.

    The table says for each kind what it is, at which sites it can sit, whether a fresh adapter leaves the model's output
    unchanged (identity), and whether it can be merged into the base's weights (folds).
    """
    from graft.cli.catalogue import cards, pages
    from graft.utils.files import write_text_atomic

    if markdown is not None:
        markdown.mkdir(parents=True, exist_ok=True)
        for name, text in pages().items():
            write_text_atomic(markdown / name, text)
        typer.echo(f"{len(pages())} pages in {markdown}")
    elif kind is not None:
        _one(kind, as_json)
    else:
        counts = {} if base is None else parameters_on(base)
        found = [{**asdict(card), **({"parameters": counts[card.kind]} if base else {})} for card in cards()]
        if as_json:
            print_json(found)
            return
        columns = ["kind", "summary", "sites", "identity", "folds", *(["parameters"] if base else []), "source"]
        print_table(columns, [[_shown(row[column]) for column in columns] for row in found])


def _shown(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value


def _one(kind: str, as_json: bool) -> None:
    from graft.cli.catalogue import card_of, equation_of, settings_of

    card, equation, settings = card_of(kind), equation_of(kind), settings_of(kind)
    if as_json:
        print_json({**asdict(card), "equation": equation, "settings": settings})
        return
    typer.echo(equation + "\n")
    print_facts({name: value for name, value in asdict(card).items() if value})
    typer.echo("\nSettings")
    print_facts(
        {f"  {name} = {default}" if default else f"  {name}": meaning for name, (default, meaning) in settings.items()}
    )


def parameters_on(model: str) -> dict[str, int | str | None]:
    """Return kind -> number of its parameters on a model with default settings, or the reason why it does not apply.

    Only the model's config is read: the model is built on torch's meta device, which holds no weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from graft.adapters.registry import kinds
    from graft.attaching.attach import attach, detach
    from graft.attaching.parameters import parameters
    from graft.errors import GraftError

    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise GraftError(f"there is no model '{model}', neither in a folder nor on the hub: {error}") from error
    cls = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        base = cls.from_config(config)
    found: dict[str, int | str | None] = {}
    for kind, adapter in kinds().items():
        try:
            attach(base, {"a": adapter.example()})
        except GraftError as error:
            found[kind] = f"does not apply: {str(error).split('.')[0]}"
            continue
        found[kind] = sum(p.numel() for _, p in parameters(base, "a"))
        detach(base)
    return found
