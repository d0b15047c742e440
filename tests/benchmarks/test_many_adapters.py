"""The benchmark of what one more job costs the host runs on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_number_of_jobs_has_its_cost(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "many_adapters.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["milliseconds"]) == {"2", "3"}
    assert {"step", "per_job", "attach"} <= set(result["milliseconds"]["3"])
