"""Who may ask: the token, the Host and Origin headers, and bodies that are JSON of a bounded size."""

from __future__ import annotations

import hmac
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from graft.errors import GraftError
from graft.serving.errors import ApiError, error_response
from graft.serving.pages.session import is_signed_in
from graft.utils.strict_json import parse_object

MOST_BYTES = 16 * 1024 * 1024
"""Most bytes of a request's body."""
SHORTEST_TOKEN = 16


def read_token(path: Path) -> str:
    """Return the token in a file. Raises `GraftError` for a file that others may read, and for a token that is too short."""
    if not path.is_file():
        raise GraftError(f"there is no token file {path}: write a secret into it and set its mode to 600")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise GraftError(f"{path} has mode {mode:o}, so others on this machine may read the token: chmod 600 {path}")
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise GraftError(f"the token in {path} must be at least {SHORTEST_TOKEN} ASCII characters without spaces")
    return token


class Guard:
    """Lets requests through that name this server as their host and carry its token, or the cookie of who has signed in to the pages.

    A reader of pages without it is led to the page where the token is typed.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: Sequence[str], open_paths: Sequence[str]) -> None:
        """hosts: the names that clients may call this server by. open_paths: what needs no token; one that ends with / is a beginning."""
        self.app, self._token, self._hosts = app, token, frozenset(host.lower() for host in hosts)
        self._open = tuple(path for path in open_paths if path.endswith("/")), frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._problem(scope)) is not None:
            reads = scope["method"] == "GET" and "text/html" in Headers(scope=scope).get("accept", "")
            answer = RedirectResponse("/login", 303) if problem.status == 401 and reads else error_response(problem)
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if _host(f"//{headers.get('host', '')}") not in self._hosts:
            said = f"this server is not called {headers.get('host', '')[:100]!r}; --allow-host adds a name"
            return ApiError(403, said, code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and _host(origin) not in self._hosts:
            return ApiError(403, f"pages of {origin[:100]} may not ask this server", code="wrong_origin")
        starts, paths = self._open
        if self._token is None or scope["path"] in paths or scope["path"].startswith(starts):
            return None
        if is_signed_in(headers.get("cookie", ""), self._token):
            return None
        if not hmac.compare_digest(_given(headers).encode(), self._token.encode()):
            return ApiError(
                401, "the token is missing or wrong: send it as 'Authorization: Bearer TOKEN'", code="invalid_api_key"
            )
        return None


def _given(headers: Headers) -> str:
    """The token of a request: a bearer's, or that of X-API-Key."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")


def _host(address: str) -> str:
    """The name in an address, without the port; empty if it holds none."""
    try:
        return (urlsplit(address).hostname or "").lower()
    except ValueError:
        return ""


async def body_of(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request's body. Raises `ApiError` for anything else, and for more than `MOST_BYTES`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site cannot send without asking first
        raise ApiError(415, f"the body must be application/json; given: {kind[:60] or 'nothing'}")
    try:
        text = (await bytes_of(request)).decode("utf-8")
        found = parse_object(text)
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeError as error:
        raise ApiError(400, "the body is not UTF-8, or holds half of a surrogate pair") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ApiError(400, f"the body is not a JSON object: {str(error)[:200]}") from error
    return found


async def bytes_of(request: Request, most: int = MOST_BYTES) -> bytes:
    """Return a request's body. Raises `ApiError` for more bytes than that."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise ApiError(413, f"the body has more than {most:,} bytes")
            parts.append(part)
    except ClientDisconnect as error:
        raise ApiError(499, "the client left") from error
    return b"".join(parts)
