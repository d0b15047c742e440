"""The unmodified client, in a Python of its own that GRAFT_TINKER_PYTHON names, against a server of ours."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.conftest import TOKEN, Running
from tests.serving.tinker.conftest import IDS, TARGETS
from tests.serving.tinker.killing import Moment, Plan, Proxy, Servers

KILLS: list[tuple[int, Moment]] = [
    (4, "lost"),
    (13, "answered"),
    (22, "before"),
    (31, "lost"),
    (40, "later"),
    (49, "answered"),
]
CLIENT = Path(__file__).with_name("client.py")


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("GRAFT_TINKER_PYTHON", "")
    if not found:
        pytest.skip("GRAFT_TINKER_PYTHON names no Python with the client 'tinker'")
    return found


def begin(python: str, url: str, call: str, base: Path, **asked: Any) -> subprocess.Popen[str]:
    script = {"call": call, "base": str(base), "ids": IDS, "targets": TARGETS, **asked}
    quiet = {"TINKER_TELEMETRY": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    command = [python, str(CLIENT), url, TOKEN, json.dumps(script)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **quiet}
    )


def answers(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def test_every_call(python: str, server: Running, base: Path) -> None:
    found = answers(begin(python, server.url, "every_call", base))
    model, name, is_lora, rank = found["info"]
    assert model.endswith(":train:0") and name == str(base) and is_lora and rank == 4
    assert str(base) in found["models"]
    total = [step[0]["loss:sum"] + step[1]["loss:sum"] for step in found["steps"]]
    assert total[0] == pytest.approx(found["before"]["metrics"]["loss:sum"], abs=1e-4) and total[1] < total[0]
    assert found["steps"][0][2]["asks"] == 2.0
    assert found["before"]["shapes"] == [[len(each)] for each in IDS]
    assert found["after"] == found["still"] == found["other"]
    assert found["again"][1] == "user" and "already" in found["again"][2]
    # the prompt's own tokens are its targets, so three roads lead to the same numbers
    own = found["after"]["logprobs"][0][:-1]
    np.testing.assert_allclose(found["prompt"][1:], own, atol=1e-4)
    tokens, logprobs, reason = found["drawn"][0]
    assert len(tokens) == 5 and reason == "length" and found["drawn"][1][0] != tokens
    np.testing.assert_allclose(found["scored"][1:], [*own, *logprobs], atol=1e-4)
    np.testing.assert_allclose(found["bare"][1:], found["before"]["logprobs"][0][:-1], atol=1e-4)
    assert found["unmoved"] == [each[:2] for each in found["drawn"]]
    assert all(row is None or row[0][1] >= row[1][1] for row in found["top"])
    assert found["runs"] == [f"{model.rpartition(':')[0]}:1", model] or model in found["runs"]
    assert len(found["checkpoints"]) == 2 and found["left"] == [found["saved"]]
    assert found["weights"] == [str(base), 4, True]


def test_many_samples_with_one_poller_and_one_given_up(
    python: str, server: Running, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = server.app.state.training.drawing
    given_up, cancel = [], drawing.cancel
    monkeypatch.setattr(drawing, "cancel", lambda number: given_up.append(cancel(number)) or given_up[-1])
    found = answers(begin(python, server.url, "samples", base))
    if found is None:
        pytest.skip("this release of the client knows no target_prompt_logprobs")
    assert found["at_once"] == found["again"] and found["shared"] == found["at_once"][:3]
    assert len({tuple(each) for each in found["at_once"]}) > 20
    assert given_up == [True] and not drawing.tasks
    assert "top_p" in found["failed"][2] and found["failed"][1] == "user"
    for name in ("publish", "urls", "project", "trace", "copy"):
        assert "not supported here" in found[name][2], found[name]
    assert found["run"] and len(found["all"]) == 1
    count = len(IDS[0]) - 1
    (dense, shape, starts, own), (sparse, _, rows, _) = found["dense"], found["sparse"]
    assert shape == [count, 3] and starts is None and rows == list(range(count + 1))
    assert dense[::3] == sparse == own[1:] and dense[2::3] == [0.0] * count and max(dense[1::3]) < 0
    tokens, logprobs, shape, top = found["alt"]
    assert shape == [count, 50]
    for row in range(count):  # the likeliest tokens are drawn about as often as they are likely
        known = dict(top[row + 1])
        drawn = list(zip(tokens[50 * row : 50 * row + 50], logprobs[50 * row : 50 * row + 50], strict=True))
        assert all(known.get(token, score) == score for token, score in drawn)
        mass = sum(np.exp(score) for score in known.values())
        hits = sum(token in known for token, _ in drawn)
        assert abs(hits - 50 * mass) <= 4 * np.sqrt(50 * mass * (1 - mass)) + 1


def test_refusals_have_the_category_user_and_the_client_goes_on(python: str, server: Running, base: Path) -> None:
    found = answers(begin(python, server.url, "refusals", base))
    metrics = found.pop("after")
    assert metrics["loss:sum"] > 0
    assert {name: each[1] for name, each in found.items()} == dict.fromkeys(found, "user")
    assert "mask" in found["key"][2] and "stable_reinforce" in found["loss"][2]


def clients() -> Iterator[dict[str, Any]]:
    """Sixteen clients: LoRA as the protocol has it and three other kinds, with sixteen sizes."""
    for size in range(1, 17):
        other: dict[str, Any] = [
            {},
            {"kind": "dora", "rank": size},
            {"kind": "series", "bottleneck": size},
            {"kind": "prefix", "tokens": size},
        ][size % 4]
        draw = np.random.default_rng(size)
        ids = [draw.integers(2, 258, length).tolist() for length in (4 + size, 9)]
        labels = {"graft.adapter": json.dumps(other)} if other else None
        yield {"rank": size, "seed": size, "labels": labels, "ids": ids, "targets": [[*each[1:], 1] for each in ids]}


@pytest.mark.slow
def test_sixteen_clients_at_once_equal_each_alone(
    python: str, server: Running, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    effects = server.app.state.training.service.effects
    ticks, run = [], effects.run
    monkeypatch.setattr(effects, "run", lambda promises: ticks.append(len(promises)) or run(promises))
    # With a tiny epsilon, Adam turns the rounding of a gradient that is nearly 0 into a whole step.
    asked = {"clients": list(clients()), "steps": 5, "adam": {"eps": 1e-2}}
    found = answers(begin(python, server.url, "clients", base, **asked))
    assert max(ticks) > 8
    for first, second in zip(found["alone"], found["together"], strict=True):
        assert first[-1] < first[0]
        np.testing.assert_allclose(second, first, rtol=1e-6)


@pytest.mark.slow
def test_a_client_is_told_the_same_by_a_server_that_dies_at_a_request(python: str, base: Path, tmp_path: Path) -> None:
    """Up to rounding, since a client's tenants may share other groups after a pause."""
    servers = Servers(base)
    proxy = Proxy(servers)
    asked = {"tenants": [each for each in clients() if each["rank"] in (4, 6, 7)]}
    told = []
    try:
        for plan in (Plan(), *(Plan(at, moment) for at, moment in KILLS)):
            servers.start(tmp_path / str(plan.at))
            proxy.plan = plan
            told.append(answers(begin(python, proxy.url, "tenants", base, **asked)))
            assert plan.died == bool(plan.at) and plan.seen > KILLS[-1][0]
    finally:
        proxy.close()
        servers.stop()
    for found in told[1:]:
        for first, second in zip(told[0], found, strict=True):
            np.testing.assert_allclose(second["losses"], first["losses"], rtol=1e-5)
            assert second["drawn"] == first["drawn"]


