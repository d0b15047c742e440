"""graft score: published counts through the command line, files of several programs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.cli import main
from graft.evaluation import protocols, tasks
from graft.utils.jsonl import JsonLines

pytest.importorskip("scipy", reason="SciPy comes with graft-llm[eval]")


@pytest.fixture
def score(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> dict[str, Any]:
        with pytest.raises(SystemExit) as end:
            main(["score", *map(str, arguments), "--json"])
        out, error = capsys.readouterr()
        return json.loads(out) if end.value.code in (None, 0) else {"code": end.value.code, "error": error}

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("task", "correct", "total"),
    [
        ("gsm8k", 771, 1319),
        ("SVAMP", 803, 1000),
        ("SingleEq", 484, 508),
        ("AddSub", 370, 395),
        ("MultiArith", 560, 600),
    ],
)
def test_the_shipped_outputs_score_as_published(score: Any, shared: Path, task: str, correct: int, total: int) -> None:
    file = shared / "data" / "llm_adapters" / task / "test.json"
    found = score(file, "--task", task, "--protocol", "llm-adapters")
    assert (found["correct"], found["total"]) == (correct, total)
    assert found["correct"] + found["wrong"] + found["unextractable"] == total
    assert found["accuracy"] == correct / total
    for name in ("interval", "bootstrap_interval"):
        low, high = found[name]
        assert low < found["accuracy"] < high and high - low < 0.06


def test_the_published_first_letter_rule_misjudges_aqua(score: Any, shared: Path) -> None:
    """Of GPT-3.5's answers 109 count under the published rule. 24 right ones it calls wrong, 10 wrong ones right: 123 under strict."""
    file = shared / "data" / "llm_adapters" / "AQuA" / "test.json"
    assert score(file, "--task", "aqua", "--protocol", "llm-adapters")["correct"] == 109
    assert score(file, "--task", "aqua", "--protocol", "strict")["correct"] == 123
    task, rows = tasks.get("aqua"), json.loads(file.read_text())
    first, strict = (
        [protocols.get(name, task).judge(task, row["answer"], row["output"]).outcome == "correct" for row in rows]  # type: ignore[union-attr]
        for name in ("llm-adapters", "strict")
    )
    assert sum(b and not a for a, b in zip(first, strict, strict=True)) == 24
    assert sum(a and not b for a, b in zip(first, strict, strict=True)) == 10


@pytest.mark.parametrize(
    ("system", "bleu"),
    [
        ("tgen-std", 66.16),
        ("sclstm", 41.75),
        pytest.param("tgen-minus", 63.80, marks=pytest.mark.slow),
        pytest.param("tgen-plus", 66.72, marks=pytest.mark.slow),
    ],
)
def test_known_systems_have_their_known_bleu(score: Any, shared: Path, system: str, bleu: float) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with graft-llm[eval]")
    folder = shared / "data" / "e2e_nlg"
    found = score(
        folder / "tgen_outputs" / f"{system}.run0.txt", "--task", "e2e", "--protocol", "bleu", "--data", folder
    )
    assert found["bleu"] == pytest.approx(bleu, abs=0.005) and found["total"] == 630
    assert found["interval"][0] < bleu < found["interval"][1]


def test_files_of_other_programs_and_columns_of_ones_own(score: Any, tmp_path: Path) -> None:
    task = ("--task", "gsm8k", "--protocol", "strict")
    theirs = [
        {"instruction": "?", "output": "gold text 9", "answer": "4.0", "output_pred": "so 4", "pred": 4.0, "flag": True}
    ]
    assert score(write(tmp_path / "experiment.json", theirs), *task)["correct"] == 1
    assert score(write(tmp_path / "a.json", [{"response": "5", "gold": "4"}]), *task)["wrong"] == 1
    own = write(tmp_path / "own.json", [{"said": "it is 4", "right": 4}, {"said": "no", "right": 4}])
    found = score(own, *task, "--output", "said", "--gold", "right")
    assert (found["correct"], found["unextractable"], found["total"]) == (1, 1, 2)


def test_answers_of_several_contestants_are_not_mixed(score: Any, tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "answers.jsonl")
    for name, answer, row in [("base", "7", 2), ("math", "it is 4", 2), ("base", "4", 1), ("math", "4", 1)]:
        lines.append({"contestant": name, "row": row, "answer": answer, "reference": "4"})
    task = ("--task", "gsm8k", "--protocol", "strict")
    assert "choose one with --contestant" in score(lines.path, *task)["error"]
    assert (
        "'maths'. Did you mean 'math'? It has: base, math" in score(lines.path, *task, "--contestant", "maths")["error"]
    )
    assert score(lines.path, *task, "--contestant", "math")["correct"] == 2
    rows = [{"instruction": f"How many {number}?", "answer": str(number)} for number in (4, 7)]
    data = write(tmp_path / "test.json", rows)
    found = score(lines.path, *task, "--contestant", "base", "--data", data)
    assert found["correct"] == 2  # the lines stand in the order in which answers came, not in that of the data


def test_answers_that_hold_their_references_need_no_other_file(score: Any, tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu", reason="sacrebleu comes with graft-llm[eval]")
    row = {"answer": "a cheap pub", "reference": "a pub", "references": ["a pub", "A cheap pub"]}
    task = ("--task", "e2e", "--protocol", "bleu")
    rows = [row, {**row, "answer": "a dear pub near the river bank"}]
    assert 0 < score(write(tmp_path / "answers.json", rows), *task)["bleu"] < 100
    rows = [{**row, "references": []}]
    assert "say where those of 'e2e' are with --data" in score(write(tmp_path / "none.json", rows), *task)["error"]


def test_right_answers_come_from_the_benchmark_where_the_file_has_none(score: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "test.json", [{"instruction": "How many?", "answer": str(number)} for number in (1, 2)])
    (tmp_path / "outputs.txt").write_text("It is 1.\nIt is 3.\n")
    task = ("--task", "svamp", "--protocol", "strict")
    assert score(tmp_path / "outputs.txt", *task, "--data", data)["correct"] == 1
    assert "say where those of 'SVAMP' are with --data" in score(tmp_path / "outputs.txt", *task)["error"]
    (tmp_path / "outputs.txt").write_text("It is 1.\n")
    assert (
        "holds 1 outputs, but there are 2 questions" in score(tmp_path / "outputs.txt", *task, "--data", data)["error"]
    )


def test_what_is_wrong_is_said_with_exit_2(score: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "o.json", [{"output": "4", "answer": "4"}, {"output": "4", "answer": ""}])
    task = ("--task", "gsm8k", "--protocol", "strict")
    cases = [
        ((tmp_path / "absent.json", *task), "there is no file"),
        ((file, *task), "o.json, row 2: there is no answer"),
        ((file, *task, "--output", "outptu"), "no column 'outptu'. Did you mean 'output'? It has: output, answer"),
        ((file, "--task", "gsm8", "--protocol", "strict"), "Did you mean 'gsm8k'?"),
        ((file, "--task", "gsm8k", "--protocol", "bleu"), "it is under llm-adapters, strict, math-verify"),
        ((file, "--task", "boolq", "--protocol", "rank"), "scores the likelihood of choices, not outputs"),
        ((write(tmp_path / "x.json", [{"text": "4"}]), *task), "name the columns"),
        (
            (write(tmp_path / "n.json", [{"output": None, "answer": "4"}]), *task),
            "row 1: there is no output ('output')",
        ),
    ]
    for arguments, words in cases:
        found = score(*arguments)
        assert found["code"] == 2 and words in found["error"], found
