"""Every benchmark's rows become records: the published layout, upstream rows, raw files; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft.errors import GraftError
from graft.evaluation import tasks

UPSTREAM: list[tuple[str, dict[str, Any], str, str, tuple[str, ...]]] = [
    (
        "gsm8k",
        {"question": "How many?", "answer": "It takes 2/2=<<2/2=1>>1.\n#### 1,003"},
        "How many?",
        "1003",
        (),
    ),
    (
        "AQuA",
        {"question": "What is f? ", "options": ["A)21", "B)f(x)", "C)3", "D)4", "E)5"], "correct": "B"},
        "What is f? Answer Choices: (A) 21 (B) f (x)  (C) 3 (D) 4 (E) 5",
        "B",
        ("21", "f (x) ", "3", "4", "5"),
    ),
    ("SVAMP", {"Body": "He has 2 cars. ", "Question": "How many?", "Answer": 2.0}, "He has 2 cars. How many?", "2.0", ()),
    ("MultiArith", {"question": "How many?", "final_ans": "7"}, "How many?", "7", ()),
    ("MultiArith", {"iIndex": 1, "sQuestion": "How many?", "lEquations": ["X=7"], "lSolutions": [7.0]}, "How many?", "7.0", ()),
    ("AddSub", {"iIndex": 1, "sQuestion": "How many?", "lEquations": ["X=7"], "lSolutions": [7.0]}, "How many?", "7.0", ()),
    ("SingleEq", {"iIndex": 1, "sQuestion": "How many?", "lEquations": ["X=7"], "lSolutions": [7.0]}, "How many?", "7.0", ()),
    ("mawps", {"question": "How many?", "result": "1/2", "result_float": 0.5}, "How many?", "0.5", ()),
    (
        "mathqa",
        {"Problem": "what ?", "options": "a ) rs . 400 , b ) 3 , c ) 5 , d ) data , e ) none of these", "correct": "e"},
        "what ? The options: A ) rs . 400 , B ) 3 , C ) 5 , D ) DAtA , E ) nonE oF thEsE",
        "E",
        ("rs . 400", "3", "5", "DAtA", "nonE oF thEsE"),
    ),
    (
        "mathqa",
        {"Problem": "what ?", "options": "['a ) 2 sqrt ( 61 )', 'b ) 3', 'c ) 5', 'd ) 6', 'e ) 7']", "correct": "a"},
        "what ? The options: ['A ) 2 sqrt ( 61 )', 'B ) 3', 'C ) 5', 'D ) 6', 'E ) 7']",
        "A",
        ("2 sqrt ( 61 )", "3", "5", "6", "7"),
    ),
    (
        "boolq",
        {"question": "is it so", "answer": False, "passage": "It is."},
        "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false",
        "false",
        ("true", "false"),
    ),
    (
        "piqa",
        {"goal": "dresser", "sol1": "use a pin", "sol2": "use wood", "label": 1},
        "Please choose the correct solution to the question: dresser\n\nSolution1: use a pin\n\nSolution2: use wood\n\n"
        "Answer format: solution1/solution2",
        "solution2",
        ("use a pin", "use wood"),
    ),
    (
        "social_i_qa",
        {"context": "Tracy stayed.", "question": "Why?", "answerA": "a b", "answerB": "c", "answerC": "d", "label": "3"},
        "Please choose the correct answer to the question: Tracy stayed. Why?\n\nAnswer1: a b Answer2: c Answer3: d\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
        ("a b", "c", "d"),
    ),
    (
        "hellaswag",
        {"activity_label": "Roof", "ctx": "A man sits. he", "endings": ["runs.", "sleeps.", "eats.", "works."], "label": "3"},
        "Please choose the correct ending to complete the given sentence: Roof: A man sits. he\n\nEnding1: runs. Ending2: sleeps. "
        "Ending3: eats. Ending4: works.\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending4",
        ("runs.", "sleeps.", "eats.", "works."),
    ),
    (
        "winogrande",
        {"sentence": "Sarah beat Maria so _ won.", "option1": "Sarah", "option2": "Maria", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah beat Maria so _ won.\n\n"
        "Option1: Sarah Option2: Maria Answer format: option1/option2",
        "option1",
        ("Sarah", "Maria"),
    ),
    (
        "ARC-Challenge",
        {"question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "C"},
        "Please choose the correct answer to the question: Why?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
        ("x", "y", "z"),
    ),
    (
        "ARC-Easy",
        {"question": "Why?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "Please choose the correct answer to the question: Why?\n\nAnswer1: x Answer2: y\n\nAnswer format: answer1/answer2",
        "answer2",
        ("x", "y"),
    ),
    (
        "openbookqa",
        {"question_stem": "Fog around:", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
        "Please choose the correct answer to the question: Fog around:\n\nAnswer1: a Answer2: b\n\nAnswer format: answer1/answer2",
        "answer1",
        ("a", "b"),
    ),
    (
        "sst2",
        {"sentence": "a charm ", "label": 1, "idx": 0},
        "Please choose the correct class.\n\na charm \n\nAnswer format: negative/positive",
        "positive",
        ("negative", "positive"),
    ),
    (
        "rte",
        {"index": "0", "sentence1": "It rains.", "sentence2": "It is wet.", "label": "not_entailment"},
        "Please choose the correct class.\n\nsentence1: It rains.\nsentence2: It is wet.\n\nAnswer format: entailment/not entailment",
        "not entailment",
        ("entailment", "not entailment"),
    ),
    ("stsb", {"sentence1": "A.", "sentence2": "B.", "label": 2.5}, "sentence1: A.\nsentence2: B.", "2.5", ()),
    ("classification", {"text": "so good", "label": "praise"}, "so good", "praise", ()),
]  # fmt: skip

ROWS = {
    "AQuA": 254, "AddSub": 395, "MultiArith": 600, "SingleEq": 508, "SVAMP": 1000, "gsm8k": 1319, "mawps": 238, "mathqa": 2985,
    "boolq": 3270, "piqa": 1838, "social_i_qa": 1954, "winogrande": 1267, "ARC-Easy": 2376, "ARC-Challenge": 1172,
    "openbookqa": 500,
}  # fmt: skip


@pytest.mark.parametrize(("name", "row", "instruction", "gold", "choices"), UPSTREAM)
def test_an_upstream_row_is_worded_as_published(
    name: str, row: dict[str, Any], instruction: str, gold: str, choices: tuple[str, ...]
) -> None:
    record = tasks.get(name).record(row, "rows.json", 7)
    assert (record.instruction, record.gold, record.choices) == (instruction, gold, choices)
    assert record.where == "rows.json, row 7"


@pytest.mark.parametrize(("name", "row", "instruction", "gold", "choices"), UPSTREAM)
def test_a_published_row_gives_the_record_of_the_upstream_row(
    name: str, row: dict[str, Any], instruction: str, gold: str, choices: tuple[str, ...]
) -> None:
    task = tasks.get(name)
    published = {"instruction": instruction, "input": "", "output": "the correct answer is 5", "answer": gold}
    found, wanted = task.record(published, "test.json", 1), task.record(row, "test.json", 1)
    if task.name in ("sst2", "rte", "mathqa") or task.answer != "class":
        assert (found.instruction, found.question, found.choices, found.gold) == (
            wanted.instruction, wanted.question, wanted.choices, wanted.gold,
        )  # fmt: skip


def test_every_benchmark_of_the_groups_has_an_upstream_row_above() -> None:
    assert set(tasks.GROUPS["all"]) <= {name for name, *_ in UPSTREAM}
    assert {group: len(names) for group, names in tasks.GROUPS.items()} == {
        "arithmetic": 8, "arithmetic-4": 4, "arithmetic-6": 6, "commonsense": 8, "glue": 9, "all": 16,
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_published_files_are_read_whole_and_reworded_to_the_letter(shared: Path, name: str) -> None:
    task = tasks.get(name)
    records = task.load(shared / "data" / "llm_adapters")
    assert len(records) == ROWS[name] and [record.row for record in records] == list(range(1, ROWS[name] + 1))
    for record in records if task.wording is not None else ():
        ways = [task.wording, *filter(None, [task.wording.alternative])]
        assert record.instruction in [way.write(record.question, record.choices) for way in ways], record.where


def test_gsm8k_is_the_same_set_in_its_raw_form(shared: Path) -> None:
    published = tasks.get("gsm8k").load(shared / "data" / "llm_adapters")
    raw = tasks.get("gsm8k").load(shared / "data" / "gsm8k")
    assert {record.question: float(record.gold) for record in raw} == {r.question: float(r.gold) for r in published}


def test_a_file_a_set_and_a_folder_of_sets_are_all_understood(tmp_path: Path) -> None:
    file = tmp_path / "sets" / "SVAMP" / "SVAMP.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([{"Body": "He has 2 cars.", "Question": "How many?", "Answer": 2.0}] * 3))
    task = tasks.get("svamp")
    for place in (file, file.parent, tmp_path / "sets"):
        assert len(task.load(place)) == 3 and len(task.load(place, limit=2)) == 2
    assert task.find(tmp_path) is None and task.find(tmp_path / "sets") == file


def test_cola_has_no_header_and_aqua_is_a_line_each(tmp_path: Path) -> None:
    (tmp_path / "CoLA").mkdir()
    (tmp_path / "CoLA" / "dev.tsv").write_text('gj04\t1\t\tThe "sailors rode.\nl-93\t0\t*\tThey drank the pub.\n')
    assert [(r.gold, r.question) for r in tasks.get("cola").load(tmp_path)] == [
        ("acceptable", 'The "sailors rode.'),
        ("unacceptable", "They drank the pub."),
    ]
    row = {"question": "What?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "correct": "E"}
    (tmp_path / "AQuA").mkdir()
    (tmp_path / "AQuA" / "test.json").write_text(json.dumps(row) + "\n" + json.dumps(row))
    assert [record.gold for record in tasks.get("aqua").load(tmp_path)] == ["E", "E"]


def test_references_to_one_meaning_are_one_record(tmp_path: Path) -> None:
    file = tmp_path / "refs.csv"
    file.write_text('"mr","ref"\n"name[A]","A is."\n"name[B]","B is."\n"name[A]","There is A."\n')
    first, second = tasks.get("e2e").load(file)
    assert (first.instruction, first.references, second.references) == ("name[A]", ("A is.", "There is A."), ("B is.",))
    assert len(tasks.get("e2e").load(file, limit=1)) == 1
    grouped = tmp_path / "refs.jsonl"
    grouped.write_text(json.dumps({"context": "name : A", "refs": ["A is .", "There is A ."]}) + "\n")
    assert tasks.get("e2e").load(grouped)[0].references == ("A is .", "There is A .")


def test_wrong_input_is_told_in_the_users_terms(tmp_path: Path) -> None:
    (tmp_path / "SVAMP").mkdir()
    with pytest.raises(GraftError, match=r"unknown task 'gsm8'.*Did you mean 'gsm8k'"):
        tasks.get("gsm8")
    with pytest.raises(GraftError, match=r"unknown task or group 'arithmetics'.*Did you mean 'arithmetic"):
        tasks.select("boolq,arithmetics")
    with pytest.raises(GraftError, match=r"does not hold 'SVAMP': looked for SVAMP/test.json, SVAMP/SVAMP.json"):
        tasks.get("SVAMP").load(tmp_path)
    with pytest.raises(GraftError, match="there is no file or folder"):
        tasks.get("SVAMP").load(tmp_path / "absent")
    with pytest.raises(GraftError, match="--data"):
        tasks.get("AddSub").load()
    cases = [
        ({"instruction": "How many?", "answer": ""}, "row 2: there is no answer"),
        ({"instruction": "How many?"}, "row 2: there is no answer"),
        ({"instruction": " ", "answer": "5"}, "row 2: there is no question"),
        ({"instruction": "How many?", "answer": "five"}, "row 2: the answer of 'SVAMP' is a number; given 'five'"),
        ({"instruction": "How many?", "answer": "nan"}, "row 2: the answer of 'SVAMP' is a number; given 'nan'"),
        ({"Question": "How many?", "Answer": 5}, "row 2 is not a row of 'SVAMP'.*its columns are Question, Answer"),
    ]
    for row, words in cases:
        file = tmp_path / "SVAMP" / "test.json"
        file.write_text(json.dumps([{"instruction": "How many?", "answer": "5"}, row]))
        with pytest.raises(GraftError, match=words):
            tasks.get("SVAMP").load(tmp_path)
    with pytest.raises(GraftError, match="one of solution1, solution2; given 'solution3'"):
        tasks.get("piqa").record({"instruction": "x", "answer": "solution3"}, "f", 1)


def test_names_do_not_mind_capitals_and_groups_unfold_once() -> None:
    assert tasks.get("arc_easy") is tasks.get("ARC-Easy") and tasks.get("siqa").name == "social_i_qa"
    assert [task.name for task in tasks.select("svamp, arithmetic-4")] == ["SVAMP", "gsm8k", "AQuA", "mawps"]


def test_the_hub_is_asked_for_the_published_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.append((path, name, split, revision))
        return [{"question": "is it so", "answer": True, "passage": ""}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (record,) = tasks.get("boolq").load()
    assert asked == [("google/boolq", None, "validation", None)]
    assert (record.source, record.gold) == ("google/boolq (validation)", "true")


def test_a_hub_that_cannot_be_reached_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'google/boolq' on the Hub\nlong story")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        GraftError, match=r"'boolq' cannot be read from the hub.*Couldn't reach.*Hub\. Name its folder.*--data"
    ):
        tasks.get("boolq").load()
