"""A training server in a thread of the tests, and a client of bare HTTP that sends what it likes in the order it likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.conftest import TOKEN, Running
from tests.small import save_small

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("google.protobuf", reason="the extra 'serve' is not installed")
httpx = pytest.importorskip("httpx", reason="the HTTP client 'httpx' is not installed")

IDS = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
TARGETS = [[6, 7, 8, 9, 10, 11], [21, 22, 1]]
Rows = Sequence[tuple[Sequence[int], Mapping[str, Any]]]
"""Token ids, and fields by name."""


def plain(ids: Sequence[Sequence[int]] = IDS, targets: Sequence[Sequence[int]] = TARGETS) -> Rows:
    return [(each, {"target_tokens": its}) for each, its in zip(ids, targets, strict=True)]


def message(
    model: str, seq: int, rows: Rows, loss: str = "cross_entropy", forward: bool = False, **config: float
) -> bytes:
    """The body of a forward_backward request."""
    from graft.serving.tinker.messages import ForwardBackwardRequest

    found = ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn=loss, forward_only=forward)
    found.loss_fn_config.update(config)
    for ids, fields in rows:
        datum = found.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(ids, "<i4").tobytes()
        for name, values in fields.items():
            array = np.asarray(values, "<i8" if name == "target_tokens" else "<f4")
            tensor = datum.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = array.tobytes(), 2 if name == "target_tokens" else 1
            tensor.shape.extend(array.shape)
    return found.SerializeToString()


def read_output(body: bytes) -> tuple[list[Any], dict[str, float]]:
    """The log-probabilities of each datum, and the metrics."""
    from graft.serving.tinker.messages import ForwardBackwardOutput

    output = ForwardBackwardOutput.FromString(body)
    logprobs = []
    for record in output.loss_fn_outputs:
        field = record.fields["logprobs"]
        ends, trailing = np.frombuffer(field.offsets, "<i8"), tuple(field.trailing_shape)
        logprobs += [
            np.frombuffer(field.data[first:last], "<f4").reshape(-1, *trailing)
            for first, last in zip(ends[:-1], ends[1:], strict=True)
        ]
    return logprobs, dict(output.metrics)


class Wire:
    """A client that sends one request after the other."""

    def __init__(self, url: str, transport: Any = None) -> None:
        headers = {"X-API-Key": TOKEN}
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers=headers, timeout=60, transport=transport)
        self.session = self.post("create_session", tags=[], sdk_version="0.38.0")["session_id"]
        self.models = self.samplers = 0

    def send(self, path: str, fields: Mapping[str, Any]) -> Any:
        return self.http.post(path, json=fields)

    def post(self, path: str, /, **fields: Any) -> Any:
        answer = self.send(path, fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def model(self, base: str, rank: int = 4, seed: int = 7, labels: Any = None) -> str:
        number, self.models = self.models, self.models + 1
        lora = {"rank": rank, "seed": seed}
        asked = {"session_id": self.session, "model_seq_id": number, "base_model": base, "lora_config": lora}
        found = self.wait(self.post("create_model", **asked, user_metadata=labels))
        assert "error" not in found, found
        return found["model_id"]

    def pass_over(
        self, model: str, seq: int, rows: Rows, loss: str = "cross_entropy", forward: bool = False, **config: float
    ) -> Any:
        """Submit a forward_backward request and return the HTTP answer."""
        content = message(model, seq, rows, loss, forward, **config)
        headers = {"Content-Type": "application/x-protobuf"}
        return self.http.post("forward_backward", content=content, headers=headers)

    def step(self, model: str, seq: int, **adam: float) -> Any:
        return self.post("optim_step", model_id=model, seq_id=seq, adam_params=adam)

    def poll(self, promise: Mapping[str, Any]) -> Any:
        return self.http.post(
            "retrieve_future", json={"request_id": promise["request_id"], "allow_metadata_only": False}
        )

    def wait_for_anything(self, promise: Mapping[str, Any]) -> dict[str, Any]:
        """Return the JSON of a result, or nothing of a message; the poll is answered again and again."""
        while True:
            answer = self.poll(promise)
            assert answer.status_code == 200, answer.text
            if answer.headers["content-type"] == "application/x-protobuf":
                return {}
            if (found := answer.json()).get("type") != "try_again":
                return found

    def wait(self, promise: Any) -> Any:
        """Return the result of a promise: a message as (log-probabilities of each datum, metrics), JSON as it is."""
        promise = promise if isinstance(promise, dict) else promise.json()
        while True:
            answer = self.poll(promise)
            assert answer.status_code == 200, answer.text
            if answer.headers["content-type"] != "application/x-protobuf":
                if (found := answer.json()).get("type") == "try_again":
                    continue
                return found
            return read_output(answer.content)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("tinker") / "base")


@pytest.fixture(scope="session")
def start(base: Path) -> Iterator[Callable[[Path], Running]]:
    """Start a server on a state folder; it stops with the tests."""
    from graft.config.base import BaseConfig
    from graft.generation.loaded import load_candidates
    from graft.serving.app import make_app

    servers = []

    def started(state: Path) -> Running:
        loaded = load_candidates(base=BaseConfig(model=str(base), device="cpu"))
        servers.append(Running(make_app(loaded, token=TOKEN, rows=8, most=40, state=state)))
        return servers[-1]

    yield started
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start: Callable[[Path], Running], tmp_path_factory: pytest.TempPathFactory) -> Running:
    return start(tmp_path_factory.mktemp("tinker") / "state")


@pytest.fixture
def wire(server: Running) -> Iterator[Wire]:
    found = Wire(server.url)
    yield found
    found.http.close()
