"""The commands and the YAML of docs/reversible.md run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.walk import commands_of, graft_command, yaml_block

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "reversible.md").read_text(encoding="utf-8")
COMMANDS = commands_of(PAGE)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(furnished: Path) -> None:
    (furnished / "run.yaml").write_text(yaml_block(PAGE, "run.yaml"))
    assert len(COMMANDS) == 4
    for command in COMMANDS:
        graft_command(command)
    assert len((furnished / "answers.jsonl").read_text().splitlines()) == 3