@pytest.fixture
def serving(base: Path, tmp_path: Path) -> Iterator[Any]:
    """Start `graft serve` on one port and one folder, again and again."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running: list[subprocess.Popen[bytes]] = []

    def start() -> tuple[str, subprocess.Popen[bytes]]:
        options = ["--state", str(tmp_path / "state"), "--token-file", str(token), "--port", str(port)]
        command = [sys.executable, "-m", "graft", "serve", str(base), "--device", "cpu", *options]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        while True:
            assert running[-1].poll() is None
            with socket.socket() as asking:
                if asking.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}", running[-1]
            time.sleep(0.1)

    yield start
    running[-1].kill()
    running[-1].wait()


@pytest.mark.slow
def test_a_client_sees_only_a_pause_when_the_server_is_killed(python: str, serving: Any, base: Path) -> None:
    asked = {"rank": 4, "seed": 3, "labels": None, "steps": 100}
    url, server = serving()
    unbroken = answers(begin(python, url, "train", base, **asked))
    client = begin(python, url, "train", base, **asked)
    time.sleep(4.0)  # of which the client's own start takes two
    for _ in range(3):
        assert client.poll() is None, "the client had finished before the server was killed"
        server.send_signal(signal.SIGKILL)
        server.wait()
        time.sleep(0.5)
        url, server = serving()
        time.sleep(1.0)
    assert answers(client) == unbroken
