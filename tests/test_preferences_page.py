"""The commands and the YAMLs of docs/preferences.md run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from graft.runs.folder import RunFolder
from tests.small import save_small
from tests.walk import graft_command, yaml_block

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")


@pytest.fixture
def here(at_home: Path) -> Path:
    """A folder with the data that the page uses, with a small base in place of the one it names."""
    pairs = [{"prompt": f"say {n}", "chosen": f"it is {n}", "rejected": f"no {n}"} for n in range(20)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_small(at_home / "base")
    return at_home


@pytest.mark.slow
def test_the_commands_of_the_example_run(here: Path) -> None:
    found = re.search(r"```sh\n(graft check.*?)```", PAGE, re.DOTALL)
    assert found is not None
    Path("examples").symlink_to(ROOT / "examples")
    few = "train.steps=2 train.batch_size=4 data.validation=6"
    for command in found.group(1).splitlines():
        graft_command(command if command.startswith("graft eval") else f"{command} {few}")
    result = json.loads(next(Path("runs/preferences/eval").glob("*/result.json")).read_text())
    assert [each["total"] for each in result["results"]] == [6, 6] and "gained" in result["results"][1]
    (line,) = re.findall(r"`(graft init new[^`]+)`", PAGE)
    graft_command(line)
    assert re.search(r"\n  objective: \{.*kind: dpo", Path("new.yaml").read_text())
    graft_command(
        "graft train new.yaml base.model=base base.device=cpu data.template=plain train.steps=1 --out runs/new"
    )


def test_the_yamls_of_the_page_train(here: Path) -> None:
    own = "base.model=base base.dtype=float32 train.steps=2 train.batch_size=4"
    for name in ("preferences", "jobs"):
        Path(f"{name}.yaml").write_text(yaml_block(PAGE, f"{name}.yaml"))
        graft_command(f"graft train {name}.yaml {own} --out runs/{name}")
    jobs = {line["job"] for line in RunFolder("runs/jobs").metrics.read()}
    assert jobs == {"dpo", "simpo", "sft"}
