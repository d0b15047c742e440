"""The benchmark of attaching runs on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_operation_has_a_time(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "attaching.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["milliseconds"]) == {"1", "3"}
    assert {"attach", "detach", "set_trainable", "set_training", "evaluating"} <= set(result["milliseconds"]["3"])
