"""Optimisers by name: each computes what its library, or its equation, computes; its state survives a checkpoint bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.attaching.active import set_trainable
from graft.config import load_run
from graft.config.optimizers import OPTIMIZERS
from graft.config.train import TrainConfig
from graft.errors import GraftError
from graft.training.updates.optimizers import build_optimizer, state_bytes
from graft.training.updates.states import optimizer_tensors, restore_optimizer
from tests.training.conftest import attach, job_on, step, tiny

NAMES = ("matrix", "vector", "cube")
EIGHT_BIT = [name for name in OPTIMIZERS if name not in ("adamw", "lion", "adafactor", "sgd")]


def library() -> Any:
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')").optim


def parameters() -> list[torch.nn.Parameter]:
    """A matrix that is large enough for a state of 8 bits, a vector and a cube that are not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in ((72, 64), (48,), (3, 8, 16))]


def config(optimizer: Any, **more: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 1e-2, "optimizer": optimizer, **more})


def made(optimizer: Any, **more: Any) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    own = parameters()
    return build_optimizer(
        [{"params": own[:1], "lr": 1e-2}, {"params": own[1:], "lr": 3e-2}], config(optimizer, **more)
    ), own


def walk(optimizer: torch.optim.Optimizer, own: list[torch.nn.Parameter], steps: range) -> list[Tensor]:
    """Take some steps, with a gradient for each step and parameter that depends on both alone."""
    for at in steps:
        random = torch.Generator().manual_seed(at)
        for parameter in own:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
    return [parameter.detach().clone() for parameter in own]


def lion_by_hand(own: Sequence[Tensor], betas: tuple[float, float], decay: float) -> list[Tensor]:
    weights, kept = [each.detach().clone() for each in own], [torch.zeros_like(each) for each in own]
    for at in range(3):
        random = torch.Generator().manual_seed(at)
        for number, weight in enumerate(weights):
            gradient, lr = torch.randn(weight.shape, generator=random), 1e-2 if number == 0 else 3e-2
            sign = (betas[0] * kept[number] + (1 - betas[0]) * gradient).sign()
            weight -= lr * (sign + decay * weight)
            kept[number] = betas[1] * kept[number] + (1 - betas[1]) * gradient
    return weights


