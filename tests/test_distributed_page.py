"""The commands of docs/distributed.md run, and give the losses of one process."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from graft.config import load_run
from tests.walk import yaml_block

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in PAGE.splitlines() if line.startswith(("    graft ", "    torchrun "))]


def test_settings_between_the_lines_are_taken() -> None:
    (setting,) = re.findall(r"`(distributed: \{[^`]*\})`", PAGE)
    reader = YAML(typ="safe")
    config = load_run({**reader.load(yaml_block(PAGE, "four.yaml")), **reader.load(setting)})
    assert (config.distributed.mode, config.distributed.stages) == ("pipeline", (4, 4))


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(furnished: Path) -> None:
    (furnished / "four.yaml").write_text(yaml_block(PAGE, "four.yaml"))
    assert len(COMMANDS) == 7
    for command in COMMANDS:
        graft, torchrun = (
            [sys.executable, "-m", "graft"],
            [sys.executable, "-m", "torch.distributed.run", "--standalone"],
        )
        words = shlex.split(command)
        started = [*(torchrun if words[0] == "torchrun" else graft), *words[1:]]
        done = subprocess.run(
            started, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (command, done.stderr)
    losses = {}
    for run in ("four", "ddp", "torchrun"):
        lines = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
        losses[run] = [line["loss"] for line in lines if "loss" in line and line["step"] <= 8]
    assert losses["four"] == pytest.approx(losses["ddp"], rel=1e-5) and losses["torchrun"] == pytest.approx(
        losses["ddp"], rel=1e-5
    )
