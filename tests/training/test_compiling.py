"""A run whose base is one compiled graph: the losses of eager code, one graph for all routing, errors for what cannot be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graft.config.jobs import REFERENCE
from graft.config.run import RunConfig
from graft.errors import GraftError
from graft.training.check import check
from tests.runs_at_hand import write_rows
from tests.small import save_small
from tests.training.conftest import attach, data, engine_for, job_on, losses, pairs, tiny

ADAPTERS: dict[str, Any] = {
    "a": {"kind": "lora", "rank": 4, "sites": "attn.q mlp.down"},
    "b": {"kind": "series", "bottleneck": 4, "sites": "mlp"},
    "c": {"kind": "prefix", "tokens": 3},
    "d": {"kind": "lora", "rank": 2, "sites": "attn.v"},
}
OBJECTIVES = {"a": "dpo", "b": "orpo", "c": {"kind": "ipo", "reference": "init"}}
"""Of the jobs that learn from pairs. "a" is compared with the bare base, "b" with nothing, "c" with an adapter that does not train."""


@pytest.fixture(autouse=True)
def _fresh_graphs() -> None:
    torch._dynamo.reset()


def run(path: Path, names: str = "a", compile: Any = None, paired: bool = False, held: int = 0) -> Any:
    """Jobs of unequal batches and lengths: the last step is that of the first job alone, and then the others are set aside.

    paired: learn from pairs where `OBJECTIVES` says so. held: samples of validation.
    """
    model, jobs = tiny(), []
    objectives = OBJECTIVES if paired else {}
    for number, name in enumerate(names):
        attach(model, name, ADAPTERS[name], seed=number)
    if "c" in objectives and "c" in names:
        attach(model, f"c{REFERENCE}", ADAPTERS["c"], seed=9)
    for number, name in enumerate(names):
        make = pairs if name in objectives else data
        rows, validation = make(32, seed=number), make(held, seed=9) if held else None
        settings = {"steps": 4 - number % 2, "batch_size": 4 + number, "objective": objectives.get(name)}
        settings |= {"init_from": "where it was"} if name == "c" and paired else {}
        jobs.append(job_on(model, name, rows, validation, **settings))
        jobs[-1].reference = f"c{REFERENCE}" if name == "c" and paired else None
    engine = engine_for(jobs, model, path, layout="auto" if compile else "padded", compile=compile)
    assert engine.run() == "finished"
    return engine


def equal(eager: Any, compiled: Any) -> None:
    assert compiled.layout == "padded"
    for key in ("loss", "validation_loss"):
        found, wanted = (
            [line[key] for line in each.folder.metrics.read() if key in line] for each in (compiled, eager)
        )
        assert found == pytest.approx(wanted, rel=1e-5)
    for own, other in zip(compiled.jobs, eager.jobs, strict=True):
        for name, parameter in own.params.items():
            torch.testing.assert_close(parameter, other.params[name], atol=1e-5, rtol=1e-3)


def test_a_compiled_run_is_one_graph_for_steps_of_any_size_and_learns_as_eager_code_does(tmp_path: Path) -> None:
    made_after: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        made_after.append(len(losses(tmp_path / "graph")))
        return graph.forward

    equal(run(tmp_path / "eager", "ad", paired=True), run(tmp_path / "graph", "ad", counting, paired=True))
    assert set(made_after) == {0, 6}  # before the first step, and when one of both jobs was set aside after its third


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("paired", [False, True])
def test_every_hook_and_every_objective_trains_the_same_compiled(tmp_path: Path, backend: str, paired: bool) -> None:
    eager = run(tmp_path / "eager", "abcd", paired=paired, held=5)
    equal(eager, run(tmp_path / "graph", "abcd", backend, paired=paired, held=5))


@pytest.mark.slow
def test_check_proves_and_measures_the_graph(tmp_path: Path) -> None:
    eager, compiled = (
        check(
            RunConfig.model_validate(
                {
                    "base": {"model": str(save_small(tmp_path / "base")), "device": "cpu"},
                    "adapter": {"kind": "lora", "rank": 2, "sites": "linear"},
                    "data": {"train": str(write_rows(tmp_path / "rows.jsonl")), "template": "plain", "cache": False},
                    "train": {"steps": 3, "batch_size": 2, "compile": compile},
                }
            )
        )
        for compile in (False, True)
    )
    assert compiled.layout.layout == "padded" and not compiled.problems
    assert eager.trial.compile_seconds is None and (compiled.trial.compile_seconds or 0.0) > 0.0
    assert compiled.trial.loss == pytest.approx(eager.trial.loss, rel=1e-5)


def test_a_model_that_torch_cannot_compile_is_an_error(tmp_path: Path) -> None:
    def unable(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no such backend")

    with pytest.raises(GraftError, match="train.compile: torch cannot compile this model.*Set train.compile to false"):
        run(tmp_path / "run", compile=unable)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda out: out * 1.5, r"by up to \d\.\d+ \(allowed"),
        (lambda out: out + (out - out.detach()) / 2, r"by up to 0 \(allowed.*the gradients by \d"),
    ],
)
def test_a_graph_that_computes_something_else_is_an_error(tmp_path: Path, wrong: Any, said: str) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(wrong(out) if out.is_floating_point() else out for out in graph.forward(*args))

    with pytest.raises(GraftError, match=f"token losses of the compiled model differ.*{said}"):
        run(tmp_path / "run", compile=backend)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"train": {"compile": True, "layout": "flat"}}, "cannot keep the sequences apart"),
        ({"train": {"compile": True, "activations": "recompute"}}, "train.activations"),
        ({"base": {"model": "x", "dropout": True}}, "base.dropout"),
        ({"data": {"train": "x", "task": "classification"}}, "data.task classification"),
        ({"adapter": {"kind": "lora", "dropout": 0.1}}, "dropout of 0.1"),
        ({"adapter": [{"kind": "lora", "dropout": 0.2}, {"kind": "series"}]}, "dropout of 0.2"),
        ({"adapter": "llm-adapters/lora"}, "dropout of 0.05"),
        ({"adapter": [{"kind": "gate", "of": {"kind": "mixture", "of": "ia3"}}]}, "adapter kind mixture"),
    ],
)
def test_what_a_graph_cannot_do_is_refused_in_the_config(changes: dict[str, Any], reason: str) -> None:
    config = {"base": {"model": "x"}, "adapter": {"kind": "lora"}, "data": {"train": "x"}, "train": {"compile": True}}
    RunConfig.model_validate(config)
    with pytest.raises(ValueError, match=f"train.compile does not go with.*{reason}"):
        RunConfig.model_validate({**config, **changes})
