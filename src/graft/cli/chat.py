"""graft chat: talk to the base and its adapters."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.loading import (
    Adapters,
    AnyBase,
    BaseName,
    Device,
    Dtype,
    Only,
    RunFolderArgument,
    TemplateName,
    load_model,
)
from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.generation.conversation import Conversation


def command(
    run: RunFolderArgument = None,
    base: BaseName = None,
    adapter: Adapters = None,
    use: Only = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and end.", show_default=False)
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System prompt in place of the template's.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy; above it samples.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
) -> None:
    """Talk to an adapter. In the conversation: /base, /adapter NAME, /reset, /help, /quit. Reads lines where stdin is no terminal."""
    loaded = load_model(run, base, adapter, template, device, dtype, any_base)
    from graft.generation.conversation import Conversation
    from graft.generation.requests import Decoding

    decoding = Decoding(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    first = loaded.find(use) if use is not None else loaded.candidates[min(1, len(loaded.adapters))]
    talk = Conversation(loaded, first, decoding, system)
    if prompt is not None:
        _answer(talk, prompt)
        return
    terminal = sys.stdin.isatty()
    if terminal:
        typer.echo(
            f"{talk.candidate.name} on {loaded.base.name}, template {talk.candidate.template.name}. /help lists the commands."
        )
    while (line := _line(f"{talk.candidate.name}> ", terminal)) is not None and line.strip() != "/quit":
        if line.startswith("/"):
            _do(talk, line.split())
        elif line.strip():
            _answer(talk, line)


def _line(mark: str, terminal: bool) -> str | None:
    """The next line, None at the end."""
    if not terminal:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with contextlib.suppress(ImportError):  # editing of the line, where Python has it
        import readline  # noqa: F401
    try:
        return input(mark)
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None


def _answer(talk: Conversation, text: str) -> None:
    """Print the answer while it comes. Ctrl-C ends it, and the conversation goes on."""
    try:
        for piece in talk.ask(text):
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo(" [interrupted]", nl=False)
    typer.echo()


def _do(talk: Conversation, words: list[str]) -> None:
    """One of the commands."""
    names = [candidate.name for candidate in talk.loaded.candidates]
    try:
        match words:
            case ["/base"]:
                talk.switch("base")
            case ["/adapter", name]:
                talk.switch(name)
            case ["/reset"]:
                talk.reset()
            case _:
                typer.echo(f"/base, /adapter NAME (of {', '.join(names)}), /reset forgets the conversation, /quit")
    except GraftError as error:
        typer.echo(f"error: {error}", err=True)
