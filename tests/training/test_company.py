"""A job trained in company equals the job alone, whatever its kind, batch, data, rank and length; and one that fails fails alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import graft
from graft.attaching.active import set_trainable
from graft.ops import low_rank as fused
from graft.ops import low_rank_grouped as grouped
from graft.training.job import Job
from tests.training.conftest import GATED, data, engine_for, exact_norm, job_on, pairs

STEPS = int(os.environ.get("GRAFT_TEST_STEPS", "20"))


def spec(kind: str) -> Any:
    """A kind as it comes, with all it has of dropout; parts for the kind that is made of others."""
    if kind == "stack":
        return [{"kind": "lora", "rank": 2, "dropout": 0.3}, {"kind": "prefix", "tokens": 2}]
    if kind == "sum":
        return {"kind": "sum", "of": [{"kind": "lora", "rank": 2, "dropout": 0.3}] * 2, "sites": "attn.q mlp.down"}
    if kind == "gate":
        return {"kind": "gate", "of": {"kind": "lora", "rank": 2, "dropout": 0.3}, "per": "token"}
    if kind == "mixture":
        return {"kind": kind, "of": {"kind": "series", "bottleneck": 4, "dropout": 0.3}, "share": "up"}
    dropout = {"dropout": 0.3} if "dropout" in graft.kinds()[kind].model_fields else {}
    return {"kind": kind, **dropout}


JOBS: dict[str, Any] = {kind: spec(kind) for kind in graft.kinds()}
JOBS |= {
    "lora-wide": {"kind": "lora", "rank": 16, "dropout": 0.1},
    "lora-one": {"kind": "lora", "rank": 1, "sites": "attn.q"},
    "gate-series": {
        "kind": "gate",
        "of": {"kind": "series", "bottleneck": 4, "dropout": 0.3},
        "reads": "output",
        "per": "token",
    },
    "sum-mixed": {
        "kind": "sum",
        "of": [{"kind": "series", "bottleneck": 4, "dropout": 0.3}, "ia3"],
        "sites": "mlp.down",
    },
    "gate-ia3": {"kind": "gate", "of": {"kind": "ia3"}, "per": "token"},
    "gate-second": {"kind": "gate", "of": {"kind": "llama-adapter", "tokens": 2, "sites": "attn"}, "per": "token"},
}
OBJECTIVES: dict[str, Any] = {
    "dpo": "dpo",
    "smoothed": {"kind": "dpo", "beta": 0.5, "label_smoothing": 0.1},
    "ipo": "ipo",
    "cpo": {"kind": "cpo", "nll": 0.5},
    "hinge": {"kind": "cpo", "loss": "hinge"},
    "orpo": "orpo",
    "simpo": "simpo",
}
"""Jobs that learn from pairs, beside those that learn to write."""
JOBS |= {name: {"kind": "lora", "rank": 3, "dropout": 0.3} for name in OBJECTIVES}
TWICE: dict[str, Any] = {
    "adamix": {"kind": "consistency", "weight": 5.0, "label_smoothing": 0.1},
    "adamix-rows": "consistency",
}
"""Jobs of which every sample runs twice."""
JOBS |= {
    "adamix": {"preset": "papers/adamix-lora", "rank": 2, "experts": 3},
    "adamix-rows": {"kind": "mixture", "of": {"kind": "ia3"}, "route": "row"},
    "mixture-tokens": {"kind": "mixture", "of": {"kind": "parallel", "bottleneck": 4}, "route": "token"},
}
JOBS |= {"ipo": {"kind": "series", "bottleneck": 4, "dropout": 0.2}, "orpo": {"kind": "prefix", "tokens": 2}}
NUMBER = {name: number for number, name in enumerate(JOBS)}


def world(
    dtype: torch.dtype, names: list[str], prepare: Callable[[Any], None] = lambda model: None
) -> tuple[Any, list[Job]]:
    """A model with these jobs, each with its own data, batch, learning rate, seed and number of steps. prepare: changes the bare model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True)  # biases are what bitfit trains
    base: Any = transformers.LlamaForCausalLM(config)
    model, jobs = base.to(dtype).eval().requires_grad_(False), []
    prepare(model)
    for name in names:
        torch.manual_seed(NUMBER[name])
        graft.attach(model, {name: JOBS[name]})
    set_trainable(model, names)
    for name in names:
        number = NUMBER[name]
        make = pairs if name in OBJECTIVES else data
        rows = make(20 + number, seed=number, longest=8 + number % 9)
        settings = {
            "steps": STEPS - number % 5,
            "lr": 1e-3 * (1 + number % 3),
            # AdamW makes whole steps of gradients that are all rounding; in float32 it takes this for small.
            "eps": 1e-6 if dtype == torch.float32 else 1e-8,
            "objective": {**OBJECTIVES, **TWICE}.get(name),
        }
        jobs.append(job_on(model, name, rows, batch_size=2 + number % 4, seed=number, **settings))
    return model, jobs


