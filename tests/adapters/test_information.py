"""The mutual-information loss of MixPHM by its definition, its gradient in every layout, company and loop, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graft
from graft.adapters.parts.information import information
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

WEIGHT = 0.7
KIND: dict[str, Any] = {"kind": "series", "bottleneck": 5, "init": "bert", "information": WEIGHT, "sites": "mlp"}
MIXTURE = {"kind": "mixture", "of": {**KIND, "hidden_dropout": 0.5}, "share": "down"}


@pytest.fixture(autouse=True)
def _norms_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)


def by_definition(added: list[Tensor], ends: list[Tensor]) -> Tensor:
    """The Jensen-Shannon estimator, pair by pair: the mean over pairs of another sequence minus that over pairs of the own one."""
    own, other = [], []
    for row, tokens in enumerate(added):
        for token in tokens:
            for at, end in enumerate(ends):
                score = sum(a * b for a, b in zip(token, end, strict=True))
                if at == row:
                    own.append(math.log(2) + torch.log(torch.sigmoid(score)))
                else:
                    other.append(-torch.log(1 - torch.sigmoid(score)) - math.log(2))
    return sum(other) / len(other) - sum(own) / len(own)  # pyright: ignore[reportReturnType]


def test_it_is_the_estimator() -> None:
    torch.manual_seed(0)
    added = [torch.randn(length, 6).double() for length in (4, 9, 1)]
    ends = torch.randn(3, 6).double()
    assert torch.allclose(information(added, ends).mean(), by_definition(added, list(ends)), atol=1e-12)
    assert information(added[:1], ends[:1]).tolist() == [0.0]
    nothing = information([torch.zeros_like(each) for each in added], ends)
    assert torch.allclose(nothing, torch.zeros(3).double(), atol=1e-12)
    with pytest.raises(graft.GraftError, match="6 features wide, with the last hidden states of 3 sequences, 5 wide"):
        information(added, ends[:, :5])


def world(weight: float = WEIGHT) -> tuple[Any, Any]:
    model = attach(tiny(dtype=torch.float64), adapter={**KIND, "information": weight})
    job = job_on(model, train=data(12, seed=2, longest=9), batch_size=4, clip=None, lr=1e-30, weight_decay=0.0)
    set_training(model, ["a"])
    return model, job


def written_out(model: Any, job: Any) -> tuple[Tensor, Tensor]:
    """The sum over sites, from the activations of each row alone; and its gradient."""
    modules, ends = [each.module for each in state_of(model).adapter("a").installs], []
    seen: list[list[Tensor]] = [[] for _ in modules]
    for module, own in zip(modules, seen, strict=True):
        module.f.register_forward_hook(lambda _, given, out, own=own: own.append(out[0]))
    model.eval()  # so that nothing is added
    for row in job.rows():
        with running(model, ForwardContext("a")):
            ends.append(model.model(input_ids=torch.from_numpy(row.example.input_ids)[None].long())[0][0].mean(0))
    for module in modules:
        module.f._forward_hooks.clear()
    total = sum(WEIGHT * by_definition(own, ends) for own in seen)
    assert isinstance(total, Tensor)
    return total.detach(), torch.cat([each.flatten() for each in torch.autograd.grad(total, list(job.params.values()))])


@pytest.mark.parametrize("layout, budget, again", [("flat", 4096, False), ("flat", 4, True), ("padded", 4, False)])
def test_a_step_adds_the_loss_once_and_its_gradient(layout: Any, budget: int, again: bool) -> None:
    slopes, outcomes = [], []
    for weight in (WEIGHT, 1e-300):
        model, job = world(weight)
        forward = Forward(model)
        with laid_out(model, layout), holding(model, "recompute") if again else torch.enable_grad():
            set_training(model, ["a"])
            outcomes.append(take_step(forward, [job], layout, budget)["a"])
        slopes.append(gradients(job))
    wanted, slope = written_out(*world())
    assert outcomes[0].scores["information"] == pytest.approx(float(wanted), rel=1e-9)
    assert outcomes[0].loss - outcomes[1].loss == pytest.approx(float(wanted), rel=1e-9)
    assert torch.allclose(slopes[0] - slopes[1], slope, atol=1e-10) and float(slope.abs().max()) > 1e-5


def padded(job: Any) -> dict[str, Tensor]:
    """The rows of a step with padding on the left."""
    rows = [torch.from_numpy(row.example.input_ids).long() for row in job.rows()]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(each, (longest - len(each), 0)) for each in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(each)).long() for each in rows])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_plain_loop_gets_the_gradient(checkpointed: bool) -> None:
    model, job = world()
    _, slope = written_out(model, job)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    for weight in (WEIGHT, 0.0):
        for module in (each.module for each in state_of(model).adapter("a").installs):
            module.information = weight
        model.train()
        graft.set_active(model, "a")
        model(**padded(job)).logits.square().mean().backward()
        found.append(gradients(job))
        model.zero_grad()
    assert torch.allclose(found[0] - found[1], slope, atol=1e-10)


def test_it_is_the_same_in_company_and_in_the_records(tmp_path: Path) -> None:
    def run(path: Path, company: bool) -> list[dict[str, Any]]:
        model = attach(tiny(dtype=torch.float64), adapter=MIXTURE)
        jobs = [job_on(model, train=data(12, seed=2), steps=4)]
        if company:
            attach(model, "b", {"kind": "lora", "rank": 2, "dropout": 0.2}, seed=4)
            jobs.append(job_on(model, "b", data(9, seed=3), steps=4, batch_size=3))
        engine_for(jobs, model, path, token_budget=40).run()
        return [line for line in RunFolder(path).metrics.read() if line.get("job", "a") == "a" and "loss" in line]

    alone, together = run(tmp_path / "alone", False), run(tmp_path / "together", True)
    assert len(alone) == len(together) == 4
    for one, other in zip(alone, together, strict=True):
        assert one["information"] == pytest.approx(other["information"], rel=1e-10) and one["information"] != 0
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-10)


def test_detach_leaves_the_model_as_it_was() -> None:
    model = tiny()
    classes = [type(each) for each in model.modules()]
    graft.attach(model, {"a": KIND})
    assert [type(each) for each in model.modules()][: len(classes)] != classes
    graft.detach(model)
    assert [type(each) for each in model.modules()] == classes


def test_where_it_means_nothing_is_named() -> None:
    with pytest.raises(graft.GraftError, match="which tokens of a decoder behind an encoder are real is not known"):
        graft.attach(base("t5"), {"a": KIND})
    with pytest.raises(graft.GraftError, match="one expert has to run them: set route: pass; given: row"):
        graft.Mixture(of=KIND, route="row")
    run = {"base": {"model": "base"}, "data": {"train": "d.json"}, "adapter": MIXTURE}
    for train, said in (
        ({"method": "mezo"}, "information adds no loss"),
        ({"compile": True}, "does not know the padding"),
        ({"objective": "consistency"}, "would take its second pass for another sample"),
    ):
        with pytest.raises(ValueError, match=said):
            RunConfig.model_validate({**run, "train": train})


def test_what_it_cannot_compare_is_an_error_and_not_silence() -> None:
    model, job = world()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    graft.set_active(model, "a")
    with pytest.raises(graft.GraftError, match="reentrant checkpointing"):
        model(**padded(job))
    model.gradient_checkpointing_disable()
    with pytest.raises(graft.GraftError, match="run the whole model"):
        model.model.layers[0].mlp(torch.randn(1, 3, 32).double())
    model = attach(tiny(), adapter=[{"kind": "prompt", "tokens": 2}, KIND])
    model.train()
    graft.set_active(model, "a")
    with pytest.raises(graft.GraftError, match="take a prefix instead"):
        model(**padded(job), use_cache=False)
