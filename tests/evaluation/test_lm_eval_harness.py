"""lm-eval's tasks for a base and its adapters in one call: the numbers, the files, what a killed call leaves to the next."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graft.cli import build
from graft.errors import GraftError
from graft.evaluation import protocols, tasks
from graft.evaluation.benchmark import evaluate_task
from graft.generation.loaded import load_candidates
from tests.runs_at_hand import make_run

pytest.importorskip("lm_eval", reason="lm-eval comes with graft-llm[eval]")
pytestmark = pytest.mark.slow
ROWS = [{"instruction": f"What is {n} plus 2?", "input": "", "output": "", "answer": str(n + 2.0)} for n in range(3)]
KINDS = {"lora": {"kind": "lora", "rank": 2, "sites": "attn.q mlp.down"}, "wide": {"kind": "parallel", "bottleneck": 4}}


def only(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Reading the thousands of definitions that lm-eval brings takes longer than all that is tested here."""
    import lm_eval.tasks

    whole = partial(lm_eval.tasks.TaskManager, include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", whole)


@pytest.fixture(autouse=True)
def only_our_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    from graft.evaluation.lm_eval import harness as lm_eval_harness

    only(monkeypatch, Path(lm_eval_harness.__file__).parent / "tasks")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name in ("SVAMP", "AddSub"):
        (folder / name).mkdir()
        (folder / name / "test.json").write_text(json.dumps(ROWS))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Trained on one of the questions."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "seen.json").write_text(json.dumps([{"question": ROWS[1]["instruction"], "answer": "3"}]))
    return make_run(folder / "math", KINDS, context=640, data={"train": str(folder / "seen.json")})


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks that cost little: multiple choice twice, and a text's perplexity, which is no accuracy."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"Is {n} even?", "c": ["yes", "no"], "a": n % 2} for n in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\ntest_split: test\n"
    )
    choose = "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: c\ndoc_to_target: a\n"
    for name in ("choose", "again"):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\n{shared}{choose}metric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n"
        )
    text = "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
    (folder / "text.yaml").write_text(f"task: text\n{shared}{text}metric_list: [{{metric: word_perplexity}}]\n")
    only(monkeypatch, folder)
    return folder


def graft(*words: Any) -> str:
    return CliRunner().invoke(build(), list(map(str, words)), catch_exceptions=False).stdout


def test_every_contestant_has_its_column_with_the_numbers_of_our_own_protocol(
    run: Path, data: Path, tmp_path: Path
) -> None:
    line = ["eval", run, "--harness", "graft_svamp,graft_addsub", "--data", data, "--out", tmp_path]
    found = json.loads(graft(*line, "--json"))
    assert [each["task"] for each in found["tasks"]] == ["graft_svamp", "graft_addsub"]
    task = tasks.get("SVAMP")
    own = evaluate_task(load_candidates(run), task, protocols.get("llm-adapters", task), task.load(data))["results"]
    for ours, theirs in zip(own, found["tasks"][0]["results"], strict=True):
        assert theirs["name"] == ours["name"]
        assert theirs["accuracy"] == theirs["metrics"]["acc,none"] == ours["accuracy"]
        assert theirs["metrics"]["unextractable,none"] == pytest.approx(ours["unextractable"] / ours["total"])
        assert theirs["cut"] == 0
    assert {name: mean["tasks"] for name, mean in found["averages"].items()} == {"base": 2, "lora": 2, "wide": 2}
    folder = Path(found["tasks"][0]["folder"])
    assert json.loads((folder / "result.json").read_text())["results"] == found["tasks"][0]["results"]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(each["contestant"], each["question"]) for each in answers] == [
        (name, row["instruction"]) for name in ("base", *KINDS) for row in ROWS
    ]
    [overlap] = found["tasks"][0]["overlap"]
    assert (overlap["of"], overlap["questions"], overlap["exact"]) == (["lora", "wide"], 3, 1)
    shown = graft("show", tmp_path)
    assert "protocol lm-eval, version" in shown and "graft_addsub acc,none" in shown and "wide" in shown
    assert "6 answers were kept" not in shown
    compared = json.loads(graft("compare", f"{tmp_path}:base", f"{tmp_path}:lora", "--json"))
    assert [each["task"] for each in compared["tasks"]] == ["graft_addsub", "graft_svamp"]


