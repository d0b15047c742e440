"""The benchmark for a GPU proves with a tiny base that it runs, and refuses to measure on anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

SCRIPT = str(ROOT / "benchmarks" / "gpu_vs_peft.py")


@pytest.mark.slow
@pytest.mark.parametrize("lengths", ["768", "alpaca"])
def test_curves_are_equal_and_ratios_are_written(lengths: str, tmp_path: Path) -> None:
    line = [sys.executable, SCRIPT, "--tiny", "--lengths", lengths, "--out", str(tmp_path / "result.json")]
    subprocess.run(line, check=True, timeout=900)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["largest_relative_loss_difference"] < 1e-2 and result["speed_ratio"] > 0
    assert result["trained"] == 2 * 2 * 32 * (32 + 32)  # layers, sites, rank, input and output
    assert result["layout_of_graft"] == "flat" and set(result["time_of_graft"]) >= {"step", "batches", "between"}
    assert torch.cuda.is_available() or result["kernels_of_graft"] == "torch"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    answer = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300)
    assert answer.returncode == 1 and "measures on a GPU" in answer.stderr and "--tiny" in answer.stderr
