"""Tenants beside others that send nonsense, too much, or nothing any more: the numbers of the others, and how long they wait."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("google.protobuf", reason="the extra 'serve' is not installed")

from graft.serving.tinker import order
from graft.serving.tinker.effects import Effects
from graft.serving.tinker.order import Order
from graft.serving.tinker.places import Places
from graft.serving.tinker.promises import Promise, Result
from graft.serving.tinker.service import Service
from graft.serving.tinker.turns import Turns
from graft.training.session import Session
from tests.serving.tinker.conftest import message, read_output
from tests.small import small_model

KINDS: list[dict[str, Any]] = [
    {"kind": "lora", "rank": 4, "sites": "linear"},
    {"kind": "lora", "rank": 3, "sites": "attn.q head", "dropout": 0.2},
    {"kind": "ia3"},
    {"kind": "prefix", "tokens": 3},
]
STEPS = 4


class House:
    """A service on a small base, without HTTP. It notes what runs in which tick."""

    def __init__(self, folder: Path) -> None:
        places = Places(folder)
        # GPT-2: LLaMA's norm rounds to float32 on its way
        self.effects = Effects(Session(small_model("gpt2", scale=4.0).double()), places, ["base"])
        self.ticks: list[list[Promise]] = []
        self._run, self.effects.run = self.effects.run, self._noted  # pyright: ignore[reportAttributeAccessIssue]
        self.service = Service(self.effects, self._call, places, {"base": "small"})

    def _noted(self, promises: Any) -> Any:
        self.ticks.append(list(promises))
        return self._run(promises)

    async def _call(self, function: Any) -> Any:
        await asyncio.sleep(0)
        return await asyncio.to_thread(function)

    async def send(self, kind: str, model: str, seq: int, content: Mapping[str, Any] | bytes) -> Promise:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return (await self.service.promise(kind, ("model", model, seq), model, seq, body, body))[0]

    async def ask(self, kind: str, model: str, seq: int, content: Mapping[str, Any] | bytes) -> Result:
        """Send a request and wait for what comes of it."""
        promise = await self.send(kind, model, seq, content)
        found = await self.service.result(promise.id, 60)
        assert found is not None
        return found

    async def make(self, model: str, number: int, **lora: Any) -> Result:
        labels = {} if lora else {"graft.adapter": KINDS[number % len(KINDS)]}
        config = {"seed": number, **lora}
        asked = {"session_id": "s", "model_seq_id": number, "base_model": "base", "lora_config": config}
        return await self.ask("create_model", model, 0, {**asked, "user_metadata": labels})


def rows(seed: int, count: int = 2, length: int = 7, **more: Any) -> Any:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(2, 258, length + at).tolist() for at in range(count)]
    return [(each, {"target_tokens": [*each[1:], 1], **more}) for each in ids]


async def good(house: House, number: int) -> list[bytes]:
    """A tenant that trains, one request after the other; what it is told."""
    model, found = f"s:train:{number}", []
    await house.make(model, number)
    for step in range(STEPS):
        data = message(model, 2 * step + 1, rows(100 * number + step, length=5 + number % 5))
        found.append((await house.ask("forward_backward", model, 2 * step + 1, data)).body)
        adam = {"learning_rate": 1e-2, "eps": 1e-3}
        asked = {"model_id": model, "seq_id": 2 * step + 2, "adam_params": adam}
        found.append((await house.ask("optim_step", model, 2 * step + 2, asked)).body)
    return found


async def sends_nonsense(house: House) -> None:
    """Rank 0, unknown losses and fields, numbers that are not finite: nothing of it reaches a pass."""
    model = "s:train:900"
    assert b'"user"' in (await house.make("s:train:901", 901, rank=0)).body
    await house.make(model, 900)
    for seq in range(1, 2 * STEPS):
        bad = rows(seq, weights=np.full(7, np.nan)) if seq % 2 else rows(seq, mask=np.ones(7))
        assert b'"user"' in (await house.ask("forward_backward", model, seq, message(model, seq, bad[:1]))).body


async def breaks(house: House) -> None:
    """Its weights become infinite by its own learning rate, and it goes on."""
    model = "s:train:910"
    await house.make(model, 0)
    for seq in range(1, 2 * STEPS, 2):
        await house.ask("forward_backward", model, seq, message(model, seq, rows(seq)))
        asked = {"model_id": model, "seq_id": seq + 1, "adam_params": {"learning_rate": 1e300}}
        await house.ask("optim_step", model, seq + 1, asked)
    assert b"not finite" in (await house.ask("forward_backward", model, 9, message(model, 9, rows(9)))).body


async def sends_ten_times_as_much(house: House) -> None:
    model = "s:train:920"
    await house.make(model, 1)
    for seq in range(1, STEPS + 1):
        await house.ask("forward_backward", model, seq, message(model, seq, rows(seq, count=20, length=12)))


async def dies(house: House) -> None:
    """It sends what comes later, and never what comes before."""
    model = "s:train:930"
    await house.make(model, 2)
    await house.send("forward_backward", model, 2, message(model, 2, rows(1)))


async def floods(house: House) -> None:
    model = "s:train:940"
    await house.make(model, 3)
    data = rows(5)
    await asyncio.gather(
        *(house.send("forward_backward", model, seq, message(model, seq, data)) for seq in range(1, 150))
    )


async def lived(folder: Path, tenants: int, *neighbours: Any) -> tuple[list[list[bytes]], House]:
    """What good tenants are told in the company of others."""
    house = House(folder)
    await house.service.start()
    work = [good(house, number) for number in range(tenants)]
    told, *_ = await asyncio.gather(asyncio.gather(*work), *(each(house) for each in neighbours))
    await house.service.stop()
    return told, house


def test_nonsense_changes_no_bit_of_the_others(tmp_path: Path) -> None:
    """One good tenant, so that the groups of the engine are the same in both runs."""
    alone, _ = asyncio.run(lived(tmp_path / "alone", 1))
    beside, _ = asyncio.run(lived(tmp_path / "beside", 1, sends_nonsense))
    assert beside == alone


def waits(house: House, tenants: int) -> list[int]:
    """Ticks that each request of a good tenant waited for, from the tick after the one before it on."""
    found = []
    for number in range(tenants):
        own = [tick for tick, its in enumerate(house.ticks) for each in its if each.owner == f"s:train:{number}"]
        found += list(np.diff(own) - 1)
    return found


@pytest.mark.parametrize("tenants", [3, pytest.param(27, marks=pytest.mark.slow)])
def test_the_others_get_their_numbers_and_their_turn(tmp_path: Path, tenants: int) -> None:
    alone, _ = asyncio.run(lived(tmp_path / "alone", tenants))
    noise = (sends_nonsense, breaks, sends_ten_times_as_much, dies, floods)
    beside, house = asyncio.run(lived(tmp_path / "beside", tenants, *noise))
    for first, second in zip(alone, beside, strict=True):
        for at, (one, other) in enumerate(zip(first, second, strict=True)):
            if at % 2:
                mine, its = json.loads(one)["metrics"], json.loads(other)["metrics"]
                assert mine["grad_norm"] == pytest.approx(its["grad_norm"], rel=1e-12)
                continue
            (mine, metrics), (its, others) = read_output(one), read_output(other)
            assert metrics["loss:sum"] == pytest.approx(others["loss:sum"], rel=1e-12)
            for a, b in zip(mine, its, strict=True):  # float32 on the wire
                np.testing.assert_allclose(a, b, rtol=2e-7)
    # A request that comes while a tick runs is in the next one, whatever the others have sent.
    assert max(waits(house, tenants)) <= 1
    assert any(each.owner == "s:train:940" for each in house.ticks[-1])  # the flood lasts longest


def test_each_model_is_served_as_much_as_it_earns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deficit round robin: with something waiting always, no model gets more than a quantum a tick beside what it saved for one request."""
    monkeypatch.setattr(order, "QUANTUM", 100)
    sizes = {"small": 10, "fair": 100, "big": 1000}
    line, ran = Order(), dict.fromkeys(sizes, 0)
    for model, size in sizes.items():
        for seq in range(100):
            line.put(Promise(seq, "optim_step", model, seq, b"x" * size))
    for tick in range(1, 91):
        for promise in line.take():
            ran[promise.owner] += len(promise.content)
        assert ran["big"] <= tick * 100 and ran["fair"] == tick * 100 and ran["small"] == tick * 10
    assert ran["big"] == 9000


