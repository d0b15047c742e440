"""The benchmarks of studies run on small sizes: samplers on a surrogate, kills, and the price against PEFT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def ran(name: str, tmp_path: Path) -> dict[str, Any]:
    out = tmp_path / "result.json"
    subprocess.run([sys.executable, ROOT / "benchmarks" / name, "--tiny", "--out", out], check=True, timeout=900)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_samplers_are_measured_on_the_surrogate(tmp_path: Path) -> None:
    found = ran("study_samplers.py", tmp_path)
    assert set(found["samplers"]) == {"random", "optuna", "nomad"}
    assert all(each["mean"] >= found["optimum"] for each in found["samplers"].values())


@pytest.mark.slow
def test_kills_lose_nothing(tmp_path: Path) -> None:
    found = ran("study_kills.py", tmp_path)
    assert found["same_outcomes"] and found["same_ranking"] and sum(found["states"].values()) == found["trials"]
    assert found["states"]["failed"] == 2


@pytest.mark.slow
def test_a_study_finds_what_peft_finds(tmp_path: Path) -> None:
    found = ran("study_vs_peft.py", tmp_path)
    assert found["trials"] == 4 and set(found["winners"]) == set(found["time"]) and found["time"]["study"] > 0
