"""Signing in to the pages: the token is typed once, and a cookie that only this server can have made stands for it."""

from __future__ import annotations

import hashlib
import hmac
from http.cookies import CookieError, SimpleCookie

COOKIE = "graft_session"


def session_of(token: str) -> str:
    """Return the value of the cookie of whoever knows the token."""
    return hmac.new(token.encode(), b"graft pages", hashlib.sha256).hexdigest()


def is_signed_in(cookies: str, token: str) -> bool:
    """Whether a Cookie header holds the session of this token."""
    try:
        found = SimpleCookie(cookies).get(COOKIE)
    except CookieError:
        return False
    return found is not None and hmac.compare_digest(found.value.encode(), session_of(token).encode())
