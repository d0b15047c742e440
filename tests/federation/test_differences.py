"""FedAvg of what adapters add to weights, in each form in which it is kept: against the outputs of the layers, and against numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from graft.attaching.active import set_active
from graft.errors import GraftError
from graft.federation.definition import read_federation
from graft.federation.methods.base import Update
from graft.federation.methods.choosing import method_of
from graft.federation.methods.differences import Differences
from graft.federation.methods.forms import difference, layers
from graft.federation.methods.parameters import averaged
from graft.federation.server import InProcess, Server
from graft.federation.store import Store
from graft.federation.workplace import Workplace
from graft.training.assembly import part_of
from tests.federation.conftest import LORA, method, updates_of


def differences(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """D [O, I] of each layer of a state."""
    return {path: difference(state, path) for path in layers(state)}


@torch.no_grad()
def computed_by(found: Any, update: Update, path: str) -> Any:
    """What an adapter adds to a layer [O, I], by the layer's outputs on the unit vectors with the adapter on and off."""
    found._described(update).job.trainable.restore(update.tensors)
    model, layer = found.place.base.model, found.root.get_submodule(path)
    set_active(model, "federated")
    own = layer(torch.eye(layer.in_features))
    set_active(model, None)
    return (own - layer(torch.eye(layer.in_features))).T


def test_differences_of_unlike_ranks_and_kinds_are_averaged_exactly(federation: dict[str, Any]) -> None:
    turns = [
        {**LORA, "rank": 4},
        {"kind": "dora", "rank": 8, "sites": "attn.q"},
        {"kind": "ia3", "sites": "attn.k attn.v"},
    ]
    mixed = {
        "clients": {"adapters": turns},
        "method": {"kind": "fedavg"},
        "local": {"steps": 3, "batch_size": 2, "lr": 1e-2},
    }
    fed = method(federation, **mixed)
    assert isinstance(fed, Differences)
    sent = updates_of(fed, fed.begin())
    state, _ = fed.aggregate(fed.begin(), sent)
    wanted: Any = sum(computed_by(fed, each, "model.layers.1.self_attn.v_proj") for each in sent) / 3
    assert torch.allclose(state["model.layers.1.self_attn.v_proj"], wanted, atol=1e-6)
    wanted = sum(computed_by(fed, each, "model.layers.0.self_attn.q_proj") for each in sent) / 3
    assert torch.allclose(state["model.layers.0.self_attn.q_proj"], wanted, atol=2e-5)
    state, _ = fed.aggregate(state, updates_of(fed, state, 2))
    batch = torch.tensor([[5, 70, 80, 90, 4]])
    fed.put(state)
    whole = fed.place.base.model(batch).logits
    fed.put({})
    base = fed.place.base.model(batch).logits
    where = fed.publish(state, Path(federation["base"]["model"]).parent / "out")
    set_active(fed.place.base.model, "federated")
    assert where.name == "federated"
    assert float((whole - base).abs().max()) > 1e-2
    again = fed.place.base.model(batch).logits
    assert float((again - whole).detach().abs().max()) < 5e-5 * float(whole.abs().max())


def test_the_average_of_differences_is_that_of_outputs_and_the_average_of_factors_is_not(
    federation: dict[str, Any],
) -> None:
    changes = {"adapter": LORA, "local": {"steps": 6, "batch_size": 2, "lr": 3e-2}}
    naive = method(federation, **changes, method={"kind": "fedavg", "aggregate": "naive"})
    exact = method(federation, **changes, method={"kind": "fedavg"})
    sent = updates_of(exact, exact.begin())
    D = differences(exact.aggregate(exact.begin(), sent)[0])
    factors = averaged(sent)
    rows = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    key = "model.layers.1.self_attn.q_proj"
    scale = 8 / 4
    outputs = [scale * rows @ each.tensors[f"{key}.linear.A"].T @ each.tensors[f"{key}.linear.B"].T for each in sent]
    wanted = torch.stack(outputs).mean(0)
    by_factors = scale * rows @ factors[f"{key}.linear.A"].T @ factors[f"{key}.linear.B"].T
    size = float(wanted.norm())
    assert float((rows @ D[key].T - wanted).norm()) < 1e-5 * size
    assert float((by_factors - wanted).norm()) > 1e-2 * size
    assert set(naive.begin()) == set(sent[0].tensors)


def test_a_rank_keeps_the_best_approximation_and_says_what_it_misses(federation: dict[str, Any]) -> None:
    changes = {
        "clients": {"adapters": [{**LORA, "rank": rank} for rank in (4, 8, 16)]},
        "local": {"steps": 4, "batch_size": 2, "lr": 1e-2},
    }
    exact = method(federation, **changes, method={"kind": "fedavg"})
    near = method(federation, **changes, method={"kind": "fedavg", "rank": 6})
    sent = updates_of(exact, exact.begin())
    assert {each.tensors["model.layers.0.self_attn.q_proj.linear.A"].shape[0] for each in sent} == {4, 8, 16}
    D = exact.aggregate(exact.begin(), sent)[0]
    state, notes = near.aggregate(near.begin(), sent)
    missed = sum(float(np.square(np.linalg.svd(each.numpy())[1][6:]).sum()) for each in D.values())
    size = sum(float(each.square().sum()) for each in D.values())
    assert notes["approximation error"] == pytest.approx((missed / size) ** 0.5, rel=1e-3)
    assert all(torch.linalg.matrix_rank(each) <= 6 for each in differences(state).values())


