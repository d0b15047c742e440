"""Bodies that no client sends, JSON and protobuf, wrong in several places at any depth: each is answered, and each promise is kept."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.conftest import Running
from tests.serving.tinker.conftest import IDS, TARGETS, Wire, message, plain

ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, -1e-300, 2**31, 2**63, -(2**63) - 1, 10**400, "", "x", "\x00", "é\u202e", "\ud800",
    "x" * 5000, "../..", "tinker://a/weights/b", "request-1", "request-9999999999999999999", [], [[]], {}, [None], [1, 2], [2**40], [-1],
    [1e999],
    {"a": {}}, [[[[1]]]], {"type": "adamw"}, {"type": "dimuon", "version": 1}, {"graft.adapter": {"kind": "ia3"}}, {"graft.adapter": "{"},
    {"graft.adapter": {"kind": "lora", "rank": 10**9}}, {"graft.adapter": "llm-adapters/series"}, {"graft.adapter": ["lora", 3]},
]  # fmt: skip
RAW = [b"", b"null", b"[]", b"{", b'{"a":1,"a":2}', b"\xff\xfe", b"NaN", b"[" * 100_000, b'{"model_id": 1e999}']
LOSSES = ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce", "", "x" * 300]
FIELDS = ["target_tokens", "weights", "advantages", "logprobs", "clip_low_threshold", "sequence_ratio_mask", "mask", ""]
ARRAYS: list[Any] = [
    [], [0], [1.0, -1.0], [float("nan")] * 6, [float("inf")] * 6, [-1] * 6, [10**6] * 6, [5, 6, 7, 8, 9, 10], [1e38] * 6, [[1, 2]] * 6,
    [[0.5, 0.5]] * 6, [[[1]]], 3, [-1e38] * 6, [0.0] * 6,
]  # fmt: skip


def whole(values: Any) -> Any:
    """The nearest whole numbers that fit into 64 bits."""
    return np.nan_to_num(np.asarray(values, "f8")).clip(-(2.0**62), 2.0**62).astype("i8")


def seq_of(content: bytes) -> int | None:
    """The sequence number in a forward_backward request; None if there is none to read."""
    from google.protobuf.message import DecodeError

    from graft.serving.tinker.messages import ForwardBackwardRequest

    try:
        return ForwardBackwardRequest.FromString(content).seq_id
    except DecodeError:
        return None


class Fuzzer:
    """A client that sends what it should not, with sessions and models of its own."""

    def __init__(self, server: Running, base: Path, seed: int) -> None:
        self.server, self.base, self.draw = server, base, random.Random(seed)
        self.statuses: Counter[int] = Counter()
        self.ends: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        self.wire = Wire(self.server.url)
        self.model, self.seq, self.promises = self.wire.model(str(self.base)), 0, list[Any]()
        asked = {"session_id": self.wire.session, "sampling_session_seq_id": 0, "base_model": str(self.base)}
        self.sampler = self.wire.post("create_sampling_session", **asked)["sampling_session_id"]

    def bodies(self) -> dict[str, dict[str, Any]]:
        """A right body for each route."""
        placed = {"model_id": self.model, "seq_id": self.seq + 1}
        new = {"session_id": self.wire.session, "model_seq_id": self.draw.randrange(1, 4), "base_model": str(self.base)}
        adam = {
            "learning_rate": 1e-3,
            "beta1": 0.9,
            "beta2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "grad_clip_norm": 1.0,
        }
        lora = {"rank": 2, "seed": 1, "train_attn": True, "train_mlp": True, "train_unembed": False}
        table = {"data": [5, 6], "shape": [2, 1], "sparse_crow_indices": None, "sparse_col_indices": None}
        sampling = {"max_tokens": 2, "temperature": 1.0, "top_k": 3, "top_p": 0.9, "seed": 1, "stop": ["a"]}
        saved = f"tinker://{self.model}/weights/p"
        return {
            "create_session": {"tags": ["a"], "sdk_version": "0", "user_metadata": {"a": "b"}, "display_name": "me"},
            "session_heartbeat": {"session_id": self.wire.session},
            "create_model": {**new, "lora_config": lora, "user_metadata": {}, "optimizer_config": {"type": "adamw"}},
            "get_info": {"model_id": self.model},
            "optim_step": {**placed, "adam_params": adam},
            "save_weights": {**placed, "path": "p", "overwrite": True, "ttl_seconds": 100, "user_metadata": {"a": 1}},
            "save_weights_for_sampler": {**placed, "path": None, "sampling_session_seq_id": 7, "kind": "snapshot"},
            "load_weights": {**self.draw.choice([placed, new]), "path": saved, "optimizer": True},
            "save_weights_external": {**placed, "path": "p"},
            "create_sampling_session": {"session_id": self.wire.session, "sampling_session_seq_id": 5, "model_path": saved},
            "asample": {
                "sampling_session_id": self.sampler, "seq_id": self.draw.randrange(10**6), "num_samples": 2, "prompt_logprobs": True,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}, "sampling_params": sampling,
                "topk_prompt_logprobs": 2, "topk_sample_logprobs": 2, "target_prompt_logprobs": table, "prompt_alt_tokens_k": 2,
            },
            "retrieve_future": {"request_id": "request-1", "allow_metadata_only": True},
            "retrieve_futures": {
                "target": {"type": "sampling_session", "sampling_session_id": self.sampler, "cloned_sampler_id": 0}, "prev_cursor": 0,
                "timeout": 0, "retrieved_request_ids": ["request-1"],
            },
            "cancel_future": {"request_id": "request-1"},
            "join_sampling_session": {"sampling_session_id": self.sampler},
            "weights_info": {"tinker_path": saved},
            "copy_weights": {"source_path": saved, "destination_project_id": "p"},
            "client/config": {"sdk_version": "0"},
            "telemetry": {"events": []},
        }  # fmt: skip

    def spoil(self, value: Any) -> Any:
        """Exchange one value at any depth, or drop, add or repeat a part."""
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        if not keys or self.draw.random() < 0.3:
            return self.draw.choice(ODD)
        key, found = self.draw.choice(keys), value.copy()
        if self.draw.random() < 0.7:
            found[key] = self.spoil(found[key])
        elif isinstance(found, dict):
            found.pop(key) if self.draw.random() < 0.5 else found.update({"unknown": self.draw.choice(ODD)})
        else:
            found = found * 2
        return found

    def datum(self) -> tuple[list[int], dict[str, Any]]:
        fields = {"target_tokens": TARGETS[0]} if self.draw.random() < 0.8 else {}
        for _ in range(self.draw.randrange(4)):
            name, values = self.draw.choice(FIELDS), self.draw.choice(ARRAYS)
            fields[name] = whole(values) if name == "target_tokens" else values
        return self.draw.choice([IDS[0], [], [0], [257], [258], [-1], [5] * 700]), fields

    def packet(self) -> bytes:
        """A forward_backward request: wrong fields, and sometimes wrong bytes."""
        settings = {
            self.draw.choice(["clip_low_threshold", "beta", "x"]): self.draw.choice([0.2, -1.0, float("nan"), 1e300])
        }
        rows = [self.datum() if self.draw.random() < 0.7 else plain()[0] for _ in range(self.draw.randrange(4))]
        more = settings if self.draw.random() < 0.3 else {}
        seq = self.draw.choice([self.seq + 1] * 8 + [0, -1, 2**31 - 1])
        with np.errstate(over="ignore"):
            content = bytearray(
                message(self.model, seq, rows, self.draw.choice(LOSSES), self.draw.random() < 0.3, **more)
            )
        if content and self.draw.random() < 0.3:
            for _ in range(self.draw.randrange(1, 6)):
                content[self.draw.randrange(len(content))] = self.draw.randrange(256)
            content = content[: self.draw.choice([len(content), self.draw.randrange(len(content))])]
        return bytes(content)

    def send(self) -> None:
        """Send one body."""
        if self.draw.random() < 0.3:
            path, content, kind = "forward_backward", self.packet(), "application/x-protobuf"
            seq = seq_of(content)
        else:
            path, body = self.draw.choice(list(self.bodies().items()))
            for _ in range(self.draw.randrange(4)):
                body = self.spoil(body)
            seq = body.get("seq_id") if isinstance(body, dict) and path != "asample" else None
            content = self.draw.choice(RAW) if self.draw.random() < 0.03 else json.dumps(body).encode()
            kind = "application/json"
        answer = self.wire.http.post(path, content=content, headers={"Content-Type": kind})
        assert answer.status_code < 500 and "Traceback" not in answer.text, (path, content[:2000], answer.text)
        self.statuses[answer.status_code] += 1
        if answer.status_code != 200:
            assert answer.json()["error"]["message"], (path, content[:2000])
        elif answer.headers["content-type"] == "application/json":
            found = answer.json()
            if "request_id" in found and "type" not in found:
                self.promises.append((found, path, content))
                self.seq += seq == self.seq + 1 and found.get("model_id") == self.model

    def end(self) -> None:
        """See that every promise is kept but those that wait behind a gap, and that these are over with their session."""
        gaps = []
        for promise, path, content in self.promises:
            for _ in range(200):
                answer = self.wire.poll(promise)
                told = {} if answer.headers["content-type"] == "application/x-protobuf" else answer.json()
                if told.get("type") != "try_again" or "waits for request" in told.get("queue_state_reason", ""):
                    break
            else:
                pytest.fail(f"nothing comes of {path} {content[:2000]!r}: {told}")
            if told.get("type") == "try_again":
                gaps.append(promise)
                continue
            assert told.get("category") != "server", (path, content[:2000], told)
            self.ends[told.get("category", "done")] += 1
        self.wire.post(f"sessions/{self.wire.session}/finish", reason={"type": "success"})
        assert all("over" in self.wire.wait_for_anything(promise)["error"] for promise in gaps)
        self.wire.http.close()


def fuzz(server: Running, base: Path, count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> Fuzzer:
    """Send bodies, fifty in a session."""
    monkeypatch.setattr("graft.serving.tinker.futures.HOLD", 0.01)
    # a poll of a mutated request id may be for a request that waits behind a gap
    monkeypatch.setattr("graft.serving.tinker.service.Service.result.__defaults__", (0.05,))
    fuzzer = Fuzzer(server, base, seed)
    for number in range(count):
        if number and number % 50 == 0:
            fuzzer.end()
            fuzzer.begin()
        fuzzer.send()
    fuzzer.end()
    return fuzzer


def numbers(server: Running, base: Path) -> Any:
    """What a client is told that sends what it should."""
    wire = Wire(server.url)
    model = wire.model(str(base))
    found = [
        wire.wait(wire.pass_over(model, 1, plain())),
        wire.wait(wire.step(model, 2)),
        wire.wait(wire.pass_over(model, 3, plain())),
    ]
    wire.http.close()
    return [[each.tolist() for each in one[0]] if isinstance(one, tuple) else one for one in found]


@pytest.mark.parametrize(("count", "seed"), [(60, 1), pytest.param(1000, 2, marks=pytest.mark.slow)])
def test_odd_bodies_are_answered_and_change_nothing_for_others(
    server: Running,
    base: Path,
    count: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before = numbers(server, base)
    fuzzer = fuzz(server, base, count, seed, monkeypatch)
    assert fuzzer.statuses[200] > count // 10 and fuzzer.statuses[400] > count // 10
    assert fuzzer.ends["user"] > count // 30 and fuzzer.ends["done"] > count // 60
    assert numbers(server, base) == before and "Traceback" not in capfd.readouterr().err
