"""Points 3 and 10: every trainable parameter changes in the real order of calls, and training goes on from a stored state."""

from __future__ import annotations

import pytest
import torch

import graft
from graft.testing.checks.training import optimizer_of, step
from tests.contract.table import ROWS, Row, attached, check, rows


@rows()
def test_every_trainable_parameter_changes_when_evaluation_and_training_alternate(row: Row) -> None:
    check("every_parameter_trains", row)


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
    check("resumes_to_the_same_losses", row)


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


def test_choosing_who_trains_holds_whatever_was_frozen_or_freed_by_hand() -> None:
    model = attached(ROWS[0], None, torch.float32, "a", "b")
    for every in (False, True):
        model.requires_grad_(every)  # as other libraries do before they train
        graft.set_active(model, "a")
        assert {name: {p.requires_grad for _, p in graft.parameters(model, name)} for name in "ab"} == {
            "a": {True},
            "b": {False},
        }


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
