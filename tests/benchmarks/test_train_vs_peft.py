"""The benchmark against PEFT runs, on a base that is tiny, and finds the loss curves equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.small import small_tokenizer


@pytest.mark.slow
def test_curves_are_equal_and_ratios_are_written(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {number}", "input": "", "output": "so " * (1 + number % 9)} for number in range(64)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    line = [sys.executable, str(ROOT / "benchmarks" / "train_vs_peft.py"), "--data", str(tmp_path / "rows.json")]
    line += [
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--steps",
        "4",
        "--repeats",
        "1",
        "--batch",
        "8",
        "--shape",
        "32,2,48,4",
    ]
    subprocess.run(
        [*line, "--micro", "4", "--threads", "1", "--out", str(tmp_path / "result.json")], check=True, timeout=600
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["largest_relative_loss_difference"] < 1e-5 and len(result["losses"]["graft"]) == 4
    assert result["speed_ratio"] > 0 and 0 < result["peak_ratio"] < 10
