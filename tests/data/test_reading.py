"""Every shape and kind of file, and every mistake a user can make with them."""

from __future__ import annotations

import csv
import json
import socket

import datasets
import pytest

from graft.config.data import SourceConfig
from graft.data import reading
from graft.data.folders import content_hash
from graft.data.reading import read, read_as_found
from graft.errors import GraftError

ALPACA = {"instruction": "Add.", "input": "2 and 3", "output": "5"}


def write(path, rows):
    """A JSON or JSONL file, by its name."""
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return str(path)


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (ALPACA, [{"role": "user", "content": "Add.", "input": "2 and 3"}, {"role": "assistant", "content": "5"}]),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, turns("Hi", "Yo")),
        ({"instruction": "Hi", "output": "Yo"}, turns("Hi", "Yo")),
        (
            {"instruction": "Who?", "context": "Bob.", "response": "Bob", "category": "qa"},
            [{"role": "user", "content": "Who?", "input": "Bob."}, {"role": "assistant", "content": "Bob"}],
        ),
        ({"messages": turns("a", "b", "c", "d")}, turns("a", "b", "c", "d")),
        (
            {"messages": [{"role": "developer", "content": "s"}, *turns("a", "b")]},
            [{"role": "system", "content": "s"}, *turns("a", "b")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            turns("ab"),
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, turns("a", "b")),
        (
            {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            [{"role": "system", "content": "s"}, *turns("a", "b")],
        ),
        ({"conversations": turns("a", "b")}, turns("a", "b")),
        ({"prompt": "a", "completion": " b"}, turns("a", " b")),
        ({"prompt": turns("a"), "completion": [{"role": "assistant", "content": "b"}]}, turns("a", "b")),
        ({"question": "a", "answer": "b"}, turns("a", "b")),
        ({"question": "2 + 3", "answer": 5}, turns("2 + 3", "5")),
        ({"prompt": "a", "response": "b"}, turns("a", "b")),
        ({"text": "Once."}, [{"role": "assistant", "content": "Once."}]),
    ],
)
def test_every_shape_is_told_from_its_columns(tmp_path, name, row, messages):
    path = write(tmp_path / name, [row, row])
    samples = read(path)
    assert [list(sample.messages) for sample in samples] == [messages, messages]
    assert [(sample.source, sample.row) for sample in samples] == [(path, 1), (path, 2)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_numbers_among_texts_are_written_out_and_leave_the_texts_alone(tmp_path, name):
    path = write(tmp_path / name, [{"prompt": "a", "completion": value} for value in ("x", 5, -1.5)])
    assert [sample.answer for sample in read(path)] == ["x", "5", "-1.5"]


def test_a_json_file_may_hold_one_row_per_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d", "note": [1]}\n')
    assert [list(sample.messages) for sample in read(str(path))] == [turns("a", "b"), turns("c", "d")]


def test_a_field_that_the_first_row_lacks_is_used_where_it_is(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}, ALPACA])
    assert [sample.prompt[0].get("input") for sample in read(path)] == [None, "2 and 3"]


def test_csv_cells_are_text_as_they_stand(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt", "completion"], ["007", "NA"], ['say "hi",\nnow', "1.50"]])
    assert [list(sample.messages) for sample in read(str(path))] == [
        turns("007", "NA"),
        turns('say "hi",\nnow', "1.50"),
    ]


def test_tsv_has_no_quoting(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('question\tanswer\n"\'Tis so\tyes\nplain\t"no"\n')
    assert [list(sample.messages) for sample in read(str(path))] == [turns("\"'Tis so", "yes"), turns("plain", '"no"')]


def test_parquet_is_read(tmp_path):
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list([{"messages": turns("a", "b")}, {"messages": turns("c", "d", "e", "f")}]).to_parquet(
        path
    )
    assert [list(sample.messages) for sample in read(path)] == [turns("a", "b"), turns("c", "d", "e", "f")]


def test_fields_rename_columns_from_the_name_expected_to_the_name_in_the_data(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "a", "r": "b"}])
    assert list(read(SourceConfig(path=path, fields={"prompt": "q", "completion": "r"}))[0].messages) == turns("a", "b")
    with pytest.raises(GraftError, match="names the column 'qq', but the data have no such column; they have q, r"):
        read(SourceConfig(path=path, fields={"prompt": "qq"}))


