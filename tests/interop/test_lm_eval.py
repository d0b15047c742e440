"""Grafted models under lm-eval: the registered model, the shipped tasks, the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graft.cli import build
from graft.evaluation import protocols, tasks
from graft.evaluation.benchmark import evaluate_task
from graft.evaluation.contestants import assemble
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


def test_the_harness_asks_base_and_adapter_what_the_protocol_asks(run: Path, data: Path, tmp_path: Path) -> None:
    line = ["eval", run, "--harness", "graft_svamp", "--data", data, "--out", tmp_path, "--json"]
    found = json.loads(CliRunner().invoke(build(), list(map(str, line)), catch_exceptions=False).stdout)
    assert set(found) == {"base", "lora"}
    task = tasks.get("SVAMP")
    protocol = protocols.get("llm-adapters", task)
    own = evaluate_task(assemble(run), task, protocol, task.load(data))["results"]
    for each in own:
        assert found[each["name"]]["graft_svamp"]["acc,none"] == pytest.approx(each["accuracy"])
        unextractable = found[each["name"]]["graft_svamp"]["unextractable,none"]
        assert unextractable == pytest.approx(each["unextractable"] / each["total"])


def test_lm_evals_own_command_knows_the_model_graft(run: Path, data: Path, tmp_path: Path) -> None:
    base = run.parent / "math-base"
    line: list[Any] = [sys.executable, "-m", "graft.interop.lm_eval", "run", "--model", "graft", "--model_args"]
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
