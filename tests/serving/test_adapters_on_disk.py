"""Adapter folders that come, change, break and go while a server runs, against adapters that are attached by hand."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.bases import load_base
from graft.config.base import BaseConfig
from graft.serving import adapters as module
from tests.serving.conftest import Running
from tests.small import save_small

httpx = pytest.importorskip("httpx", reason="the HTTP client 'httpx' is not installed")
PROMPT, TOKENS = "forty plus two", 12
WEIGHTS = "adapter_model.safetensors"


class Disk:
    """A folder of adapters, a server of it, and what each adapter answers by a model of its own."""

    def __init__(self, folder: Path) -> None:
        save_small(folder / "base", scale=3.0)
        self.base = load_base(BaseConfig(model=str(folder / "base"), device="cpu"))
        self.made, self.shelf = folder / "made", folder / "shelf"
        self.shelf.mkdir()
        self.texts: dict[str, str] = {}
        for seed, name in enumerate(("first", "second", "third")):
            kind = {"kind": "lora", "rank": 2 + seed, "sites": "attn.q mlp.down"}
            graft.attach(self.base.model, {name: kind})  # pyright: ignore[reportArgumentType]
            torch.manual_seed(seed)
            with torch.no_grad():
                for _, parameter in graft.parameters(self.base.model, name):
                    parameter.normal_(std=0.3)
            graft.save(self.base.model, name, self.made / name)
            self.texts[name] = self.answer(name)
        assert len(set(self.texts.values())) == 3

    def answer(self, adapter: Any) -> str:
        tokenizer, model = self.base.tokenizer, self.base.model
        ids = torch.tensor([tokenizer.encode(PROMPT)])
        with torch.no_grad(), graft.use(model, adapter):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, eos_token_id=1
            )
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def put(self, made: str, name: str) -> None:
        """Exchange a folder as a whole, as a careful writer does."""
        fresh = self.shelf / f".{name}.new"
        shutil.copytree(self.made / made, fresh)
        if (self.shelf / name).exists():
            os.rename(self.shelf / name, self.shelf / f".{name}.old")
        os.rename(fresh, self.shelf / name)
        shutil.rmtree(self.shelf / f".{name}.old", ignore_errors=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture(scope="module")
def server(disk: Disk) -> Iterator[Running]:
    from graft.generation.loaded import load_candidates
    from graft.serving.app import make_app

    disk.put("first", "there")
    loaded = load_candidates(
        base=BaseConfig(model=str(disk.base.name), device="cpu"), adapters=[f"there={disk.shelf / 'there'}"]
    )
    running = Running(make_app(loaded, rows=8, adapters=disk.shelf))
    yield running
    running.stop()


Ask = Callable[..., Any]


@pytest.fixture
def ask(server: Running, monkeypatch: pytest.MonkeyPatch) -> Ask:
    monkeypatch.setattr(module, "SETTLED", 0.05)

    def asked(model: str, **fields: Any) -> Any:
        body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": TOKENS, **fields}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)

    return asked


def said(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def listed(server: Running) -> list[str]:
    return [each["id"] for each in httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]]


def test_folders_come_change_and_go(disk: Disk, server: Running, ask: Ask) -> None:
    assert said(ask("there")) == disk.texts["first"] and listed(server) == ["base", "there"]
    assert ask("late").status_code == 404
    disk.put("second", "late")
    assert said(ask("late")) == disk.texts["second"] and listed(server) == ["base", "there", "late"]
    prints = set()
    for made in ("third", "first", "second", "third"):
        disk.put(made, "late")
        assert said(answer := ask("late")) == disk.texts[made]
        assert said(ask("late+0.5*there")) == disk.answer(
            {made: 1.0, "first": 0.5} if made != "first" else {"first": 1.5}
        )
        prints.add(answer.json()["system_fingerprint"])
    assert len(prints) == 3
    shutil.rmtree(disk.shelf / "late")
    for name in ("late", "late+there", "there+0.5*late"):
        assert ask(name).status_code == 404
    assert httpx.get(f"{server.url}/v1/models/late").status_code == 404 and listed(server) == ["base", "there"]
    disk.put("second", "late")
    assert listed(server) == ["base", "there", "late"] and said(ask("late")) == disk.texts["second"]
    # nothing that was replaced is still attached
    held = server.engine.batch.model.__dict__["graft_state"]
    assert sorted(name.partition("-")[0] for name in held.adapters) == ["late", "there"]


def test_a_request_that_runs_goes_on_with_the_adapter_that_it_began_with(disk: Disk, server: Running, ask: Ask) -> None:
    disk.put("first", "moved")
    assert said(ask("moved")) == disk.texts["first"]
    options = {"model": "moved", "prompt": PROMPT, "temperature": 0, "max_tokens": 120, "stream": True}
    whole = said(ask("moved", max_tokens=120))
    with (
        httpx.Client(timeout=30) as client,
        client.stream("POST", f"{server.url}/v1/completions", json=options) as response,
    ):
        lines = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))
        text = next(lines)["choices"][0]["text"]
        disk.put("second", "moved")
        assert said(ask("moved")) == disk.texts["second"]
        text += "".join(each["choices"][0]["text"] for each in lines)
    assert text == whole and whole.startswith(disk.texts["first"])


@pytest.mark.parametrize("how", ["cut", "other", "missing", "json", "tokens", "task"])
def test_a_folder_that_cannot_be_read_is_an_error_and_never_the_adapter_before(
    disk: Disk, server: Running, ask: Ask, how: str
) -> None:
    disk.put("first", "broken")
    assert said(ask("broken")) == disk.texts["first"]
    folder = disk.shelf / "broken"
    if how == "cut":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    elif how == "other":  # the weights of one adapter beside the config of another
        shutil.copy(disk.made / "second" / WEIGHTS, folder / WEIGHTS)
    elif how == "missing":
        (folder / WEIGHTS).unlink()
    elif how == "json":
        (folder / "adapter_config.json").write_text("{")
    elif how == "tokens":
        (folder / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    else:
        (folder / "task.json").write_text('{"task": "classification", "names": ["a", "b"]}')
    for name in ("broken", "there+broken"):
        answer = ask(name)
        error = answer.json()["error"]
        assert answer.status_code == 503 and error["code"] == "model_not_readable", answer.text
        assert "broken" in error["message"] and "Traceback" not in error["message"]
    assert "broken" not in listed(server)
    assert httpx.get(f"{server.url}/health").json()["unreadable"] == ["broken"]
    disk.put("third", "broken")
    assert said(ask("broken")) == disk.texts["third"]
    assert httpx.get(f"{server.url}/health").json()["unreadable"] == []


def test_a_folder_whose_name_no_adapter_can_have_is_named(disk: Disk, server: Running, ask: Ask) -> None:
    disk.put("second", "two words")
    assert "two words" not in listed(server) and httpx.get(f"{server.url}/health").json()["unreadable"] == ["two words"]
    answer = ask("two words")
    assert answer.status_code == 503 and "rename its folder" in answer.json()["error"]["message"]
    shutil.rmtree(disk.shelf / "two words")
    assert ask("two words").status_code == 404 and "two words" not in listed(server)


def test_a_folder_that_is_being_written_is_waited_for(
    disk: Disk, server: Running, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A careless writer, byte by byte into the folder in place."""
    folder = disk.shelf / "slow"
    disk.put("first", "slow")
    assert said(ask("slow")) == disk.texts["first"]
    began = threading.Event()

    def write() -> None:
        for name in ("adapter_config.json", WEIGHTS):
            content = (disk.made / "second" / name).read_bytes()
            with open(folder / name, "wb", buffering=0) as file:
                for at in range(0, len(content), 1 + len(content) // 10):
                    file.write(content[at : at + 1 + len(content) // 10])
                    began.set()
                    time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    began.wait()
    assert said(ask("slow")) == disk.texts["second"]
    writer.join()
    monkeypatch.setattr(module, "TRIES", 2)
    writing, over = threading.Thread(target=lambda: [touch(folder) for _ in iter(over.is_set, True)]), threading.Event()
    writing.start()
    answer = ask("slow")
    over.set()
    writing.join()
    assert answer.status_code == 503 and "is being written" in answer.text
    assert said(ask("slow")) == disk.texts["second"]


def touch(folder: Path) -> None:
    (folder / "note.txt").write_text(str(time.monotonic_ns()))
    time.sleep(0.005)


def test_names_lead_nowhere_else(disk: Disk, server: Running, ask: Ask) -> None:
    shutil.copytree(disk.made / "first", disk.shelf / ".hidden", dirs_exist_ok=True)
    for name in ("../made/first", "..", ".hidden", "", "/", "there/../there", str(disk.made / "first")):
        assert ask(name).status_code == 404, name
    assert not any(each.startswith(".") for each in listed(server))
