"""graft check --against: what of a test set the training data hold, in words and as JSON."""

from __future__ import annotations

import json
import re
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


def test_the_command_at_the_end_trains_what_was_checked(check: Any, world: Path) -> None:
    code, out = check("train.lr=1e-3", "data.system=it's")
    assert code == 0
    assert out.splitlines()[-1] == (
        f"No problems found. Start with: graft train {world / 'run.yaml'} train.lr=1e-3 'data.system=it'\"'\"'s'"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.lr=3"], "train.lr is 3"),
        (["adapter.rank=33"], "rank 33 is above the width of model.layers.0.self_attn.q_proj (32 to 32 features)"),
        (["adapter={kind: series, bottleneck: 64}"], "bottleneck 64 is above the width"),
        (["train.batch_size=13"], "train.batch_size is 13, but there are only 12 training samples"),
        (["adapter=[{kind: lora, rank: 2}, {kind: ia3}, {kind: lora, rank: 2}]"], "adapters 1 and 3 of the stack are the same"),
        (["adapter={kind: full, sites: linear embed}"], "of the base's"),
    ],
)  # fmt: skip
def test_a_setting_that_is_seldom_meant_is_asked_about(check: Any, changes: list[str], words: str) -> None:
    code, out = check(*changes, "--json")
    assert code == 0
    (question,) = [each for each in json.loads(out)["questions"] if words in each]
    assert question


def test_a_usual_run_raises_no_question(check: Any) -> None:
    assert json.loads(check("--json")[1])["questions"] == []


@pytest.mark.parametrize(("tokens", "room"), [(0, 256), (8, 248)])
def test_no_length_is_proposed_that_the_base_cannot_hold(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tokens: int, room: int
) -> None:
    adapter = f"{{kind: prefix, tokens: {tokens}, positions: after_prefix}}" if tokens else "{kind: lora, rank: 2}"
    for length, proposed in (
        (room - 60, f"data.max_length={room}"),
        (room + 9, f"The base has room for {room}, so not"),
    ):
        (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * length, "completion": "y"}) + "\n")
        with pytest.raises(SystemExit) as end:
            main(["check", str(world / "run.yaml"), f"adapter={adapter}", f"data.train={tmp_path / 'long.jsonl'}",
                  "data.template=plain", "data.max_length=20"])  # fmt: skip
        said = capsys.readouterr().err
        assert end.value.code == 2
        assert proposed in said or f"data.max_length={-(-(length + 2) // 8) * 8}" in said, said
        assert all(int(n) <= room for n in re.findall(r"data.max_length=(\d+) ", said)), said
