"""The commands and the YAMLs of docs/composition.md run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.walk import commands_of, graft_command, yaml_block

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "composition.md").read_text(encoding="utf-8")
COMMANDS = commands_of(PAGE)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(furnished: Path) -> None:
    for name in re.findall(r"^# (\S+\.yaml)$", PAGE, re.MULTILINE):
        (furnished / name).write_text(yaml_block(PAGE, name))
    assert len(COMMANDS) >= 5
    for command in COMMANDS:
        graft_command(command)
    (saved,) = (furnished / "runs" / "adamix" / "adapters").glob("*/adapter_config.json")
    assert json.loads(saved.read_text())["adapter"]["kind"] == "series"
    assert len((furnished / "answers.jsonl").read_text().splitlines()) == 3
