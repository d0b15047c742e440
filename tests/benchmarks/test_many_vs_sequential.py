"""The benchmark of eight jobs runs on a tiny base: every way gives the same loss curves, and all that is asked for is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "jobs", "bound"), [("", 8, 1e-5), ("--quantise nf4", 7, 1e-5), ("--dtype bfloat16", 8, 1e-3)]
)
def test_curves_of_all_ways_are_equal_and_all_is_written(tmp_path: Path, options: str, jobs: int, bound: float) -> None:
    if "nf4" in options:
        pytest.importorskip("bitsandbytes")
    script, out = ROOT / "benchmarks" / "many_vs_sequential.py", tmp_path / "result.json"
    subprocess.run([sys.executable, script, "--tiny", *options.split(), "--out", out], check=True, timeout=900)
    result = json.loads(out.read_text())
    assert len(result["losses"]["together"]) == len(result["losses"]["one by one"]) == jobs
    of_peft = result["losses"]["PEFT"].values()
    assert len(of_peft) == jobs - 2 and all(len(curve) == 4 for curve in of_peft)
    assert max(result["largest_relative_loss_difference"].values()) < bound
    assert all(result[ratio]["speed"] > 0 for ratio in ("over_one_by_one", "over_peft", "one_by_one_over_peft"))
    assert result["profile"]["operators"] and set(result["peak_mib"]) == set(result["tokens_per_second"])
