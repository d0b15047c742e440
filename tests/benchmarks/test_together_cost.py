"""The benchmark of several adapters on one row runs on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_pair_has_ratios(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "together_cost.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())["milliseconds"]
    assert all(each["step two / one"] > 0 and each["forward apart / one"] > 0 for each in result.values())
