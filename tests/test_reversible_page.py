"""The commands and the YAML of docs/reversible.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.walk import furnish, graft_command, yaml_block

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "reversible.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (graft .+)$", PAGE, re.MULTILINE)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    furnish(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml_block(PAGE, "run.yaml"))
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        graft_command(command)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3
