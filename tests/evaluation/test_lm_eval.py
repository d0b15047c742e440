"""Grafted models under lm-eval's own command line, started through our module: where the start-up line is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs_at_hand import make_run

pytest.importorskip("lm_eval", reason="lm-eval comes with graft-llm[eval]")
pytestmark = pytest.mark.slow
ROWS = [{"instruction": f"What is {n} plus 2?", "input": "", "output": "", "answer": str(n + 2.0)} for n in range(3)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapters = {"lora": {"kind": "lora", "rank": 2, "sites": "attn.q mlp.down"}}
    return make_run(tmp_path_factory.mktemp("runs") / "math", adapters, context=640)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    (folder / "SVAMP").mkdir()
    (folder / "SVAMP" / "test.json").write_text(json.dumps(ROWS))
    return folder


def test_lm_evals_own_command_knows_the_model_graft(run: Path, data: Path, tmp_path: Path) -> None:
    base = run.parent / "math-base"
    line: list[Any] = [
        sys.executable,
        "-m",
        "graft.evaluation.lm_eval",
        "run",
        "--model",
        "graft",
        "--model_args",
    ]
    line += [
        f"base={base},adapter={run / 'adapters' / 'lora'}",
        "--device",
        "cpu",
        "--tasks",
        "graft_svamp",
        "--limit",
        "2",
    ]
    line += ["--metadata", json.dumps({"data": str(data)}), "--output_path", tmp_path]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(list(map(str, line)), capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert "graft_svamp" in answer.stdout
