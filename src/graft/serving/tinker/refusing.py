"""Routes of the protocol that have no sense here: each is refused by name, so that a client's user reads why."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from graft.serving.errors import ApiError

_ONE = "training_runs/{model}/checkpoints/{kind}/{name}"
_ALL_IN_ONE = "here whoever has the token may use every checkpoint"
_FILES = "the checkpoint is an adapter folder below 'checkpoints' in the server's state; graft export turns it into other formats"
_NO_ACCOUNTS = "this server keeps no accounts"
ROUTES: tuple[tuple[str, str, str, str], ...] = (
    ("POST", f"{_ONE}/publish", "publishing", _ALL_IN_ONE),
    ("DELETE", f"{_ONE}/publish", "publishing", _ALL_IN_ONE),
    ("GET", f"{_ONE}/external_weights_urls", "downloading weights", _FILES),
    ("GET", f"{_ONE}/archive", "downloading weights", _FILES),
    ("PUT", "sessions/{name}/project", "assigning projects", "this server has no projects"),
    ("POST", "sessions/search", "searching sessions", "list_sessions lists them"),
    ("GET", "sessions/{name}/trace_export", "exporting traces", "this server keeps none"),
    ("GET", "audit", "the audit log", _NO_ACCOUNTS),
    ("GET", "billing/usage/events", "billing", _NO_ACCOUNTS),
    ("GET", "billing/usage/checkpoints/current", "billing", _NO_ACCOUNTS),
    ("GET", "auth/apikey/me", "whoami", "the key is the server's token, and names nobody"),
    ("POST", "auth/token", "exchanging keys", "send the key itself"),
)
"""Method, path, what it would do, and what to do in its place or why it is missing."""


def add_to(app: Any) -> None:
    """Add the routes to an application."""
    for method, path, what, why in ROUTES:

        async def refuse(_: Request, what: str = what, why: str = why) -> Response:
            raise ApiError(400, f"{what} is not supported here: {why}")

        app.add_route(f"/api/v1/{path}", refuse, methods=[method])
