"""A server that is killed after any request of a script: what three tenants of unlike kinds are told is what an unkilled one tells them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.tinker.conftest import Wire, httpx, plain
from tests.serving.tinker.killing import Moment, Plan, Proxy, Servers

KINDS: list[dict[str, Any]] = [
    {"rank": 4},
    {"labels": {"graft.adapter": {"kind": "lora", "rank": 2, "dropout": 0.2, "sites": "attn.q mlp.down"}}},
    {"labels": {"graft.adapter": {"kind": "prefix", "tokens": 3}}},
]
"""LoRA with an adapted head, LoRA with dropout, and a kind that acts in attention."""
LENGTH = 64
"""Requests of the script."""


class Stubborn(httpx.HTTPTransport):
    """Sends a request again as long as the connection breaks, as clients of the API do."""

    def handle_request(self, request: Any) -> Any:
        while True:
            try:
                return super().handle_request(request)
            except (httpx.NetworkError, httpx.RemoteProtocolError):
                time.sleep(0.01)


class Script:
    """Requests of three tenants, each of which is answered before the next is sent, so that every group of the engine is known."""

    def __init__(self, url: str) -> None:
        self.wire = Wire(url, Stubborn())
        self.next: dict[str, int] = {}
        self.told: list[Any] = []

    def note(self, found: Any) -> None:
        """Note an answer, without ids that are drawn."""
        if isinstance(found, tuple):
            self.told.append(([each.tolist() for each in found[0]], found[1]))
        elif isinstance(found, dict):
            ids = ("model_id", "path", "sampling_session_id")
            text = str({key: value for key, value in found.items() if key not in ids})
            self.told.append(text.replace(self.wire.session, "SESSION"))
        else:
            self.told.append(found)

    def number(self, model: str) -> int:
        self.next[model] = self.next.get(model, 0) + 1
        return self.next[model]

    def passed(self, model: str, rows: Any, loss: str = "cross_entropy", forward: bool = False) -> None:
        self.note(self.wire.wait(self.wire.pass_over(model, self.number(model), rows, loss, forward)))

    def did(self, kind: str, model: str, **fields: Any) -> Any:
        found = self.wire.wait(self.wire.post(kind, model_id=model, seq_id=self.number(model), **fields))
        self.note(found)
        return found

    def stepped(self, model: str) -> None:
        self.did("optim_step", model, adam_params={"learning_rate": 1e-2})

    def drawn(self, sampler: str, number: int) -> None:
        from graft.serving.tinker.messages import SampleResponse

        prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
        asked = {"sampling_session_id": sampler, "seq_id": number, "prompt": prompt, "num_samples": 2}
        promise = self.wire.post("asample", **asked, sampling_params={"max_tokens": 4, "seed": 3})
        while (answer := self.wire.poll(promise)).headers["content-type"] != "application/x-protobuf":
            assert "error" not in answer.json(), answer.text
        found = SampleResponse.FromString(answer.content)
        self.told.append([(each.tokens, each.logprobs) for each in found.sequences])

    def run(self, base: Path) -> list[Any]:
        wire, rows = self.wire, plain()
        models = [wire.model(str(base), **kind) for kind in KINDS]
        for round in range(4):
            for model in models:
                self.passed(model, rows[: 1 + round % 2])
                self.stepped(model)
        for model in models:
            self.did("save_weights", model, path="kept")
        unnamed = self.did("save_weights_for_sampler", models[0], sampling_session_seq_id=0)["sampling_session_id"]
        path = self.did("save_weights_for_sampler", models[1], path="named")["path"]
        named = wire.post(
            "create_sampling_session", session_id=wire.session, sampling_session_seq_id=1, model_path=path
        )["sampling_session_id"]
        for model in models:
            self.passed(model, rows)  # gradients that wait for their step
        self.drawn(unnamed, 0)
        self.drawn(named, 0)
        self.passed(models[0], rows, "no_such_loss")
        self.did("save_weights", models[1], path="kept")  # refused: it is there
        for model in models:
            self.stepped(model)
        for model, optimizer in zip(models, (True, False, True), strict=True):
            kept = f"tinker://{model}/weights/kept"
            self.did("load_weights", model, path=kept, optimizer=optimizer)
        self.did("save_weights", models[1], path="kept", overwrite=True)
        number, wire.models = wire.models, wire.models + 1
        fresh = {"session_id": wire.session, "model_seq_id": number, "optimizer": True}
        kept = f"tinker://{models[1]}/weights/kept"
        models.append(wire.wait(wire.post("load_weights", **fresh, path=kept))["model_id"])
        for model in models:
            early = wire.step(model, self.number(model) + 1, learning_rate=1e-2)
            self.note(wire.wait(wire.pass_over(model, self.number(model) - 1, rows)))
            self.note(wire.wait(early))
        for model in models:
            self.passed(model, rows, forward=True)
        self.drawn(unnamed, 1)
        wire.post(f"sessions/{wire.session}/finish", reason={"type": "success"})
        refused = wire.send("optim_step", {"model_id": models[0], "seq_id": 99})
        self.note(refused.json() if refused.status_code == 404 else f"status {refused.status_code}")
        wire.http.close()
        return self.told


@pytest.fixture(scope="module")
def servers(base: Path) -> Iterator[Servers]:
    found = Servers(base)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def proxy(servers: Servers) -> Iterator[Proxy]:
    found = Proxy(servers)
    yield found
    found.close()


@pytest.fixture(scope="module")
def unkilled(proxy: Proxy, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    found = told(proxy, Plan(), base, tmp_path_factory.mktemp("unkilled"))
    assert proxy.plan.seen == LENGTH and not proxy.plan.died
    return found


def told(proxy: Proxy, plan: Plan, base: Path, folder: Path) -> list[Any]:
    """What the tenants are told by a server that dies as planned."""
    proxy.servers.start(folder)
    proxy.plan = plan
    return Script(proxy.url).run(base)


def check(proxy: Proxy, base: Path, folder: Path, unkilled: list[Any], at: int, moment: Moment) -> None:
    found = told(proxy, Plan(at, moment), base, folder)
    for _ in range(200):  # "later" may come after the last answer
        if proxy.plan.died:
            break
        time.sleep(0.01)
    assert proxy.plan.died
    for number, (first, second) in enumerate(zip(unkilled, found, strict=True)):
        assert first == second, (at, moment, number)


@pytest.mark.parametrize(("at", "moment"), [(31, "lost"), (64, "answered")])
def test_a_kill_changes_no_answer(
    proxy: Proxy, base: Path, tmp_path: Path, unkilled: list[Any], at: int, moment: Moment
) -> None:
    check(proxy, base, tmp_path, unkilled, at, moment)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("moment", ["before", "lost", "answered", "later"])
def test_a_kill_after_any_request_changes_no_answer(
    proxy: Proxy, base: Path, tmp_path: Path, unkilled: list[Any], moment: Moment, first: int
) -> None:
    for at in range(first, LENGTH + 1, 2):
        check(proxy, base, tmp_path / str(at), unkilled, at, moment)
