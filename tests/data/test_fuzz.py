"""Broken data files of every kind: each is read as it is written, or refused with an error of ours, within seconds.

A whole file must give back its texts, character by character. A damaged one may be refused; what is read of it must not crash later. The
short campaign runs by default, the long one (more than a thousand files) with the slow tests.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from graft.config.data import DataConfig, SourceConfig
from graft.data.preparing import prepare
from graft.data.reading import read
from graft.errors import GraftError

SECONDS = 10.0
PIECES = [
    "a",
    "the cat",
    " ",
    "\n",
    "\t",
    ",",
    ";",
    '"',
    '""',
    "'",
    "\\",
    "{",
    "}",
    "[",
    "]",
    ":",
    "é",
    "漢",
    "😀",
    "nan",
    "NA",
    "null",
    "1.0",
    "1e-05",
    "007",
    "-0",
    "</s>",
    "<s>",
    "<|im_end|>",
    "{{ x }}",
    "{% if %}",
    "\u200b",
    "\u2028",
    "\x0b",
    "\x1b[31m",
    "%s",
    "\ufeff",
    "#",
    "---",
    "True",
]
SHAPES = {
    "completion": ("prompt", "completion"),
    "question": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "pairs": ("prompt", "chosen", "rejected"),
    "labels": ("text", "label"),
    "kto": ("prompt", "completion", "label"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}
TASKS = {"pairs": "preference", "labels": "classification", "kto": "preference"}
KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz", ".csv.gz", "folder")
EXTRA_KEYS: list[tuple[str, Any]] = [
    ("tools", [{"name": "f"}]),
    ("tools", "not json"),
    ("weight", 0),
    ("weight", "x"),
    ("train", False),
    ("loss_mask", [1]),
    ("history", [["a", "b"]]),
    ("history", 3),
    ("system", "s"),
    ("system", {"a": 1}),
    ("images", ["x.png"]),
    ("label", True),
    ("label", None),
    ("id", 7),
    ("input", ["x"]),
    ("context", "c"),
    ("messages", "hi"),
    ("messages", []),
    ("prompt", None),
    ("chosen", {}),
    ("text", 1.5),
    ("label", float("nan")),
    ("functions", {}),
]


def said(rng: np.random.Generator) -> str:
    """A text that begins and ends with a letter, so that no reader may trim it."""
    return "x" + "".join(rng.choice(PIECES, size=rng.integers(0, 6))) + "y"


def row_of(rng: np.random.Generator, shape: str) -> tuple[dict[str, Any], list[str]]:
    """A row, and the texts that must come back."""
    if shape in ("messages", "sharegpt"):
        texts = [said(rng), said(rng)]
        who, what, names = ("role", "content", ("user", "assistant"))
        if shape == "sharegpt":
            who, what, names = ("from", "value", ("human", "gpt"))
        return {SHAPES[shape][0]: [{who: name, what: text} for name, text in zip(names, texts, strict=True)]}, texts
    row: dict[str, Any] = {name: said(rng) for name in SHAPES[shape]}
    if shape == "kto":
        row["label"] = bool(rng.integers(2))
    return row, [value for value in row.values() if isinstance(value, str)]


def content_of(rows: list[dict[str, Any]], kind: str, columns: tuple[str, ...]) -> bytes:
    if kind == ".json":
        return json.dumps(rows, ensure_ascii=False).encode()
    if kind.startswith(".jsonl"):
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == ".parquet":
        stream = io.BytesIO()
        pandas.DataFrame(rows).to_parquet(stream)
        return stream.getvalue()
    text = io.StringIO()
    if kind == ".txt":
        return "".join(row["text"].replace("\n", " ") + "\n" for row in rows).encode()
    names = list(dict.fromkeys(name for row in rows for name in row))
    dialect = ("\t", csv.QUOTE_ALL) if kind == ".tsv" else (",", csv.QUOTE_MINIMAL)
    writer = csv.DictWriter(text, names, delimiter=dialect[0], quoting=dialect[1])
    writer.writeheader()
    writer.writerows([{k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows])
    return text.getvalue().encode()


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """Cut, flip, repeat or insert bytes."""
    at, length = int(rng.integers(0, max(1, len(content)))), int(rng.integers(1, 40))
    odd = [b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b'"', b"\r", b"\\ud800", b"{", b"]", b",,", b"\t\t", b"\n\n"]
    odd += [b"NaN", b"1e999", b"\xef\xbb\xbf"]
    choices = [
        lambda: content[:at],
        lambda: content[:at] + content[at + length :],
        lambda: content[:at] + bytes(rng.integers(0, 256, length, dtype=np.uint8)) + content[at:],
        lambda: content[:at] + odd[rng.integers(len(odd))] + content[at:],
        lambda: content[:at] + content[at : at + length] * 3 + content[at + length :],
        lambda: content + content[:at],
        lambda: content.decode(errors="ignore").encode("utf-16"),
        lambda: content.decode(errors="ignore").encode("latin-1", errors="ignore"),
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: b"",
    ]
    return choices[rng.integers(len(choices))]()


def one(seed: int, folder: Path, tokenizer: Any) -> str:
    """Make one file, read it and prepare it; "read", or "refused"."""
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    shape = list(SHAPES)[rng.integers(len(SHAPES))]
    if kind == ".txt":
        rows = [{"text": said(rng).replace("\n", " ")} for _ in range(4)]
        wanted = [row["text"] for row in rows]
    else:
        made = [row_of(rng, shape) for _ in range(int(rng.integers(2, 6)))]
        rows, wanted = [row for row, _ in made], [text for _, texts in made for text in texts]
    task = TASKS.get(shape, "causal") if kind != ".txt" else "causal"
    whole = rng.random() < 0.4
    if not whole and rng.random() < 0.5 and kind != ".txt":
        key, value = EXTRA_KEYS[rng.integers(len(EXTRA_KEYS))]
        rows[rng.integers(len(rows))][key] = value
    suffix = ".jsonl" if kind == "folder" else kind
    try:
        content = content_of(rows, suffix, SHAPES[shape])
    except (ValueError, TypeError, OSError, NotImplementedError):
        return "refused"  # what the writer refuses (a column of several types in Parquet) is no file
    content = content if whole else damaged(rng, content)
    content = gzip.compress(content) if suffix.endswith(".gz") else content
    path = folder / f"{seed}{suffix}"
    if kind == "folder":
        path = folder / f"{seed}"
        path.mkdir()
        (path / "rows.jsonl").write_bytes(content)
        others = {
            "dataset_info.json": b"{}",
            ".hidden.jsonl": b"\xff",
            "test.jsonl": content,
            "notes.md": b"#",
            "other.csv": b"a,b\n1,2\n",
        }
        for name in rng.choice(list(others), size=rng.integers(0, 3), replace=False):
            (path / name).write_bytes(others[name])
        if rng.random() < 0.2:
            os.mkfifo(path / "pipe.jsonl")
        whole = whole and sorted(file.name for file in path.iterdir() if file.suffix == ".jsonl") == ["rows.jsonl"]
        whole = whole and not (path / "other.csv").exists()
    else:
        path.write_bytes(content)
    start = time.monotonic()
    try:
        samples = read(SourceConfig(path=str(path)), task=task)
        if whole:
            found = [m["content"] for s in samples for m in (*s.messages, *s.rejected[s.asked :])]
            assert found == wanted, f"seed {seed}: the text of a whole {kind} file changed"
        settings = {"train": str(path), "task": task, "cache": False, "max_length": 4000}
        settings |= {} if task == "classification" else {"template": "plain"}
        prepare(DataConfig.model_validate(settings), tokenizer)
        outcome = "read"
    except GraftError as error:
        assert str(error) and not whole or _is_no_text(error), (
            f"seed {seed}: a whole {kind} file of {shape} is refused: {error}"
        )
        outcome = "refused"
    assert time.monotonic() - start < SECONDS, f"seed {seed}: it took {time.monotonic() - start:.0f} s"
    return outcome


def _is_no_text(error: GraftError) -> bool:
    """Whether a whole file is refused for what it says, and not for how it is written."""
    return any(
        words in str(error)
        for words in ("two or more classes", "out of turn", "cannot continue a text", "no token is left")
    )


def campaign(seeds: range, folder: Path, tokenizer: Any) -> dict[str, int]:
    outcomes = [one(seed, folder, tokenizer) for seed in seeds]
    return {name: outcomes.count(name) for name in ("read", "refused")}


def test_some_broken_files(tmp_path: Path, gpt: Any) -> None:
    found = campaign(range(180), tmp_path, gpt)
    assert found["read"] > 60 and found["refused"] > 30


@pytest.mark.slow
def test_many_broken_files(tmp_path: Path, gpt: Any, llama: Any) -> None:
    found = [campaign(range(180, 1200), tmp_path, gpt), campaign(range(1200, 1800), tmp_path, llama)]
    assert sum(each["read"] for each in found) > 500 and sum(each["refused"] for each in found) > 300
