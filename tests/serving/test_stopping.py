"""SIGTERM: what is open may finish, and nothing new is taken."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

httpx = pytest.importorskip("httpx", reason="the HTTP client 'httpx' is not installed")


@pytest.mark.slow
def test_a_stream_that_runs_comes_to_its_end(a_run: Path) -> None:
    words = [sys.executable, "-m", "graft", "serve", str(a_run), "--port", "0", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        text = ""
        for line in server.stdout:
            text += line
            if line.startswith("}"):
                break
        url = json.loads(text)["url"]
        body = {"model": "style", "prompt": "go on", "max_tokens": 200, "temperature": 3, "seed": 1, "stream": True}
        with httpx.Client(timeout=60) as client, client.stream("POST", f"{url}/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] is not None
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/models")
        assert server.wait(30) in (0, -signal.SIGTERM)
