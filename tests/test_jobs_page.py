"""The commands and the YAMLs of docs/jobs.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graft.config import load_run
from graft.runs.folder import RunFolder
from tests.walk import commands_of, graft_command

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "jobs.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = commands_of(PAGE)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(furnished: Path) -> None:
    (furnished / "four.yaml").write_text(BLOCKS[0])
    (furnished / "late.yaml").write_text("adapter: {rank: 2}\n")
    assert len(COMMANDS) == 8
    for command in COMMANDS:
        if "cancel" not in command:
            graft_command(command)
    graft_command("graft resume runs/four")
    status = RunFolder("runs/four").read_status()
    assert {name: (job["ended"], job["step"]) for name, job in status["jobs"].items()} == {
        "small": ("finished", 8), "wide": ("finished", 8), "series": ("finished", 8), "prefix": ("finished", 8), "late": ("finished", 4),
    }  # fmt: skip
    assert status["jobs"]["late"]["priority"] == 5
    with pytest.raises(AssertionError, match="cancel"):  # it has ended already, which is an error of the user
        graft_command(next(command for command in COMMANDS if "cancel" in command))


def test_the_scheduler_block_of_the_page_is_valid(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(BLOCKS[0] + BLOCKS[1])
    scheduler = load_run(tmp_path / "run.yaml").scheduler
    assert (scheduler.resident, scheduler.together, scheduler.memory) == (4, 2, 20)
    assert scheduler.halving is not None and scheduler.halving.rungs == (100, 200)
