"""The code and the commands of docs/combining.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runs_at_hand import make_run, write_rows
from tests.walk import graft_command, yaml_block

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
    (tmp_path / "on-top.yaml").write_text(yaml_block(PAGE, "on-top.yaml"))
    write_rows(tmp_path / "data.jsonl")
    base = tmp_path / "runs" / "task-base"
    graft_command(
        f"graft train on-top.yaml base.model={base} base.device=cpu train.steps=2 train.batch_size=2 --out runs/top"
    )
    assert (tmp_path / "runs" / "top" / "adapters" / "stack" / "adapter_model.safetensors").is_file()
    for name in "ab":
        make_run(tmp_path / "runs" / name, {name: {"kind": "series", "bottleneck": 4, "sites": "mlp"}})
    (tmp_path / "fusion.yaml").write_text(yaml_block(PAGE, "fusion.yaml"))
    graft_command(
        f"graft train fusion.yaml base.model={base} base.device=cpu train.steps=2 train.batch_size=2 --out runs/f"
    )
    combining = [line for line in block.splitlines() if line.startswith("graft combine")]
    for line in combining:
        graft_command(line)
    assert len(combining) == 2 and (tmp_path / "both" / "adapter_model.safetensors").is_file()