def test_what_waits_for_a_model_is_limited_but_for_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "MOST", 3)
    line = Order()
    line.open("a", 1)
    for seq in (2, 3, 4):
        assert not line.full("a", seq)
        line.put(Promise(seq, "optim_step", "a", seq, b""))
    assert line.full("a", 5) and not line.full("a", 1)
    line.put(Promise(1, "optim_step", "a", 1, b""))
    assert [each.seq for _ in range(2) for each in line.take()] == [1, 2] and not line.full("a", 5)
    assert line.waits() == {"a": 2}


def test_a_model_that_is_to_be_closed_takes_no_requests() -> None:
    line = Order()
    line.open("a", 5)
    assert "a" in line and line.close("a") == []
    line.put(Promise(1, "close", "a", 0, b""))
    assert "a" not in line and [each.kind for each in line.take()] == ["close"] and "a" not in line


def test_whoever_waits_for_many_places_takes_turns_with_the_others() -> None:
    async def run() -> list[str]:
        turns, had = Turns(2), list[str]()

        async def work(who: str) -> None:
            async with turns.place(who):
                had.append(who)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(work(who)) for who in ["flood"] * 20 + ["a", "a", "b"]]
        await asyncio.sleep(0)
        assert turns.waits() == {"flood": 18, "a": 2, "b": 1}
        tasks[5].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(work("after"), 1)
        return had

    had = asyncio.run(run())
    assert max(at for at, who in enumerate(had) if who in "ab") <= 8 and had.count("flood") == 19
