"""graft compare on result folders as `graft eval` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.cli import main
from graft.evaluation import protocols, tasks
from graft.evaluation.protocols import OutputProtocol
from graft.evaluation.scoring import Output, summary
from graft.utils.files import write_json_atomic
from graft.utils.jsonl import JsonLines

pytest.importorskip("scipy", reason="SciPy comes with graft-llm[eval]")


def evaluation(
    run: Path, right: str, *, task: str = "svamp", protocol: str = "abc", rank: int = 8, **names: str
) -> Path:
    """A run with an evaluation whose adapter's answers are right ("1") or wrong ("0"); the bare base is never right."""
    folder = run / "eval" / f"{task}.{protocol}"
    answers = {"base": "0" * len(right), **(names or {"math": right})}
    folder.mkdir(parents=True)
    (run / "config.yaml").write_text(f"base: {{model: seedling}}\nadapter: {{kind: lora, rank: {rank}}}\n")
    lines = JsonLines(folder / "answers.jsonl")
    for row in reversed(range(len(right))):  # answers come in any order
        for name, outcomes in answers.items():
            outcome = "correct" if outcomes[row] == "1" else "wrong"
            # Every question stands there twice, as some of MultiArith's do.
            lines.append({"contestant": name, "row": row + 1, "question": f"How many {row // 2}?", "outcome": outcome})
    result = {
        "task": task, "protocol": {"name": "strict", "rules": protocol}, "protocol_hash": protocol,
        "base": {"model": "seedling", "digest": "d"},
        "dtype": "float32", "results": [
            {"name": name, "template": {"digest": "t"}, "total": len(right), "accuracy": outcomes.count("1") / len(right)}
            for name, outcomes in answers.items()
        ],
    }  # fmt: skip
    write_json_atomic(folder / "result.json", result)
    return run


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Any:
        with pytest.raises(SystemExit) as end:
            main(["compare", *map(str, arguments)])
        out, error = capsys.readouterr()
        if end.value.code:
            return {"code": end.value.code, "error": error}
        return json.loads(out) if "--json" in arguments else out

    return run


def test_two_runs_are_compared_question_by_question(compare: Any, tmp_path: Path) -> None:
    """Only the second is right on 7 questions, only the first on 1: p = 18 / 256."""
    a = evaluation(tmp_path / "a", "1" * 4 + "0" * 7 + "1")
    b = evaluation(tmp_path / "b", "1" * 11 + "0", rank=32)
    found = compare(a, b, "--json")
    (task,) = found["tasks"]
    assert (task["only_first"], task["only_second"], task["total"]) == (1, 7, 12)
    assert task["p_value"] == pytest.approx(18 / 256) and task["difference"] == pytest.approx(0.5)
    assert task["interval"][0] < 0.5 < task["interval"][1]
    assert found["settings"] == {"adapter.rank": [8, 32]}
    table = compare(a, b)
    assert "+50.0%" in table and "adapter.rank: 8, 32" in table


def test_an_adapter_is_compared_with_its_base(compare: Any, tmp_path: Path) -> None:
    run = evaluation(tmp_path / "a", "0111")
    found = compare(f"{run}:base", run, "--json")
    assert found["tasks"][0]["difference"] == 0.75
    assert found["settings"] == {"contestant": ["base", "math"], "adapter.kind": ["none", "lora"]}
    assert "settings are the same" in compare(run, f"{run}:math")


def test_a_base_that_trained_itself_is_compared_as_such(compare: Any, tmp_path: Path) -> None:
    whole, run = evaluation(tmp_path / "a", "0011", whole="0011"), evaluation(tmp_path / "b", "0111")
    file = whole / "eval" / "svamp.abc" / "result.json"
    result = json.loads(file.read_text())
    result["results"] = [
        {**each, "adapter": None, "trained": {"train": {"method": {"kind": "full"}, "lr": 1e-5}}}
        for each in result["results"]
        if each["name"] == "whole"
    ]
    file.write_text(json.dumps(result))
    found = compare(whole, run, "--json")
    assert found["settings"]["adapter.kind"] == ["none, the base trained (full)", "lora"]
    assert found["settings"]["train.lr"] == [1e-5, None]
    beside = compare(f"{run}:base", whole, "--json")["settings"]
    assert beside == {"contestant": ["base", "whole"], "adapter.kind": ["none", "none, the base trained (full)"]}


