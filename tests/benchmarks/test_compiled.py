"""The benchmark of compiled training runs on a tiny base: equal curves, and the time of compiling apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_curves_are_equal_and_compiling_is_reported_apart(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "compiled.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=900)
    result = json.loads((tmp_path / "result.json").read_text())
    for way in ("padded", "flat"):
        found = result[f"against_{way}"]
        assert found["largest_relative_loss_difference"] < 1e-4 and found["speed_ratio"] > 0
        assert set(found["losses"]) == {"compiled", way} and len(found["losses"][way]) == 4
    first = result["seconds_to_the_end_of_the_first_step"]
    assert first["compiled"] > max(first["padded"], first["flat"]) > 0