def trained(
    dtype: torch.dtype, names: list[str], path: Path, layout: str = "flat"
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[float]]]:
    """Parameters at the end and losses, by job."""
    model, jobs = world(dtype, names)
    ended: dict[str, dict[str, Tensor]] = {}

    def publish(job: Job) -> None:
        ended[job.name] = {key: parameter.detach().clone() for key, parameter in job.params.items()}

    engine = engine_for(jobs, model, path, publish, token_budget=256, layout=layout)
    assert engine.run() == "finished"
    lines = [line for line in engine.folder.metrics.read() if "loss" in line]
    return ended, {name: [line["loss"] for line in lines if line["job"] == name] for name in names}


@pytest.fixture(autouse=True, scope="module")
def _norms_are_exact() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", exact_norm)
        yield


WORLDS = [
    "float64 flat",
    *(pytest.param(world, marks=pytest.mark.slow) for world in ("float32 flat", "float64 padded")),
]


@pytest.fixture(scope="module", params=WORLDS)
def company(_norms_are_exact: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All kinds as jobs of one run."""
    name, layout = request.param.split()
    dtype = getattr(torch, name)
    return dtype, layout, *trained(dtype, list(JOBS), tmp_path_factory.mktemp("company") / "run", layout)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_in_company_is_the_job_alone(company: Any, name: str, tmp_path: Path) -> None:
    dtype, layout, parameters, found = company
    alone, wanted = trained(dtype, [name], tmp_path / "run", layout)
    assert len(wanted[name]) == STEPS - NUMBER[name] % 5
    assert found[name] == pytest.approx(wanted[name], rel=1e-12 if dtype == torch.float64 else 1e-6)
    if dtype == torch.float64:
        for key, parameter in alone[name].items():
            assert float((parameter - parameters[name][key]).abs().max()) <= 1e-12, key


def test_low_rank_jobs_by_grouped_products_are_the_jobs_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a device with a kernel for them; alone, a job is one term, which no product of several takes."""
    names, taken = ["lora", "lora-wide", "series", "lora-one", "smoothed"], []
    add = fused.add_grouped_
    monkeypatch.setattr(grouped, "has_kernel", lambda x: True)
    monkeypatch.setattr(fused, "add_grouped_", lambda out, x, terms: (taken.append(len(terms)), add(out, x, terms))[1])
    _, found = trained(torch.float32, names, tmp_path / "company")
    assert max(taken) >= 4
    for name in names:
        _, wanted = trained(torch.float32, [name], tmp_path / name)
        assert found[name] == pytest.approx(wanted[name], rel=1e-6)


def test_every_job_of_the_company_learns_something(company: Any) -> None:
    dtype, _, parameters, _ = company
    _, jobs = world(dtype, list(JOBS))
    still = [
        job.name for job in jobs if all(torch.equal(p, parameters[job.name][key]) for key, p in job.params.items())
    ]
    assert still == []
