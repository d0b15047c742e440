"""Points 1, 2 and 5: a fresh adapter is the identity, the base never changes, off is the base, and contexts restore what they found."""

from __future__ import annotations

import pytest
import torch

import graft
from graft.injection.container import AdapterContainer
from graft.injection.state import state_of
from tests.contract.table import Row, attached, changes, ids, logits, loss, pristine, rows, same_base


@rows()
def test_a_fresh_adapter_changes_nothing_or_declares_that_it_does(row: Row) -> None:
    model = attached(row, fresh=True)
    same = torch.equal(logits(model, ids()), logits(pristine(row.family), ids()))
    assert same == row.config.starts_as_identity


@rows()
def test_a_trained_adapter_shows_and_off_is_the_base_bit_for_bit(row: Row) -> None:
    model, inputs = attached(row), ids()
    with graft.use(model, None):
        assert torch.equal(logits(model, inputs), logits(pristine(row.family), inputs))
    assert changes(model, row)


@rows()
def test_on_off_on_is_stable_and_an_exception_restores_the_choice(row: Row) -> None:
    model, inputs = attached(row, None, torch.float32, "a", "b"), ids()
    on = logits(model, inputs)
    with pytest.raises(RuntimeError, match="on the way"), graft.use(model, "b"), graft.use(model, None):
        with graft.route(model, ["a", None, "b"]):
            logits(model, inputs)
        raise RuntimeError("on the way")
    assert state_of(model).current.rows == "a"
    assert torch.equal(logits(model, inputs), on)
    with graft.use(model, "b"):
        assert not torch.allclose(logits(model, inputs), on, atol=1e-3)


@rows("llama-mam llama-parallel-mlp bloom-prefix")
def test_an_exception_inside_the_forward_pass_leaves_the_next_one_right(row: Row) -> None:
    model, inputs = attached(row), ids()
    expected = logits(model, inputs)
    hook = [module for name, module in model.named_modules() if name.endswith(("up_proj", "dense_h_to_4h"))][-1]
    handle = hook.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), graft.use(model, None):
        model(inputs)
    with pytest.raises(ZeroDivisionError):
        model(inputs)
    handle.remove()
    assert torch.equal(logits(model, inputs), expected)


@rows()
def test_the_base_never_changes_in_evaluation_or_training(row: Row) -> None:
    model = attached(row, fresh=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for mode in (False, True, False):
        model.train(mode)
        loss(model, ids()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same_base(model, row.family)
    assert all(p.grad is None for name, p in model.named_parameters() if "graft" not in name.split("."))
    graft.detach(model)
    assert same_base(model, row.family) and not any(isinstance(module, AdapterContainer) for module in model.modules())
