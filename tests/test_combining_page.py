"""The code and the commands of docs/combining.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs_at_hand import make_run
from tests.walk import graft_command

PAGE = (ROOT / "docs" / "combining.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "combining.md", "exec"), {})  # noqa: S102


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for seed, name in enumerate(("style", "task")):
        make_run(tmp_path / "runs" / name, {name: {"kind": "lora", "rank": 4, "sites": "attn.q"}}, seed=seed)
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    combining = [line for line in block.splitlines() if line.startswith("graft combine")]
    for line in combining:
        graft_command(line)
    assert len(combining) == 2 and (tmp_path / "both" / "adapter_model.safetensors").is_file()
