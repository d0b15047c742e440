"""graft chat: chat with the base and its adapters."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.loading import (
    Adapters,
    AnyBase,
    BaseName,
    Device,
    Dtype,
    MaxNewTokens,
    Only,
    Resize,
    RunFolderArgument,
    Seed,
    Temperature,
    TemplateName,
    TopP,
    load_model,
)
from graft.errors import GraftError
from graft.utils.terminal import visible

if TYPE_CHECKING:
    from graft.generation.conversation import Conversation


def command(
    run: RunFolderArgument = None,
    base: BaseName = None,
    adapter: Adapters = None,
    use: Only = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this one prompt and exit.", show_default=False)
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", help="System prompt that replaces the template's.", show_default=False),
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    resize: Resize = False,
    as_json: AsJson = False,
) -> None:
    """Chat with an adapter or the bare base.

    Commands in the conversation: /base and /adapter NAME switch who answers, /reset forgets the conversation, /help lists the
    commands, /quit ends. If stdin is not a terminal, every line of it is a turn.

    Example: graft chat runs/math --prompt 'What is 17 plus 25?'
    """
    loaded = load_model(run, base, adapter, template, device, dtype, any_base, resize)
    from graft.generation.conversation import Conversation
    from graft.generation.requests import Decoding

    decoding = Decoding(max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    # Without --use the first adapter answers, or the bare base if there is no adapter.
    first = loaded.find(use) if use is not None else loaded.candidates[min(1, len(loaded.adapters))]
    talk = Conversation(loaded, first, decoding, system)
    if as_json and prompt is None:
        raise GraftError("--json answers one prompt: give it with --prompt")
    if as_json and prompt is not None:
        answer = "".join(talk.ask(prompt))
        print_json({"adapter": talk.candidate.name, "base": loaded.base.name, "question": prompt, "answer": answer})
        return
    if template is None and not loaded.adapters:
        typer.echo(
            f"{loaded.base.name} is asked with template {talk.candidate.template.name}; --template names another.",
            err=True,
        )
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
    """Read the next line; None at the end of the input."""
    if not terminal:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with contextlib.suppress(ImportError):  # importing it gives `input` line editing and a history
        import readline  # noqa: F401
    try:
        return input(mark)
    except (EOFError, KeyboardInterrupt):
        typer.echo()
        return None


def _answer(talk: Conversation, text: str) -> None:
    """Print the answer while it is generated. Ctrl-C ends the answer but not the conversation."""
    try:
        for piece in talk.ask(text):
            typer.echo(visible(piece), nl=False)
    except KeyboardInterrupt:
        typer.echo(" [interrupted]", nl=False)
    typer.echo()


def _do(talk: Conversation, words: list[str]) -> None:
    """Run one of the slash commands."""
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
                typer.echo(
                    f"/base, /adapter NAME (one of {', '.join(names)}), /reset (forget the conversation), /help, /quit"
                )
    except GraftError as error:
        typer.echo(f"error: {error}", err=True)
