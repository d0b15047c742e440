"""The benchmarks of several processes run on small sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_mode_has_a_speed_and_gives_the_same_loss(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "world.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=900)
    ways = json.loads((tmp_path / "result.json").read_text())["ways"]
    assert set(ways) == {"one", "ddp", "spread", "fsdp2"}
    for way in ways.values():
        assert way["tokens_per_second"][0] > 0
        assert way["last_loss"] == pytest.approx(ways["one"]["last_loss"], rel=1e-5)
    assert (
        ways["one"]["sent_bytes_per_step"]
        == 0
        < ways["spread"]["sent_bytes_per_step"]
        < ways["ddp"]["sent_bytes_per_step"]
    )


@pytest.mark.slow
def test_a_killed_process_costs_nothing(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "kills.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=900)
    assert json.loads((tmp_path / "result.json").read_text())["equal"] == 1


@pytest.mark.slow
def test_jobs_in_one_step_and_one_after_the_other_give_the_same_loss_in_a_pipeline(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "pipeline_bubble.py"
    subprocess.run([sys.executable, script, "--tiny", "--out", tmp_path / "result.json"], check=True, timeout=900)
    runs = json.loads((tmp_path / "result.json").read_text())["runs"]
    assert [(each["jobs"], each["way"]) for each in runs] == [
        (1, "joint"), (2, "joint"), (2, "flush"), (4, "joint"), (4, "flush"),
    ]  # fmt: skip
    for each in runs:
        assert each["last_loss"] == pytest.approx(runs[0]["last_loss"], rel=1e-6)
        assert all(0 < share < 1 for share in each["waited"][0])
        together = each["jobs"] if each["way"] == "joint" else 1
        assert each["micro_batches"] == together * runs[0]["micro_batches"]


def test_the_page_has_what_is_predicted() -> None:
    said = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "many_gpus.py"], check=True, capture_output=True, text=True
    ).stdout
    assert said in (ROOT / "docs" / "distributed.md").read_text()
