"""The benchmark of generation runs on small sizes: all ways are tuned, judged by BLEU, and go on where they were."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_all_ways_write_and_are_scored(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "e2e_generation.py"
    base, data = shared / "models" / "stories-260k", shared / "data" / "e2e_nlg"
    given = ["--tiny", "--data", data, "--base", base, "--work", tmp_path / "work", "--out", out]
    subprocess.run([sys.executable, script, *given], check=True, timeout=600)
    found = json.loads(out.read_text())
    assert set(found["ways"]) == {"lora", "adamix-100", "adamix-10", "adamix-1"} and found["model"] == "stories-260k"
    assert all(len(each["by_seed"]) == 2 and 0 <= each["bleu"] <= 100 for each in found["ways"].values())
    assert all(each["lr"] in map(float, each["tried"]) for each in found["ways"].values())
