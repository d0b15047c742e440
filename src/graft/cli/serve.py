"""graft serve: answer over HTTP, as OpenAI's clients expect it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from graft.cli.common import AsJson, print_json
from graft.cli.loading import Adapters, AnyBase, Device, Dtype, Resize, TemplateName, load_model
from graft.errors import GraftError, counted

TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="File of mode 600 with the token that clients must send.", show_default=False),
]
Host = Annotated[str, typer.Option("--host", help="Address to listen at. Beyond this machine, a token is needed.")]
AllowHosts = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        help="Another name that clients call this server by, such as a proxy's. Repeat it.",
        show_default=False,
    ),
]


def command(
    base: Annotated[
        str,
        typer.Argument(
            metavar="BASE", help="Base model (folder, hub name or seedling), or a run folder.", show_default=False
        ),
    ],
    adapters: Annotated[
        Path | None,
        typer.Option(
            "--adapters",
            help="Folder of adapter folders. All are served, and those that come later.",
            show_default=False,
        ),
    ] = None,
    adapter: Adapters = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    host: Host = "127.0.0.1",
    token_file: TokenFile = None,
    allow_host: AllowHosts = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Most answers that are generated at once.")] = 64,
    token_budget: Annotated[
        int,
        typer.Option(
            "--token-budget",
            min=1,
            help="Most tokens of the KV cache, padding counted. A request that needs more runs alone.",
        ),
    ] = 65_536,
    prefix_tokens: Annotated[
        int,
        typer.Option(
            "--prefix-tokens", min=0, help="Most tokens of prompts that are kept, so as not to read them again."
        ),
    ] = 32_768,
    runs: Annotated[
        Path | None, typer.Option("--runs", help="Folder of runs that the pages show too.", show_default=False)
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder of the training service; with it, clients can train.", show_default=False),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Most open requests; more get status 429.")] = 256,
    template: TemplateName = None,
    device: Device = None,
    dtype: Dtype = None,
    any_base: AnyBase = False,
    resize: Resize = False,
    as_json: AsJson = False,
) -> None:
    """Serve a base and its adapters: chat, completions and models, as OpenAI's clients expect them.

    A client chooses an adapter by `model`; "base" is the bare base, and "style+0.5*task" is two adapters with weights. Ctrl-C, or
    SIGTERM, lets open answers finish.

    Example: graft serve runs/math --port 8000
    """
    token = check_address(host, token_file)
    from graft.serving.adapters import adapters_in, check_shelf
    from graft.serving.app import make_app
    from graft.serving.listening import listen
    from graft.utils.hosts import LOOPBACK

    is_run = (Path(base) / "config.yaml").is_file()
    shelved = [] if adapters is None else adapters_in(check_shelf(adapters))
    named = [*(f"{path.name}={path}" for path in shelved), *(adapter or [])]
    loaded = load_model(
        Path(base) if is_run else None, None if is_run else base, named, template, device, dtype, any_base, resize
    )
    hosts = [*LOOPBACK, host, *(allow_host or [])]
    app = make_app(
        loaded,
        token=token,
        hosts=hosts,
        rows=rows,
        token_budget=token_budget,
        prefixes=prefix_tokens,
        most=queue,
        runs=runs,
        state=state,
        adapters=adapters,
    )
    if state is not None:
        app.state.training.claim()  # before anyone is told that it listens
    names = [each.name for each in loaded.candidates]
    listen(
        app,
        host,
        port,
        lambda url: say(as_json, f"{counted(len(names), 'model')} ({', '.join(names)})", f"{url}/v1", models=names),
    )


def say(as_json: bool, what: str, url: str, **more: Any) -> None:
    """Say on stderr, or as JSON on stdout, that a server listens."""
    if as_json:
        print_json({"url": url, **more})
    else:
        typer.echo(f"{what} at {url}", err=True)


def check_address(host: str, token_file: Path | None) -> str | None:
    """Return the token, if there is a file of it. Raises `GraftError` without the extra, and for an open address without a token."""
    from graft.errors import require

    require("fastapi", "serve")
    require("sse_starlette", "serve")
    require("jinja2", "serve")
    from graft.serving.guarding import read_token
    from graft.utils.hosts import is_loopback

    token = None if token_file is None else read_token(token_file)
    if token is None and not is_loopback(host):
        raise GraftError(f"{host} can be reached from other machines: give a token with --token-file FILE")
    return token
