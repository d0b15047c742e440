"""Modes of training: recomputed blocks give the same gradients, and the base's dropout is off unless wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graft.errors import GraftError
from graft.training.forward.activations import holding
from graft.training.forward.causal import Forward
from graft.training.forward.layout import decide, laid_out
from graft.training.forward.modes import evaluating, set_training
from tests.training.conftest import assert_same_gradient, attach, batcher, gradients, job_on, take_step, tiny

ADAPTERS: dict[str, Any] = {
    "lora": {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.3},
    "parallel": {"kind": "parallel", "bottleneck": 5, "sites": "attn mlp"},
    "prefix": {"kind": "prefix", "tokens": 3},
}


def one_step(model: Any, layout: Any, recompute: bool) -> tuple[float, torch.Tensor, int]:
    """Loss, gradient, and how often the first block ran."""
    job, forward, calls = job_on(model, clip=None), Forward(model), [0]
    decide(forward, [job], layout, batcher())
    block = next(
        module
        for module in model.modules()
        if "DecoderLayer" in type(module).__name__ or type(module).__name__.endswith("Block")
    )
    counted = next(module for module in block.modules() if type(module).__name__.endswith(("MLP", "Linear", "Conv1D")))

    def count(*given: Any) -> None:
        calls[0] += 1

    with laid_out(model, layout):
        handle = counted.register_forward_hook(count)
        if recompute:
            with holding(model, "recompute"):
                set_training(model, ["a"])
                loss = take_step(forward, [job], layout)["a"].loss
        else:
            set_training(model, ["a"])
            loss = take_step(forward, [job], layout)["a"].loss
        handle.remove()
    return loss, gradients(job), calls[0]


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize("family", ["llama", "opt", "falcon", "gpt2"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_recomputed_blocks_give_the_same_loss_and_gradient(family: str, adapter: str, layout: str) -> None:
    """OPT and Falcon apply dropout in the block itself, which stays off although a checkpointed block is in training mode."""
    plain, gradient, once = one_step(attach(tiny(family), adapter=ADAPTERS[adapter]), layout, recompute=False)
    again, other, twice = one_step(attach(tiny(family), adapter=ADAPTERS[adapter]), layout, recompute=True)
    assert again == pytest.approx(plain, rel=1e-6)
    assert_same_gradient(other, gradient, 1e-5)
    assert (once, twice) == (1, 2)


def test_after_recomputing_the_model_is_as_before() -> None:
    model = attach(tiny())
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with holding(model, "recompute"):
        set_training(model, ["a"])
    model.eval()
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert {name: set(values) for name, values in before.items()} == {
        name: set(values) for name, values in after.items()
    }
    assert not any(module.training for module in model.modules())


def test_a_model_without_blocks_is_refused() -> None:
    with (
        pytest.raises(GraftError, match="no blocks that can be recomputed"),
        holding(torch.nn.Linear(2, 2), "recompute"),
    ):
        pass


def test_only_the_named_adapters_are_in_training_mode() -> None:
    model = attach(attach(tiny("opt"), "a"), "b")
    set_training(model, ["b"])
    on = {name for name, module in model.named_modules() if module.training}
    assert on and all(".graft.b." in name for name in on)
    set_training(model, ["a"], base_dropout=True)
    assert model.training and not any(module.training for name, module in model.named_modules() if ".graft.b." in name)


def test_evaluating_brings_every_mode_back() -> None:
    model = attach(tiny())
    set_training(model, ["a"])
    before = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()
