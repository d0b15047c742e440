"""Ferret: the coordinates that travel and the model that is rebuilt from them, against the algebra with noise that numpy draws here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graft.errors import GraftError
from graft.federation.definition import read_federation
from graft.federation.folder import federate
from graft.federation.methods.base import Update
from graft.federation.methods.choosing import method_of
from graft.federation.methods.ferret import Ferret, add_projected_, projected
from graft.federation.workplace import Workplace
from tests.noise import drawn

LOCAL = {"steps": 3, "batch_size": 2, "lr": 1e-3}


def ferret(federation: dict[str, Any], block: int = 7, **changes: Any) -> Any:
    method = {"kind": "ferret", "block": block, **changes.pop("method", {})}
    given = {**federation, "local": LOCAL, **changes, "method": method}
    return method_of(Workplace(read_federation(given)))


def bases(key: int, index: int, count: int) -> np.ndarray:
    """The noise of a tensor, drawn here by numpy alone."""
    return drawn(key, index, count).astype(np.float64)


def by_hand(changes: list[Tensor], block: int, key: int) -> tuple[list[float], list[np.ndarray]]:
    """The coordinates, and the change that they stand for, block by block."""
    coordinates, again = [], []
    for index, change in enumerate(changes):
        flat, noise = change.flatten().double().numpy(), bases(key, index, change.numel())
        new = np.zeros_like(flat)
        for at in range(0, len(flat), block):
            D, z = flat[at : at + block], noise[at : at + block]
            coordinates.append(len(D) * (z @ D) / (z @ z))
            new[at : at + block] = coordinates[-1] * z
        again.append(new.reshape(change.shape))
    return coordinates, again


def changes_of(*sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size, generator=torch.Generator().manual_seed(len(size))) for size in sizes]


@pytest.mark.parametrize("block", [1, 4, 5, 100])
def test_coordinates_and_rebuilt_changes_are_those_of_the_formula(block: int) -> None:
    changes = changes_of((6, 5), (8,), (2, 3, 3))
    coordinates, wanted = by_hand(changes, block, 17)
    found = projected(changes, block, 17)
    assert found.tolist() == pytest.approx(coordinates, rel=1e-4, abs=1e-5)
    again = [torch.zeros_like(each) for each in changes]
    add_projected_(again, found, block, 17)
    for each, one, change in zip(again, wanted, changes, strict=True):
        assert torch.allclose(each.double(), torch.from_numpy(one), rtol=1e-4, atol=1e-5)
        assert block > 1 or torch.allclose(each, change, rtol=1e-5)


def test_the_mean_over_bases_is_the_change_and_its_squared_error_is_d_minus_one_times_its_own() -> None:
    change, block, draws = changes_of((40, 8)), 8, 4000
    total, error = torch.zeros(40, 8), 0.0
    for key in range(draws):
        again = [torch.zeros(40, 8)]
        add_projected_(again, projected(change, block, key), block, key)
        total += again[0] / draws
        error += float((again[0] - change[0]).square().sum()) / draws
    size = float(change[0].square().sum())
    assert error == pytest.approx((block - 1) * size, rel=0.05)
    assert float((total - change[0]).square().sum()) < 2 * (block - 1) * size / draws


@pytest.mark.parametrize("trained", ["base", "adapter", "parts"])
def test_a_round_moves_the_model_by_the_mean_of_what_clients_sent(federation: dict[str, Any], trained: str) -> None:
    adapter = {"adapter": {"kind": "series", "bottleneck": 4, "sites": "mlp"}} if trained == "adapter" else {}
    found = ferret(federation, method={"parts": "attn norm"} if trained == "parts" else {}, **adapter)
    assert isinstance(found, Ferret)
    state, before = found.begin(), [each.detach().clone() for each in found.params]
    sent = [found.work(state, 1, name)[0] for name in ("ada", "ben")]
    assert all(torch.equal(one, other) for one, other in zip(found.params, before, strict=True))
    state, _ = found.aggregate(state, [Update("ada", 0.25, sent[0]), Update("ben", 0.75, sent[1])])
    found.put(state["coordinates"])
    mean = 0.25 * sent[0]["coordinates"] + 0.75 * sent[1]["coordinates"]
    at, moved = 0, 0.0
    for index, (start, now) in enumerate(zip(before, found.params, strict=True)):
        noise = torch.from_numpy(bases(found._key(1), index, start.numel()))
        own = mean[at : at + -(-start.numel() // 7)]
        wanted = start.double() + (own.double().repeat_interleave(7)[: start.numel()] * noise).view_as(start)
        assert torch.allclose(now.detach().double(), wanted, atol=1e-6)
        at, moved = at + len(own), max(moved, float((now - start).detach().abs().max()))
    assert at == len(mean) and moved > 1e-4


def test_blocks_of_one_value_are_the_average_of_parameters(federation: dict[str, Any]) -> None:
    found = ferret(federation, block=1)
    names, state, after = ("ada", "ben", "cleo"), found.begin(), []
    for name in names:
        found.put(state["coordinates"])
        found.place.train(found.part, found.place.clients[name], found.place.seed_of(1, name))
        after.append([each.detach().clone() for each in found.params])
    sent = [Update(name, 1 / 3, *found.work(state, 1, name)) for name in names]
    found.put(found.aggregate(state, sent)[0]["coordinates"])
    for now, *each in zip(found.params, *after, strict=True):
        assert torch.allclose(now, torch.stack(each).mean(0), atol=1e-6)


def test_a_client_that_knows_nothing_rebuilds_the_same_bits(federation: dict[str, Any]) -> None:
    found = ferret(federation)
    state = found.begin()
    for number in (1, 2):
        sent = [Update(name, 1 / 3, *found.work(state, number, name)) for name in ("ada", "ben", "cleo")]
        state, _ = found.aggregate(state, sent)
    assert state["coordinates"].shape == (2, sum(found.counts))
    fresh = ferret(federation)
    assert torch.equal(found.work(state, 3, "ben")[0]["coordinates"], fresh.work(state, 3, "ben")[0]["coordinates"])
    found.put(state["coordinates"][:1])  # back, as where a server goes on
    found.put(state["coordinates"])
    assert all(torch.equal(one, other) for one, other in zip(found.params, fresh.params, strict=True))


def test_what_bfloat16_rounds_away_is_kept_between_rounds(federation: dict[str, Any]) -> None:
    """Steps too small for bfloat16 leave the weights as they are, so no change is sent, although the model lies between two numbers."""
    found = ferret(federation, base={**federation["base"], "dtype": "bfloat16"}, local={**LOCAL, "lr": 1e-12})
    state = {"coordinates": torch.full((1, sum(found.counts)), 1e-4)}
    sent = found.work(state, 2, "ada")[0]["coordinates"]
    assert torch.equal(sent, torch.zeros_like(sent))
    shown = [each.detach().float() for each in found.params]
    assert any(not torch.equal(one, other) for one, other in zip(shown, found.start, strict=True))


def test_what_cannot_be_coordinates_is_refused(federation: dict[str, Any]) -> None:
    found = ferret(federation)
    right = torch.zeros(sum(found.counts))
    for given, said in (
        ({}, "it sent nothing"),
        ({"coordinates": right[:-1]}, "should have shape"),
        ({"coordinates": right.long()}, "NaN or infinite"),
        ({"coordinates": right + float("nan")}, "NaN or infinite"),
    ):
        with pytest.raises(GraftError, match=said):
            found.check(Update("ada", 1.0, given), found.begin())


def test_a_federation_by_ferret_learns_and_publishes_the_model(federation: dict[str, Any], tmp_path: Path) -> None:
    given = {**federation, "method": {"kind": "ferret", "block": 4}, "local": LOCAL, "rounds": 4}
    report = federate(given, (), tmp_path / "out")
    losses = [row["loss"] for row in report["rounds"]]
    assert losses[-1] < losses[0]
    assert (tmp_path / "out/model/model.safetensors").is_file()
    ups, downs = ([row[way] for row in report["rounds"][1:]] for way in ("up", "down"))
    assert max(ups) - min(ups) <= 8 and downs == sorted(downs) and downs[0] < 200