def test_unlike_models_are_no_seeds_of_one(compare: Any, tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / f"{rank}", "110", rank=rank) for rank in (4, 8, 16)]
    found = compare(f"{runs[0]},{runs[1]}", f"{runs[1]},{runs[2]}")
    assert found["code"] == 2 and "differ in adapter.rank (4, 8): only seeds of the same adapter" in found["error"]


def test_seeds_are_pooled_and_the_seed_itself_is_no_difference(compare: Any, tmp_path: Path) -> None:
    first = [evaluation(tmp_path / f"a{seed}", right) for seed, right in enumerate(("100100", "000110"))]
    second = [evaluation(tmp_path / f"b{seed}", right) for seed, right in enumerate(("111100", "110110"))]
    found = compare(",".join(map(str, first)), ",".join(map(str, second)), "--json")
    (task,) = found["tasks"]
    assert (task["seeds"], task["first"], task["second"]) == (2, pytest.approx(2 / 6), pytest.approx(4 / 6))
    assert task["difference"] == pytest.approx(2 / 6) and task["per_seed"] == pytest.approx([2 / 6, 2 / 6])
    assert "give equally many" in compare(first[0], ",".join(map(str, second)))["error"]


def test_what_is_not_comparable_is_refused(compare: Any, tmp_path: Path) -> None:
    a, other = evaluation(tmp_path / "a", "0101"), evaluation(tmp_path / "other", "0101", protocol="xyz")
    longer, several = (
        evaluation(tmp_path / "longer", "010111"),
        evaluation(tmp_path / "several", "01", math="01", code="10"),
    )
    (tmp_path / "empty").mkdir()
    cases = [
        ((a, other), "the scores of 'svamp' are not comparable, because the protocols differ: strict abc"),
        ((a, other), "they differ in rules"),
        ((a, longer), "answered different questions (4 and 6, 4 of them the same)"),
        ((a, several), "name one, as in FOLDER:math"),
        ((a, f"{several}:maths"), "has no 'maths'. Did you mean 'math'? It has: base, math, code"),
        ((a, tmp_path / "empty"), "holds no results"),
        ((a, tmp_path / "absent"), "there is no folder"),
        ((a, evaluation(tmp_path / "gsm", "0101", task="gsm8k")), "have no task in common: svamp; gsm8k"),
    ]
    for arguments, words in cases:
        found = compare(*arguments)
        assert found["code"] == 2 and words in found["error"], found


def scored(run: Path, task_name: str, **outputs: list[str]) -> Path:
    """A run with a scored evaluation of a task of GLUE or of e2e; what contestants wrote is given."""
    task = tasks.get(task_name)
    rules = protocols.get(protocols.defined_for(task)[0], task)
    assert isinstance(rules, OutputProtocol)
    folder = run / "eval" / f"{task.name}.{rules.digest(task)}"
    folder.mkdir(parents=True)
    lines, results = JsonLines(folder / "answers.jsonl"), []
    for name, texts in outputs.items():
        answers = [Output(text, *gold) for text, gold in zip(texts, GOLD[task_name], strict=True)]
        judged = [rules.judge(task, answer.gold, answer.text) for answer in answers]
        settings = {"kind": "lora", "rank": 8 if name == "wide" else 2, "sites": "linear"}
        results.append({"name": name, "adapter": settings, "trained": None, **summary(task, answers, judged)})
        for row, (answer, judgement) in enumerate(zip(answers, judged, strict=True), start=1):
            said = {
                "contestant": name,
                "row": row,
                "question": f"{row}?",
                "expected": answer.gold,
                "answer": answer.text,
            }
            said |= {"references": answer.references} if answer.references else {}
            lines.append({**said, "extracted": judgement.extracted, "outcome": judgement.outcome})
    about = {"task": task.name, "protocol": rules.content(task), "protocol_hash": rules.digest(task)}
    write_json_atomic(folder / "result.json", {**about, "results": results})
    return run


GOLD: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "mrpc": [("equivalent" if row % 3 else "not equivalent", ()) for row in range(30)],
    "stsb": [(f"{row % 6}.0", ()) for row in range(30)],
    "e2e": [(f"the {word} near the river serves cheap food", (f"the {word} near the river serves cheap food",))
            for word in ("mill", "vaults", "eagle", "phoenix", "punter", "cricketers", "plough", "wrestlers")],
}  # fmt: skip


