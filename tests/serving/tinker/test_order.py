"""The order of effects: repeats, gaps, refusals, arrival in any order, company, and a process that was killed."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.conftest import Running
from tests.serving.tinker.conftest import Wire, plain

IA3 = {"graft.adapter": {"kind": "ia3"}}


def run(wire: Wire, base: Path, arrival: tuple[int, ...] = (1, 2, 3, 4), model: str | None = None) -> list[Any]:
    """Two requests of gradients, a step and a forward pass, sent in this order; their results by number."""
    model = model or wire.model(str(base))
    rows = plain()
    send = {
        1: lambda: wire.pass_over(model, 1, rows[:1]),
        2: lambda: wire.pass_over(model, 2, rows[1:]),
        3: lambda: wire.step(model, 3, learning_rate=1e-2),
        4: lambda: wire.pass_over(model, 4, rows, forward=True),
    }
    promises = {number: send[number]() for number in arrival}
    return [wire.wait(promises[number]) for number in sorted(promises)]


def same(first: Any, second: Any) -> bool:
    if isinstance(first, tuple):
        return first[1] == second[1] and all(np.array_equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    return first == second


def test_effects_are_in_the_order_of_numbers_whatever_the_arrival(wire: Wire, base: Path) -> None:
    straight, reversed_ = run(wire, base), run(wire, base, (4, 3, 2, 1))
    assert all(map(same, straight, reversed_))
    assert straight[3][1]["loss:sum"] < straight[0][1]["loss:sum"] + straight[1][1]["loss:sum"]


def test_a_repeat_acts_once_and_other_content_is_refused(wire: Wire, base: Path) -> None:
    model = wire.model(str(base))
    promises = [wire.pass_over(model, 1, plain()).json() for _ in range(3)]
    assert len({each["request_id"] for each in promises}) == 1
    other = wire.pass_over(model, 1, plain()[:1])
    assert other.status_code == 422 and "number 1" in other.text
    steps = [wire.step(model, 2, learning_rate=1e-2) for _ in range(2)]
    assert steps[0] == steps[1] and wire.wait(steps[0])["metrics"]["asks"] == 1.0
    assert wire.send("optim_step", {"model_id": model, "seq_id": 2, "adam_params": {}}).status_code == 422


def test_a_refused_request_fails_alone_and_what_follows_runs(wire: Wire, base: Path) -> None:
    model, rows = wire.model(str(base)), plain()
    bad = [
        wire.pass_over(model, 1, rows, "no_such_loss"),
        wire.pass_over(model, 2, [([5, 6], {"target_tokens": [6, 7], "weights": [float("nan"), 1.0]})]),
        wire.post("optim_step", model_id=model, seq_id=3, adam_params={"lr": 1.0}),
        wire.post("save_weights", model_id=model, seq_id=4, path="../../away"),
        wire.post("load_weights", model_id=model, seq_id=5, path="tinker://no/weights/such", optimizer=True),
        wire.post("save_weights_external", model_id=model, seq_id=6, path="out"),
    ]
    good = wire.pass_over(model, 7, rows)
    for promise in bad:
        found = wire.wait(promise)
        assert found["category"] == "user" and found["error"]
    alone = wire.wait(wire.pass_over(wire.model(str(base)), 1, rows))
    assert same(wire.wait(good), alone)


@pytest.mark.parametrize(
    ("path", "fields", "status"),
    [
        ("optim_step", {"model_id": "no", "seq_id": 1}, 404),
        ("optim_step", {"seq_id": 1}, 404),
        ("create_model", {"session_id": "no", "model_seq_id": 0, "base_model": "x"}, 400),
        ("create_session", {"sdk_version": 1}, 400),
        ("asample", {"sampling_session_id": "no", "seq_id": 0}, 404),
        ("retrieve_future", {"request_id": "request-99999999"}, 404),
        ("retrieve_future", {"request_id": "request-\u0661"}, 404),
        ("session_heartbeat", {"session_id": "no"}, 410),
        ("sessions/no/finish", {}, 404),
        ("weights_info", {"tinker_path": "tinker://a/b/c"}, 404),
    ],
)
def test_bad_requests_are_refused(wire: Wire, path: str, fields: dict[str, Any], status: int) -> None:
    answer = wire.send(path, fields)
    assert answer.status_code == status and answer.json()["error"]["message"]


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**40,
    1.5,
    "",
    "x" * 300,
    "\x00",
    "tinker://a/weights/b",
    [],
    [[]],
    {},
    {"a": {}},
]


def test_no_body_brings_the_server_down(wire: Wire, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies with one field of any value, for every route that takes a body."""
    monkeypatch.setattr("graft.serving.tinker.futures.HOLD", 0.01)
    model, draw = wire.model(str(base)), np.random.default_rng(0)
    sampler = wire.post(
        "create_sampling_session", session_id=wire.session, sampling_session_seq_id=0, base_model=str(base)
    )
    prompt, target = (
        {"chunks": [{"type": "encoded_text", "tokens": [5]}]},
        {"sampling_session_id": sampler["sampling_session_id"]},
    )
    own = {"session_id": wire.session, "model_seq_id": 9, "base_model": str(base), "path": "p", "optimizer": True}
    placed = {"model_id": model, "seq_id": 1, "path": "p", "optimizer": True}
    bodies: dict[str, dict[str, Any]] = {
        "create_session": {"sdk_version": "0"},
        "session_heartbeat": {"session_id": wire.session},
        "create_model": {**own, "lora_config": {"rank": 2}, "user_metadata": {}},
        "load_weights": own,
        "get_info": {"model_id": model},
        "optim_step": {**placed, "adam_params": {}},
        "save_weights": placed,
        "save_weights_for_sampler": placed,
        "asample": {
            **{**sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 1}, "num_samples": 1},
            **{"target_prompt_logprobs": {"data": [], "shape": [0, 1]}, "prompt_alt_tokens_k": 1},
        },
        "retrieve_futures": {"target": target, "prev_cursor": 0, "timeout": 0, "retrieved_request_ids": []},
        "cancel_future": {"request_id": "request-1"},
        "join_sampling_session": dict(sampler),
        "create_sampling_session": {**own, "sampling_session_seq_id": 5, "model_path": "p"},
        "retrieve_future": {"request_id": "request-1"},
        "weights_info": {"tinker_path": "p"},
    }
    for path, body in bodies.items():
        for name in body:
            for value in draw.permutation(len(VALUES))[:6]:
                answer = wire.send(path, {**body, name: VALUES[value]})
                assert answer.status_code < 500, (path, name, VALUES[value], answer.text)
    seq = 2**30
    assert wire.wait(wire.pass_over(wire.model(str(base)), 1, plain())) and wire.step(model, seq)


