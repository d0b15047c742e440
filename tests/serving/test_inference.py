"""The chat server, asked by the unmodified client of OpenAI and by plain HTTP, against Graft's own generation."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import graft
from graft.generation.generate import generate
from graft.generation.prompts import request_of
from graft.generation.requests import Decoding
from graft.serving.replies import token_text
from tests.serving.conftest import TOKEN, Running

httpx = pytest.importorskip("httpx", reason="the HTTP client 'httpx' is not installed")
ASKED = [{"role": "user", "content": "What is 40 plus 2?"}]


@pytest.fixture(scope="module")
def client(running: Running) -> Any:
    openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=TOKEN, max_retries=0, timeout=30)


def post(running: Running, path: str, body: Any, **headers: str) -> Any:
    return httpx.post(
        f"{running.url}/v1/{path}", json=body, headers={"Authorization": f"Bearer {TOKEN}", **headers}, timeout=30
    )


def own(loaded: Any, name: str, tokens: int = 12, **decoding: Any) -> str:
    """The answer by Graft's own generation, alone."""
    candidate = loaded.find(name)
    request = request_of(loaded.base, candidate.template, candidate.adapter, ASKED)  # pyright: ignore[reportArgumentType]
    found = dict(generate(loaded.base.model, [request], Decoding(tokens, **decoding)))[0]
    return loaded.base.tokenizer.decode(found.ids, skip_special_tokens=True)


def test_the_client_lists_the_models_and_chats_with_each(client: Any, loaded: Any) -> None:
    names = [each.id for each in client.models.list()]
    assert names == ["base", "lead", "style", "task"] and client.models.retrieve("lead").kind == "prefix"
    prints = set()
    for name in names:
        found = client.chat.completions.create(model=name, messages=ASKED, temperature=0, max_tokens=12)
        assert found.choices[0].message.content == own(loaded, name)
        assert found.usage.completion_tokens <= 12 and found.choices[0].finish_reason in ("stop", "length")
        prints.add(found.system_fingerprint)
    assert len(prints) == 4 and any(loaded.find("style").digest in each for each in prints)


def test_a_stream_holds_the_whole_answer_and_then_the_usage(client: Any, loaded: Any) -> None:
    options: dict[str, Any] = {
        "model": "style",
        "messages": ASKED,
        "seed": 3,
        "n": 2,
        "max_tokens": 9,
        "temperature": 0.7,
    }
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        text = "".join(choice.delta.content or "" for choice in mine)
        assert text == whole.choices[index].message.content == own(loaded, "style", 9, temperature=0.7, seed=3 + index)
        assert mine[0].delta.role == "assistant" and mine[-1].finish_reason == whole.choices[index].finish_reason


def test_several_adapters_with_weights_answer_as_in_the_model_itself(client: Any, loaded: Any) -> None:
    found = client.completions.create(
        model="style+0.5*task", prompt="4 plus 5", temperature=0, max_tokens=6, logprobs=0
    )
    ids = torch.tensor([loaded.base.tokenizer.encode("4 plus 5")])
    tokenizer, model = loaded.base.tokenizer, loaded.base.model
    with torch.no_grad(), graft.use(model, {"style": 1.0, "task": 0.5}):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=1
        )
    assert found.choices[0].text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert "1*" in found.system_fingerprint and "0.5*" in found.system_fingerprint


def test_log_probabilities_and_echo_are_those_of_one_pass(client: Any, loaded: Any) -> None:
    prompt = "four + five"
    options: dict[str, Any] = {
        "model": "task",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 5,
        "logprobs": 2,
        "echo": True,
    }
    (choice,) = client.completions.create(**options).choices
    tokenizer, model = loaded.base.tokenizer, loaded.base.model
    by_text = {token_text(tokenizer, token)[0]: token for token in range(len(tokenizer))}
    ids = [by_text[text] for text in choice.logprobs.tokens]
    assert ids[: len(prompt)] == tokenizer.encode(prompt) and len(ids) == len(prompt) + 5
    with torch.no_grad(), graft.use(model, "task"):
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    scores = choice.logprobs.token_logprobs
    assert scores[0] is None and choice.text.startswith(prompt)
    assert scores[1:] == pytest.approx(expected, abs=1e-4)
    assert choice.logprobs.text_offset[len(prompt)] == len(prompt)
    scored = client.completions.create(**{**options, "max_tokens": 0}).choices[0]
    assert scored.logprobs.token_logprobs == pytest.approx(scores[: len(prompt)]) and scored.text == prompt
    chat = client.chat.completions.create(
        model="task", messages=ASKED, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0
    )
    exact = client.chat.completions.create(
        model="task", messages=ASKED, logprobs=True, max_tokens=4, temperature=0, extra_body={"exact_logprobs": True}
    )
    first, second = ([each.logprob for each in found.choices[0].logprobs.content] for found in (chat, exact))
    assert first == pytest.approx(second, abs=1e-5)
    assert chat.choices[0].logprobs.content[0].top_logprobs[0].logprob == first[0]


