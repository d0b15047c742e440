"""graft compare of several runs, and of result files in the shape of PEFT's method_comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from graft.errors import GraftError
from graft.study.report.others import read_results, result_files
from graft.study.report.ranking import rank


def result(folder: Path, name: str, correct: int, status: str = "success") -> Path:
    metrics = [{"step": 250, "valid accuracy": 0.4}, {"step": 500, "test accuracy": correct / 1319, "train loss": 0.6}]
    value = {
        "run_info": {
            "experiment_name": name,
            "train_config": {"seed": 0, "optimizer_kwargs": {"lr": 1e-4}},
            "peft_branch": "main",
        },
        "train_info": {"status": status, "num_trainable_params": 1000 + correct, "train_time": 2.5, "metrics": metrics},
        "meta_info": {"dataset_info": {"gsm8k": {"sha": "e53f"}}},
    }
    path = folder / f"{name.replace('/', '--')}.json"
    path.write_text(json.dumps(value))
    return path


def test_pefts_files_are_ranked_with_wilsons_intervals_and_fishers_tests(tmp_path: Path) -> None:
    counts = {"lora/a": 640, "ia3/b": 560, "vera/c": 500}
    for name, correct in counts.items():
        result(tmp_path, name, correct)
    result(tmp_path, "broken/d", 0, status="failed")
    (tmp_path / "notes.json").write_text("[]")
    entries, notes = read_results(result_files(tmp_path))
    assert notes == ["broken--d.json is left out: its status is failed"]
    ranked = rank(entries, high=True)
    assert [each.entry.name for each in ranked] == list(counts)
    tables = [[[640, 679], [correct, 1319 - correct]] for correct in (560, 500)]
    raw = [float(stats.fisher_exact(table).pvalue) for table in tables]
    assert [each.p_value for each in ranked[1:]] == pytest.approx(raw)
    assert [each.p_holm for each in ranked[1:]] == pytest.approx([max(raw[0], 2 * raw[1]), 2 * raw[1]])
    low, high = stats.binomtest(640, 1319).proportion_ci(method="wilson")
    assert ranked[0].interval == pytest.approx((low, high))


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    path = result(tmp_path, "lora/a", 640)
    path.write_text(path.read_text().replace(str(640 / 1319), "0.5"))
    with pytest.raises(GraftError, match="no share of 1,319 questions"):
        read_results([path])
    path.write_text('{"run_info": {}}')
    with pytest.raises(GraftError, match="not a result of PEFT's method_comparison: run_info.experiment_name"):
        read_results([path])


def test_three_runs_are_ranked_question_by_question(tmp_path: Path) -> None:
    from graft.study.report.sides import rank_sides

    right = {"a": [1, 1, 1, 1, 1, 1, 0, 0], "b": [1, 0, 0, 0, 0, 0, 0, 0], "c": [1, 1, 1, 0, 1, 1, 0, 0]}
    for name, answers in right.items():
        folder = tmp_path / name / "eval" / "quiz.abc"
        folder.mkdir(parents=True)
        lines = [
            {
                "contestant": name,
                "number": at,
                "row": at,
                "question": f"q{at}",
                "outcome": "correct" if each else "wrong",
            }
            for at, each in enumerate(answers, start=1)
        ]
        (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        scores = {"name": name, "total": 8, "accuracy": sum(answers) / 8, "adapter": {"kind": "lora"}}
        made = {
            "task": "quiz",
            "protocol": {"name": "datafile"},
            "protocol_hash": "abc",
            "base": {},
            "results": [scores],
        }
        (folder / "result.json").write_text(json.dumps(made))
    found = rank_sides([str(tmp_path / name) for name in right])
    ranking = found[0]["ranking"]
    assert [Path(each["name"]).name for each in ranking] == ["a", "c", "b"]
    # McNemar: a alone is right once (against c) and five times (against b).
    assert [each["p_value"] for each in ranking[1:]] == pytest.approx([1.0, 2 * 0.5**5])
