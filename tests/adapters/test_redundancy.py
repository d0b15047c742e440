"""Losses that adapters add: redundancy by its definition, its gradient in every layout, company and loop, and its name in the records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.parts.redundancy import redundancy
from graft.attaching.active import running
from graft.config import RunConfig
from graft.injection.state import state_of
from graft.routing.context import ForwardContext
from graft.runs.folder import RunFolder
from graft.training.forward.activations import holding
from graft.training.forward.causal import Forward
from graft.training.forward.layout import laid_out
from graft.training.forward.modes import set_training
from tests.contract.table import base
from tests.training.conftest import attach, data, engine_for, exact_norm, gradients, job_on, take_step, tiny

KIND = {"kind": "series", "bottleneck": 5, "init": "bert", "redundancy": 0.3, "sites": "mlp"}
MIXTURE = {"kind": "mixture", "of": {**KIND, "hidden_dropout": 0.5}, "share": "down"}


@pytest.fixture(autouse=True)
def _norms_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)


def by_definition(u: Tensor, f: Tensor) -> Tensor:
    u, f = (each / each.norm(dim=-1, keepdim=True) for each in (u, f))
    C = torch.einsum("li,lj->ij", f, u)
    return (C.square() * (1 - torch.eye(len(C), dtype=C.dtype))).sum()


def test_redundancy_is_the_sum_of_squares_off_the_diagonal() -> None:
    pairs = [(torch.randn(length, 6).double(), torch.randn(length, 6).double()) for length in (4, 9, 1)]
    found = redundancy([u for u, _ in pairs], [f for _, f in pairs])
    assert torch.allclose(found, torch.stack([by_definition(u, f) for u, f in pairs]), atol=1e-12)


def world(weight: float = 0.3, adapter: Any = None) -> tuple[Any, Any]:
    spec = adapter or {**KIND, "redundancy": weight}
    model = attach(tiny(dtype=torch.float64), adapter=spec)
    job = job_on(model, train=data(12, seed=2), clip=None, lr=1e-30, weight_decay=0.0)
    set_training(model, ["a"])
    return model, job


def written_out(model: Any, job: Any) -> tuple[Tensor, Tensor]:
    """The mean over rows and the sum over sites, from the activations of each row alone; and its gradient."""
    modules, seen = [each.module for each in state_of(model).adapter("a").installs], []
    for module in modules:
        module.f.register_forward_hook(lambda _, given, out: seen.append((given[0][0], out[0])))
    rows = job.rows()
    model.eval()  # so that nothing is added
    for row in rows:
        with running(model, ForwardContext("a")):
            model(input_ids=torch.from_numpy(row.example.input_ids)[None].long())
    for module in modules:
        module.f._forward_hooks.clear()
    total = 0.3 * sum(by_definition(u, f) for u, f in seen) / len(rows)
    assert isinstance(total, Tensor)
    return total.detach(), torch.cat([each.flatten() for each in torch.autograd.grad(total, list(job.params.values()))])


@pytest.mark.parametrize("layout, budget, again", [("flat", 4096, False), ("flat", 40, True), ("padded", 60, False)])
def test_a_step_adds_the_loss_once_and_its_gradient(layout: Any, budget: int, again: bool) -> None:
    slopes, outcomes = [], []
    for weight in (0.3, 1e-300):
        model, job = world(weight)
        forward = Forward(model)
        with laid_out(model, layout), holding(model, "recompute") if again else torch.enable_grad():
            set_training(model, ["a"])
            outcomes.append(take_step(forward, [job], layout, budget)["a"])
        slopes.append(gradients(job))
    model, job = world()
    wanted, slope = written_out(model, job)
    assert outcomes[0].scores["redundancy"] == pytest.approx(float(wanted), rel=1e-9)
    assert outcomes[0].loss - outcomes[1].loss == pytest.approx(float(wanted), rel=1e-9)
    assert torch.allclose(slopes[0] - slopes[1], slope, atol=1e-10) and float(slope.abs().max()) > 1e-5


def test_a_plain_loop_gets_the_gradient_with_padding_on_the_left() -> None:
    model, job = world()
    rows = [row.example.input_ids for row in job.rows()]
    longest = max(map(len, rows))
    ids = torch.stack(
        [torch.nn.functional.pad(torch.from_numpy(each).long(), (longest - len(each), 0)) for each in rows]
    )
    mask = torch.stack([(torch.arange(longest) >= longest - len(each)).long() for each in rows])
    _, slope = written_out(model, job)
    found = []
    for weight in (0.3, 0.0):
        for module in (each.module for each in state_of(model).adapter("a").installs):
            module.redundancy = weight
        model.train()
        graft.set_active(model, "a")
        model(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
        found.append(gradients(job))
        model.zero_grad()
    assert torch.allclose(found[0] - found[1], slope, atol=1e-10)


def test_where_it_means_nothing_is_named() -> None:
    with pytest.raises(graft.GraftError, match="which tokens of a decoder behind an encoder are real is not known"):
        graft.attach(base("t5"), {"a": KIND})
    run = {"base": {"model": "base"}, "data": {"train": "d.json"}, "adapter": KIND}
    for train, said in (
        ({"method": "mezo"}, "redundancy adds no loss"),
        ({"compile": True}, "does not know the padding"),
    ):
        with pytest.raises(ValueError, match=said):
            RunConfig.model_validate({**run, "train": train})


def test_it_is_the_same_in_company_and_in_the_records(tmp_path: Path) -> None:
    def run(path: Path, company: bool) -> list[dict[str, Any]]:
        model = attach(tiny(dtype=torch.float64), adapter=MIXTURE)
        jobs = [job_on(model, train=data(12, seed=2), steps=4)]
        if company:
            attach(model, "b", {"kind": "lora", "rank": 2, "dropout": 0.2}, seed=4)
            jobs.append(job_on(model, "b", data(9, seed=3), steps=4, batch_size=3))
        engine_for(jobs, model, path, token_budget=64).run()
        return [line for line in RunFolder(path).metrics.read() if line.get("job", "a") == "a" and "loss" in line]

    alone, together = run(tmp_path / "alone", False), run(tmp_path / "together", True)
    assert len(alone) == len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert one["redundancy"] == pytest.approx(other["redundancy"], rel=1e-10) and one["redundancy"] > 0
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-10)