def test_a_body_that_is_no_message_is_refused_at_once(wire: Wire) -> None:
    headers = {"Content-Type": "application/x-protobuf"}
    assert wire.http.post("forward_backward", content=b"\xff\xff", headers=headers).status_code == 400
    assert wire.http.post("forward_backward", content=b"", headers={"Content-Type": "text/plain"}).status_code == 415
    assert wire.http.post("create_session", json={}, headers={"X-API-Key": "tml-wrong"}).status_code == 401


def test_unlike_kinds_at_once_equal_each_alone(wire: Wire, base: Path) -> None:
    kinds: list[dict[str, Any]] = [{"rank": 2}, {"rank": 8}, {"labels": IA3}]
    alone = [run(wire, base, model=wire.model(str(base), **kind)) for kind in kinds]
    models = [wire.model(str(base), **kind) for kind in kinds]
    rows = plain()
    promises = []
    # number 1 last, so that all models become ready at about the same time and share passes
    for seq in (2, 3, 4, 1):
        for model in models:
            if seq == 3:
                promises.append(wire.step(model, seq, learning_rate=1e-2))
            else:
                chosen = {1: rows[:1], 2: rows[1:], 4: rows}[seq]
                promises.append(wire.pass_over(model, seq, chosen, forward=seq == 4))
    together = [wire.wait(promise) for promise in promises]
    for number, found in enumerate(alone):
        for at, seq in enumerate((2, 3, 4, 1)):
            if seq != 3:
                mine, its = found[seq - 1], together[at * len(kinds) + number]
                for first, second in zip(mine[0], its[0], strict=True):
                    np.testing.assert_allclose(first, second, atol=2e-5)


