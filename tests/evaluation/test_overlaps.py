"""Test sets by name: files, tasks, groups."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graft.data.overlap import Question
from graft.errors import GraftError
from graft.evaluation.overlaps import questions_against
from graft.evaluation.tasks import GROUPS

ROW = {"instruction": "How many boxes? ", "input": "", "output": "", "answer": "7"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("AddSub", *GROUPS["arithmetic-4"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps([{**ROW, "answer": "A" if name == "AQuA" else "7"}]))
    return tmp_path


def test_a_task_and_a_group_are_looked_for_in_the_folder(folder: Path) -> None:
    found = questions_against(["addsub", "arithmetic-4"], folder)
    assert set(found) == {"AddSub", *GROUPS["arithmetic-4"]}
    assert found["AddSub"] == [Question("How many boxes? ", f"{folder / 'AddSub/test.json'}, row 1")]


def test_a_file_keeps_its_name_and_needs_no_answers(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"prompt": "How many?"}\n')
    assert questions_against([str(path)]) == {str(path): [Question("How many?", f"{path}, row 1")]}


def test_what_is_neither_is_refused(folder: Path) -> None:
    with pytest.raises(GraftError, match="Did you mean 'AddSub'"):
        questions_against(["adsub"], folder)
    with pytest.raises(GraftError, match="no such file"):
        questions_against([str(folder / "missing.json")])
