"""QFT: 8-bit weights compute what their dequantised values compute, learn as Lion in float32 does, and leave an ordinary model."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks import qft_rounding
from graft.attaching.bare import keep_context
from graft.config import load_run
from graft.config.train import TrainConfig
from graft.errors import GraftError
from graft.training.forward.activations import holding
from graft.training.forward.causal import Forward
from graft.training.forward.modes import set_training
from graft.training.job import Job
from graft.training.resuming import resume
from graft.training.start import train
from graft.training.step import NonFinite
from graft.training.updates.int8 import Int8Weight, from_int8, to_int8
from graft.training.updates.optimizers import update_bytes, weight_bytes
from graft.training.updates.qft_lion import QFTLion
from graft.training.updates.rules import rule_of
from tests.training.conftest import batcher, data, losses, take_step, tiny


def job_of(model: Any, method: Any = "qft", **config: Any) -> Job:
    keep_context(model)
    settings = {"batch_size": 8, "lr": 1e-3, "schedule": "constant", "steps": 8, "method": method, **config}
    job = Job.make(model, "qft", TrainConfig(**settings), data(16), None)
    job.trainable.begin(job.optimizer)
    set_training(model, [])
    return job


def steps(model: Any, job: Job, count: int, budget: int = 4096) -> list[float]:
    return [take_step(Forward(model), [job], "padded", budget)["qft"].loss for _ in range(count)]


def weights(job: Job) -> dict[str, Tensor]:
    held: Any = job.trainable
    return {name: each.weight.dequantised() for name, each in held.held.items()}


def test_a_weight_is_within_half_a_step_and_its_outliers_are_exact() -> None:
    torch.manual_seed(0)
    values = torch.randn(40, 50)
    values[3, 7], values[:, 9] = 30.0, 0.0
    weight = Int8Weight(values, 0.02, "stochastic")
    error = (weight.dequantised() - values).abs()
    assert bool((error <= weight.scale / 2 * 1.0001).all())
    assert len(weight.index) == 40 and 3 * 50 + 7 in weight.index.tolist()
    largest = values.abs().flatten().topk(40).indices
    assert set(weight.index.tolist()) == set(largest.tolist())
    assert torch.equal(weight.dequantised().flatten()[largest], values.flatten()[largest])
    ids = torch.tensor([3, 3, 39, 0, 17])
    assert torch.equal(weight.rows(ids), weight.dequantised()[ids])
    plain = Int8Weight(values, 0.0, "stochastic")
    assert torch.equal(plain.rows(ids), plain.dequantised()[ids])
    codes, scale = to_int8(values)
    assert bool(((from_int8(codes, scale) - values).abs() <= scale / 2 * 1.0001).all())


def test_stochastic_rounding_keeps_the_mean_and_nearest_loses_small_updates() -> None:
    torch.manual_seed(0)
    values = torch.randn(20, 100) * 0.02
    moved = {}
    for rounding in ("stochastic", "nearest"):
        weight = Int8Weight(values, 0.0, rounding)  # pyright: ignore[reportArgumentType]
        start, update = weight.dequantised(), weight.scale * 0.05
        random = torch.Generator().manual_seed(1)
        for _ in range(200):
            weight.store(weight.dequantised() + update, random)
        moved[rounding] = float(((weight.dequantised() - start) / weight.scale).mean())
    assert moved["stochastic"] == pytest.approx(200 * 0.05, rel=0.02)
    assert moved["nearest"] == 0.0


def test_a_row_that_outgrows_its_grid_gets_another() -> None:
    weight = Int8Weight(torch.linspace(-1, 1, 64).repeat(3, 1), 0.0, "nearest")
    grown = weight.dequantised()
    grown[1] *= 1.5
    before = weight.scale.clone()
    weight.store(grown, None)
    assert bool((weight.scale[[0, 2]] == before[[0, 2]]).all()) and bool((weight.scale[1] > before[1]).all())
    assert float((weight.dequantised() - grown).abs().max()) <= float(weight.scale.max()) / 2 * 1.001


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_those_of_the_dequantised_weights(family: str, again: bool) -> None:
    """Against autograd through transformers' model; GPT-2 shares its table with the head and stores weights transposed."""
    model = tiny(family)
    job = job_of(model)
    plain = tiny(family)
    plain.load_state_dict(job.trainable.whole())  # type: ignore[arg-type]
    rows = job.rows()
    size, found = job.objective.size(rows), dict[str, Tensor]()
    names = {id(each.anchor): name for name, each in job.trainable.held.items()}  # type: ignore[attr-defined]

    def loss(forward: Forward) -> Tensor:
        each = forward.losses(*batcher().inputs(rows, forward.device)).double()
        lengths = torch.tensor([row.targets for row in rows])
        return job.objective.share(rows, torch.segment_reduce(each, "sum", lengths=lengths), size)

    def sink(held: Any, grad: Tensor) -> None:
        name = names[id(held.anchor)]
        found[name] = found.get(name, 0.0) + grad

    for each in job.trainable.held.values():  # type: ignore[attr-defined]
        each.sink = sink
    keep_context(plain)
    plain.requires_grad_(True)
    with holding(model, "recompute") if again else nullcontext():
        set_training(model, [])
        own = loss(Forward(model))
        own.backward()
    expected = loss(Forward(plain))
    expected.backward()
    assert float(own.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert {"llama": 2 * 7 + 2, "gpt2": 2 * 4 + 2}[family] == len(found)
    for name, parameter in plain.named_parameters():
        grad = found[name] if name in found else model.get_parameter(name).grad
        torch.testing.assert_close(
            grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}"
        )