def test_fields_win_over_a_column_of_that_name(tmp_path):
    path = write(tmp_path / "a.json", [{"instruction": "a", "output": "", "answer": "b"}])
    assert read(SourceConfig(path=path, fields={"output": "answer"}))[0].answer == "b"


def test_a_format_can_be_asked_for(tmp_path):
    path = write(tmp_path / "a.json", [{**ALPACA, "question": "q", "answer": "a"}])
    assert read(path)[0].prompt[0]["content"] == "Add."
    assert read(SourceConfig(path=path, format="completion"))[0].prompt[0]["content"] == "q"
    with pytest.raises(GraftError, match="do not fit the format 'messages'"):
        read(SourceConfig(path=path, format="messages"))


def test_a_file_name_is_taken_as_it_stands(tmp_path):
    assert len(read(write(tmp_path / "a[1] of 2.jsonl", [ALPACA, ALPACA]))) == 2


def test_reading_a_local_file_asks_nothing_of_the_network(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: asked.append(args) or [])
    read(write(tmp_path / "a.json", [ALPACA]))
    assert not asked


def test_limit_reads_from_the_start(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": str(number), "completion": "x"} for number in range(9)])
    assert [sample.prompt[0]["content"] for sample in read(SourceConfig(path=path, limit=3))] == ["0", "1", "2"]


def test_globs_and_folders_are_read_file_by_file(tmp_path):
    for name in ("b.jsonl", "a.json"):
        write(tmp_path / name, [{"prompt": name, "completion": "x"}] * 2)
    for path in (str(tmp_path), str(tmp_path / "*.json*")):
        assert [(sample.prompt[0]["content"], sample.row) for sample in read(path)] == [
            ("a.json", 1), ("a.json", 2), ("b.jsonl", 1), ("b.jsonl", 2)]  # fmt: skip
    assert len(read(SourceConfig(path=str(tmp_path), limit=3))) == 3


def test_a_folder_of_several_splits_needs_a_choice(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "test.jsonl"):
        write(tmp_path / name, [{"prompt": name, "completion": "x"}])
    with pytest.raises(GraftError, match=r"holds several splits \(test, train\)"):
        read(str(tmp_path))
    assert len(read(SourceConfig(path=str(tmp_path), split="train"))) == 2
    with pytest.raises(GraftError, match="no data file of the split 'validation'"):
        read(SourceConfig(path=str(tmp_path), split="validation"))


def test_prompts_without_answers_are_read_where_none_is_needed(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert [list(sample.messages) for sample in read(path, need_answers=False)] == [turns("a"), turns("b")]
    with pytest.raises(GraftError, match="fit no known format"):
        read(path)
    alpaca = write(tmp_path / "b.jsonl", [{"instruction": "a", "output": "x"}, {"instruction": "b"}])
    assert [sample.answer for sample in read(alpaca, need_answers=False)] == ["x", None]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a", "output": "b"}, {"instruction": "a"}], "row 2, field 'output': is missing"),
        ([{"prompt": "a", "completion": ["b"]}], "row 1, field 'completion': must be text, but is a list"),
        ([{"prompt": "a", "completion": True}], "row 1, field 'completion': must be text, but is true or false"),
        ([{"messages": []}], "row 1, field 'messages': must be a list of {role, content}, but is an empty list"),
        ([{"messages": "hi"}], "row 1, field 'messages': must be a list of {role, content}, but is text"),
        (
            [{"messages": turns("a", "b")}, {"messages": [{"role": "robot", "content": "x"}]}],
            r"row 2, field 'messages\[0\].role': must be one of system, user, assistant, tool, developer, function, but is 'robot'",
        ),
        ([{"messages": [{"role": "user", "content": None}]}], r"row 1, field 'messages\[0\].content': is missing"),
        (
            [{"messages": [{"role": "user", "content": [{"type": "image_url", "text": None}]}]}],
            r"row 1, field 'messages\[0\].content\[0\]': only parts of type 'text'",
        ),
        (
            [{"conversations": [{"from": "me", "value": "x"}]}],
            r"row 1, field 'conversations\[0\].from': must be one of human, .* but is 'me'",
        ),
    ],
)
def test_a_row_of_the_wrong_shape_is_named_with_its_field(tmp_path, rows, message):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(GraftError, match=message):
        read(path)


def test_unknown_columns_are_listed_with_the_shapes_that_are_known(tmp_path):
    path = write(tmp_path / "a.json", [{"mr": "a", "ref": "b"}])
    with pytest.raises(
        GraftError, match=r"the columns mr, ref(.|\n)*alpaca(.|\n)*sharegpt(.|\n)*fields: {instruction: mr}"
    ):
        read(path)


