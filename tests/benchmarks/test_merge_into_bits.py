"""The benchmark of merging into few bits runs on small sizes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_kind_has_its_share() -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes (pip install 'graft-llm[quant]')")
    script = ROOT / "benchmarks" / "merge_into_bits.py"
    done = subprocess.run([sys.executable, script, "--tiny"], check=True, timeout=600, capture_output=True, text=True)
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["int8", "lora"], ["int8", "ia3"]]
