"""A run whose base is one compiled graph: the losses of eager code, one graph for all routing, errors for what cannot be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from graft.config.schema import RunConfig
from graft.errors import GraftError
from tests.training.conftest import attach, data, engine_for, job_on, losses, tiny

ADAPTERS: dict[str, Any] = {
    "a": {"kind": "lora", "rank": 4, "sites": "attn.q mlp.down"},
    "b": {"kind": "series", "bottleneck": 4, "sites": "mlp"},
    "c": {"kind": "prefix", "tokens": 3},
}


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch._dynamo.reset()


def run(path: Path, names: str = "a", compile: Any = None) -> Any:
    """Jobs of unequal batches and lengths: the last step is that of the first job alone, and then the others are set aside."""
    model, jobs = tiny(), []
    for number, name in enumerate(names):
        attach(model, name, ADAPTERS[name], seed=number)
        jobs.append(job_on(model, name, data(32, seed=number), steps=4 - number % 2, batch_size=4 + number))
    engine = engine_for(jobs, model, path, layout="auto" if compile else "padded", compile=compile)
    assert engine.run() == "finished"
    return engine


def equal(eager: Any, compiled: Any) -> None:
    assert compiled.layout == "padded"
    assert losses(compiled.folder.path) == pytest.approx(losses(eager.folder.path), rel=1e-5)
    for own, other in zip(compiled.jobs, eager.jobs, strict=True):
        for name, parameter in own.params.items():
            torch.testing.assert_close(parameter, other.params[name], atol=1e-5, rtol=1e-3)


def test_a_compiled_run_is_one_graph_for_steps_of_any_size_and_learns_as_eager_code_does(tmp_path: Path) -> None:
    made_after: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        made_after.append(len(losses(tmp_path / "graph")))
        return aot_eager(graph, inputs)

    equal(run(tmp_path / "eager", "ab"), run(tmp_path / "graph", "ab", counting))
    assert set(made_after) == {0, 6}  # before the first step, and when one of both jobs was set aside after its third


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_hook_trains_the_same_compiled(tmp_path: Path, backend: str) -> None:
    equal(run(tmp_path / "eager", "abc"), run(tmp_path / "graph", "abc", backend))


def test_a_model_that_torch_cannot_compile_is_an_error(tmp_path: Path) -> None:
    def unable(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such backend")

    with pytest.raises(GraftError, match="train.compile: torch cannot compile this model.*Set train.compile to false"):
        run(tmp_path / "run", compile=unable)


def test_a_graph_that_computes_something_else_is_an_error(tmp_path: Path) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(out * 1.5 if out.is_floating_point() else out for out in graph.forward(*args))

    with pytest.raises(GraftError, match="token losses of the compiled model differ"):
        run(tmp_path / "run", compile=wrong)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": {"compile": True, "layout": "flat"}}, "cannot keep segments apart"),
        ({"train": {"compile": True, "gradient_checkpointing": True}}, "gradient_checkpointing"),
        ({"base": {"model": "x", "dropout": True}}, "base.dropout"),
        ({"data": {"train": "x", "task": "classification"}}, "data.task classification"),
        ({"adapter": {"kind": "lora", "dropout": 0.1}}, "dropout of 0.1"),
        ({"adapter": [{"kind": "lora", "dropout": 0.2}, {"kind": "series"}]}, "dropout of 0.2"),
        ({"adapter": "llm-adapters/lora"}, "dropout of 0.05"),
    ],
)
def test_what_a_graph_cannot_do_is_refused_in_the_config(changes: dict[str, Any], reason: str) -> None:
    config = {"base": {"model": "x"}, "adapter": {"kind": "lora"}, "data": {"train": "x"}, "train": {"compile": True}}
    RunConfig.model_validate(config)
    with pytest.raises(ValueError, match=f"train.compile does not go with.*{reason}"):
        RunConfig.model_validate({**config, **changes})
