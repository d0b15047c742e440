"""graft check --against: what of a test set the training data hold, in words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.cli import main
from tests.small import save_small

QUESTION = "Ned had {} boxes and didn't count the others. How many boxes did Ned have in his shop on Monday?"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_small(folder / "base")
    rows = [{"instruction": QUESTION.format(number), "output": str(number)} for number in range(100, 112)]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "AddSub").mkdir()
    asked = [QUESTION.format(100).upper(), QUESTION.format(101).replace("didn't", "did [not]"), "Why [bold]?"]
    (folder / "AddSub/test.json").write_text(
        json.dumps([{"instruction": text, "input": "", "output": "", "answer": "1"} for text in asked])
    )
    (folder / "clean.jsonl").write_text('{"prompt": "What is the capital of Peru?"}\n')
    (folder / "run.yaml").write_text(
        f"base: {{model: {folder / 'base'}, device: cpu}}\nadapter: {{kind: lora, rank: 2, sites: attn.q}}\n"
        f"data: {{train: {folder / 'train.json'}, template: alpaca, cache: false}}\ntrain: {{steps: 1, batch_size: 2}}\n"
    )
    return folder


@pytest.fixture
def check(world: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as end:
            main(["check", str(world / "run.yaml"), *map(str, arguments)])
        return end.value.code or 0, capsys.readouterr().out

    return run


def test_questions_in_the_training_data_are_a_problem_and_shown(check: Any, world: Path) -> None:
    code, out = check("--against", "addsub", "--data", world)
    words = " ".join(out.split())
    assert code == 2
    assert "AddSub: 2 of 3 questions: 1 exact, 1 near (similarity of 5-grams at least 0.85)" in words
    assert "near, 0." in words and "did [not]" in words and "train.json, row 2" in words


def test_the_report_as_json_keeps_clean_sets(check: Any, world: Path) -> None:
    code, out = check("--against", world / "clean.jsonl", "--json")
    assert code == 0
    (found,) = json.loads(out)["overlaps"].values()
    assert (found["questions"], found["trained"], found["exact"], found["near"], found["examples"]) == (1, 12, 0, 0, [])


def test_a_folder_of_tasks_without_a_task_is_refused(check: Any, world: Path) -> None:
    assert check("--data", world)[0] == 2