def test_a_killed_call_is_continued_where_a_contestant_was_finished(
    run: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import evaluator

    from graft.evaluation.lm_eval.harness import harness

    asked: list[str] = []
    ask = evaluator.simple_evaluate

    def counting(**options: Any) -> Any:
        asked.append(options["tasks"][0].task_name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(**options)

    monkeypatch.setattr(evaluator, "simple_evaluate", counting)
    loaded, names = load_candidates(run), ["choose", "again"]
    with pytest.raises(KeyboardInterrupt):
        harness(loaded, names, None, tmp_path / "killed", limit=3)
    found = harness(loaded, names, None, tmp_path / "killed", limit=3)
    assert asked == ["choose"] * 4 + ["again"] * 3
    assert [each["continued_from"] for each in found["tasks"]] == [6, 0]
    whole = harness(loaded, names, None, tmp_path / "whole", limit=3)
    for one, other in zip(found["tasks"], whole["tasks"], strict=True):
        assert [_timeless(each) for each in one["results"]] == [_timeless(each) for each in other["results"]]
    count = len(asked)
    harness(loaded, names, None, tmp_path / "whole", limit=3)
    assert len(asked) == count, "nothing is asked again"
    more = harness(loaded, names, None, tmp_path / "whole", limit=4)
    assert len(asked) == count + 6 and {each["total"] for each in more["tasks"][0]["results"]} == {4}
    harness(loaded, names, None, tmp_path / "whole", limit=2, overwrite=True)
    assert len(asked) == count + 12


def _timeless(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key != "seconds"}


def test_prompts_that_lm_eval_cuts_are_counted_and_impossible_lengths_are_refused(tmp_path: Path, data: Path) -> None:
    from graft.evaluation.lm_eval.harness import harness

    run = make_run(tmp_path / "short", {"lora": KINDS["lora"]}, context=300)
    [result] = harness(load_candidates(run), ["graft_svamp"], data)["tasks"]
    assert [each["cut"] for each in result["results"]] == [3, 3]
    run = make_run(tmp_path / "shorter", {"lora": KINDS["lora"]}, context=256)
    with pytest.raises(GraftError, match="lets a model write 256 tokens, and the context of this base holds 256"):
        harness(load_candidates(run), ["graft_svamp"], data)


def test_an_unknown_task_is_named_with_the_nearest_one(run: Path) -> None:
    from graft.evaluation.lm_eval.harness import harness

    with pytest.raises(GraftError, match="no task 'graft_svam'. Did you mean 'graft_svamp'"):
        harness(load_candidates(run), ["graft_svam"])


def test_choices_and_texts_are_kept_as_answers(run: Path, choices: Path, tmp_path: Path) -> None:
    from graft.evaluation.lm_eval.harness import harness

    choose, text = harness(load_candidates(run), ["choose", "text"], None, tmp_path, limit=3)["tasks"]
    answers = [json.loads(line) for line in (Path(choose["folder"]) / "answers.jsonl").read_text().splitlines()]
    for each in choose["results"]:
        own = [line for line in answers if line["contestant"] == each["name"]]
        right = [line["likelihoods"].index(max(line["likelihoods"])) == (line["row"] - 1) % 2 for line in own]
        assert each["accuracy"] == each["metrics"]["acc,none"] == sum(right) / 3
        assert {line["answer"].strip() for line in own} <= {"yes", "no"}
    assert all("accuracy" not in each and each["metrics"]["word_perplexity,none"] > 1 for each in text["results"])
    assert "text word_perplexity,none" in graft("show", tmp_path)
