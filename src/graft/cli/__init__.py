"""The command `graft`. Each verb is one thin file with a function `command`; its docstring is the help text.

A verb with subcommands has an `app` instead. Verb modules import nothing heavy at the top, so that help is printed at once. What all
verbs share, such as how a mistake is reported, is in frame.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from graft.cli.frame import run
from graft.version import __version__

_PANELS = {
    "Start": ("quickstart", "init"),
    "Train": ("check", "train", "resume", "jobs", "study", "federate"),
    "Evaluate and use": ("eval", "compare", "score", "predict", "chat", "serve"),
    "Convert": ("merge", "combine", "import", "export"),
    "Look up": ("show", "ui", "kinds", "env"),
}
"""The verbs under the headings of `graft --help`."""
_LISTS = ("--tasks", "--harness")
"""Options whose value is a list."""
VERBS = tuple(verb for verbs in _PANELS.values() for verb in verbs)


def build() -> typer.Typer:
    """Build the application with all its verbs."""
    app = typer.Typer(
        name="graft",
        help="Fine-tune language models with adapters: small trainable modules on a frozen base model.\n\n"
        "New here? `graft quickstart` trains four adapters in minutes, without a download. Then `graft init` writes a "
        "run.yaml, `graft check` checks it, `graft train` trains it and `graft eval` measures the result. "
        "`graft VERB --help` explains a verb.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def graft_command(
        version: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
        ] = False,
        verbose: Annotated[
            bool,
            typer.Option(
                "--verbose",
                "-v",
                help="Show what other libraries print, and where an error was raised. Any verb takes it.",
            ),
        ] = False,
    ) -> None:
        pass

    for panel, verbs in _PANELS.items():
        for verb in verbs:
            module = importlib.import_module(f"graft.cli.{verb}")
            if hasattr(module, "app"):
                app.add_typer(module.app, name=verb, rich_help_panel=panel)
            else:
                app.command(verb, rich_help_panel=panel)(module.command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graft {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (of this process, unless arguments are given) and exit. A reader that goes away (`| head`) ends nothing."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    run(typer.main.get_command(build()), _with_lists(given))


def _with_lists(arguments: list[str]) -> list[str]:
    """Join the parts of a list that is written with spaces: --tasks rte, mrpc is --tasks rte,mrpc."""
    found: list[str] = []
    for word in arguments:
        if len(found) > 1 and found[-2] in _LISTS and found[-1].endswith(","):
            found[-1] += word
        else:
            found.append(word)
    return found
