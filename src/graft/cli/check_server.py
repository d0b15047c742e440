"""The part of graft check that looks at a server: --server URL --adapter DIR."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from graft.cli.common import print_json
from graft.cli.loading import load_model
from graft.errors import GraftError

if TYPE_CHECKING:
    from graft.serving.checking.remote import Remote


def check(
    url: str,
    adapter: str | None,
    base: str | None,
    model: str | None,
    base_model: str | None,
    token_file: Path | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Compare a server with Graft and say what is wrong with it; the exit code is 2 if anything is."""
    if adapter is None:
        raise GraftError("--server needs --adapter, the folder of the adapter that the server should apply")
    from graft.generation.adapter_folders import named_folders, trained_by
    from graft.serving.checking.remote import Remote
    from graft.serving.checking.verdict import check_server
    from graft.serving.guarding import read_token

    folders = named_folders(adapter)
    if len(folders) > 1:
        raise GraftError(
            f"{adapter} holds several adapters ({', '.join(name for name, _ in folders)}): name the folder of one"
        )
    ((name, folder),) = folders
    if not folder.is_dir():
        raise GraftError(f"there is no folder {folder} of an adapter")
    trained = trained_by(folder)
    if base is None and trained is None:
        raise GraftError(f"{folder} lies in no run, so name its base with --base")
    remote = Remote(url, None if token_file is None else read_token(token_file))
    its, bare = _names(remote, model or name, model is not None, base_model)
    loaded = load_model(None, base or str(trained.base.model), [f"{name}={folder}"], dtype=dtype)  # pyright: ignore
    verdict = check_server(remote, loaded, its, bare)
    if as_json:
        faults = [{"fault": fault, "message": said} for fault, said in verdict.faults]
        print_json(
            {"model": its, "base_model": bare, "faults": faults, "notes": verdict.notes, "distances": verdict.distances}
        )
    else:
        for what, value in verdict.distances.items():
            typer.echo(f"{_WORDS.get(what, what)}: {value:.2g} nats")
        for note in verdict.notes:
            typer.echo(f"note: {note}")
        for fault, said in verdict.faults:
            typer.secho(f"{fault}: ", fg=typer.colors.RED, bold=True, nl=False)
            typer.echo(said)
        if not verdict.faults:
            typer.secho(f"{its} at {remote.url} answers as this adapter does in Graft.", fg=typer.colors.GREEN)
    if verdict.faults:
        raise typer.Exit(2)


_WORDS = {
    "signal": "between base and adapter, here",
    "base": "the base, there and here",
    "adapter": "the adapter, there and here",
    "chat": "the first token of a chat, there and here",
}


def _names(remote: Remote, model: str, given: bool, base_model: str | None) -> tuple[str, str | None]:
    """Return the names of the adapter and of the bare base on the server. Raises `GraftError` if the adapter's is not there."""
    listed = remote.models()
    if model not in listed and not (given and "+" in model):
        raise GraftError(
            f"{remote.url} has no model '{model}': name one of {', '.join(listed) or 'its models'} with --model"
        )
    if base_model is not None and base_model not in listed:
        raise GraftError(f"{remote.url} has no model '{base_model}'; it has {', '.join(listed)}")
    others = [each for each in listed if each != model]
    if base_model is None:
        base_model = "base" if "base" in others else others[0] if len(others) == 1 else None
    return model, base_model
