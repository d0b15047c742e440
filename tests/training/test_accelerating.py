"""Runs with Liger's kernels, by a stand-in of the package: the same losses, a proof before the first step, and what is said of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graft.config import load_run
from graft.config.run import RunConfig
from graft.errors import GraftError, MissingExtra
from graft.kernels import chosen, described
from graft.training import train
from graft.training.check import check
from tests.kernels.fake_liger import CALLS, LigerRMSNormFunction, put_in_place, rope_backward
from tests.runs_at_hand import write_rows
from tests.small import save_small
from tests.task_bases import answered_rows, labelled_rows, save_task_base
from tests.training.conftest import attach, data, engine_for, events, job_on, losses, pairs, tiny

KINDS: dict[str, Any] = {
    "a": {"kind": "lora", "rank": 4, "sites": "linear", "dropout": 0.1},
    "b": {"kind": "full", "sites": "norm"},
    "c": {"kind": "prefix", "tokens": 3},
}


def run(
    path: Path, kernels: str, names: str = "abc", family: str = "llama", paired: bool = False, **settings: Any
) -> Any:
    model, jobs = tiny(family), []
    for number, name in enumerate(names):
        attach(model, name, KINDS[name], seed=number)
    for number, name in enumerate(names):
        rows = pairs(24, seed=number) if paired else data(24, seed=number)
        objective = "dpo" if paired else None
        jobs.append(job_on(model, name, rows, steps=3 + number, batch_size=4, objective=objective, patience=None))
    before = {path: type(module) for path, module in model.named_modules()}
    engine = engine_for(jobs, model, path, kernels=kernels, **settings)
    assert engine.run() == "finished"
    assert {path: type(module) for path, module in model.named_modules()} == before
    return engine


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("settings", [{}, {"layout": "padded"}, {"activations": "recompute"}])
def test_jobs_of_several_kinds_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any]
) -> None:
    put_in_place(monkeypatch)
    run(tmp_path / "off", "off", family=family, **settings)
    assert not CALLS
    engine = run(tmp_path / "liger", "liger", family=family, **settings)
    assert losses(tmp_path / "liger") == pytest.approx(losses(tmp_path / "off"), rel=1e-5)
    assert CALLS["rms_norm"] and CALLS["rope_forward"] and CALLS["rope_backward"]
    assert bool(CALLS["swiglu_forward"]) == (family == "llama")  # Gemma's is by gelu
    said = "Liger 9.0 (5 norms, 2 rotary positions" if family == "llama" else "Liger 9.0 (13 norms, 2 rotary positions"
    assert engine.folder.read_status()["kernels"].startswith(said)
    (event,) = (each for each in engine.folder.events.read() if each["event"] == "kernels")
    assert event["kernels"].startswith(said) and event["losses"] < 1e-5 and event["gradients"] < 1e-5


def test_pairs_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    run(tmp_path / "off", "off", "ab", paired=True)
    run(tmp_path / "liger", "auto", "ab", paired=True)
    assert CALLS["rms_norm"]
    assert losses(tmp_path / "liger") == pytest.approx(losses(tmp_path / "off"), rel=1e-5)


class WrongForward(LigerRMSNormFunction):
    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, eps: float, *args: Any) -> Tensor:
        return LigerRMSNormFunction.forward(ctx, X, W, eps + 1.0, *args)


class WrongBackward(LigerRMSNormFunction):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dX, *rest = LigerRMSNormFunction.backward(ctx, *grads)
        return dX * 1.1, *rest


class Breaks(LigerRMSNormFunction):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        raise AssertionError("Triton found no compiler\nand says so at length")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "norm": ({"LigerRMSNormFunction": WrongForward}, "with them the token losses of the first batch differ by"),
    "norm's gradient": ({"LigerRMSNormFunction": WrongBackward}, "of their norm (allowed 0.001)"),
    "rotation's gradient": (
        {"rope_backward": lambda dq, dk, cos, sin: rope_backward(dq, dk, cos, -sin)},
        "and the gradients by",
    ),
    "product": ({"swiglu_forward": lambda e, u: (e, u, e * u)}, "with them the token losses"),
    "compiler": ({"LigerRMSNormFunction": Breaks}, "they do not run here (AssertionError: Triton found no compiler)"),
}


@pytest.mark.parametrize("what", WRONG)
def test_kernels_that_compute_something_else_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    changed, said = WRONG[what]
    put_in_place(monkeypatch, **changed)
    spoken: list[str] = []
    monkeypatch.setattr("graft.training.records.progress.Reporter.say", lambda self, text: spoken.append(text))
    engine = run(tmp_path / "auto", "auto", "a")
    (line,) = (each for each in spoken if "kernels" in each)
    assert line.startswith("Liger's kernels cannot be used: ") and said in line
    assert engine.folder.read_status()["kernels"] == "torch" and events(tmp_path / "auto").count("kernels") == 1
    run(tmp_path / "off", "off", "a")
    assert losses(tmp_path / "auto") == losses(tmp_path / "off")


def test_kernels_that_are_demanded_have_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, LigerRMSNormFunction=WrongForward)
    with pytest.raises(
        GraftError, match="train.kernels is liger, but its kernels cannot be used: with them the token losses"
    ):
        run(tmp_path / "wrong", "liger", "a")
    put_in_place(monkeypatch)
    with pytest.raises(GraftError, match="this model has no module that they compute"):
        run(tmp_path / "none", "liger", "a", family="gpt2")


def test_a_cpu_runs_torch_and_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    monkeypatch.delenv("TRITON_INTERPRET")
    engine = run(tmp_path / "run", "auto", "a")
    assert engine.folder.read_status()["kernels"] == "torch" and "kernels" not in events(tmp_path / "run") and not CALLS


def test_demands_that_cannot_be_met_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert chosen("auto", cpu) is chosen("off", cuda) is chosen("auto", cuda) is None
    with pytest.raises(GraftError, match="needs a CUDA device, but the base is on cpu"):
        chosen("liger", cpu)
    with pytest.raises(MissingExtra, match=r"pip install 'graft-llm\[gpu\]'"):
        chosen("liger", cuda)
    assert "torch's own operations" in described()
    put_in_place(monkeypatch, version="0.6.4")
    assert chosen("auto", cpu) is None
    with pytest.raises(GraftError, match="liger-kernel 0.6.4 recompiles .* Install 0.6.5 or later"):
        chosen("liger", cpu)


def configured(folder: Path, **settings: Any) -> Any:
    if not (folder / "base").exists():
        save_small(folder / "base")
        write_rows(folder / "rows.jsonl")
    return load_run(
        {
            "base": {"model": str(folder / "base"), "device": "cpu"},
            "adapter": {"kind": "lora", "rank": 2},
            "data": {"train": str(folder / "rows.jsonl"), "template": "plain", "cache": False},
            "train": {"steps": 2, "batch_size": 2, **settings},
        }
    )


def test_a_demand_fails_before_a_run_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(GraftError, match="CUDA device"):
        train(configured(tmp_path, kernels="liger"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_check_measures_a_step_with_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch)
    report = check(configured(tmp_path))
    assert report.trial.kernels.startswith("Liger 9.0 (5 norms") and not report.problems and CALLS["rope_backward"]
    report = check(configured(tmp_path, kernels="off"))
    assert report.trial.kernels == "torch"


@pytest.mark.parametrize(
    ("family", "data", "served"),
    [
        ("llama", {"task": "classification"}, "5 norms, 2 rotary positions"),
        ("t5", {"task": "seq2seq"}, "12 norms)"),
    ],
)
def test_other_tasks_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, data: dict[str, Any], served: str
) -> None:
    put_in_place(monkeypatch)
    rows = write_rows(tmp_path / "rows.jsonl", answered_rows() if family == "t5" else labelled_rows())
    base = save_task_base(tmp_path / "base", family)
    for kernels in ("off", "auto"):
        config = load_run(
            {
                "base": {"model": str(base), "device": "cpu"},
                "adapter": {"kind": "lora", "rank": 2, "sites": "linear"},
                "data": {"train": str(rows), "cache": False, **data},
                "train": {"steps": 3, "batch_size": 4, "lr": 1e-2, "kernels": kernels},
            }
        )
        folder = train(config, tmp_path / kernels, quiet=True)
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "off"), rel=1e-5)
    assert served in folder.read_status()["kernels"]


def test_the_setting_is_read_from_yaml_and_has_no_part_in_a_compiled_run(tmp_path: Path) -> None:
    assert isinstance(config := configured(tmp_path, kernels="off", compile=True), RunConfig)
    assert config.train.kernels == "off"
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: {model: seedling}\nadapter: {kind: lora}\ndata: {train: rows.jsonl, template: plain}\ntrain: {kernels: off}\n"
    )
    assert load_run(path).train.kernels == "off" and load_run(path, ["train.kernels=auto"]).train.kernels == "auto"
    with pytest.raises(GraftError, match="train.compile does not go with train.kernels liger"):
        configured(tmp_path, kernels="liger", compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_run_on_a_gpu_uses_them(tmp_path: Path, family: str) -> None:
    pytest.importorskip("liger_kernel")
    found: dict[str, list[float]] = {}
    for kernels in ("off", "liger"):
        model = attach(tiny(family).cuda())
        engine = engine_for([job_on(model, steps=4)], model, tmp_path / kernels, kernels=kernels)
        assert engine.run() == "finished"
        found[kernels] = losses(tmp_path / kernels)
    assert engine.folder.read_status()["kernels"].startswith("Liger")
    assert found["liger"] == pytest.approx(found["off"], rel=1e-4)
