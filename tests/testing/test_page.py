"""docs/adding-a-kind.md: its file keeps every promise, and its commands and tests run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graft
from graft.adapters.kinds.miss import MiSS
from graft.attaching.saving import load_training_state, training_state
from graft.testing import CHECKS, run_contract
from graft.testing.bases import ids, logits, tiny_base
from graft.testing.case import Case
from graft.testing.kind_files import configs_in
from tests.testing.conftest import SLOW
from tests.walk import graft_command

PAGE = (Path(__file__).resolve().parents[2] / "docs/adding-a-kind.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two files of the page."""
    kind, test = blocks("python")
    (tmp_path / "my_kind.py").write_text(kind)
    (tmp_path / "test_my_kind.py").write_text(test)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_keeps_every_promise(folder: Path) -> None:
    report = run_contract(configs_in(folder / "my_kind.py"), ["llama"], checks=set(CHECKS) - SLOW)
    assert report.ok, str(report)
    dropout = [row.outcome for row in report.rows if row.check == "dropout_follows_the_row_seed"]
    assert dropout == ["does not apply", "passed"]


def test_the_file_computes_what_miss_computes(folder: Path) -> None:
    mine = next(iter(configs_in(folder / "my_kind.py")))
    model = Case("llama", "mine", mine).attached()
    other = tiny_base("llama")
    graft.attach(other, {"a": MiSS(rank=16)})
    load_training_state(other, "a", training_state(model, "a"))
    torch.testing.assert_close(logits(model, ids()), logits(other, ids()))


@pytest.mark.usefixtures("folder", "quick")
def test_the_commands_run() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert commands == ["graft kinds my_kind.py --contract", "graft kinds ia3 --contract"]
    for command in commands:
        graft_command(command)


@pytest.mark.slow
def test_the_tests_of_the_page_run_under_pytest(folder: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "bert and (identity or mode)"]
    answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert "4 passed" in answer.stdout, answer.stdout + answer.stderr


@pytest.mark.slow
def test_the_file_keeps_every_promise_on_every_family(folder: Path) -> None:
    report = run_contract(configs_in(folder / "my_kind.py"))
    assert report.ok, str(report)
