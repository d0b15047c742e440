"""What clients compute and what the server makes of it: against the algebra, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graft.federation.messages import Message
from graft.federation.methods.base import Update
from graft.federation.methods.kseed import KSeed, probabilities, rebuilt
from tests.federation.conftest import LORA, method, updates_of
from tests.noise import drawn


def noise(seed: int, index: int, shape: torch.Size) -> Tensor:
    """The noise of a seed for one tensor, drawn here by numpy alone."""
    return torch.from_numpy(drawn(seed, index, shape.numel())).view(shape)


@pytest.mark.parametrize("trained", ["base", "adapter", "parts"])
def test_rebuilding_is_the_sequential_trajectory_in_any_order(federation: dict[str, Any], trained: str) -> None:
    changes: dict[str, Any] = {"local": {"steps": 12, "batch_size": 2, "lr": 1e-4}}
    if trained == "adapter":
        changes["adapter"] = {"kind": "series", "bottleneck": 4, "sites": "mlp"}
    if trained == "parts":
        changes["method"] = {**federation["method"], "parts": "attn norm"}
    kseed = method(federation, **changes)
    tensors, _ = kseed.work(kseed.begin(), 1, "ada")
    assert len(set(tensors["seeds"].tolist())) > 6
    moved = [each.clone() for each in kseed.origin]
    for seed, slope in zip(tensors["seeds"].tolist(), tensors["slopes"].tolist(), strict=True):
        for index, each in enumerate(moved):
            each -= 1e-4 * slope * noise(kseed.pool[seed], index, each.shape)
    state, _ = kseed.aggregate(kseed.begin(), [Update("ada", 1.0, tensors)])
    again = rebuilt(kseed.origin, kseed.rates, kseed.pool, state["accumulators"])
    backwards = [
        rebuilt([each] , [rate], kseed.pool, state["accumulators"], lambda t, a, key, _, at=at: t.add_(noise(key, at, t.shape), alpha=a))[0]
        for at, (each, rate) in reversed(list(enumerate(zip(kseed.origin, kseed.rates, strict=True))))
    ][::-1]  # fmt: skip
    assert any(float((each - start).abs().max()) > 1e-4 for each, start in zip(moved, kseed.origin, strict=True))
    for each, one, other in zip(moved, again, backwards, strict=True):
        assert float((each - one).abs().max()) < 1e-6
        assert torch.equal(one, other)


def test_a_client_leaves_the_model_where_its_round_began_and_clients_do_not_depend_on_each_other(
    federation: Any,
) -> None:
    kseed = method(federation)
    first = updates_of(kseed, kseed.begin())
    state, notes = kseed.aggregate(kseed.begin(), first)
    assert notes["seeds used"] == len({seed for each in first for seed in each.tensors["seeds"].tolist()})
    there = {name: kseed.work(state, 2, name)[0]["slopes"] for name in ("ada", "ben", "cleo")}
    back = {name: kseed.work(state, 2, name)[0]["slopes"] for name in ("cleo", "ada", "ben")}
    other = method(federation)
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert torch.equal(there["ben"], other.work(state, 2, "ben")[0]["slopes"])
    assert not torch.equal(there["ben"], other.work(state, 3, "ben")[0]["slopes"])


@pytest.mark.parametrize(("seeds", "most"), [(4096, 17_984), (1024, 5_696)])
def test_bytes_of_a_round_are_those_of_the_paper(seeds: int, most: int) -> None:
    """4 bytes a seed down, and 8 for each of 200 pairs up, by the paper's arithmetic; the messages as they travel stay below."""
    accumulators = torch.randn(seeds)
    down = Message("train", 40, "client-007", "0123456789abcdef", {"accumulators": accumulators}).encoded()
    pairs = {"seeds": torch.zeros(200, dtype=torch.uint16), "slopes": torch.randn(200)}
    up = Message("update", 40, "client-007", "0123456789abcdef", pairs).encoded()
    assert most == 4 * seeds + 8 * 200
    assert 4 * seeds + 6 * 200 < len(down) + len(up) <= most


