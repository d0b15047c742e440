"""The benchmarks of memory run on small sizes, and their committed results hold what the pages say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def tiny(script: str, out: Path) -> dict[str, Any]:
    """The result of a script on sizes that only prove that it runs."""
    path = ROOT / "benchmarks" / script
    subprocess.run([sys.executable, path, "--tiny", "--out", out], check=True, timeout=900)
    return json.loads(out.read_text()) if out.exists() else {}


@pytest.mark.slow
def test_every_method_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    found = tiny("methods_of_training.py", tmp_path / "result.json")["methods"]
    assert len(found) == 12
    # Algebra: full training in float32 has gradients as large as its weights, AdamW a state of twice that and Lion of once that.
    full, lion = found["full, AdamW"], found["full, Lion"]
    assert full["gradients"] == lion["gradients"] == 4 * full["trained"]
    assert full["optimiser"] >= 2 * full["gradients"] and lion["optimiser"] == lion["gradients"]
    assert found["LoRA, recomputed"]["activations"] < found["LoRA"]["activations"]
    assert found["MeZO on LoRA"]["activations"] < found["LoRA"]["activations"]
    for one in found.values():
        together = sum(one[part] for part in ("weights", "gradients", "optimiser", "activations", "moment"))
        assert one["weights"] + one["optimiser"] < one["peak"] <= together + 1


@pytest.mark.slow
def test_the_prediction_is_measured(tmp_path: Path) -> None:
    tiny("memory_prediction.py", tmp_path / "result.json")  # it keeps no result of this size
