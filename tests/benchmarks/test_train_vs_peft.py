"""The benchmark against PEFT runs, on a base that is tiny, in each of its variants, and finds loss curves equal where they can be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def measured(tmp_path: Path, *options: str) -> dict[str, Any]:
    line = [
        sys.executable,
        str(ROOT / "benchmarks" / "train_vs_peft.py"),
        "--tiny",
        "--out",
        str(tmp_path / "result.json"),
    ]
    subprocess.run([*line, *options], check=True, timeout=900)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["losses"]["graft"]) == len(result["losses"]["peft"]) == 4
    assert result["speed_ratio"] > 0 and 0 < result["peak_ratio"] < 10
    return result


@pytest.mark.slow
def test_curves_are_equal_and_ratios_are_written(tmp_path: Path) -> None:
    assert measured(tmp_path)["largest_relative_loss_difference"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["nf4", "fp4", "int8"])
def test_curves_on_a_base_in_few_bits_are_those_of_peft_bitsandbytes_and_the_trainer(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    assert measured(tmp_path, "--quantise", bits)["largest_relative_loss_difference"] < 1e-5


@pytest.mark.slow
def test_with_dropout_in_bfloat16_the_curves_differ_by_masks_and_rounding_alone(tmp_path: Path) -> None:
    result = measured(tmp_path, "--dropout", "0.05", "--dtype", "bfloat16")
    assert result["largest_relative_loss_difference"] < 5e-2
    assert (result["settings"]["dropout"], result["settings"]["dtype"]) == (0.05, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_rows_of_trl_are_other_rows(dtype: str, tmp_path: Path) -> None:
    result = measured(tmp_path, "--peer", "trl", "--dropout", "0.05", "--dtype", dtype)
    assert result["largest_relative_loss_difference"] is None and result["settings"]["peer"] == "trl"
