"""Every setting that a study is given arrives in its runs, and shows in their names; what cannot arrive is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from graft.errors import GraftError
from graft.study.definition import read_study
from graft.study.points import check, in_words, points_of

LORA = {"kind": "lora", "rank": 4, "sites": "attn.q"}
BY_NAME = [{"adapter": "lora"}, {"adapter": {"kind": "lora"}}]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"list": [{"adapter": LORA}], "grid": {"adapter.kind": ["dora", "series"]}}, "set by list and adapter.kind is set by grid"),
        ({"list": [{"adapter": LORA}], "grid": {"adapter.rank": [2], "adapter.kind": ["foo"]}}, "by list and adapter.kind is"),
        ({"list": [{"adapter": LORA, "adapter.preset": "qkv"}]}, "adapter.preset is set by list"),
        ({"zip": {"adapter.kind": ["lora"], "adapter.preset": ["qkv"]}}, "adapter.preset is set by zip"),
        ({"search": {"space": {"adapter": [LORA], "adapter.kind": ["dora"]}, "budget": 1}}, "is set by search.space"),
        ({"list": BY_NAME}, "two points are the same run"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_an_error(run_of: dict[str, Any], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(GraftError, match=said):
        check(read_study({"run": run_of, **keys}))


def test_a_key_inside_a_listed_mapping_arrives_and_the_name_shows_it(run_of: dict[str, Any]) -> None:
    study = read_study(
        {
            "run": run_of,
            "list": [{"adapter": LORA}, {"adapter": "dora"}],
            "grid": {"adapter.rank": [1, 2], "train.lr": [0.5]},
        }
    )
    points = points_of(study)
    assert [each.adapter.rank for each in check(study)] == [1, 2, 1, 2]
    assert [in_words(each) for each in points] == [
        "lora rank 1 sites attn.q, lr 0.5", "lora rank 2 sites attn.q, lr 0.5", "dora rank 1, lr 0.5", "dora rank 2, lr 0.5",
    ]  # fmt: skip
    assert points[0]["adapter"] == LORA, "naming a point leaves it as it is"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=[0]", r"'seed=\[0\]': unknown key 'seed'. Did you mean 'seeds'\? Keys of a study: run, seeds, grid, zip, search"),
        ("bogus=1", "unknown key 'bogus'. Keys of a study: .*together, memory, list; keys of its run: base, adapter"),
        ("lr=1", "Did you mean 'train.lr'"),
        ("adapter.rank=8", "adapter.rank would have no effect, because list sets adapter for every trial"),
        ("train.seed=3", "train.seed would have no effect, because seeds sets it"),
        ("grid.train.lr=[-1]", r"^'grid\.train\.lr=\[-1\]': train\.lr "),
        ("grid={train.lr: [-1]}", r"^'grid=\{train\.lr: \[-1\]\}': train\.lr "),
        ("train.steps=-1", r"^'train\.steps=-1': train\.steps "),
    ],
)  # fmt: skip
def test_wrong_changes_are_named_once_with_what_is_allowed(run_of: dict[str, Any], change: str, said: str) -> None:
    with pytest.raises(GraftError, match=said):
        check(read_study({"run": run_of, "list": [{"adapter": LORA}], "grid": {"train.lr": [1.0]}}, [change]))


def test_the_command_to_go_on_with_is_whole_and_the_report_says_what_is_missing(
    run_of: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shlex

    from graft.cli import build
    from graft.study import loop
    from graft.study.folder import begin
    from graft.study.report.writing import write_reports
    from graft.study.running import Stopped

    path, out = tmp_path / "a study.yaml", tmp_path / "out"
    YAML().dump({"run": run_of, "grid": {"train.lr": [1e-3, 1e-2]}, "tune": ["train.lr"]}, path)

    def stop(*given: Any) -> None:
        raise Stopped

    changes = ["together=1", "train.steps=2", "seeds=[3]"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "run_pack", stop)
        found = CliRunner().invoke(build(), ["study", str(path), *changes, "--out", str(out)])
    again = shlex.split(found.output.rsplit("Go on with: ", 1)[1])
    assert again == ["graft", "study", str(path), *changes, "--out", str(out), "--resume"]
    runner = begin(path, changes, out, resume=True, say=lambda text: None)
    runner.run(most=1)
    notes = write_reports(runner.study, runner.store, out)["notes"]
    assert notes[0] == "1 of 2 trials are done."
    assert notes[1].startswith("Tuning is not complete: 1 trial still to run")
    runner.run()
    assert not any("not complete" in note for note in write_reports(runner.study, runner.store, out)["notes"])
