"""Points 3 and 10: every trainable parameter changes in the real order of calls, and training goes on from a stored state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.attaching.saving import load_training_state, training_state
from tests.contract.table import ROWS, Row, attached, ids, loss, rows

STEPS = 3


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in graft.parameters(model, name)], lr=1e-2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One optimiser step in training mode."""
    model.train()
    value = loss(model, ids(4, 8, seed))
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    return value.item()


def evaluated(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return loss(model, ids(4, 8)).item()


@rows()
def test_every_trainable_parameter_changes_when_evaluation_and_training_alternate(row: Row) -> None:
    model = attached(row, fresh=True)
    before = {name: p.detach().clone() for name, p in graft.parameters(model, "a")}
    assert before and all(p.requires_grad for _, p in graft.parameters(model, "a"))
    optimizer = optimizer_of(model, "a")
    losses = []
    for seed in range(STEPS):
        losses.append(evaluated(model))
        step(model, optimizer, seed)
    assert [name for name, p in graft.parameters(model, "a") if torch.equal(p, before[name])] == []
    assert len(set(losses)) == STEPS


@rows(
    "llama-mam llama-parallel-linear llama-prefix-projection bloom-lora-bias gptj-adapterh "
    "llama-dora llama-pissa llama-vera llama-adalora llama-loha llama-lokr llama-lokr-both "
    "llama-miss llama-miss-bat llama-hira llama-shira llama-oft llama-oft-exact"
)
def test_training_lowers_the_loss_on_what_it_is_trained_on(row: Row) -> None:
    model = attached(row, fresh=True)
    optimizer = optimizer_of(model, "a")
    losses = [step(model, optimizer, seed=0) for _ in range(25)]
    assert losses[-1] < 0.8 * losses[0]


@rows(
    "llama-lora-dropout llama-mam llama-prefix-projection bloom-prefix-after llama-dora-dropout llama-pissa-quick llama-adalora"
)
def test_training_goes_on_from_a_stored_state_to_the_same_losses(row: Row) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = attached(row, fresh=True)
        torch.manual_seed(8)
        return model, optimizer_of(model, "a")

    model, optimizer = fresh()
    unbroken = [step(model, optimizer, seed) for seed in range(4)]
    model, optimizer = fresh()
    for seed in range(2):
        step(model, optimizer, seed)
    stored: dict[str, Tensor] = {name: tensor.clone() for name, tensor in training_state(model, "a").items()}
    moments, rng = optimizer.state_dict(), torch.get_rng_state()
    model, optimizer = fresh()
    load_training_state(model, "a", stored)
    optimizer.load_state_dict(moments)
    torch.set_rng_state(rng)
    assert [step(model, optimizer, seed) for seed in range(2, 4)] == unbroken[2:]


def test_only_the_active_adapter_requires_gradients_and_switching_moves_them() -> None:
    model = attached(ROWS[0], None, torch.float32, "a", "b")
    assert {name: {p.requires_grad for _, p in graft.parameters(model, name)} for name in "ab"} == {
        "a": {True},
        "b": {False},
    }
    graft.set_active(model, "b")
    assert {name: {p.requires_grad for _, p in graft.parameters(model, name)} for name in "ab"} == {
        "a": {False},
        "b": {True},
    }
    graft.set_active(model, None)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_setting_without_effect_is_an_error() -> None:
    model = attached(ROWS[0])
    for spec, field in (
        (graft.Series(train_bias=True, sites="mlp"), "train_bias"),
        (graft.Parallel(train_bias=True, sites="attn mlp"), "train_bias"),
        (graft.LoRA(sites="attn.q", rank_pattern={"mlp.down": 2}), "rank_pattern"),
        (graft.LoRA(sites="attn.q", alpha_pattern={"attn.v": 2.0}), "alpha_pattern"),
    ):
        with pytest.raises(graft.GraftError, match=f"^{field}: "):
            graft.attach(model, {"b": spec})
    assert graft.names(model) == ("a",)
