"""MeZO: slopes along noise are those of algebra and autograd, parameters come back bit for bit, and jobs do each other no harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import graft
from graft.attaching.active import set_trainable
from graft.config import load_run
from graft.config.methods import MeZOMethod
from graft.errors import GraftError
from graft.training.forward.causal import Forward
from graft.training.forward.modes import set_training
from graft.training.job import Job
from graft.training.resuming import resume
from graft.training.start import train
from graft.training.step import NonFinite
from graft.training.updates import noise
from graft.training.updates.gradients import Gradients
from graft.training.updates.noise import add_noise_, step_key
from graft.training.updates.noise_sgd import NoiseSGD
from graft.training.updates.zeroth import Zeroth
from tests.noise import drawn as by_numpy
from tests.training.conftest import attach, batcher, data, exact_norm, job_on, losses, pairs, step, tiny
from tests.training.test_kto import marked


@pytest.fixture(autouse=True)
def _norms_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)


def drawn(key: int, index: int, count: int) -> torch.Tensor:
    """The noise of a key, by numpy alone."""
    return torch.from_numpy(by_numpy(key, index, count))


def test_noise_is_normal_and_depends_on_its_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.zeros(40_000)
    add_noise_(whole, 1.0, 7, 3)
    torch.testing.assert_close(whole, drawn(7, 3, 40_000), rtol=1e-6, atol=1e-7)
    for power, (mean, spread) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):  # of a normal variable's powers
        assert abs(float(whole.double().pow(power).mean()) - mean) < 4 * (spread / 40_000) ** 0.5
    for apart in (1, 2, 3, 4, 8):
        assert abs(float((whole[apart:] * whole[:-apart]).mean())) < 4 / 40_000**0.5
    for key, index in ((7, 4), (8, 3)):
        other = torch.zeros(40_000)
        add_noise_(other, 1.0, key, index)
        assert abs(float((whole * other).mean())) < 4 / 40_000**0.5
    monkeypatch.setattr(noise, "PIECE", 1000)
    pieces, turned = torch.zeros(40_000), torch.zeros(100, 400).t()
    add_noise_(pieces, 1.0, 7, 3)
    add_noise_(turned, 1.0, 7, 3)
    assert torch.equal(pieces, whole)
    assert torch.equal(turned.reshape(-1), whole)
    keys = {step_key(seed, at, direction) for seed in range(3) for at in range(3) for direction in range(3)}
    assert len(keys) == 27
    half = torch.full((50,), 0.5, dtype=torch.bfloat16)
    add_noise_(half, 1e-3, 7, 3)
    assert torch.equal(half, (0.5 + 1e-3 * drawn(7, 3, 50)).to(torch.bfloat16))


def test_on_a_quadratic_the_step_is_its_equation() -> None:
    """The central difference of a quadratic L = w A w / 2 is exact: the slope is z A w."""
    torch.manual_seed(0)
    A = torch.randn(6, 6, dtype=torch.float64)
    A = A + A.T
    weight = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    method = MeZOMethod(epsilon=0.1, directions=2)
    optimizer = NoiseSGD([{"params": [weight], "lr": 0.05}], 0.05, 0.2, method)
    start, expected = weight.detach().clone(), weight.detach() * (1 - 0.05 * 0.2)
    for key in (11, 12):
        with torch.no_grad(), optimizer.moving(key) as move:
            sides = []
            for side in (1, -1):
                move(side)
                sides.append(float(weight @ A @ weight / 2))
        assert torch.equal(weight, start)
        z = drawn(key, 0, 6).double()
        optimizer.slopes[key] = (sides[0] - sides[1]) / 0.2
        assert optimizer.slopes[key] == pytest.approx(float(z @ A @ start), rel=1e-12)
        expected = expected - 0.05 * (z @ A @ start) / 2 * z
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert not optimizer.slopes and not optimizer.state


def loss_of(model: Any, job: Job) -> torch.Tensor:
    """The mean loss of the job's next step, sample by sample through the model's own logits."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in job.rows():
        ids = torch.as_tensor(row.example.input_ids).long()
        each = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
        picked = each[torch.as_tensor(row.example.supervised[1:])]
        total, count = total + picked.sum(), count + len(picked)
    return total / count


