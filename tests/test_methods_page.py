"""The commands and the YAMLs of docs/methods-of-training.md run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from graft.runs.folder import RunFolder
from tests.small import save_small
from tests.walk import graft_command, yaml_block

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "methods-of-training.md").read_text(encoding="utf-8")
OWN = "base.model=base base.dtype=float32 train.steps=2 train.batch_size=4"


@pytest.fixture
def here(at_home: Path) -> Path:
    """A folder with data, and a small base in place of the one that the page names."""
    rows = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(20)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_small(at_home / "base")
    return at_home


def test_a_file_to_start_from_trains_with_its_method(here: Path) -> None:
    (line,) = re.findall(r"`(graft init new[^`]+)`", PAGE)
    graft_command(line)
    written = Path("new.yaml").read_text()
    assert re.search(r"\n  method: \{kind: full,", written) and "\nadapter:" not in written
    graft_command("graft train new.yaml base.device=cpu train.steps=1 --out runs/new")
    graft_command("graft init plain.yaml --data data.jsonl")
    assert "\n  # method: adapter\n" in Path("plain.yaml").read_text()


@pytest.mark.parametrize("name", re.findall(r"^# (\w+)\.yaml$", PAGE, re.MULTILINE))
def test_the_commands_of_a_method_run(name: str, here: Path) -> None:
    Path(f"{name}.yaml").write_text(yaml_block(PAGE, f"{name}.yaml"))
    (block,) = (each for each in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if f"{name}.yaml" in each)
    for command in block.splitlines():
        graft_command(f"{command} {OWN}" if f"{name}.yaml" in command else command)
    assert len(list(RunFolder(f"runs/{name}").metrics.read())) >= 2
