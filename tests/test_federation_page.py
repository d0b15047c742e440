"""The commands and the YAMLs of docs/federation.md run."""

from __future__ import annotations

import re
from pathlib import Path

from graft.federation.definition import read_federation
from graft.federation.folder import report_in
from tests.walk import commands_of, graft_command, yaml_block

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "federation.md").read_text(encoding="utf-8")


def test_the_page_runs_from_top_to_bottom(at_home: Path) -> None:
    code = re.search(r"```python\n# rows.py\n(.*?)```", PAGE, re.DOTALL)
    assert code is not None
    exec(code.group(1))  # noqa: S102
    given = yaml_block(PAGE, "federation.yaml")
    (at_home / "federation.yaml").write_text(
        given.replace("steps: 10, batch_size: 4", "steps: 1, batch_size: 1").replace("rounds: 3", "rounds: 1")
    )
    commands = commands_of(PAGE)
    assert len(commands) == 4
    for command in commands:
        graft_command(command)
    assert (at_home / "runs/fedavg/adapters/federated/adapter_model.safetensors").is_file()
    assert [report_in(at_home / f"runs/{name}")["done"] for name in ("federation", "fedavg")] == [1, 1]


def test_the_other_settings_of_the_page_are_valid(at_home: Path) -> None:
    whole = yaml_block(PAGE, "federation.yaml")
    blocks = re.findall(r"```yaml\n((?:clients).*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    for name, block in zip(("dealt", "unlike"), blocks, strict=True):
        kept = [line for line in whole.splitlines() if name == "dealt" or not line.startswith(("adapter", "method"))]
        (at_home / f"{name}.yaml").write_text("\n".join(kept) + "\n" + block)
        read_federation(at_home / f"{name}.yaml")