@pytest.mark.parametrize("adapter", [None, {"kind": "series"}, {"kind": "prefix", "tokens": 3}], ids=str)
def test_a_step_is_the_difference_of_two_losses_along_the_noise(adapter: Any) -> None:
    def fresh() -> tuple[Any, Job]:
        model = attach(tiny(dtype=torch.float64), adapter=adapter)
        return model, job_on(model, method={"kind": "mezo", "epsilon": 1e-4}, clip=None, seed=5)

    model, job = fresh()
    key = step_key(5, 0)
    noise_of = {
        name: drawn(key, at, each.numel()).view(each.shape) for at, (name, each) in enumerate(job.params.items())
    }
    before = {name: each.detach().clone() for name, each in job.params.items()}
    sides = []
    with graft.use(model, "a"):
        for side in (1, -1):
            with torch.no_grad():
                for name, each in job.params.items():
                    each.copy_(before[name] + side * 1e-4 * noise_of[name])
                sides.append(float(loss_of(model, job)))
        with torch.no_grad():
            for name, each in job.params.items():
                each.copy_(before[name])
        loss_of(model, job).backward()
    derivative = sum(
        float((each.grad * noise_of[name]).sum()) for name, each in job.params.items() if each.grad is not None
    )
    slope = (sides[0] - sides[1]) / 2e-4
    assert slope == pytest.approx(derivative, rel=1e-3)
    for layout in ("padded", "flat"):
        own, other = fresh()
        outcome = step(own, [other], layout=layout)["a"]
        assert outcome.grad_norm == pytest.approx(abs(slope), rel=1e-6)
        assert outcome.loss == pytest.approx(sum(sides) / 2, rel=1e-9)
        for name, each in other.params.items():
            torch.testing.assert_close(
                each.detach(), before[name] - 1e-2 * slope * noise_of[name], rtol=1e-6, atol=1e-9
            )


