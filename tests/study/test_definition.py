"""A study is checked before its first trial: every mistake is named, with its place and what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from graft.errors import GraftError
from graft.study.definition import presets, read_study
from graft.study.points import check, points_of


def study(run: dict[str, Any], **keys: Any) -> Any:
    return read_study({"run": run, **keys})


def test_points_are_every_variant_with_every_row_and_every_combination(run_of: dict[str, Any]) -> None:
    found = points_of(
        study(
            run_of,
            list=[{"adapter.rank": 2}, {"adapter.rank": 4}],
            zip={"train.lr": [1e-3, 1e-2], "train.warmup": [0, 1]},
            grid={"adapter.alpha": [2, 4, 8]},
        )
    )
    assert len(found) == 2 * 2 * 3
    assert found[0] == {"adapter.rank": 2, "train.lr": 1e-3, "train.warmup": 0, "adapter.alpha": 2}


def test_a_wrong_key_is_named_with_its_line_and_the_nearest_one(run_of: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    YAML().dump({"run": run_of, "grid": {"adapter.rnk": [2, 4]}}, path)
    line = next(at for at, text in enumerate(path.read_text().splitlines(), start=1) if "adapter.rnk" in text)
    with pytest.raises(GraftError, match=rf"study.yaml:{line}: .*rnk.*Did you mean 'rank'"):
        check(read_study(path))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"grid": {"train.lr": [1e-3]}, "seeds": [1, 2, 1]}, "1 stands there twice"),
        ({"grid": {"train.lr": [1e-3, 1e-2]}, "budget": 1}, "budget is 1, but grid, zip and list make 2 points"),
        ({"grid": {"train.lr": [1e-3]}, "objective": "tset_accuracy"}, "Did you mean 'test_accuracy'"),
        ({"grid": {"train.lr": [1e-3]}, "objective": "test_accuracy"}, "test is not set"),
        ({"grid": {"train.lr": [1e-3]}, "test": "nowhere.jsonl"}, "there is no file nowhere.jsonl, which test names"),
        ({"grid": {"train.lr": [1e-3]}, "objective": "validation_margin"}, "data.task is not preference"),
        ({"grid": {"train.seed": [1]}}, "seeds of a study stand under seeds"),
        ({"grid": {"train.lr": [1e-3]}, "tune": ["train.lrr"]}, "Did you mean 'train.lr'"),
        ({"grid": {"train.lr": [1e-3]}, "list": [{"train.lr": 1e-2}]}, "set twice"),
        ({"list": [{"train.lr": 1e-2}, {"train.lr": 1e-2}]}, "same point stands there twice"),
        ({"zip": {"train.lr": [1e-2], "adapter.rank": [1, 2]}}, "equally many values"),
        ({}, "needs grid, zip, list or search"),
        ({"search": {"space": {"train.lr": {"low": 1e-3, "high": 1e-4}}, "budget": 2}}, "low must be smaller than high"),
        ({"search": {"space": {"adapter.dropout": {"low": 0.0, "high": 1.5}}, "budget": 2}}, "adapter.dropout"),
        ({"search": {"space": {"adapter.rank": [0, 4]}, "budget": 2}}, "adapter.rank"),
        ({"search": {"space": {"adapter.alpha": {"values": [1], "times": "adapter.rnk"}}, "budget": 2}}, "times of"),
        ({"search": {"space": {"train.lr": [1e-3]}, "budget": 2, "start": [{"train.lr": 1.0}]}}, "not among"),
        ({"grid": {"train.lr": [1e-3]}, "pruner": {"kind": "halving"}}, "needs rungs"),
        ({"grid": {"train.lr": [1e-3]}, "pruner": {"kind": "median", "keep": 0.5}}, "no setting 'keep'"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_the_first_trial(run_of: dict[str, Any], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(GraftError, match=said):
        check(study(run_of, **keys))


def test_alpha_follows_the_rank_it_is_a_multiple_of(run_of: dict[str, Any]) -> None:
    from graft.study.samplers.space import Space

    space = {"adapter.rank": [2, 4], "adapter.alpha": {"values": [0.5, 2], "times": "adapter.rank"}}
    found = study(run_of, search={"space": space, "budget": 3})
    assert Space.of(found.config.search).settings({"adapter.rank": 1, "adapter.alpha": 1}) == {
        "adapter.rank": 4, "adapter.alpha": 8,
    }  # fmt: skip
    check(found)


def test_changes_belong_to_the_study_or_to_its_run(run_of: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    YAML().dump({"run": run_of, "grid": {"train.lr": [1e-3]}}, path)
    found = read_study(path, ["seeds=[3]", "grid.train.lr=[0.1, 0.2]", "train.steps=9"])
    assert found.config.seeds == [3]
    assert [each["train.lr"] for each in points_of(found)] == [0.1, 0.2]
    assert found.config_of({"train.lr": 0.1}, 3).train.steps == 9


def test_every_preset_is_valid(tmp_path: Path) -> None:
    from graft.study.problems import with_problems

    assert presets() == ["fair-kinds", "hpo-lora", "llm-adapters-hyperparameters", "llm-adapters-placement"]
    for name in presets():
        study = with_problems(
            read_study(f"studies/{name}.yaml", ["problems.train=8", "problems.test=4"]), tmp_path / name
        )
        check(study)
