"""The commands and the YAMLs of docs/composition.md run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.walk import furnish, graft_command, yaml_block

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "composition.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (graft .+)$", PAGE, re.MULTILINE)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    furnish(tmp_path)
    for name in re.findall(r"^# (\S+\.yaml)$", PAGE, re.MULTILINE):
        (tmp_path / name).write_text(yaml_block(PAGE, name))
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        graft_command(command)
    (saved,) = (tmp_path / "runs" / "adamix" / "adapters").glob("*/adapter_config.json")
    assert json.loads(saved.read_text())["adapter"]["kind"] == "series"
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
