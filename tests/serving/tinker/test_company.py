"""Clients of both APIs on one engine: who chats, who floods and who leaves change no number of who trains, and the other way round."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import TOKEN, Running
from tests.serving.tinker.conftest import Wire, httpx, plain

PROMPTS = ("forty plus two", "4", "what is it that")


def trained(server: Running, base: Path) -> list[Any]:
    """What a tenant is told in four steps."""
    wire = Wire(server.url)
    model, told = wire.model(str(base)), list[Any]()
    for step in range(4):
        passed = wire.wait(wire.pass_over(model, 2 * step + 1, plain()))
        told.append([each.tolist() for each in passed[0]])
        told.append(wire.wait(wire.step(model, 2 * step + 2, learning_rate=1e-2)))
    wire.http.close()
    return told


def test_chat_and_training_change_nothing_of_each_other(server: Running, base: Path) -> None:
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=5, timeout=60)

    def chatted(prompt: str) -> str:
        found = client.completions.create(model="base", prompt=prompt, temperature=0, max_tokens=16)
        return found.choices[0].text

    alone, answers = trained(server, base), {prompt: chatted(prompt) for prompt in PROMPTS}
    over, found, wrong = threading.Event(), set[tuple[str, str]](), list[BaseException]()

    def until_over(work: Any) -> None:
        try:
            while not over.is_set():
                work()
        except BaseException as error:
            wrong.append(error)

    def chats() -> None:
        found.update((prompt, chatted(prompt)) for prompt in PROMPTS)

    def leaves() -> None:
        body = {"model": "base", "prompt": "go on", "max_tokens": 200, "n": 8, "temperature": 5}
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-API-Key": TOKEN}, timeout=0.1)

    def errs() -> None:
        for fields in ({"top_p": 7.0}, {"model": "nobody"}, {"max_tokens": 10**9, "prompt": [5] * 10_000}):
            with pytest.raises((openai.BadRequestError, openai.NotFoundError)):
                client.completions.create(**{"model": "base", "prompt": "4", "max_tokens": 2, **fields})

    threads = [threading.Thread(target=until_over, args=(work,)) for work in (chats, chats, leaves, errs)]
    for each in threads:
        each.start()
    try:
        together = [trained(server, base) for _ in range(2)]
    finally:
        over.set()
        for each in threads:
            each.join(60)
    assert not wrong and together == [alone, alone]
    assert found == set(answers.items())
