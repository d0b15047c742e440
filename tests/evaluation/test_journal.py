"""The folder of one evaluation: one writer at a time, and errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from graft.errors import GraftError
from graft.evaluation.journal import Journal, read_result
from graft.utils.files import write_json_atomic

ABOUT: dict[str, Any] = {
    "task": "two", "protocol": {"name": "strict"}, "protocol_hash": "abc", "base": {}, "dtype": "float32", "engine": {},
    "contestants": {"base": {"digest": None, "template": {}}},
}  # fmt: skip
ASKED = [("one?", "1"), ("two?", "2")]


def line(number: int) -> dict[str, Any]:
    question, expected = ASKED[number - 1]
    said = {"answer": "1", "extracted": "1", "outcome": "wrong", "ended": "stopped", "tokens": 1}
    return {"contestant": "base", "number": number, "question": question, "expected": expected, **said}


def test_answers_are_kept_and_taken_up_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "new" / "one", ABOUT, ASKED) as journal:
        journal.append(line(2))
    with Journal(tmp_path / "new" / "one", ABOUT, ASKED) as journal:
        assert journal.kept == 1 and journal.answers["base", 2] == line(2)
    with Journal(None, ABOUT, ASKED) as nowhere:
        nowhere.append(line(1))
        assert nowhere.kept == 0 and nowhere.answers["base", 1] == line(1)


def test_one_evaluation_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    with (
        Journal(tmp_path, ABOUT, ASKED),
        pytest.raises(GraftError, match=r"another evaluation is writing to .*: wait until it ends, or name another"),
    ):
        Journal(tmp_path, ABOUT, ASKED, overwrite=True)
    with pytest.raises(GraftError, match="belongs to another task"):
        Journal(tmp_path, {**ABOUT, "task": "other"}, ASKED)
    with Journal(tmp_path, ABOUT, ASKED):  # a refused one holds nothing
        pass


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        GraftError, match=r"results cannot be written to .*Not a directory. Name another folder with --out"
    ):
        Journal(tmp_path / "file" / "inside", ABOUT, ASKED)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{torn}\n", "answers.jsonl:2 is not a line of JSON"),
        (
            '{"contestant": "base"}\n',
            "answers.jsonl:2 is not an answer of this version of Graft: it has no number, question",
        ),
        ("[1]\n", "answers.jsonl:2 is not an answer"),
    ],
)
def test_a_damaged_line_is_named_with_the_way_out(tmp_path: Path, text: str, words: str) -> None:
    with Journal(tmp_path, ABOUT, ASKED) as journal:
        journal.append(line(1))
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write(text)
    with pytest.raises(GraftError) as error:
        Journal(tmp_path, ABOUT, ASKED)
    assert words in str(error.value) and "Delete that line, and its question is asked again" in str(error.value)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"task": "two"}, "it has no protocol, protocol_hash, results"),
        ({**ABOUT, "protocol": "strict", "results": [{"name": "base"}]}, "it has no protocol.name, results.total"),
        ({**ABOUT, "results": []}, "it has no candidates"),
    ],
)
def test_a_result_of_another_version_is_refused(tmp_path: Path, result: dict[str, Any], words: str) -> None:
    write_json_atomic(tmp_path / "result.json", result)
    with pytest.raises(GraftError) as error:
        read_result(tmp_path)
    assert words in str(error.value) and "--overwrite" in str(error.value)
