"""The benchmark of gates runs on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_kind_has_a_ratio(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gate_cost.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())["milliseconds"]
    assert all(each["step gated / plain"] > 0 for kinds in result.values() for each in kinds.values())
