"""A server of OpenAI's API, asked for log-probabilities. Nothing here but HTTP: any such server will do."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from graft.errors import GraftError

SECONDS = 120
TOP = 5
"""Alternatives of a token that are asked for."""


class Refused(GraftError):
    """The server answered with an error."""


class Remote:
    """A server at a URL, with or without /v1 at its end."""

    def __init__(self, url: str, token: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise GraftError(f"a server is named by its URL, such as http://127.0.0.1:8000; given: {url}")
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}

    def models(self) -> list[str]:
        """Return the names of the models."""
        found = self._ask("models").get("data")
        return (
            [each["id"] for each in found if isinstance(each, dict) and isinstance(each.get("id"), str)]
            if isinstance(found, list)
            else []
        )

    def scores(self, model: str, prompt: str | Sequence[int]) -> list[float] | None:
        """Return the log-probability of each token of a prompt but the first; None if the server does not score prompts."""
        settings = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
        given = prompt if isinstance(prompt, str) else list(prompt)
        body: dict[str, Any] = {"model": model, "prompt": given, **settings}
        try:
            found = self._ask("completions", body)
        except Refused:
            found = self._ask("completions", {**body, "max_tokens": 1})  # some servers generate at least one token
        scores = _at(found, "choices", 0, "logprobs", "token_logprobs")
        if not isinstance(scores, list) or len(scores) < 2 or scores[0] is not None:
            return None
        numbers = scores[1 : len(prompt)] if not isinstance(prompt, str) else scores[1:]
        return [float(each) for each in numbers] if all(isinstance(each, int | float) for each in numbers) else None

    def first_chat_token(self, model: str, text: str) -> dict[str, float] | None:
        """Return the likeliest first tokens of the answer to a question, as text, with their log-probabilities; None if there are none."""
        messages = [{"role": "user", "content": text}]
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": TOP,
            "temperature": 0,
        }
        found = _at(self._ask("chat/completions", body), "choices", 0, "logprobs", "content", 0, "top_logprobs")
        if not isinstance(found, list):
            return None
        return _finite({each.get("token"): each.get("logprob") for each in found if isinstance(each, dict)})

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                found = json.load(response)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            raise Refused(f"{self.url}/{path} answered with status {error.code}: {said[:300]}") from error
        except (OSError, ValueError) as error:
            raise GraftError(f"{self.url}/{path} does not answer as OpenAI's API does: {error}") from error
        if not isinstance(found, dict):
            raise GraftError(f"{self.url}/{path} answered with {type(found).__name__}, not with an object")
        return found


def _at(value: Any, *path: str | int) -> Any:
    """Return what lies at a path in JSON, None if nothing does."""
    for step in path:
        if isinstance(step, int):
            value = value[step] if isinstance(value, list) and len(value) > step else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return value


def _finite(found: dict[Any, Any]) -> dict[str, float] | None:
    kept = {key: float(value) for key, value in found.items()
            if isinstance(key, str) and isinstance(value, int | float) and math.isfinite(value)}  # fmt: skip
    return kept or None
