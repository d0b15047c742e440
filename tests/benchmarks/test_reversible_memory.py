"""The benchmark of reversible bases runs on small sizes, and its committed result holds what the page says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

RESULT = ROOT / "benchmarks" / "results" / "reversible_memory.json"


@pytest.mark.slow
def test_every_method_is_measured(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "reversible_memory.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["by_layers"]) == ["2", "4"]
    four = result["by_layers"]["4"]
    assert {"full", "lora", "lora_recomputed", "meft1", "meft2", "meft3", "meft1_no_anchors"} <= set(four)
    # Algebra: both streams of float64 and the input of float32, [4, 8, 32], are kept; with an anchor before block 3, two more streams.
    streams, anchor, given = 2 * 4 * 8 * 32 * 8, 2 * 4 * 8 * 32 * 8, 4 * 8 * 32 * 4
    assert four["meft1"]["held"] - four["meft1_no_anchors"]["held"] == anchor
    assert streams + given <= four["meft1_no_anchors"]["held"] < streams + 8 * given


def test_at_24_blocks_a_step_takes_at_most_16_percent_of_the_activations() -> None:
    measured = json.loads(RESULT.read_text())["by_layers"]["24"]
    assert all(measured[name]["peak_of_full"] <= 0.16 for name in ("meft1", "meft2", "meft3"))
    page = (ROOT / "docs" / "reversible.md").read_text(encoding="utf-8")
    for name in ("meft1", "meft2", "meft3"):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |") and "MiB" in line)
        assert f"{measured[name]['peak'] / 2**20:.0f} MiB ({100 * measured[name]['peak_of_full']:.0f} %)" in row