def test_a_gap_waits_and_ends_with_its_session(server: Running, wire: Wire, base: Path) -> None:
    model = wire.model(str(base))
    promise = wire.step(model, 2)
    state = server.app.state.training.service.state(int(promise["request_id"].removeprefix("request-")))
    assert "request 1" in state["queue_state_reason"]
    wire.post(f"sessions/{wire.session}/finish", reason={"type": "success"})
    assert "over" in wire.wait(promise)["error"]
    assert wire.send("optim_step", {"model_id": model, "seq_id": 3}).status_code == 404


def test_a_session_that_was_over_long_ago_is_forgotten_but_for_what_it_saved(
    start: Callable[[Path], Running], base: Path, tmp_path: Path
) -> None:
    server = start(tmp_path / "state")
    service = server.app.state.training.service
    wire = Wire(server.url)
    saving, other = wire.model(str(base)), wire.model(str(base))
    wire.wait(wire.pass_over(other, 1, plain()))
    path = wire.wait(wire.post("save_weights", model_id=saving, seq_id=1, path="kept"))["path"]
    wire.post(f"sessions/{wire.session}/finish", reason={"type": "success"})
    loop = service._loop.get_loop()

    def do(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    while wire.session in str(service.order.models):
        time.sleep(0.01)
    do(service.drop(wire.session))
    assert wire.session in service.books.session  # what ran since the last snapshot may have to run again
    do(service._snapshot())
    do(service.drop(wire.session))
    assert wire.session not in service.books.session and other not in service.books.model
    assert not do(service.store(lambda store: store.execute("select * from promises").fetchall()))
    assert wire.post("weights_info", tinker_path=path)["lora_rank"] == 4
    wire.http.delete(f"training_runs/{saving}/checkpoints/weights/kept")
    assert not service.books.model and wire.send("weights_info", {"tinker_path": path}).status_code == 404
    wire.http.close()


def test_a_server_that_starts_on_what_a_killed_one_left_goes_on_bit_by_bit(
    start: Callable[[Path], Running], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a snapshot, in which there are gradients that wait for their step, and the ticks after it."""
    monkeypatch.setattr("graft.serving.tinker.service.EVERY", 4)
    first = start(tmp_path / "state")
    wire = Wire(first.url)
    model, other = wire.model(str(base)), wire.model(str(base), labels=IA3)
    rows = plain()
    for each in (model, other):
        wire.wait(wire.pass_over(each, 1, rows))
        wire.wait(wire.step(each, 2, learning_rate=1e-2))
        wire.wait(wire.post("save_weights", model_id=each, seq_id=3, path="kept"))
        wire.wait(wire.pass_over(each, 4, rows[:1]))  # gradients that no step has used yet
    sampler = wire.wait(wire.post("save_weights_for_sampler", model_id=model, seq_id=5, sampling_session_seq_id=0))[
        "sampling_session_id"
    ]
    early = wire.step(model, 7, learning_rate=1e-2)  # 6 has not arrived
    shutil.copytree(tmp_path / "state", tmp_path / "copy")  # what a kill at this moment leaves
    (tmp_path / "copy" / ".lock").unlink()

    def rest(server: Running) -> list[Any]:
        client = Wire.__new__(Wire)
        client.__dict__.update(wire.__dict__)
        client.http = type(wire.http)(base_url=f"{server.url}/api/v1", headers=wire.http.headers, timeout=60)
        client.pass_over(model, 6, rows[1:])
        found = [client.wait(early), client.wait(client.pass_over(model, 8, rows, forward=True))]
        client.wait(client.step(other, 5, learning_rate=1e-2))
        found.append(client.wait(client.pass_over(other, 6, rows, forward=True)))
        asked = {"sampling_session_id": sampler, "seq_id": 0, "num_samples": 2}
        prompt = {"chunks": [{"type": "encoded_text", "tokens": rows[0][0]}]}
        promise = client.post("asample", **asked, prompt=prompt, sampling_params={"max_tokens": 4})
        while (answer := client.poll(promise)).headers["content-type"] != "application/x-protobuf":
            pass
        client.wait(
            client.post("load_weights", model_id=model, seq_id=9, path=f"tinker://{model}/weights/kept", optimizer=True)
        )
        found += [answer.content, client.wait(client.pass_over(model, 10, rows, forward=True))]
        refused = client.wait(client.post("save_weights", model_id=model, seq_id=11, path="kept"))
        client.http.close()
        return [*found, refused["error"]]

    unbroken = rest(first)
    again = start(tmp_path / "copy")
    assert all(map(same, unbroken, rest(again)))
    wire.http.close()
