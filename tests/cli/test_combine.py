"""`graft combine`: adapters of runs become one folder, which other verbs read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.cli import main
from graft.config.base import BaseConfig
from graft.generation.loaded import load_candidates
from tests.contract.table import ids, logits
from tests.runs_at_hand import make_run

LORA = {"kind": "lora", "rank": 2, "sites": "attn.q mlp.up"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("combine")
    make_run(folder / "style", {"style": LORA})
    two = {"kind": "dora", "rank": 2, "sites": "mlp.up"}
    make_run(folder / "both", {"one": {**LORA, "rank": 3}, "two": two}, seed=2)
    make_run(folder / "other", {"other": LORA}, data={"template": "alpaca"})
    make_run(folder / "wide", {"wide": LORA}, hidden_size=64)
    return folder


@pytest.fixture
def combine(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Any:
        with pytest.raises(SystemExit) as end:
            main(["combine", *map(str, arguments)])
        out, error = capsys.readouterr()
        if end.value.code:
            assert end.value.code == 2
            return " ".join(error.split())
        return json.loads(out) if "--json" in arguments else " ".join(out.split())

    return run


def test_adapters_of_two_runs_become_one_folder(combine: Any, runs: Path, tmp_path: Path) -> None:
    one = runs / "both" / "adapters" / "one"
    said = combine(runs / "style", f"one={one}", "--weights", "0.5,2", "--to", tmp_path / "sum")
    assert "0.5 style + 2 one" in said and "a LoRA of rank 5 at 4 modules" in said
    assert "it is 0.00% away from the weighted sum" in said
    base = BaseConfig(model=str(runs / "style-base"), device="cpu")
    loaded = load_candidates(None, base, [str(runs / "style"), f"one={one}", f"sum={tmp_path / 'sum'}"])
    assert loaded.adapters[2].template == loaded.adapters[0].template
    model = loaded.base.model
    with graft.use(model, {"style": 0.5, "one": 2.0}):
        wanted = logits(model, ids())
    with graft.use(model, "sum"):
        torch.testing.assert_close(logits(model, ids()), wanted, atol=1e-4, rtol=1e-4)


def test_all_adapters_of_a_run_are_taken(combine: Any, runs: Path, tmp_path: Path) -> None:
    report = combine(runs / "both", "--how", "svd", "--rank", "2", "--json", "--to", tmp_path / "sum")
    assert report["weights"] == {"both-one": 1.0, "both-two": 1.0}
    assert report["on"] == "differences" and report["rank"] == 2 and 0 < report["error"] <= report["worst"]


def test_a_template_is_chosen_where_they_differ(combine: Any, runs: Path, tmp_path: Path) -> None:
    given = [runs / "style", runs / "other", "--to", tmp_path / "sum"]
    assert "style and other were trained with different templates" in combine(*given)
    combine(*given, "--template", "alpaca")
    base = BaseConfig(model=str(runs / "style-base"), device="cpu")
    found = load_candidates(None, base, [str(runs / "other"), str(tmp_path / "sum")]).adapters
    assert found[0].template == found[1].template


def test_an_adapter_without_a_template_is_asked_as_the_others(combine: Any, runs: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(runs / "style" / "adapters" / "style", bare)
    (bare / "template.json").unlink()
    combine(bare, runs / "other", "--to", tmp_path / "sum")
    base = BaseConfig(model=str(runs / "style-base"), device="cpu")
    found = load_candidates(None, base, [str(runs / "other"), str(tmp_path / "sum")]).adapters
    assert found[0].template == found[1].template


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["style"], "made of at least two adapters; given: "),
        (["style", "both"], "'both-two' is kind dora at model.layers.0.mlp.up_proj, and cat on factors is for LoRAs"),
        (
            ["style", "both", "--weights", "1,2"],
            "--weights needs one number for each of style, both-one, both-two; given: 1,2",
        ),
        (
            ["style", "both", "--weights", "1,x,2"],
            "--weights takes numbers with commas between them, as 0.5,1; given: '1,x,2'",
        ),
        (["style", "wide"], "hidden_size 64 there, 32 here"),
        (["style-base", "style-base"], "none of the adapters lies in a run folder"),
    ],
)
def test_what_cannot_be_combined_writes_nothing(
    combine: Any, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(runs)
    said = combine(*arguments, "--to", tmp_path / "sum")
    assert message in said
    assert not (tmp_path / "sum").exists()


def test_a_folder_that_is_not_empty_is_left_alone(combine: Any, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("kept")
    assert "is not an empty folder" in combine(runs / "both", "--to", tmp_path)
    assert (tmp_path / "own.txt").read_text() == "kept"