def test_a_step_is_lion_up_to_one_step_of_the_grid() -> None:
    model = tiny()
    job = job_of(model, weight_decay=0.1, clip=None, betas=[0.8, 0.95], lr=1e-2)
    before, held = weights(job), job.trainable.held  # type: ignore[attr-defined]
    random = torch.Generator().manual_seed(0)
    optimizer: Any = job.optimizer
    name = "model.layers.0.mlp.up_proj.weight"
    weight, kept = before[name].clone(), torch.zeros_like(before[name])
    for now in range(3):
        gradient = torch.randn(weight.shape, generator=random)
        optimizer.now = now
        optimizer.push(held[name], gradient)
        rounded = from_int8(*to_int8(gradient))
        sign = (0.8 * kept + 0.2 * rounded).sign()
        weight = weight - 1e-2 * (sign + 0.1 * weight)
        kept = from_int8(*to_int8(0.95 * kept + 0.05 * rounded))
        optimizer.step()
        assert not optimizer.stack
        found = held[name].weight.dequantised()
        assert float(((found - weight).abs() / held[name].weight.scale).max()) <= 1.001
        torch.testing.assert_close(
            from_int8(*(optimizer.state[held[name].anchor][key] for key in ("momentum", "scale"))), kept
        )
        weight = found  # the rounding of this step is that of the next one's start


def test_micro_batches_and_clipping() -> None:
    """The norm is that of plain gradients, and however a step is cut, its gradients are the same up to their 8 bits."""
    model = tiny()
    plain = tiny()
    job = job_of(model, clip=0.1)
    plain.load_state_dict(job.trainable.whole())  # type: ignore[arg-type]
    full = Job.make(plain, "full", TrainConfig(method="full", batch_size=8, clip=None), data(16), None)  # type: ignore[arg-type]
    keep_context(plain)
    norm = rule_of(full).prepare(Forward(plain), [full], batcher())["full"].norm
    for budget in (4096, 30):
        gradient = rule_of(job).prepare(Forward(model), [job], batcher(budget=budget))["qft"]
        assert gradient.norm == pytest.approx(norm, rel=2e-2)
        optimizer: Any = job.optimizer
        assert optimizer.factor == pytest.approx(0.1 / norm, rel=2e-2)
        assert len(optimizer.stack) == len(weights(job))


