"""The commands, the YAML and the Python of docs/gates.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.walk import commands_of, graft_command, yaml_block

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "gates.md").read_text(encoding="utf-8")
COMMANDS = commands_of(PAGE)


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(furnished: Path) -> None:
    (furnished / "run.yaml").write_text(yaml_block(PAGE, "run.yaml"))
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        graft_command(command)
    assert len((furnished / "answers.jsonl").read_text().splitlines()) == 3


def test_the_python_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert "torch.Size([2, 2])" in capsys.readouterr().out
