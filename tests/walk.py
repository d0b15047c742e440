"""Make a folder with the files that the README, the pages and the examples use, small enough to train on in seconds."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from graft.cli import main
from graft.quickstart.problems import generate

QUICK = (
    "base.model=seedling",
    "base.dtype=float32",
    "train.steps=2",
    "train.epochs=1",
    "train.batch_size=4",
    "train.warmup=0",
)


def furnish(folder: Path) -> None:
    """Write training data, a test file and prompts."""
    rows = [{**row, "input": ""} for row in generate("train", 24)]
    (folder / "math_10k.json").write_text(json.dumps(rows))
    tested = generate("heldout", 3)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tested))
    (folder / "prompts.txt").write_text("\n".join(row["instruction"] for row in tested) + "\n")


def graft_command(line: str) -> None:
    """Run a command line as the shell would, and require exit code 0."""
    words = shlex.split(line)
    assert words[0] == "graft"
    with pytest.raises(SystemExit) as ended:
        main(words[1:])
    assert ended.value.code in (0, None), line


def yaml_block(page: str, name: str) -> str:
    """Return the YAML block of a page that has this name in its first line."""
    found = re.search(rf"```yaml\n# {name}\n(.*?)```", page, re.DOTALL)
    assert found is not None
    return found.group(1)


def commands_of(page: str) -> list[str]:
    """Return the commands of a page, which stand in indented blocks."""
    return re.findall(r"^    (graft .+)$", page, re.MULTILINE)