def test_a_missing_file_is_an_error_with_the_nearest_name(tmp_path):
    write(tmp_path / "train.jsonl", [ALPACA])
    with pytest.raises(GraftError, match=r"no such file. Did you mean '.*train.jsonl'"):
        read(str(tmp_path / "trian.jsonl"))
    with pytest.raises(GraftError, match="The folder .*nowhere does not exist either"):
        read(str(tmp_path / "nowhere" / "a.jsonl"))
    with pytest.raises(GraftError, match="no data file matches"):
        read(str(tmp_path / "*.csv"))
    (tmp_path / "notes.doc").touch()
    with pytest.raises(GraftError, match=r"unknown file type '\.doc', expected \.json, \.jsonl"):
        read(str(tmp_path / "notes.doc"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "is empty"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "prompt,completion\n", "holds no rows"),
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt" "a"}\n', "line 2 column 11"),
        ("a.json", "[{]", "cannot be read as JSON"),
        ("a.json", '{"data": [{"prompt": "a"}]}', "holds one object; .*its key 'data' holds a list"),
        ("a.json", "3", "type int; it must hold a list of rows"),
        ("a.json", '["a"]', 'row 1: must be an object with named fields, but is "a"'),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.csv", "prompt,completion\na,b\na,b,c\n", "row 2: has 3 cells, but the header names 2 columns"),
        ("a.csv", b"\xff\xfe\x00", "cannot be read as CSV"),
        ("a.parquet", b"nonsense", "cannot be read as Parquet"),
    ],
)
def test_an_empty_or_broken_file_is_an_error(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(GraftError, match=message):
        read(str(path))


def test_a_hub_name_is_loaded_with_its_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "a", "answer": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = SourceConfig(path="openai/gsm8k", name="main", split="test")
    samples = read(source)
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert samples[0].source == "openai/gsm8k" and list(samples[0].messages) == turns("a", "b")
    assert content_hash(source) is None


def test_a_hub_name_that_cannot_be_loaded_is_an_error(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("no access")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(GraftError, match="there is no such file, and loading it from the hub failed: no access"):
        read("someone/something")


def test_the_content_hash_follows_the_bytes(tmp_path):
    source = SourceConfig(path=write(tmp_path / "a.json", [ALPACA]))
    first = content_hash(source)
    assert content_hash(source) == first
    write(tmp_path / "a.json", [ALPACA, ALPACA])
    assert content_hash(source) != first


@pytest.mark.parametrize(
    ("path", "rows"),
    [  # rows as counted in the README of the shared data
        ("alpaca/alpaca_random_9k.json", 9229),
        ("dolly/dolly_3k.json", 2996),
        ("gsm8k/train.jsonl", 7473),
        ("chatdoctor/chatdoctor5k.json", 5452),
        ("llm_adapters/boolq/train.json", 9427),
    ],
)
def test_real_data_are_read_whole(shared, path, rows):
    assert len(read(str(shared / "data" / path))) == rows


def test_one_reading_tells_pairs_from_conversations(tmp_path, monkeypatch):
    pair = {"prompt": "Hi", "chosen": "Yo", "rejected": "No"}
    opened, read_rows = [], reading.read_rows
    monkeypatch.setattr(reading, "read_rows", lambda file, *how: (opened.append(file.name), read_rows(file, *how))[1])
    for number, row in enumerate([pair, pair, ALPACA]):
        write(tmp_path / f"{number}.jsonl", [row, row])
    both = SourceConfig(path=str(tmp_path / "[01].jsonl"), limit=3)
    assert read_as_found(both) == (read(both, task="preference"), True) and len(read(both, task="preference")) == 3
    plain = SourceConfig(path=str(tmp_path / "2.jsonl"))
    opened.clear()
    assert read_as_found(plain) == (read(plain), False)
    assert opened == ["2.jsonl"] * 2  # once by each
    renamed = write(tmp_path / "renamed.json", [{"prompt": "Hi", "better": "Yo", "worse": "No"}])
    source = SourceConfig(path=renamed, fields={"chosen": "better", "rejected": "worse"})
    assert read_as_found(source)[1]
    with pytest.raises(GraftError, match="holds no rows"):
        read_as_found(SourceConfig(path=write(tmp_path / "none.json", [])))
