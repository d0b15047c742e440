"""The row of docs/training_service.md that says what is refused: each is tried, and says so by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.serving.tinker.conftest import Wire, message, plain

ROW = next(
    line
    for line in (ROOT / "docs" / "training_service.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| **refused**")
)
PROMPT = {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]}


def with_image(model: str) -> bytes:
    from graft.serving.tinker.messages import ForwardBackwardRequest

    found = ForwardBackwardRequest.FromString(message(model, 1, plain()))
    found.data[0].model_input.add().image.data = b"png"
    return found.SerializeToString()


class Refused:
    """Sends what is refused, and returns what was said: of the answer itself, or of the promise."""

    def __init__(self, wire: Wire, base: str) -> None:
        self.wire, self.base, self.model = wire, base, wire.model(base)
        path = wire.wait(wire.post("save_weights", model_id=self.model, seq_id=1, path="p"))["path"]
        self.path, self.seq = path, 1
        self.one = f"training_runs/{self.model}/checkpoints/weights/p"

    def said(self, answer: Any) -> str:
        if answer.status_code == 200:
            found = self.wire.wait_for_anything(answer.json())
            assert found["category"] == "user"
            return found["error"]
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["message"]

    def placed(self, path: str, /, **fields: Any) -> str:
        self.seq += 1
        return self.said(self.wire.send(path, {"model_id": self.model, "seq_id": self.seq, **fields}))

    def passed(self, content: Callable[[], bytes]) -> str:
        """With a model of its own, whose first request it is."""
        return self.said(
            self.wire.http.post(
                "forward_backward", content=content(), headers={"Content-Type": "application/x-protobuf"}
            )
        )

    def sampled(self, **fields: Any) -> str:
        number, self.wire.samplers = self.wire.samplers, self.wire.samplers + 1
        asked = {"session_id": self.wire.session, "sampling_session_seq_id": number, "base_model": self.base}
        sampler = self.wire.post("create_sampling_session", **asked)["sampling_session_id"]
        body = {"sampling_session_id": sampler, "seq_id": 0, "prompt": PROMPT, "sampling_params": {"max_tokens": 1}}
        return self.said(self.wire.send("asample", {**body, **fields}))

    def made(self, **fields: Any) -> str:
        number, self.wire.models = self.wire.models, self.wire.models + 1
        asked = {"session_id": self.wire.session, "model_seq_id": number, "base_model": self.base}
        return self.said(self.wire.send("create_model", {**asked, **fields}))

    def asked(self, method: str, path: str, fields: Any = None) -> str:
        body = {} if fields is None else {"json": fields}
        return self.said(self.wire.http.request(method, path, **body))


WAYS: dict[str, list[tuple[str, Callable[[Refused], str]]]] = {
    "stable_reinforce": [
        ("loss stable_reinforce", lambda r: r.passed(lambda: message(r.wire.model(r.base), 1, plain(), "stable_reinforce")))
    ],
    "images": [
        ("chunk of image", lambda r: r.passed(lambda: with_image(r.wire.model(r.base)))),
        ("type", lambda r: r.sampled(prompt={"chunks": [{"type": "image", "data": "", "format": "png"}]})),
    ],
    "record_stability_info": [("record_stability_info", lambda r: r.sampled(record_stability_info=True))],
    "save_weights_external": [("save_weights_external", lambda r: r.placed("save_weights_external", path="out"))],
    "custom losses on the server": [("create_custom_loss", lambda r: r.placed("create_custom_loss", graph=""))],
    "copy_weights": [
        ("copy_weights", lambda r: r.asked("POST", "copy_weights", {"source_path": r.path, "destination_project_id": "x"}))
    ],
    "publishing": [
        ("publishing", lambda r: r.asked("POST", f"{r.one}/publish")),
        ("publishing", lambda r: r.asked("DELETE", f"{r.one}/publish")),
    ],
    "projects": [("projects", lambda r: r.asked("PUT", f"sessions/{r.wire.session}/project", {"project_id": "p"}))],
    "searching sessions": [("searching", lambda r: r.asked("POST", "sessions/search", {}))],
    "traces": [("traces", lambda r: r.asked("GET", f"sessions/{r.wire.session}/trace_export"))],
    "accounts (billing, audit, `whoami`)": [
        ("billing", lambda r: r.asked("GET", "billing/usage/events")),
        ("audit", lambda r: r.asked("GET", "audit")),
        ("whoami", lambda r: r.asked("GET", "auth/apikey/me")),
    ],
    "the optimiser `dimuon`": [("adamw", lambda r: r.made(optimizer_config={"type": "dimuon", "version": 1}))],
    "unknown fields and settings": [
        ("mood", lambda r: r.made(mood=1)),
        ("mask", lambda r: r.passed(lambda: message(r.wire.model(r.base), 1, [([5, 6], {"target_tokens": [6, 7], "mask": [1, 1]})]))),
        ("tau", lambda r: r.passed(lambda: message(r.wire.model(r.base), 1, plain(), "ppo", tau=1.0))),
        ("no field 'adam_params.lr'", lambda r: r.placed("optim_step", adam_params={"lr": 1.0})),
        ("no field 'sampling_params.mood'", lambda r: r.sampled(sampling_params={"max_tokens": 1, "mood": 1})),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_what_is_refused_says_so_by_name_and_the_client_goes_on(wire: Wire, base: Path, name: str) -> None:
    refused = Refused(wire, str(base))
    for word, way in WAYS[name]:
        assert word in way(refused), (name, word)
    refused.seq += 1
    assert not isinstance(wire.wait(wire.pass_over(refused.model, refused.seq, plain())), dict)


def test_the_row_of_the_page_is_this_table() -> None:
    listed = json.dumps(ROW).replace("`", "")
    assert all(name.replace("`", "") in listed for name in WAYS)
    named = ROW.split("|")[2].replace("`", "").replace("(billing, audit, whoami)", "")
    assert len(named.split(",")) == len(WAYS)
