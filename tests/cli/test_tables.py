"""Tables on a narrow terminal, and the wording of numbers."""

from __future__ import annotations

import re
import sys

import pytest

from graft.cli import common
from graft.cli.wording import between, counted, rounded

COLUMNS = ["", "correct", "accuracy", "95 % interval", "F1", "loss", "margin"]
ROWS = [
    [name, "75/100", "7.5%", "from 1.0% to 13.5%", "0.1234 (from -0.35 to 0.25)", "50.1234", "-50.4321"]
    for name in ("base", "a-long-name-of-an-adapter")
]


@pytest.mark.parametrize("width", [200, 80, 60, 40])
def test_no_digit_is_lost_at_any_width(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    common.print_table(COLUMNS, ROWS, title="protocol")
    text = capsys.readouterr().out
    assert "..." not in text and "\u2026" not in text
    for cell in ("base", "a-long-name-of-an-adapter", "75/100", "7.5%", "13.5%", "50.1234", "-50.4321", "0.1234"):
        assert cell in text
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= max(width, 60)


def test_a_pipe_gets_one_line_per_row(capsys: pytest.CaptureFixture[str]) -> None:
    common.print_table(["name", "text"], [["a", "word " * 200]])
    assert len([line for line in capsys.readouterr().out.splitlines() if "word" in line]) == 1


def test_numbers_are_worded_for_people() -> None:
    assert [counted(number, "answer") for number in (0, 1, 1200)] == ["0 answers", "1 answer", "1,200 answers"]
    assert counted(2, "query", "queries") == "2 queries"
    assert [rounded(value) for value in (0.00012345678, 1.0, 3, "a")] == ["0.0001235", "1", 3, "a"]
    assert between((-0.35, 0.25), "{:.2f}") == "from -0.35 to 0.25" and between(None, "{}") is None
