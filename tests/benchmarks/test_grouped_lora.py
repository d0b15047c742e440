"""The benchmark of many low-rank terms at one module runs on small sizes, and its ways compute the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_way_has_a_time_and_gives_the_loop_s_numbers(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "grouped_lora.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["milliseconds"]) == set(result["operators"]) == {"loop", "grouped", "batched", "layer"}
    assert set(result["over_loop"]) == {"grouped", "batched"}
    assert all(apart < 1e-5 for apart in result["largest_relative_difference_to_loop"].values())
