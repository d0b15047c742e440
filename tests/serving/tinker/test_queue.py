"""The page of tenants and queue: what a service does, read from its folder while it serves and when it is gone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("google.protobuf", reason="the extra 'serve' is not installed")

from graft.errors import GraftError
from graft.serving.app import make_pages
from graft.serving.pages.queue import read_queue
from tests.serving.conftest import TOKEN, Running
from tests.serving.test_pages import Checked
from tests.serving.tinker.conftest import Wire, httpx, message, plain
from tests.serving.tinker.test_neighbours import House, good


def test_who_trains_and_what_waits(tmp_path: Path) -> None:
    async def run() -> Any:
        house = House(tmp_path / "state")
        await house.service.start()
        await asyncio.gather(good(house, 0), good(house, 1), house.make("s:train:7", 2))
        for seq in (2, 3):  # 1 never comes
            await house.send("forward_backward", "s:train:7", seq, message("s:train:7", seq, plain()))
        await house.send("sample", "s:sample:0", 0, {})
        return read_queue(tmp_path / "state"), house

    found, _ = asyncio.run(run())
    assert [(each.name, each.kind, each.steps, each.state) for each in found.tenants] == [
        ("s:train:0", "lora 4", 4, "idle"),
        ("s:train:1", "lora 3", 4, "idle"),
        ("s:train:7", "ia3", 0, "waits for the client"),
    ]
    assert found.tenants[2].gap == 1 and found.waiting == 2 and found.samples == {"s": 1}
    again = read_queue(tmp_path / "state")  # nobody serves it any longer
    assert again == found
    with pytest.raises(GraftError, match="not the state of a training service"):
        read_queue(tmp_path)


def test_the_page_of_a_server_and_of_the_folder_alone(server: Running, wire: Wire, base: Path, tmp_path: Path) -> None:
    labels = {"graft.adapter": json.dumps({"kind": "ia3"})}
    model = wire.model(str(base), labels=labels)
    wire.wait(wire.pass_over(model, 1, plain()))
    wire.step(model, 3)
    (tmp_path / "runs").mkdir()
    state = server.app.state.training.service.places.root
    beside = Running(make_pages(tmp_path / "runs", state=state))
    for url in (server.url, beside.url):
        with httpx.Client(base_url=url, headers={"X-API-Key": TOKEN}) as client:
            page = client.get("/queue")
            assert page.status_code == 200 and model in page.text and "(request 2)" in page.text
            Checked(page.text)
            with client.stream("GET", "/queue/live") as stream:
                line = next(each for each in stream.iter_lines() if each.startswith("data: "))
            assert model in json.loads(line[6:])
    beside.stop()