def test_many_directions_are_averaged_and_clipped_by_the_norm_that_they_estimate() -> None:
    """The mean square of slopes along normal noise is the square of the gradient's norm."""
    model = attach(tiny())
    job = job_on(model, method={"kind": "mezo", "directions": 100}, clip=0.1)
    gradient = Zeroth().prepare(Forward(model), [job], batcher())["a"]
    plain = attach(tiny())
    assert gradient.norm == pytest.approx(step(plain, [job_on(plain, clip=None)])["a"].grad_norm, rel=0.2)
    assert len(gradient.slopes) == 100
    assert np.sqrt(np.mean(np.square(list(gradient.slopes.values())))) == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_fails_leaves_every_bit_of_the_parameters(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(tiny(dtype=dtype))
    with torch.no_grad():
        for _, parameter in graft.parameters(model, "a"):
            parameter.data = parameter.data.to(dtype)
    for restore, exact in (("copy", True), ("subtract", False)):
        job = job_on(model, method={"kind": "mezo", "restore": restore})
        before = [each.detach().clone() for each in job.params.values()]
        forward, passes = Forward(model), [0]
        plain = forward.losses

        def losses_of(*given: Any, plain: Any = plain, passes: Any = passes) -> torch.Tensor:
            passes[0] += 1
            return plain(*given) * (float("nan") if passes[0] == 2 else 1.0)

        monkeypatch.setattr(forward, "losses", losses_of)
        with pytest.raises(NonFinite, match="the loss of 'a' became infinite or not a number in step 1"):
            Zeroth().prepare(forward, [job], batcher())
        same = [torch.equal(one, other) for one, other in zip(before, job.params.values(), strict=True)]
        assert all(same) if exact else not all(same)
        for one, other in zip(before, job.params.values(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_company_changes_nothing() -> None:
    """Two jobs of MeZO and one with gradients, together and alone."""
    kinds = {"a": "lora", "b": "series", "c": "lora"}
    settings: dict[str, dict[str, Any]] = {
        "a": {"method": "mezo", "lr": 1e-3, "seed": 3},
        "b": {"method": {"kind": "mezo", "directions": 2}, "lr": 1e-3, "clip": None},
        "c": {},
    }

    def run(names: str) -> dict[str, list[float]]:
        model = tiny(dtype=torch.float64)
        for number, name in enumerate("abc"):
            if name in names:
                attach(model, name, {"kind": kinds[name]}, seed=number)
        set_trainable(model, list(names))
        jobs = [job_on(model, name, data(32, seed=ord(name)), **settings[name]) for name in names]
        taken = [step(model, jobs) for _ in range(4)]
        return {name: [outcomes[name].loss for outcomes in taken] for name in names}

    together = run("abc")
    for name in "abc":
        assert run(name)[name] == pytest.approx(together[name], rel=1e-9)


@pytest.mark.parametrize("objective", [None, "dpo", "orpo", "kto"])
def test_a_slope_is_the_gradient_along_the_noise(objective: str | None) -> None:
    """Whatever the objective makes of the losses, and with the penalty that a kind adds; the gradients are those of the other rule."""
    train = {None: data, "kto": marked}.get(objective, pairs)(8)
    kind = {"kind": "adalora", "orthogonality": 0.5} if objective is None else None

    def fresh(**more: Any) -> tuple[Any, Job]:
        model = attach(tiny(dtype=torch.float64), adapter=kind)
        return model, job_on(model, train=train, objective=objective, clip=None, **more)

    model, job = fresh()
    set_training(model, ["a"])
    Gradients().prepare(Forward(model), [job], batcher())
    key = step_key(0, 0)
    along = sum(
        float((each.grad * drawn(key, at, each.numel()).view(each.shape)).sum())
        for at, each in enumerate(job.params.values())
        if each.grad is not None
    )
    model, job = fresh(method={"kind": "mezo", "epsilon": 1e-6})
    found = Zeroth().prepare(Forward(model), [job], batcher(budget=20))["a"]
    assert found.slopes[key] == pytest.approx(along, rel=1e-6)


RUN: dict[str, Any] = {
    "base": {"model": "base", "device": "cpu"},
    "adapter": {"kind": "lora", "rank": 2},
    "data": {"train": "data.json", "template": "alpaca", "validation": 4},
    "train": {"method": "mezo", "steps": 6, "batch_size": 4, "save_every": 3, "schedule": "constant", "lr": 1e-2},
}


def test_a_run_is_resumed_bit_for_bit(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    whole = train(load_run(RUN), tmp_path / "whole", quiet=True)
    half = train(load_run(RUN, ["train.steps=3"]), tmp_path / "half", quiet=True)
    resume(half, ["train.steps=6"], quiet=True)
    assert losses(half.path) == losses(whole.path)
    one, other = (folder.adapter_dir("lora") / "adapter_model.safetensors" for folder in (whole, half))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["train.optimizer=adamw"], "method mezo updates parameters along its noise, as sgd without momentum does"),
        (["train.optimizer={kind: sgd, momentum: 0.9}"], "as sgd without momentum does: set optimizer to sgd"),
        (["train.betas=[0.9, 0.99]"], "optimizer sgd has no betas"),
        (["train.gradient_checkpointing=true"], "method mezo has no backward pass, so activations has no use"),
        (["train.compile=true"], "method mezo has no backward pass, so compile has no use"),
        (["adapter.dropout=0.1"], "compares two passes without dropout, so an adapter's dropout of 0.1 has no use"),
        (["base.dropout=true"], "compares two passes without dropout, so base.dropout has no use"),
        (["adapter={kind: adalora}"], "mezo makes no gradients, but adalora needs them to choose ranks"),
        (["train.method=meso"], "train.method must be one of adapter, .*did you mean 'mezo'"),
        (["train.method={kind: mezo, eps: 1}"], "unknown key 'train.method.eps'"),
        (["train.method={kind: mezo, epsilon: 0}"], "train.method.epsilon"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_named(changes: list[str], said: str) -> None:
    with pytest.raises(GraftError, match=said):
        load_run(RUN, changes)