def test_lion_is_its_equation() -> None:
    optimizer, own = made({"kind": "lion", "betas": [0.8, 0.95]}, weight_decay=0.1)
    expected = lion_by_hand(own, (0.8, 0.95), 0.1)
    for found, right in zip(walk(optimizer, own, range(3)), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


def test_lion_is_that_of_bitsandbytes() -> None:
    optimizer, own = made("lion", weight_decay=0.1)
    theirs = parameters()
    other = library().Lion(
        [{"params": theirs[:1], "lr": 1e-2}, {"params": theirs[1:], "lr": 3e-2}], betas=(0.9, 0.99), weight_decay=0.1
    )
    for found, right in zip(walk(optimizer, own, range(4)), walk(other, theirs, range(4)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def adafactor(groups: Any) -> Any:
    from transformers.optimization import Adafactor

    return Adafactor(
        groups, lr=1e-2, scale_parameter=False, relative_step=False, decay_rate=-0.6, beta1=0.9, weight_decay=0.1
    )


THEIRS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "sgd": (
        {"kind": "sgd", "momentum": 0.9, "nesterov": True},
        lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "adafactor": ({"kind": "adafactor", "decay_rate": -0.6, "beta1": 0.9}, adafactor),
    "adamw-8bit": (
        {"kind": "adamw-8bit", "betas": [0.8, 0.99], "eps": 1e-6},
        lambda groups: library().AdamW8bit(groups, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
    ),
    "lion-8bit": ("lion-8bit", lambda groups: library().Lion8bit(groups, betas=(0.9, 0.99), weight_decay=0.1)),
    "paged-adamw": ("paged-adamw", lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_settings_reach_the_library(name: str) -> None:
    asked, make = THEIRS[name]
    if name in EIGHT_BIT:
        library()
    optimizer, own = made(asked, weight_decay=0.1)
    theirs = parameters()
    other = make([{"params": theirs[:1], "lr": 1e-2}, {"params": theirs[1:], "lr": 3e-2}])
    for found, right in zip(walk(optimizer, own, range(3)), walk(other, theirs, range(3)), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_state_goes_on_bit_for_bit(name: str) -> None:
    if name in EIGHT_BIT:
        library()
    optimizer, own = made({"kind": name, **({"momentum": 0.9} if name == "sgd" else {})})
    walk(optimizer, own, range(2))
    stored = {key: tensor.clone() for key, tensor in optimizer_tensors(optimizer, NAMES).items()}
    assert not [key for key, tensor in stored.items() if not isinstance(tensor, Tensor)]
    fresh, copies = made({"kind": name, **({"momentum": 0.9} if name == "sgd" else {})})
    for copy, parameter in zip(copies, own, strict=True):
        copy.data = parameter.detach().clone()
    restore_optimizer(fresh, NAMES, stored)
    for found, right in zip(walk(fresh, copies, range(2, 5)), walk(optimizer, own, range(2, 5)), strict=True):
        assert torch.equal(found, right)
    assert optimizer_tensors(fresh, NAMES).keys() == stored.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bytes_of_a_state_are_known_before_it_is_made(name: str) -> None:
    if name in EIGHT_BIT:
        library()
    for settings in (
        ({}, {"momentum": 0.9}) if name == "sgd" else ({}, {"beta1": 0.9}) if name == "adafactor" else ({},)
    ):
        optimizer, own = made({"kind": name, **settings})
        expected = state_bytes(own, config({"kind": name, **settings}))
        walk(optimizer, own, range(1))
        held = [tensor for tensor in optimizer_tensors(optimizer, NAMES).values() if tensor.dim()]
        assert sum(tensor.numel() * tensor.element_size() for tensor in held) == expected


@pytest.mark.parametrize(("name", "lr"), [("lion", 1e-3), ("adafactor", 1e-3), ("sgd", 0.1), ("adamw-8bit", 1e-3)])
def test_a_job_learns_with_it_beside_a_job_of_adamw_as_alone(name: str, lr: float) -> None:
    if name in EIGHT_BIT:
        library()
    plus = graft.LoRA(rank=4, lr_ratio=4.0)
    model = attach(attach(tiny(), "a", plus), "b")
    set_trainable(model, ["a", "b"])
    jobs = [job_on(model, "a", optimizer=name, lr=lr), job_on(model, "b")]
    beside = [step(model, jobs)["a"].loss for _ in range(6)]
    lone = attach(tiny(), "a", plus)
    job = job_on(lone, "a", optimizer=name, lr=lr)
    assert [step(lone, [job])["a"].loss for _ in range(6)] == pytest.approx(beside, rel=1e-6)
    assert [group["lr"] for group in job.optimizer.param_groups] == [lr, 4 * lr]
    assert beside[-1] < beside[0]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"optimizer": "adamw8bit"}, "train.optimizer must be one of adamw, .*did you mean 'adamw-8bit'"),
        ({"optimizer": {"kind": "lion", "eps": 1e-8}}, "unknown key 'train.optimizer.eps'"),
        ({"optimizer": "sgd", "betas": [0.9, 0.99]}, "optimizer sgd has no betas: remove train.betas"),
        ({"optimizer": {"kind": "lion", "betas": [0.9, 0.99]}, "betas": [0.9, 0.9]}, "betas is set twice"),
        ({"optimizer": {"kind": "sgd", "nesterov": True}}, "nesterov has no effect without momentum"),
        ({"optimizer": {"kind": "adamw", "betas": [0.9, 1.0]}}, "each at least 0 and below 1"),
        ({"optimizer": {"momentum": 0.9}}, "a mapping whose kind is one of them"),
        ({"optimizer": {"kind": ["sgd"]}}, "train.optimizer must be one of adamw, .*did you mean 'sgd'"),
        ({"method": {"kind": {"full": None}}}, "train.method must be one of adapter, full, qft, mezo"),
        ({"method": None}, "train.method must be one of adapter, full, qft, mezo"),
        ({"lr": 1e300}, "train.lr must be at most 1e.38; given: 1e"),
        ({"optimizer": {"kind": "sgd", "weight_decay": 1e300}}, "train.optimizer.weight_decay must be at most 1e.38"),
    ],
)
def test_what_an_optimiser_does_not_take_is_named(train: dict[str, Any], said: str) -> None:
    run = {"base": {"model": "seedling"}, "adapter": {"kind": "lora"}, "data": {"train": "rows.jsonl"}, "train": train}
    with pytest.raises(GraftError, match=said):
        load_run(run)
