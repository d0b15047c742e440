"""Kinds on few rows, on a tiny encoder: every kind has a line for each K, and rows to tune with are no rows to judge by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.task_bases import labelled_rows, save_task_base


@pytest.mark.slow
def test_kinds_are_tuned_on_other_rows_and_judged_for_each_k(tmp_path: Path) -> None:
    base = save_task_base(tmp_path / "bert", "bert")
    rows = [f"{number} {row['text']}\t{int(row['label'] == 'pos')}\n" for number, row in enumerate(labelled_rows(40))]
    (tmp_path / "SST-2").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "SST-2" / name).write_text("sentence\tlabel\n" + "".join(rows))
    script, out, work = ROOT / "benchmarks" / "encoder_few_rows.py", tmp_path / "result.json", tmp_path / "work"
    given = f"--tiny --data {tmp_path} --base {base} --kinds lora series adamix --work {work} --out {out}"
    subprocess.run([sys.executable, script, *given.split()], check=True, timeout=600)
    found = json.loads(out.read_text())
    assert list(found["rows"]) == ["8", "12"] and len(found["tried"]) == 3
    for lines in found["rows"].values():
        assert set(lines) == {"lora", "series", "adamix"} and all(len(line["by_seed"]) == 2 for line in lines.values())
    parts = {name: set((work / f"{name}.tsv").read_text().splitlines()[1:])
             for name in ("validation", "tuned-train", "judged-8-train", "judged-12-train")}  # fmt: skip
    assert [len(each) for each in parts.values()] == [8, 8, 8, 12]
    assert not parts["tuned-train"] & (parts["judged-12-train"] | parts["validation"])
    assert not parts["validation"] & parts["judged-12-train"] and parts["judged-8-train"] < parts["judged-12-train"]
    shown = subprocess.run([sys.executable, script, "--table", out, out], check=True, capture_output=True, text=True)
    assert shown.stdout.count("SST-2, K = 12") == 2