@pytest.mark.parametrize("method", ["full", "qft"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_update_in_backward_is_the_same_update(method: str, family: str) -> None:
    """And no gradient is left behind."""
    found = []
    for update in ("after", "in_backward"):
        model = tiny(family)
        job = job_of(model, {"kind": method, "update": update}, clip=None, weight_decay=0.1)
        taken = steps(model, job, 4)
        state = {**job.trainable.state(), **job.tensors()}
        found.append((taken, state))
        assert all(each.grad is None for each in job.params.values()) or update == "after"
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    for name, tensor in found[0][1].items():
        assert torch.equal(tensor, found[1][1][name]), name


def test_what_an_update_in_backward_cannot_do_is_named() -> None:
    model = tiny()
    job = job_of(model, {"kind": "full", "update": "in_backward"}, clip=None)
    before = {name: each.detach().clone() for name, each in job.params.items()}
    with pytest.raises(
        GraftError, match="the longest step has .* tokens, which train.token_budget 40 cuts into .* micro-batches"
    ):
        steps(model, job, 1, budget=40)
    forward = Forward(model)
    broken = forward.losses
    forward.losses = lambda *given: broken(*given) * float("nan")  # type: ignore[method-assign]
    with pytest.raises(NonFinite, match="the loss of 'qft' became infinite"):
        rule_of(job).prepare(forward, [job], batcher())
    rule_of(job).rehearse(Forward(model), job, batcher())
    assert all(torch.equal(each, before[name]) for name, each in job.params.items())
    last = model.model.layers[1].mlp.down_proj.weight
    last.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(NonFinite, match=r"gradient \(of model.layers.1.mlp.down_proj.weight\)"):
        rule_of(job).prepare(Forward(model), [job], batcher())
    assert torch.equal(last, before["model.layers.1.mlp.down_proj.weight"])


def test_the_state_of_a_model_is_a_fifth_of_that_of_adam() -> None:
    """Weights, gradients on the stack and momenta, measured from their tensors, against 16 bytes per parameter."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    count = sum(each.numel() for each in model.parameters())
    sizes = {id(each): torch.empty_like(each) for each in model.parameters()}
    job = job_of(model)
    assert job.trainable.count == count
    steps(model, job, 1)
    rule_of(job).prepare(Forward(model), [job], batcher())
    optimizer: Any = job.optimizer
    assert isinstance(optimizer, QFTLion)
    held = [tensor for _, tensor in job.trainable.tensors()]
    held += [tensor for _, codes, scale in optimizer.stack for tensor in (codes, scale)]
    held += [each.grad for each in job.params.values() if each.grad is not None]
    held += [tensor for state in optimizer.state.values() for tensor in state.values()]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert 0.19 < taken / (16 * count) < 0.21
    params = [sizes[id(each)] for each in model.parameters()]
    assert weight_bytes(params, job.config) + update_bytes(params, job.config) == taken == job.own_bytes


RUN: dict[str, Any] = {
    "base": {"model": "base", "device": "cpu", "dtype": "float32"},
    "data": {"train": "data.json", "template": "alpaca", "validation": 4},
    "train": {"method": "qft", "steps": 8, "batch_size": 5, "save_every": 3, "validate_every": 4, "lr": 1e-3, "schedule": "constant"},
}  # fmt: skip


@pytest.mark.parametrize("update", ["after", "in_backward"])
def test_a_run_resumes_bit_for_bit_and_leaves_an_ordinary_model(
    update: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the end of an epoch, where outliers are chosen anew."""
    monkeypatch.chdir(world)
    changes = [f"train.method.update={update}", *(["train.clip=null"] if update == "in_backward" else [])]
    run = {**RUN, "train": {**RUN["train"], "method": {"kind": "qft"}}}
    whole = train(load_run(run, changes), tmp_path / "whole", quiet=True)
    half = train(load_run(run, [*changes, "train.steps=3"]), tmp_path / "half", quiet=True)
    resume(half, ["train.steps=8"], quiet=True)
    assert losses(half.path) == losses(whole.path)
    assert len(losses(whole.path)) == 8 and losses(whole.path)[-1] < losses(whole.path)[0]
    one, other = (folder.path / "model" / "model.safetensors" for folder in (half, whole))
    assert one.read_bytes() == other.read_bytes()
    model: Any = AutoModelForCausalLM.from_pretrained(whole.path / "model")
    base: Any = AutoModelForCausalLM.from_pretrained("base")
    assert {name: each.shape for name, each in model.state_dict().items()} == {
        name: each.shape for name, each in base.state_dict().items()
    }
    assert not any(torch.equal(each, base.state_dict()[name]) for name, each in model.named_parameters())
    best = json.loads((whole.path / "checkpoints" / "best.json").read_text())["qft"]
    scored = [line["validation_loss"] for line in whole.metrics.read() if "validation_loss" in line]
    assert best["loss"] == min(scored)


@pytest.mark.slow
def test_it_learns_as_lion_in_float32_where_nearest_rounding_stalls(tmp_path: Path) -> None:
    qft_rounding.toy(tmp_path)
    found = {name: qft_rounding.measure(tmp_path, name, 2e-5, 300) for name in list(qft_rounding.METHODS)[:3]}
    fall = {name: each["start"] - each["end"] for name, each in found.items()}
    assert fall["lion, float32"] > 1.0
    assert found["qft, stochastic"]["end"] == pytest.approx(found["lion, float32"]["end"], abs=0.02)
    assert fall["qft, nearest"] < 0.1 * fall["lion, float32"]