def test_stop_texts_end_an_answer_and_are_not_shown(client: Any, loaded: Any) -> None:
    text = own(loaded, "base", 20)
    stop = text[6:9]
    options: dict[str, Any] = {
        "model": "base",
        "messages": ASKED,
        "temperature": 0,
        "max_tokens": 20,
        "stop": [stop, "never"],
    }
    found = client.chat.completions.create(**options).choices[0]
    assert found.message.content == text[: text.index(stop)] and found.finish_reason == "stop"
    stream = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == found.message.content


def test_many_clients_at_once_get_what_each_gets_alone(client: Any, loaded: Any) -> None:
    expected = {name: own(loaded, name, 16) for name in ("base", "style", "task", "lead")}
    found: list[tuple[str, str]] = []

    def ask(name: str) -> None:
        answer = client.chat.completions.create(model=name, messages=ASKED, temperature=0, max_tokens=16)
        found.append((name, answer.choices[0].message.content))

    threads = [threading.Thread(target=ask, args=(name,)) for name in expected for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(30)
    assert len(found) == 16 and all(text == expected[name] for name, text in found)


def test_what_is_wrong_is_named_in_openais_form(client: Any, running: Running) -> None:
    import openai

    for model in ("nobody", "style+nobody", "base+style", "0.5*", ""):
        with pytest.raises(openai.NotFoundError, match="does not exist here") as raised:
            client.chat.completions.create(model=model, messages=ASKED)
        assert "model_not_found" in str(raised.value.body)
    chat = {"model": "base", "messages": ASKED}
    table: list[tuple[dict[str, Any], str]] = [
        ({"temprature": 1.0}, "There are: model"), ({"temperature": -1}, "temperature must be"), ({"top_p": 0}, "top_p must be"),
        ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"), ({"n": 0}, "n must be"), ({"n": 9}, "at most 8 rows"),
        ({"messages": []}, "messages must"), ({"messages": [{"role": "poet", "content": "x"}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "parts of type text"),
        ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "unknown field 'mood'"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, "tokens"), ({"stop": ""}, "a stop text must not be empty"),
        ({"top_logprobs": 3}, "top_logprobs needs"), ({"stream_options": {}}, "stream_options is for streams"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"), ({"exact_logprobs": True}, "exact_logprobs needs"),
    ]  # fmt: skip
    for change, said in table:
        found = post(running, "chat/completions", {**chat, **change})
        assert found.status_code == 400 and said in found.json()["error"]["message"], (change, found.text)
    found = post(running, "completions", {"model": "base", "prompt": [5, 9999]})
    assert found.status_code == 400 and "there is no token 9999" in found.text


def test_only_who_names_the_host_and_knows_the_token_is_answered(running: Running) -> None:
    def status(path: str = "models", **headers: str) -> int:
        return httpx.get(f"{running.url}/v1/{path}", headers=headers).status_code

    assert status(Authorization=f"Bearer {TOKEN}") == status(**{"X-API-Key": TOKEN}) == 200
    assert status() == status(Authorization="Bearer wrong") == status(Authorization=f"Basic {TOKEN}") == 401
    assert status(Authorization=f"Bearer {TOKEN}", Host="evil.example") == 403
    assert status(Authorization=f"Bearer {TOKEN}", Origin="https://evil.example") == 403
    assert status("nothing", Authorization=f"Bearer {TOKEN}") == 404
    plain = httpx.post(f"{running.url}/v1/completions", content=b"{}", headers={"Authorization": f"Bearer {TOKEN}"})
    assert plain.status_code == 415
    health = httpx.get(f"{running.url}/health").json()
    assert health["status"] == "ok" and 0 <= health["logprobs_apart"] < 1e-5


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(running: Running, stream: bool) -> None:
    body = {
        "model": "base",
        "prompt": "go on",
        "max_tokens": 200,
        "n": 8,
        "seed": 1,
        "stream": stream,
        "temperature": 5,
    }
    before = running.engine.load["steps"]
    with httpx.Client(timeout=30) as client:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        if stream:
            with client.stream("POST", f"{running.url}/v1/completions", json=body, headers=headers) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{running.url}/v1/completions", json=body, headers=headers, timeout=0.15)
    end = time.monotonic() + 10
    while running.engine.load["open"] or running.engine.load["running"]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert running.engine.load["steps"] - before < 190


def test_a_full_queue_says_so_and_a_failing_step_ends_its_own_requests_only(
    running: Running, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    body = {"model": "base", "prompt": "go on", "max_tokens": 2, "temperature": 0}
    with monkeypatch.context() as full:
        full.setattr(running.engine, "most", 0)
        found = post(running, "completions", body)
        assert found.status_code == 429 and found.headers["retry-after"] == "1"
    with monkeypatch.context() as broken:
        broken.setattr(running.engine.batch, "_choose", lambda _: 1 / 0)
        found = post(running, "completions", body)
        assert found.status_code == 500 and "the server's log" in found.json()["error"]["message"]
        streamed = post(running, "completions", {**body, "stream": True})
        assert '"server_error"' in streamed.text and "[DONE]" not in streamed.text
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert post(running, "completions", body).status_code == 200 and running.engine.load["open"] == 0