def test_pro_draws_seeds_by_the_mean_size_of_their_slopes(federation: dict[str, Any]) -> None:
    p = probabilities(torch.tensor([0.0, 1.0, 2.0, 2.0]))
    assert p.tolist() == pytest.approx((np.exp([0, 0.5, 1, 1]) / np.exp([0, 0.5, 1, 1]).sum()).tolist())
    pro = method(federation, method={**federation["method"], "kind": "fedkseed-pro"})
    state = pro.begin()
    slopes = torch.tensor([3.0, -5.0, 2.0, 4000.0])
    sent = Update("ada", 1.0, {"seeds": torch.tensor([1, 1, 2, 5], dtype=torch.uint16), "slopes": slopes})
    new, _ = pro.aggregate(state, [sent])
    assert (new["sizes"] / new["counts"])[[0, 1, 2, 5]].tolist() == pytest.approx(
        [0, 8 / 3, 1, 500]
    )  # the first slope is 0
    down = pro.down(new, 2, "ada")
    tensors, _ = pro.work(down, 2, "ada")
    assert torch.equal(tensors["seeds"], down["draws"]) and set(down) == {"accumulators", "draws"}


@pytest.mark.parametrize("kind", ["fedzo", "fedavg"])
def test_parameters_are_averaged_by_rows(federation: dict[str, Any], kind: str) -> None:
    adapter = {"kind": "series", "bottleneck": 4, "sites": "mlp"}  # is no difference of weights
    found = method(federation, adapter=adapter, method=kind)
    sent = updates_of(found, found.begin())
    state, _ = found.aggregate(found.begin(), sent)
    key = next(key for key in state if key.endswith("down.weight"))
    assert torch.allclose(state[key], sum(each.tensors[key] for each in sent) / 3, atol=1e-7)  # pyright: ignore
    assert not torch.equal(sent[0].tensors[key], sent[1].tensors[key])


def test_local_clients_train_apart_and_exchange_nothing(federation: dict[str, Any]) -> None:
    found = method(federation, adapter=LORA, method="local", local={"steps": 3, "batch_size": 2, "lr": 1e-2})
    sent = updates_of(found, found.begin())
    state, _ = found.aggregate(found.begin(), sent)
    assert not found.exchanges
    assert all(
        torch.equal(found.down(state, 2, each.client)[key], each.tensors[key]) for each in sent for key in each.tensors
    )
    assert found.scores(state)["loss"] > 0


def test_kseed_is_mezo_with_a_pool_where_there_is_one_client(federation: dict[str, Any]) -> None:
    kseed = method(federation)
    assert isinstance(kseed, KSeed)
    kseed.put(kseed.begin()["accumulators"])
    tensors, _ = kseed.work(kseed.begin(), 1, "ben")
    seed = int(tensors["seeds"][0])
    rows = kseed.place.clients["ben"]
    order = rows.epoch_order(kseed.place.seed_of(1, "ben"), 0)[:2]

    def loss_at(side: float) -> float:
        with torch.no_grad():
            for index, (each, start) in enumerate(zip(kseed.params, kseed.origin, strict=True)):
                each.copy_(start + side * 1e-3 * noise(kseed.pool[seed], index, start.shape))
            total, count = 0.0, 0
            for sample in order:
                example = rows[int(sample)]
                logits = (
                    kseed.place.base.model(torch.from_numpy(example.input_ids.astype(np.int64))[None])
                    .logits[0]
                    .double()
                )
                targets = torch.from_numpy(np.flatnonzero(example.supervised))
                ids = torch.from_numpy(example.input_ids.astype(np.int64))[targets]
                total += float(torch.nn.functional.cross_entropy(logits[targets - 1], ids, reduction="sum"))
                count += len(ids)
        return total / count

    slope = (loss_at(1) - loss_at(-1)) / 2e-3
    assert float(tensors["slopes"][0]) == pytest.approx(slope, rel=2e-3)
