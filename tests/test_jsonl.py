"""Lines that survive a kill: a real process is killed while it writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graft.errors import GraftError
from graft.utils.jsonl import JsonLines, read_json

WRITER = """
import sys
from graft.utils.jsonl import JsonLines
lines = JsonLines(sys.argv[1])
for number in range(10**9):
    lines.append({"number": number, "text": "x" * (number % 5000)})
"""


def test_lines_are_read_in_the_order_of_writing_and_an_absent_file_has_none(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    assert lines.read() == []
    for step in range(3):
        lines.append({"step": step, "text": "é\n"})
    lines.append({"step": 3}, {"step": 4})
    assert [line["step"] for line in lines.read()] == [0, 1, 2, 3, 4]
    assert lines.path.read_text(encoding="utf-8").count("\n") == 5


@pytest.mark.parametrize("torn", ['{"step": 1', "x" * 10_000])
def test_an_unfinished_line_is_ignored_and_cut_before_the_next(tmp_path: Path, torn: str) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.append({"step": 0})
    with open(lines.path, "a") as file:
        file.write(torn)
    assert lines.read() == [{"step": 0}]
    lines.append({"step": 2})
    assert lines.read() == [{"step": 0}, {"step": 2}]


def test_a_file_of_one_unfinished_line_starts_over(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.path.write_text("x" * 9000)
    lines.append({"step": 0})
    assert lines.read() == [{"step": 0}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(GraftError, match=r"a\.jsonl:2 is not a line of JSON"):
        lines.read()


def test_keep_drops_the_other_lines(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.keep(lambda line: True)
    assert not lines.path.exists()
    for step in range(5):
        lines.append({"step": step})
    lines.keep(lambda line: line["step"] <= 2)
    lines.append({"step": 3})
    assert [line["step"] for line in lines.read()] == [0, 1, 2, 3]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    with subprocess.Popen([sys.executable, "-c", WRITER, str(lines.path)]) as writer:
        until = time.monotonic() + 30
        while (not lines.path.exists() or lines.path.stat().st_size < 300_000) and time.monotonic() < until:
            time.sleep(0.01)
        writer.kill()
    numbers = [line["number"] for line in lines.read()]
    assert len(numbers) > 10 and numbers == list(range(len(numbers)))
    lines.append({"number": len(numbers)})
    assert len(lines.read()) == len(numbers) + 1


def test_a_file_without_permission_is_explained(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a.jsonl")
    lines.path.write_text("")
    lines.path.chmod(0o400)
    if os.access(lines.path, os.W_OK):
        pytest.skip("this user may write everything")
    with pytest.raises(GraftError, match="no permission"):
        lines.append({"a": 1})


@pytest.mark.parametrize(("text", "reason"), [("[1]", "must hold a JSON object"), ("{", "is not a JSON file")])
def test_a_json_file_of_another_shape_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(GraftError, match=reason):
        read_json(tmp_path / "a.json")
