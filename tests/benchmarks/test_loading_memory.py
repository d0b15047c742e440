"""The benchmark of loading runs on a base that is tiny, and its kept result holds what the page promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

WAYS = ("plain", "int8", "nf4", "saved_int8", "saved_nf4")
KEPT = json.loads((ROOT / "benchmarks" / "results" / "loading_memory.json").read_text())


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    script, out = ROOT / "benchmarks" / "loading_memory.py", tmp_path / "result.json"
    subprocess.run([sys.executable, str(script), "--tiny", "--out", str(out)], check=True, timeout=600)
    found = json.loads(out.read_text())
    ways = found["ways"]
    assert set(ways) == {f"{way}{more}" for way in WAYS for more in ("", "_in_parts")}
    assert found["shards"] > 1 and ways["nf4"]["model_bytes"] < ways["plain"]["model_bytes"]


@pytest.mark.parametrize("way", WAYS)
def test_a_process_held_no_more_than_its_part_and_one_shard(way: str) -> None:
    whole, part = KEPT["ways"][way], KEPT["ways"][f"{way}_in_parts"]
    assert part["model_bytes"] < 0.52 * whole["model_bytes"]
    assert part["peak_bytes"] <= part["model_bytes"] + KEPT["largest_shard"]
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert f"{part['peak_bytes'] / 1e6:.0f} MB" in page


@pytest.mark.parametrize("way", ["int8", "nf4"])
def test_loading_held_no_more_than_the_model_and_one_shard(way: str) -> None:
    found = KEPT["ways"][way]
    assert found["peak_bytes"] <= found["model_bytes"] + KEPT["largest_shard"] < KEPT["file_bytes"]
    page = (ROOT / "docs" / "quantised-bases.md").read_text()
    assert f"{found['peak_bytes'] / 1e6:.0f} MB" in page and f"{found['model_bytes'] / 1e6:.0f} MB" in page
