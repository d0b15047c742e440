"""graft kinds: list the adapter kinds, explain one, count the parameters of each on a model, or test one against the contract."""

from __future__ import annotations

import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_facts, print_json, print_table
from graft.errors import GraftError

WIDE = 160
"""Columns that the table of all kinds needs."""


def command(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]",
            help="Explain this kind: its equation and all its settings. With --contract also a .py file that defines kinds.",
            show_default=False,
        ),
    ] = None,
    contract: Annotated[
        bool,
        typer.Option(
            "--contract", help="Test a kind, or the kinds of a .py file, against everything that adapters promise."
        ),
    ] = False,
    closure: Annotated[
        bool,
        typer.Option(
            "--closure",
            help="Try every kind, or one, in every composition on tiny models, and print what works and what refuses the rest.",
        ),
    ] = False,
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

    `graft kinds --contract my_kind.py` tests kinds of your own on tiny random models: each kind of the file at its defaults, and
    the configs in the file's constant CONTRACT. The exit code is 1 if a promise is broken.

    Example: graft kinds lora
    """
    from graft.cli.catalogue import cards, pages
    from graft.utils.files import write_text_atomic

    if contract:
        _hold_to_contract(kind, as_json)
    elif closure:
        _close(kind, as_json)
    elif markdown is not None:
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
        if sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDE:
            for row in found:
                _show_narrow(row)
            return
        columns = ["kind", "summary", "sites", "identity", "folds", *(["parameters"] if base else []), "source"]
        print_table(columns, [[_shown(row[column]) for column in columns] for row in found])


def _show_narrow(row: dict[str, Any]) -> None:
    """Print a kind in a few short lines, for a terminal that a table does not fit into."""
    typer.secho(row["kind"], bold=True)
    identity, folds = (f"{name}: {row[name]}" for name in ("identity", "folds"))
    facts = [row["summary"], f"sites: {row['sites']}", f"{identity}; {folds}", row["source"]]
    counts = [f"parameters: {_shown(row['parameters'])}"] if "parameters" in row else []
    for text in filter(None, [*facts, *counts]):
        typer.echo(textwrap.fill(text, shutil.get_terminal_size().columns, initial_indent="  ", subsequent_indent="  "))


def _shown(value: Any) -> Any:
    return f"{value:,}" if isinstance(value, int) else value


def _hold_to_contract(kind: str | None, as_json: bool) -> None:
    """Test a kind or the kinds of a file, print the report, and exit with 1 if a promise is broken."""
    import warnings

    from graft.testing import run_contract
    from graft.testing.kind_files import configs_in
    from graft.utils.terminal import console

    if kind is None:
        raise GraftError(
            "--contract tests one kind: give its name or a file, as in `graft kinds --contract my_kind.py`"
        )
    is_file = "." in kind or "/" in kind  # no kind's name has either
    with warnings.catch_warnings(), console(stderr=True).status("") as status:
        warnings.simplefilter("ignore")  # of the tiny models, which nobody trained
        report = run_contract(configs_in(Path(kind)) if is_file else kind, progress=status.update)
    if as_json:
        print_json({"ok": report.ok, "rows": [asdict(row) for row in report.rows]})
    else:
        for variant in report.variants:
            columns, lines = report.table(variant)
            print_table(columns, lines, title=f"{variant}: {report.counts(variant)}")
            for note in report.notes(variant):
                typer.echo(note)
            typer.echo()
        broken = len(report.failures)
        typer.echo(f"{broken} broken promises" if broken else "every promise is kept")
    if not report.ok:
        raise typer.Exit(1)


def _close(kind: str | None, as_json: bool) -> None:
    """Try every kind, or one, in every composition, and print what came of it as Markdown."""
    import warnings

    from graft.adapters.registry import kind_class
    from graft.testing.closure import closure, page
    from graft.utils.terminal import console

    if kind is not None:
        kind_class(kind)  # an unknown kind is an error before anything is tried
    cells = []
    with warnings.catch_warnings(), console(stderr=True).status("") as status:
        warnings.simplefilter("ignore")  # of the tiny models, which nobody trained
        for cell in closure(None if kind is None else [kind]):
            status.update(f"{cell.kind}: {cell.place}")
            cells.append(cell)
    print_json([asdict(cell) for cell in cells]) if as_json else typer.echo(page(cells), nl=False)


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
    from graft.adapters.registry import kinds
    from graft.attaching.attach import attach, detach
    from graft.attaching.parameters import parameters
    from graft.bases.loading import own_task
    from graft.bases.skeleton import load_skeleton
    from graft.config.base import BaseConfig

    try:
        config = BaseConfig(model=model)
        base = load_skeleton(config, "seq2seq" if own_task(config) == "seq2seq" else "causal")
    except GraftError as error:
        raise GraftError(f"there is no model '{model}', neither in a folder nor on the hub: {error}") from error
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
