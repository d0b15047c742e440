"""The benchmark of many small jobs runs on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_part_has_its_numbers(tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf", reason="the extra 'serve' is not installed")
    script = ROOT / "benchmarks" / "service_churn.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [each["jobs"] >= 8 * (at + 1) for at, each in enumerate(result["parts"])] == [True] * 3
    assert result["memory_last_to_second"] > 0 and result["p99_last_to_second"] > 0
