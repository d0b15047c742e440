"""Files as people have them: numbers as written, tables of other programs, encodings, gzip, long cells; each odd one with a word."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os

import numpy as np
import pandas
import pytest

from graft.config.data import SourceConfig
from graft.data.file_readers import read_rows
from graft.data.reading import read
from graft.errors import GraftError


def answers(path, task="causal", **source):
    return [sample.answer for sample in read(SourceConfig(path=str(path), **source), task=task)]


@pytest.mark.parametrize(
    "written", ["0.00001", "1.10", "1e-05", "1E5", "-0", "-0.0", "12345678901234567890.5", "9" * 5000]
)
def test_a_json_number_stays_as_it_is_written(tmp_path, written):
    for name, text in (
        ("a.jsonl", '{"prompt": "a", "completion": %s}\n'),
        ("a.json", '[{"prompt": "a", "completion": %s}]'),
    ):
        (tmp_path / name).write_text(text % written)
        assert answers(tmp_path / name) == [written]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_not_a_number_is_an_empty_cell(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    rows = [
        {"prompt": "a", "input": float("nan"), "completion": 1.5},
        {"prompt": "a", "input": 2.0, "completion": float("nan")},
    ]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pandas.DataFrame(rows).to_parquet(path)
    with pytest.raises(GraftError, match="row 2, field 'completion': is missing"):
        read(str(path))
    assert read(SourceConfig(path=str(path), limit=1))[0].prompt == ({"role": "user", "content": "a"},)
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": NaN}\n')
    with pytest.raises(GraftError, match="row 1, field 'label': is missing"):
        read(str(tmp_path / "b.jsonl"), task="classification")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "completion": -Infinity}\n')
    with pytest.raises(GraftError, match="row 1, field 'completion': is infinite"):
        read(str(tmp_path / "c.jsonl"))


def test_labels_in_csv_stay_as_they_are_written(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,1.0\nb,1\nc,nan\n")
    assert answers(tmp_path / "a.csv", "classification") == ["1.0", "1", "nan"]


FRAME = pandas.DataFrame({"prompt": ["1", 'say "hi"', "a\tb"], "completion": ["2,3", "line\nend", ""]})


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("sep", [",", "\t", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_what_pandas_writes_is_read_back(tmp_path, index, sep, quoting, encoding, packed):
    path = tmp_path / f"a.{'tsv' if sep == chr(9) else 'csv'}{packed}"
    frame = FRAME.assign(prompt=["é", *FRAME.prompt[1:]])
    frame.to_csv(path, index=index, sep=sep, quoting=quoting, encoding=encoding)
    given = {"delimiter": sep} if sep in ";|" else {}
    given |= {"encoding": encoding} if encoding == "latin-1" else {}
    rows = [(s.prompt[0]["content"], s.answer) for s in read(SourceConfig.model_validate({"path": str(path), **given}))]
    assert rows == list(frame.itertuples(index=False, name=None))


def test_a_table_without_a_header_gets_names(tmp_path):
    (tmp_path / "a.csv").write_text("hi,yo\nbye,ok\n")
    assert answers(tmp_path / "a.csv", columns=["prompt", "completion"]) == ["yo", "ok"]
    with pytest.raises(
        GraftError, match=r"If the file has no header, name its columns .*columns: \[prompt, completion\]"
    ):
        read(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "prompt;completion\na;b\n", 'The header holds ";": name it in the source, .*delimiter: ";"'),
        ("a.csv", "prompt,completion,prompt\na,b,c\n", "names the column 'prompt' twice"),
        ("a.csv", "a,a\nb,c\n", "names the column 'a' twice. If the file has no header"),
        ("a.csv", 'prompt,completion\n"a"b,c\n', "line 2. A quotation mark in a cell is written twice"),
        ("a.csv", 'prompt,completion\na,"b\n', "unexpected end of data"),
        ("a.csv", b"prompt,completion\na\x00,b\n", "line 2 holds a NUL"),
        (
            "a.csv",
            b"prompt,completion\ncaf\xe9,b\n",
            "line 2 holds the byte 0xe9, which is not utf-8. Name its encoding",
        ),
        ("a.txt", b"\x7fELF\x00\x00", "holds a NUL"),
        ("a.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n', "names the key 'prompt' twice: line 1"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json.gz", b"\x1f\x8b\x08\x00oops", "cannot be read as JSON"),
        ("a.csv.gz", b"prompt,completion\n", "cannot be read as CSV: Not a gzipped file"),
        ("a.parquet", b"PAR1oops", "cannot be read as Parquet"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(GraftError, match=said):
        read(str(path))


@pytest.mark.parametrize(
    ("name", "given"),
    [("a.jsonl", {"delimiter": ";"}), ("a.parquet", {"encoding": "latin-1"}), ("a.json", {"columns": ["a"]}), ("a.txt", {"quotes": True})],
)  # fmt: skip
def test_a_setting_without_effect_on_a_file_is_refused(tmp_path, name, given):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(GraftError, match=f"`{next(iter(given))}` has no effect on"):
        read(SourceConfig.model_validate({"path": str(tmp_path / name), **given}))


def test_a_truncated_gzip_file_is_named(tmp_path):
    packed = gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(GraftError, match="cannot be read as JSON lines: Compressed file ended"):
        read(str(tmp_path / "a.jsonl.gz"))


def test_cells_may_be_long(tmp_path):
    long, before = "a b " * 40_000, csv.field_size_limit()
    for name, text in (("a.csv", f"prompt,completion\n{long},x\n"), ("a.tsv", f"prompt\tcompletion\n{long}\tx\n")):
        (tmp_path / name).write_text(text)
        assert read(str(tmp_path / name))[0].prompt[0]["content"] == long
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("cell", ['"no"', "\"'Tis so", '"', 'so "good"', '""'])
def test_tsv_without_marks_keeps_them(tmp_path, cell):
    (tmp_path / "a.tsv").write_text(f"prompt\tcompletion\n{cell}\tyes\nplain\tno\n")
    assert read(str(tmp_path / "a.tsv"))[0].prompt[0]["content"] == cell


def test_a_text_file_is_one_row_per_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\r\n")
    assert answers(tmp_path / "a.txt") == ["one", "two"]


def test_parquet_keeps_only_what_its_rows_hold(tmp_path):
    call = lambda **arguments: {"function": {"name": "f", "arguments": arguments}}  # noqa: E731
    said = [{"content": None, "tool_calls": [call(x=1)]}, {"content": "b", "tool_calls": [call(y="2")]}]
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", **turn}]} for turn in said]
    frame = pandas.DataFrame(rows)
    frame.index = pandas.Index(["p", "q"])
    frame.to_parquet(tmp_path / "a.parquet")
    first, second = read(str(tmp_path / "a.parquet"))
    assert first.messages[1]["extra"]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert second.messages[1]["extra"]["tool_calls"][0]["function"]["arguments"] == {"y": "2"}
    frame = pandas.DataFrame({"messages": [json.dumps(row["messages"]) for row in rows], "n": np.arange(2)})
    frame.to_parquet(tmp_path / "b.parquet")
    assert [s.messages for s in read(str(tmp_path / "b.parquet"))] == [s.messages for s in (first, second)]


def test_a_pipe_ends_with_a_word(tmp_path):
    for name in ("a.jsonl", "pipe"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(GraftError, match="is a pipe or a device"):
            read(str(tmp_path / name))
        with pytest.raises(GraftError, match="is a pipe or a device"):
            read_rows(tmp_path / name) if name == "a.jsonl" else read(str(tmp_path / name))


def rows_of(name):
    return "".join(json.dumps({"prompt": f"{name}{number}", "completion": "x"}) + "\n" for number in range(2))


def folder_of(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(content)
    return str(tmp_path)


@pytest.mark.parametrize("held", ["test.jsonl", "gsm8k_test.jsonl", "holdout.json", "math-valid.jsonl", "eval.jsonl", "testset.jsonl",
                                  "val2.jsonl", "test/part.jsonl", "heldout.jsonl.gz"])  # fmt: skip
@pytest.mark.parametrize("own", ["math.jsonl", "train.jsonl"])
def test_files_of_another_split_are_never_mixed_in(tmp_path, held, own):
    folder = folder_of(tmp_path, {own: rows_of("own"), held: rows_of("held")})
    if held.endswith(".gz"):
        (tmp_path / held).write_bytes(gzip.compress(rows_of("held").encode()))
    with pytest.raises(GraftError, match="split"):
        read(folder)
    found = [sample.prompt[0]["content"] for sample in read(SourceConfig(path=folder, split="train"))]
    assert found == ["own0", "own1"]


def test_a_folder_of_held_out_files_alone_is_no_training_data(tmp_path):
    from graft.config.data import DataConfig
    from graft.data.splits import samples_of

    folder = folder_of(tmp_path, {"test.jsonl": rows_of("held")})
    with pytest.raises(GraftError, match=r"named as held out \(test\).*split: test"):
        samples_of(DataConfig(train=folder))
    assert samples_of(DataConfig.model_validate({"train": {"path": folder, "split": "test"}}))


@pytest.mark.parametrize("other", [".ipynb_checkpoints/train-checkpoint.jsonl", "._train.jsonl", "dataset_info.json", "state.json",
                                   "cache/a.jsonl", ".hidden/b.csv", "__pycache__/c.json",
                                   "train (copy).jsonl", "train - Copy (2).jsonl", "Copy of train.jsonl", "train (1).jsonl",
                                   "train~.jsonl"])  # fmt: skip
def test_what_is_no_data_is_left_out_by_name(tmp_path, other):
    folder = folder_of(tmp_path, {"train.jsonl": rows_of("train"), other: "{}", "README.md": "#"})
    unread: dict[str, list[str]] = {}
    assert len(read(folder, unread=unread)) == 2
    assert unread == {folder: [other]}


def test_a_folder_without_data_says_what_it_left_out(tmp_path):
    folder = folder_of(tmp_path, {"data-00000-of-00001.arrow": "ARROW1", "dataset_info.json": "{}"})
    with pytest.raises(GraftError, match="holds no data file .*left out: dataset_info.json"):
        read(folder)


def test_a_folder_of_unlike_files_is_refused(tmp_path):
    alpaca = json.dumps({"instruction": "a", "output": "b"}) + "\n"
    folder = folder_of(tmp_path, {"a.jsonl": rows_of("a"), "b.jsonl": alpaca})
    with pytest.raises(
        GraftError, match=r"unlike files: .*a.jsonl has prompt, completion, .*b.jsonl has instruction, output"
    ):
        read(folder)


def test_a_huge_folder_ends_with_a_word(tmp_path, monkeypatch):
    from graft.data import folders

    monkeypatch.setattr(folders, "MOST", 3)
    with pytest.raises(GraftError, match="holds more than 3 files and folders"):
        read(folder_of(tmp_path, {f"{number}.jsonl": rows_of("a") for number in range(5)}))


def test_csv_agrees_with_the_library_on_quoted_tables(tmp_path):
    rng = np.random.default_rng(0)
    parts = ["a", '"', ",", "\n", " ", "é", "\t", "''", "1.0"]
    for number in range(60):
        cells = ["".join(rng.choice(parts, size=rng.integers(1, 6))) + "x" for _ in range(6)]
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter=",\t"[number % 2])
        writer.writerow(["prompt", "completion"])
        writer.writerows([cells[:2], cells[2:4], cells[4:], ['doubled ""', "tab\t"]])
        path = tmp_path / ("a.csv" if number % 2 == 0 else "a.tsv")
        path.write_text(stream.getvalue(), newline="")
        found = [cell for s in read(str(path))[:3] for cell in (s.prompt[0]["content"], s.answer)]
        assert found == cells
