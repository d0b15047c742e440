"""Trials run together learn what they would learn one by one; a trial that fails leaves the others alone; a study goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.errors import GraftError
from graft.study.definition import read_study
from graft.study.folder import begin, join
from graft.study.loop import Runner
from graft.study.report.writing import write_reports
from graft.study.searching import best_adapter


def started(study: dict[str, Any], out: Path, **options: Any) -> Runner:
    return begin(study, (), out, resume=False, say=lambda text: None, **options)


def finished(study: dict[str, Any], out: Path) -> Runner:
    runner = started(study, out)
    runner.run()
    return runner


def results(runner: Runner) -> list[Any]:
    return [
        (
            each.settings,
            each.seed,
            each.state,
            each.result and [each.result[key] for key in ("loss", "curve", "validations")],
        )
        for each in runner.store.trials()
    ]


def close(first: Any, second: Any) -> bool:
    if isinstance(first, float):
        return first == pytest.approx(second, abs=1e-6)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(close(a, b) for a, b in zip(first, second, strict=True))
    return first == second


def test_joint_trials_equal_trials_one_by_one_and_the_report_is_there(run_of: dict[str, Any], tmp_path: Path) -> None:
    study = {
        "run": run_of,
        "seeds": [0, 3],
        "list": [
            {"adapter": {"kind": "lora", "rank": 2, "sites": "attn.q attn.v", "dropout": 0.2}},
            {"adapter": {"kind": "series", "bottleneck": 4, "sites": "mlp"}, "train.batch_size": 3},
        ],
        "grid": {"train.lr": [1e-3, 1e-2]},
        "tune": ["train.lr"],
    }
    tested = {**study, "objective": "test_accuracy", "test": str(tmp_path / "test.jsonl")}
    together = finished(tested, tmp_path / "together")
    alone = finished({**study, "together": 1}, tmp_path / "alone")
    assert len(list((tmp_path / "together" / "packs").glob("*/config.yaml"))) == 1
    assert len(list((tmp_path / "alone" / "packs").glob("*/config.yaml"))) == 8
    assert all(close(a, b) for a, b in zip(results(together), results(alone), strict=True))
    report = write_reports(together.study, together.store, tmp_path / "together")
    assert [row["trials"] for row in report["ranking"]] == [2, 2] and report["counts"] == {"done": 8}
    page = (tmp_path / "together" / "report.html").read_text()
    assert "<svg" in page and "http-equiv" not in page and "src=" not in page, "finished, and of one file"
    assert json.loads((tmp_path / "together" / "report.json").read_text())["objective"] == "test_accuracy"
    assert "| 1" in (tmp_path / "together" / "report.md").read_text()


def test_trials_that_fail_are_noted_and_the_study_goes_on(run_of: dict[str, Any], tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.jsonl")
    study = {
        "run": run_of,
        "list": [
            {"train.lr": 1e-3},
            {"data.train": missing},
            {"train.lr": 1e38, "train.clip": None},
            {"train.lr": 2e-3},
        ],
    }
    runner = finished(study, tmp_path / "out")
    states = [(each.state, bool(each.error)) for each in runner.store.trials()]
    assert states == [("done", False), ("failed", True), ("failed", True), ("done", False)]
    report = write_reports(runner.study, runner.store, tmp_path / "out")
    assert len(report["failed"]) == 2 and "nowhere.jsonl" in report["failed"][0]["error"]


def test_a_trial_that_does_not_fit_is_told_not_tried(run_of: dict[str, Any], tmp_path: Path) -> None:
    from graft.study.memory import MemoryPredictor

    run_of["train"] = {"steps": 1, "batch_size": 4}
    space = {"adapter.rank": [2, 4096], "train.lr": {"low": 1e-3, "high": 1e-2, "log": True}}
    search = {"space": space, "budget": 6, "batch": 3, "sampler": "random"}
    fits = MemoryPredictor().peak(read_study({"run": run_of, "search": search}).config_of({}))
    # Rank 4096 at attn.q of two layers of width 32: as many values, their gradients, and two moments, in float32.
    limit = (fits + 2 * 4096 * (32 + 32) * 16 / 2) / 1e9
    runner = finished({"run": run_of, "search": search, "memory": limit, "together": 4}, tmp_path / "out")
    by_rank = {each.settings["adapter.rank"]: each.state for each in runner.store.trials()}
    assert by_rank == {2: "done", 4096: "infeasible"}


def test_another_process_joins_and_nothing_runs_twice(run_of: dict[str, Any], tmp_path: Path) -> None:
    study = {"run": run_of, "grid": {"train.lr": [1e-3, 2e-3, 3e-3, 4e-3]}, "together": 2}
    first = started(study, tmp_path / "out")
    first.run(most=1)
    second = join(tmp_path / "out", say=lambda text: None)
    second.run()
    assert second.store.counts() == {"done": 4} and len(second.store.running_packs()) == 0
    assert len({each.pack for each in second.store.trials()}) == 2
    with pytest.raises(GraftError, match="already holds a study"):
        started(study, tmp_path / "out")
    other = {**study, "seeds": [5]}
    with pytest.raises(GraftError, match="another study, which differs in seeds"):
        begin(other, (), tmp_path / "out", resume=True, say=lambda text: None)


def test_a_point_starts_from_the_best_adapter_of_its_kind(run_of: dict[str, Any], tmp_path: Path) -> None:
    space = {"train.lr": {"low": 1e-6, "high": 1e-2, "log": True}}
    first = [{"train.lr": each} for each in (1e-6, 1e-2)]
    search = {"space": space, "budget": 4, "batch": 2, "sampler": "random", "start": first, "warm_start": True}
    runner = finished({"run": run_of, "search": search}, tmp_path / "out")
    fresh, warm = runner.store.trials()[:2], runner.store.trials()[2:]
    best = min(fresh, key=lambda each: (each.result or {})["loss"])
    assert best.settings == {"train.lr": 1e-2} and len(warm) == 2
    assert [Path(each.settings["train.init_from"]).name for each in warm] == [best.job] * 2
    # It goes on where the best one was: with next to no learning rate it would keep that loss.
    assert all((each.result or {})["loss"] < (fresh[0].result or {})["loss"] for each in warm)
    assert best_adapter(runner.study, runner.store, {"adapter.rank": 4}) is None, "another adapter starts afresh"
    report = write_reports(runner.study, runner.store, tmp_path / "out")
    assert sum(row["setting"].endswith(f"from {best.job}") for row in report["ranking"]) == 2


def test_halving_and_the_median_end_trials_early(run_of: dict[str, Any], tmp_path: Path) -> None:
    grid = {"train.lr": [1e-6, 1e-5, 1e-2, 2e-2]}
    halved = finished({"run": run_of, "grid": grid, "pruner": {"kind": "halving", "rungs": [2]}}, tmp_path / "a")
    assert [(each.result or {})["ended"] for each in halved.store.trials()] == [
        "halved",
        "halved",
        "finished",
        "finished",
    ]
    pruner = {"kind": "median", "least": 3}
    median = finished({"run": run_of, "grid": grid, "pruner": pruner, "together": 3}, tmp_path / "b")
    ends = [(each.result or {})["ended"] for each in median.store.trials()]
    assert ends[0] == "median" and ends[2] == ends[3] == "finished", "the fourth is compared with the first three"
