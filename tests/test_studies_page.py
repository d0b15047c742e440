"""The commands and the YAMLs of docs/studies.md run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from graft.study.definition import read_study
from graft.study.points import check
from tests.walk import commands_of, graft_command

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "studies.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = commands_of(PAGE)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(furnished: Path) -> None:
    (furnished / "study.yaml").write_text(BLOCKS[0])
    assert len([command for command in COMMANDS if "stud" in command]) == 5
    for command in COMMANDS:
        graft_command(command)
    report = json.loads((furnished / "runs" / "size" / "report.json").read_text())
    assert report["counts"] == {"done": 8} and len(report["ranking"]) == 2


def test_the_search_of_the_page_is_valid(furnished: Path) -> None:
    run = BLOCKS[0].split("seeds:")[0]
    (furnished / "study.yaml").write_text(run + BLOCKS[1])
    study = read_study(furnished / "study.yaml")
    assert check(study) and study.config.search is not None and study.config.search.budget == 50