def test_scores_that_are_no_means_are_compared_with_the_libraries_values(compare: Any, tmp_path: Path) -> None:
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with graft-llm[eval]")
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with graft-llm[eval]")
    gold = {name: [text for text, _ in rows] for name, rows in GOLD.items()}
    wide = {
        "mrpc": [text if row % 5 else "not equivalent" for row, text in enumerate(gold["mrpc"])],
        "stsb": [text if row % 5 else "no idea" for row, text in enumerate(gold["stsb"])],
        "e2e": gold["e2e"],
    }
    slim = {
        "mrpc": ["equivalent" if row % 2 else "not equivalent" for row in range(30)],
        "stsb": [f"{row % 4}" for row in range(30)],
        "e2e": [text.replace("river", "sea") for text in gold["e2e"]],
    }
    for name in GOLD:
        scored(tmp_path / "run", name, slim=slim[name], wide=wide[name])
    found = compare(f"{tmp_path / 'run'}:slim", f"{tmp_path / 'run'}:wide", "--json")
    scores = {(each["task"], each["metric"]): each for each in found["tasks"]}
    assert set(scores) == {
        ("mrpc", "accuracy"), ("mrpc", "f1"), ("stsb", "pearson"), ("stsb", "spearman"), ("e2e", "bleu"),
    }  # fmt: skip
    f1 = [sklearn.f1_score(gold["mrpc"], each["mrpc"], pos_label="equivalent") for each in (slim, wide)]
    assert [scores["mrpc", "f1"][side] for side in ("first", "second")] == pytest.approx(f1)
    assert scores["stsb", "pearson"]["second"] == pytest.approx(1.0) and scores["e2e", "bleu"][
        "second"
    ] == pytest.approx(100)
    for each in scores.values():
        low, high = each["interval"]
        assert low <= each["difference"] <= high and each["difference"] > 0 and each["p_value"] < 0.05, each
    assert found["settings"] == {"contestant": ["slim", "wide"], "adapter.rank": [2, 8]}
    assert found["first"]["contestants"] == ["slim"] and found["skipped"] == []
    table = compare(f"{tmp_path / 'run'}:slim", f"{tmp_path / 'run'}:wide")
    assert "BLEU" in table and "contestant: slim, wide" in table and "B is wide in" in table
    seeds = compare(
        f"{tmp_path / 'run'}:slim,{tmp_path / 'run'}:slim", f"{tmp_path / 'run'}:wide,{tmp_path / 'run'}:wide", "--json"
    )
    pooled = {(each["task"], each["metric"]): each for each in seeds["tasks"]}
    assert pooled["mrpc", "f1"]["seeds"] == 2 and pooled["mrpc", "f1"]["spread"] == 0
    assert pooled["mrpc", "f1"]["difference"] == pytest.approx(scores["mrpc", "f1"]["difference"])


def test_a_score_that_does_not_exist_is_named_and_damaged_files_are_refused(compare: Any, tmp_path: Path) -> None:
    silent, other = ["I cannot say"] * 30, [text for text, _ in GOLD["stsb"]]
    run = scored(tmp_path / "run", "stsb", slim=silent, wide=other)
    found = compare(f"{run}:slim", f"{run}:wide", "--json")
    assert found["tasks"] == [] and [each["metric"] for each in found["skipped"]] == ["pearson", "spearman"]
    (folder,) = (run / "eval").iterdir()
    answers = folder / "answers.jsonl"
    whole = answers.read_text()
    for text, words in (
        (whole.replace("\n", "\n{torn\n", 1), "answers.jsonl:2 is not a line of JSON"),
        (whole.split("\n", 1)[1], "holds 29 answers of 'slim', but result.json counts 30"),
        (whole.replace('"outcome"', '"result"'), "answers.jsonl:1 is not an answer: it has no outcome"),
        (
            whole.replace('"extracted"', '"taken"'),
            "the answers have no 'extracted', which is needed to compare pearson",
        ),
    ):
        answers.write_text(text)
        assert words in compare(f"{run}:slim", f"{run}:wide")["error"]
    (folder / "result.json").write_text('{"task": "stsb"}')
    assert "not a result that this version of Graft reads" in compare(run, run)["error"]
    (folder / "result.json").unlink()
    assert "is not finished: give its command again" in compare(run, run)["error"]


def test_tasks_that_only_one_has_are_named(compare: Any, tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", "0101"), evaluation(tmp_path / "b", "0111")
    evaluation(tmp_path / "more", "0101", task="gsm8k")
    (tmp_path / "more" / "eval" / "gsm8k.abc").rename(b / "eval" / "gsm8k.abc")
    found = compare(a, b, "--json")
    assert [each["task"] for each in found["tasks"]] == ["svamp"]
    assert [(each["task"], each["reason"]) for each in found["skipped"]] == [("gsm8k", f"only {b} has it")]
