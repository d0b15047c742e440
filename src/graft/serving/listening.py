"""Run an application until Ctrl-C or SIGTERM. What is open then may finish."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from graft.errors import GraftError

GRACE = 30
"""Seconds that open requests have to finish."""


def listen(app: Any, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve at an address; `ready` is told the URL once it listens. Raises `GraftError` for an address that is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise GraftError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
    shown = f"[{host}]" if ":" in host else host
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE
    )
    server = uvicorn.Server(settings)
    ready(f"http://{shown}:{sock.getsockname()[1]}")
    server.run(sockets=[sock])
