"""graft ui: pages to look at runs, evaluations and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graft.cli.common import AsJson
from graft.cli.serve import AllowHosts, Host, TokenFile, check_address, say


def command(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS]", help="Folder of runs and studies.")] = Path("runs"),
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8080,
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Folder of a training service, whose tenants are shown too.", show_default=False),
    ] = None,
    host: Host = "127.0.0.1",
    token_file: TokenFile = None,
    allow_host: AllowHosts = None,
    as_json: AsJson = False,
) -> None:
    """Show runs with live curves, samples, evaluations and studies in a browser.

    With --token-file, whoever signs in with the token can also start runs, go on with them, and submit and cancel jobs.

    Example: graft ui runs
    """
    token = check_address(host, token_file)
    from graft.serving.app import make_pages
    from graft.serving.listening import listen
    from graft.utils.hosts import LOOPBACK

    app = make_pages(runs, token=token, hosts=[*LOOPBACK, host, *(allow_host or [])], state=state)
    listen(app, host, port, lambda url: say(as_json, str(runs), url))
