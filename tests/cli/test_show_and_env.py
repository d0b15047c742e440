"""graft show and graft env: what they print is what the files and the machine say."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.cli import main
from graft.config import load_run, schema
from graft.runs.folder import RunFolder
from graft.utils.files import new_dir


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "math").create()
    folder.write_config(load_run({"base": {"model": "some/base"}, "adapter": "lora", "data": {"train": "a"}}))
    folder.status({"state": "finished", "step": 2})
    folder.metrics.append({"step": 1, "loss": 2.5, "lr": 0.1})
    folder.metrics.append({"step": 2, "loss": 1.25})
    with new_dir(folder.adapter_dir("default")) as made:
        (made / "adapter_config.json").write_text("{}")
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code
    return capsys.readouterr().out


def parsed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(printed(capsys, *arguments, "--json"))


def test_runs_are_listed_with_state_and_loss(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    table = printed(capsys, "show", str(run.path.parent))
    assert all(word in table for word in (str(run.path), "finished", "some/base", "lora", "1.2500"))
    [listed] = parsed(capsys, "show", str(run.path.parent))
    assert listed["last_metrics"] == {"step": 2, "loss": 1.25, "lr": 0.1}


def test_runs_is_the_folder_that_is_listed_unasked(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parent.parent)
    assert [listed["run"] for listed in parsed(capsys, "show")] == ["runs/math"]


def test_one_run_is_shown_with_status_metrics_and_adapters(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    shown = parsed(capsys, "show", str(run.path))
    assert (shown["status"]["state"], shown["adapters"], shown["checkpoints"]) == ("finished", ["default"], [])
    text = printed(capsys, "show", str(run.path))
    assert all(word in text for word in ("default", "finished", "1.25", "some/base"))


def test_the_losses_of_a_run_are_drawn_and_written(
    run: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run.metrics.append({"step": 2, "job": "", "validation_loss": 1.5}, {"step": 3, "loss": float("nan")})
    text = printed(capsys, "show", str(run.path))
    top, *_, bottom = [line for line in text.splitlines() if " | " in line]
    assert top.split() == ["2.5", "|", "."] and bottom.split()[0] == "1.25"
    assert ". loss" in text and "o validation loss" in text
    pytest.importorskip("matplotlib", reason="matplotlib comes with graft-llm[report]")
    printed(capsys, "show", str(run.path), "--curve", str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "error"), [(["kinds", "--curve", "a.png"], "--curve is for"), (["kinds", "--csv", "a"], "--csv and")]
)
def test_a_file_of_what_is_not_there_is_an_error(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["show", *arguments])
    assert end.value.code == 2 and error in capsys.readouterr().err


def test_numbers_are_rounded_for_people_only(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run.metrics.append({"step": 3, "loss": 1.23456789, "lr": 0.00012345678})
    text = printed(capsys, "show", str(run.path))
    assert "1.235" in text and "0.0001235" in text and "1.23456789" not in text
    assert parsed(capsys, "show", str(run.path))["last_metrics"]["loss"] == 1.23456789


def test_results_of_every_kind_are_shown(run: RunFolder, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Protocols of labels and of pairs have no version."""
    kinds = {
        "classification": {"accuracy": 0.75, "interval": [0.5, 0.9]},
        "regression": {"pearson": 0.5, "pearson_interval": [-0.35, 0.25]},
        "preference": {"accuracy": 0.5, "interval": [0.25, 0.75]},
    }
    for name, scores in kinds.items():
        (run.path / "eval" / f"{name}.ab").mkdir(parents=True)
        result = {
            "task": name,
            "protocol": {"name": name},
            "protocol_hash": "ab",
            "results": [{"name": "base", "total": 4, **scores}],
        }
        (run.path / "eval" / f"{name}.ab" / "result.json").write_text(json.dumps(result))
    text = printed(
        capsys, "show", str(run.path), "--csv", str(tmp_path / "all.csv"), "--latex", str(tmp_path / "all.tex")
    )
    assert "75.0% (from 50.0% to 90.0%)" in text and "0.50 Pearson (from -0.35 to 0.25)" in text
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert lines[0] == "protocol,task,questions,candidate,score,value,low,high"
    assert sorted(lines[1:]) == [
        "classification ab,classification,4,base,accuracy,0.75,0.5,0.9",
        "preference ab,preference,4,base,accuracy,0.5,0.25,0.75",
        "regression ab,regression,4,base,Pearson,0.5,-0.35,0.25",
    ]
    assert r"75.0\% (from 50.0\% to 90.0\%) \\" in (tmp_path / "all.tex").read_text()


def test_an_empty_folder_has_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "show", str(tmp_path)) == f"No runs in {tmp_path}.\n"
    assert parsed(capsys, "show", str(tmp_path)) == []


def test_presets_kinds_and_schema_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    shown = parsed(capsys, "show", "presets")
    assert list(shown) == list(graft.presets()) and shown["llm-adapters/lora"][0]["rank"] == 32
    names = [line for line in printed(capsys, "show", "presets").splitlines() if not line.startswith(" ")]
    assert names == list(graft.presets())
    one = printed(capsys, "show", "papers/mam")
    assert [line.strip() for line in one.splitlines()[1:]] == [
        "kind prefix, tokens 30, projection 800",
        "kind parallel, bottleneck 512, scale 4.0, init mam, sites mlp",
    ]
    assert list(parsed(capsys, "show", "kinds")) == list(graft.kinds())
    assert "rank=8" in printed(capsys, "show", "kinds")
    assert parsed(capsys, "show", "schema") == json.loads(json.dumps(schema()))


def test_env_tells_versions_cores_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    facts = parsed(capsys, "env")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cores"]["all"] == os.cpu_count()
    assert facts["memory_bytes"]["all"] > 2**28
    assert len(facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert torch.cuda.is_available() or facts["kernels"].startswith("torch's own operations")
    source = "".join(path.read_text() for path in Path(graft.__file__).parent.rglob("*.py"))
    asked = set(re.findall(r'(?:require|MissingExtra)\(\s*"?[\w.]+"?, "(\w+)"\)', source))
    assert asked <= set(facts["extras"]) == {
        "quant", "gpu", "search", "eval", "report", "track", "vllm", "federated", "serve",
    }  # fmt: skip
    assert set(facts["extras"]["report"]) == {"matplotlib"}
    assert torch.__version__ in printed(capsys, "env")


def test_env_names_the_command_for_a_missing_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.cli.env.extras", lambda: {"track": {"wandb": None, "trackio": "1"}})
    assert "missing wandb: pip install 'graft-llm[track]'" in printed(capsys, "env")
