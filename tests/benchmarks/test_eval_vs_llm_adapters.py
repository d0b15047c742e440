"""The benchmark against evaluate.py runs, on a base that is tiny, and finds the answers equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.small import save_small


@pytest.mark.slow
def test_answers_are_equal_and_ratios_are_written(tmp_path: Path) -> None:
    rows = [{"instruction": f"What is {number} plus 2?", "answer": str(number + 2)} for number in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    save_small(tmp_path / "base", context=300)
    line = [sys.executable, str(ROOT / "benchmarks" / "eval_vs_llm_adapters.py"), "--data", str(tmp_path / "rows.json")]
    line += ["--base", str(tmp_path / "base"), "--prompts", "3", "--new-tokens", "5", "--threads", "1"]
    subprocess.run([*line, "--out", str(tmp_path / "result.json")], check=True, timeout=600)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["same_answers"] == result["prompts"] == 3
    ways = result["ways"]
    assert (
        ways["graft"]["tokens_through_the_base"]
        < ways["one at a time, no cache (evaluate.py)"]["tokens_through_the_base"]
    )
