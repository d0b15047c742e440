"""The benchmark of mixtures runs on a tiny base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_way_has_a_time(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "mixture_cost.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["step"]) == {"plain", "mixture", "adamix"}
    assert set(result["evaluated"]) == {"plain", "adamix", "collapsed"}
    assert result["parameters"]["collapsed"] == result["parameters"]["plain"] < result["parameters"]["adamix"]
