"""The benchmark of the server runs on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_both_tools_answer_every_stream(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
    script = ROOT / "benchmarks" / "serving.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["graft_to_peft"]) == {"1", "2"}
    for tool in ("graft", "peft"):
        for found in result["runs"][tool][0].values():
            assert 0 < found["first_token"] <= found["p50"] <= found["p99"] and found["tokens_per_second"] > 0
