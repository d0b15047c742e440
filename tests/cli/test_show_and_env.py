"""graft show and graft env: what they print is what the files and the machine say."""

from __future__ import annotations

import json
import os
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


def test_an_empty_folder_has_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "show", str(tmp_path)) == f"No runs in {tmp_path}.\n"
    assert parsed(capsys, "show", str(tmp_path)) == []


def test_presets_kinds_and_schema_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed(capsys, "show", "presets") == list(graft.presets())
    assert printed(capsys, "show", "presets").splitlines() == list(graft.presets())
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
    assert facts["extras"]["dev"]["pytest"] == pytest.__version__
    assert torch.cuda.is_available() or facts["kernels"].startswith("torch's own operations")
    assert set(facts["extras"]) == {
        "quant", "gpu", "search", "federated", "serve", "eval", "report", "track", "vllm", "dev", "docs",
    }  # fmt: skip
    assert torch.__version__ in printed(capsys, "env")


def test_env_names_the_command_for_a_missing_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graft.cli.env.extras", lambda: {"track": {"wandb": None, "trackio": "1"}})
    assert "missing wandb: pip install 'graft-llm[track]'" in printed(capsys, "env")
