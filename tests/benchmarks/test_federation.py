"""The benchmark of federated methods runs on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_part_has_a_result(shared: Path, tmp_path: Path) -> None:
    script, out = ROOT / "benchmarks" / "federation.py", tmp_path / "result.json"
    subprocess.run([sys.executable, script, "--tiny", "--shared", shared, "--out", out], check=True, timeout=900)
    found = json.loads(out.read_text())
    assert len(found["methods on stories-260k"]["result"]["runs"]) == 7 and set(found["many"]["result"]["runs"]) == {
        "2",
        "3",
    }
    assert all(each["largest_error"]["one pass"] < 1 for each in found["rebuild"]["result"].values())
