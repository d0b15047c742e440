"""Bodies that nobody should send: each gets an answer, none a fault of the server's."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.serving.conftest import TOKEN, Running

httpx = pytest.importorskip("httpx", reason="the HTTP client 'httpx' is not installed")

CHAT = {
    "model": "base", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.5, "top_p": 0.9, "top_k": 5, "n": 1,
    "stop": ["x"], "seed": 1, "max_tokens": 3, "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, "stream": True,
    "user": "me",
    "stream_options": {"include_usage": True}, "frequency_penalty": 0, "response_format": {"type": "text"}, "exact_logprobs": True,
}  # fmt: skip
COMPLETION = {
    "model": "style", "prompt": "hello", "temperature": 0.5, "top_p": 0.9, "n": 1, "stop": "x", "seed": 1, "max_tokens": 3, "logprobs": 2,
    "echo": True, "stream": False, "best_of": 1, "logit_bias": {}, "suffix": "", "presence_penalty": 0, "exact_logprobs": True,
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.0, 1e308, -1e-300, 2**63, -(2**63) - 1, 10**400, "", "a", "base", "style+0.5*task", "style+style",
    "9" * 400 + "*style+task", "é\u0000\u202e", "\ud800", "x" * 5000, [], [[]], {}, [None], [1, 2], [[5, 6], [7]], ["a", 1], [-1],
    [257, 258], [2**70], {"role": "user", "content": "x"}, [{"role": "user", "content": "x"}] * 3, [{"role": "assistant", "content": "x"}],
    [{"role": "system"}], [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "tool", "content": "x", "tool_call_id": {}}],
    [{"role": "assistant", "tool_calls": 3, "content": None}, {"role": "user", "content": "x"}], {"a": {"b": [1]}}, [[[[[[1]]]]]],
]  # fmt: skip
RAW = [
    b"",
    b"null",
    b"[]",
    b"{",
    b'{"a":1,"a":2}',
    b"\xff\xfe",
    b"NaN",
    b'{"model": NaN}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"model": 1e999}',
]


def body(draw: random.Random) -> tuple[str, bytes]:
    """One body, wrong in one to three places as often as not, or no JSON at all."""
    if draw.random() < 0.05:
        return draw.choice(["chat/completions", "completions"]), draw.choice(RAW)
    path, start = draw.choice([("chat/completions", CHAT), ("completions", COMPLETION)])
    kept = {
        key: value
        for key, value in start.items()
        if key in ("model", "messages", "prompt", "max_tokens") or draw.random() < 0.2
    }
    for _ in range(draw.randrange(4)):
        kept[draw.choice([*start, "unknown", "tools"])] = draw.choice(ODD)
    return path, json.dumps(kept).encode()


def fuzz(running: Running, count: int, seed: int) -> dict[int, int]:
    """Send bodies; return how often each status came."""
    draw, found = random.Random(seed), {}
    with httpx.Client(
        timeout=20, headers={"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    ) as client:
        for number in range(count):
            path, content = body(draw)
            answer = client.post(f"{running.url}/v1/{path}", content=content)
            assert answer.status_code < 500, (number, path, content[:500], answer.text)
            assert "Traceback" not in answer.text and '"server_error"' not in answer.text, (
                number,
                path,
                content[:500],
                answer.text,
            )
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], (number, content[:500])
            found[answer.status_code] = found.get(answer.status_code, 0) + 1
    assert client.is_closed and running.engine.is_alive() and httpx.get(f"{running.url}/health").json()["open"] == 0
    return found


def test_a_hundred_odd_bodies_are_answered(running: Running, capfd: pytest.CaptureFixture[str]) -> None:
    found = fuzz(running, 100, 1)
    assert found[200] > 5 and found[400] > 20 and "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_thousand_odd_bodies_are_answered(running: Running, capfd: pytest.CaptureFixture[str]) -> None:
    found = fuzz(running, 1000, 2)
    assert found[200] > 50 and found[400] > 200 and "Traceback" not in capfd.readouterr().err