def test_stacked_factors_are_the_exact_average_with_the_sum_of_ranks_until_the_weight_is_smaller(
    federation: dict[str, Any],
) -> None:
    changes = {
        "clients": {"adapters": [{**LORA, "rank": rank, "sites": "attn.q attn.k"} for rank in (1, 2, 3)]},
        "local": {"steps": 3, "batch_size": 2, "lr": 1e-2},
    }
    exact = method(federation, **changes, method={"kind": "fedavg"})
    stack = method(federation, **changes, method={"kind": "fedavg", "aggregate": "stack"})
    states, ranks = [exact.begin(), stack.begin()], []
    for number in (1, 2, 3):
        sent = updates_of(exact, states[0], number)
        states[0], _ = exact.aggregate(states[0], sent)
        states[1], notes = stack.aggregate(states[1], sent)
        assert layers(states[0]) == layers(states[1])
        for path, D in states[0].items():
            assert torch.allclose(differences(states[1])[path], D, atol=2e-6)
        ranks.append(notes["stacked rank"])
    q = "model.layers.0.self_attn.q_proj"
    assert ranks == [6.0, 12.0, 0.0]  # 18 (32 + 32) numbers are more than 32 * 32
    assert states[1][q].shape == states[0][q].shape == (32, 32)


def test_stacked_factors_are_published_as_a_lora_of_their_rank(federation: dict[str, Any], tmp_path: Path) -> None:
    changes = {"adapter": {**LORA, "rank": 2}, "local": {"steps": 3, "batch_size": 2, "lr": 1e-2}}
    stack = method(federation, **changes, method={"kind": "fedavg", "aggregate": "stack"})
    state, _ = stack.aggregate(stack.begin(), updates_of(stack, stack.begin()))
    batch = torch.tensor([[5, 70, 80, 90, 4]])
    stack.put(state)
    whole = stack.place.base.model(batch).logits
    where = stack.publish(state, tmp_path)
    assert json.loads((where / "adapter_config.json").read_text())["adapter"]["rank"] == 6
    set_active(stack.place.base.model, "federated")
    assert torch.allclose(stack.place.base.model(batch).logits, whole, atol=2e-5)


def test_an_adapter_is_attached_and_the_average_put_in_once_a_round(
    federation: dict[str, Any], monkeypatch: Any
) -> None:
    changes = {"adapter": LORA, "local": {"steps": 2, "batch_size": 2, "lr": 1e-2}, "rounds": 3}
    place = Workplace(read_federation({**federation, **changes, "method": {"kind": "fedavg", "rank": 4}}))
    fed, attachments, made = method_of(place), [], []
    monkeypatch.setattr("graft.federation.workplace.part_of", lambda *words: attachments.append(1) or part_of(*words))
    monkeypatch.setattr(
        "graft.federation.methods.differences.difference", lambda *words: made.append(words[1]) or difference(*words)
    )
    heard: list[str] = []
    Server(
        place,
        fed,
        Store.open(Path(federation["base"]["model"]).parent / "once", {}),
        InProcess(place, fed),
        heard.append,
    ).run()
    assert len(attachments) == 3
    assert len(made) <= 2 * 3 * len(set(made))  # into the weights, and to add to it


def test_frozen_parts_that_a_seed_draws_are_those_of_the_round_at_the_server_too(federation: dict[str, Any]) -> None:
    """VeRA's shared matrices are drawn, not sent: client and server have to draw the same."""
    vera = {"kind": "vera", "rank": 4, "sites": "attn.q"}
    fed = method(federation, adapter=vera, method="fedavg", local={"steps": 3, "batch_size": 2, "lr": 1e-1})
    sent = updates_of(fed, fed.begin(), 2)
    path = "model.layers.0.self_attn.q_proj"
    state, _ = fed.aggregate(fed.begin(), sent)
    wanted: Any = 0.0
    for name in fed.place.clients:
        fed.work(fed.begin(), 2, name)
        model, layer = fed.place.base.model, fed.root.get_submodule(path)
        with torch.no_grad():
            set_active(model, "federated")
            own = layer(torch.eye(layer.in_features))
            set_active(model, None)
            wanted = wanted + (own - layer(torch.eye(layer.in_features))).T / 3
    assert float(wanted.abs().max()) > 1e-5
    assert torch.allclose(state[path], wanted, atol=2e-6)


def test_an_update_that_describes_what_cannot_be_averaged_is_refused(federation: dict[str, Any]) -> None:
    fed = method(federation, adapter=LORA, method={"kind": "fedavg", "aggregate": "differences"})
    for adapter, said in (
        ({"kind": "prefix", "tokens": 2}, "is no difference of weights"),
        ({"kind": "lora", "rank": 3, "sites": "attn.v"}, "what it sent"),
        ({"kind": "lorra"}, "what it says of its adapter is none"),
    ):
        with pytest.raises(GraftError, match=said):
            fed.check(Update("ada", 1.0, {}, json.dumps(adapter)), fed.begin())
    with pytest.raises(GraftError, match="what it says of its adapter is none"):
        fed.check(Update("ada", 1.0, {}, "not json"), fed.begin())
