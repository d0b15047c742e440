"""The commands and the YAMLs of docs/tasks.md run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from graft.runs.folder import RunFolder
from tests.task_bases import answered_rows, labelled_rows, save_task_base
from tests.walk import graft_command, yaml_block

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
FEW = "train.epochs=1 train.batch_size=8"


@pytest.fixture
def here(at_home: Path) -> Path:
    """A folder with the data that the page uses, with small bases in place of the ones it names."""
    rows = labelled_rows(20)
    for name in ("reviews.tsv", "more.tsv"):
        Path(name).write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))
    Path("texts.txt").write_text("fine\nbad\n")
    pairs = [f"{row['text']}\tday\t{number / 4}\n" for number, row in enumerate(rows)]
    Path("pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "".join(pairs))
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answered_rows(8)))
    save_task_base(at_home / "bert", "bert")
    save_task_base(at_home / "t5", "t5")
    for name in ("sentiment", "similarity", "answers"):
        Path(f"{name}.yaml").write_text(yaml_block(PAGE, f"{name}.yaml"))
    return at_home


def test_the_commands_of_classification_run(here: Path) -> None:
    found = re.search(r"```sh\n(graft check.*?)```", PAGE, re.DOTALL)
    assert found is not None
    commands = found.group(1).splitlines()
    assert len(commands) == 5
    added = {"check": f"base.model=bert {FEW}", "train": f"base.model=bert {FEW}"}
    for command in commands:
        graft_command(f"{command} {added.get(command.split()[1], '')}")
    assert len(Path("labels.jsonl").read_text().splitlines()) == 2 and Path("merged/config.json").is_file()
    lines = RunFolder("runs/sentiment").metrics.read()
    assert any("validation_accuracy" in line for line in lines)
    card = Path("runs/sentiment/adapters/lora/README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained("bert", num_labels=2)' in card
    (line,) = re.findall(r"`(graft init sentiment[^`]+)`", PAGE)
    graft_command(line.replace("sentiment.yaml", "new.yaml"))
    assert "  task: classification" in Path("new.yaml").read_text()


@pytest.mark.parametrize(
    ("name", "base", "data"), [("similarity", "bert", "pairs.tsv"), ("answers", "t5", "questions.jsonl")]
)
def test_the_other_tasks_train_evaluate_and_predict(here: Path, name: str, base: str, data: str) -> None:
    graft_command(f"graft check {name}.yaml base.model={base} {FEW}")
    graft_command(f"graft train {name}.yaml base.model={base} {FEW} --out runs/{name}")
    graft_command(f"graft eval runs/{name} --data {data} --limit 4")
    graft_command(f"graft predict runs/{name} {data} --out out.jsonl --max-new-tokens 4")
    assert Path("out.jsonl").stat().st_size > 100
