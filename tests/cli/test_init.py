"""graft init: the file it writes is a run, explains every setting, and never replaces another."""

from __future__ import annotations

from pathlib import Path

import pytest

import graft
from graft.cli import main
from graft.cli.init import run_yaml
from graft.config import RunConfig, load_run


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


@pytest.mark.parametrize("kind", [*sorted(set(graft.kinds()) - {"stack"}), *graft.presets()])
def test_the_file_is_the_run_that_was_asked_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.yaml"
    assert call("init", str(path), "--base", "some/base", "--data", "a: b.json", "--kind", kind) == 0
    asked = {"base": {"model": "some/base"}, "adapter": kind, "data": {"train": "a: b.json"}}
    assert load_run(path) == load_run(asked)


def test_the_comments_name_every_setting_at_a_value_that_is_valid() -> None:
    text = run_yaml("m", "a.json", "lora")
    lines = [line.replace("  # ", "  ", 1) if line.startswith("  # ") else line for line in text.splitlines()]
    uncommented = "\n".join(lines) + "\n"
    for section, field in RunConfig.model_fields.items():
        for name in getattr(field.annotation, "model_fields", {}):
            assert f"\n  {name}: " in uncommented, f"{section}.{name}"


def test_a_file_that_exists_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert call("init", str(path), "--data", "a.json") == 2
    assert path.read_text() == "mine" and "exists already" in capsys.readouterr().err


def test_an_unknown_kind_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("init", str(tmp_path / "run.yaml"), "--data", "a.json", "--kind", "llm-adapters/sries") == 2
    assert "Did you mean 'llm-adapters/series'?" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
