"""Classification of a text or of a pair, as in GLUE (Wang et al. 2018, arXiv 1804.07461), from TSV, CSV, JSON or the hub.

One raw row (SST-2/dev.tsv, and nyu-mll/glue on the hub, where the label is a number):

    sentence	label
    it 's a charming and often affecting journey . 	1

The texts of a row are its columns `sentence`, `text`, `sentence1`, `sentence2` and so on. CoLA's files have no header; their
columns are source, label, the author's mark and sentence. The task `classification` reads any file of this form that has words
as labels. The label -1, in the hidden test splits, means that the row has no answer.
"""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

from graft.data.file_readers import Row, read_rows
from graft.evaluation.tasks.base import ParsedRow, Task
from graft.evaluation.tasks.sources import Hub
from graft.evaluation.tasks.wording import FixedChoices

_TEXTS = ("sentence", "text", "question", "question1", "question2", "premise", "hypothesis", "sentence1", "sentence2",
          "#1 String", "#2 String")  # fmt: skip
_LABELS = ("label", "gold_label", "score", "is_duplicate", "Quality")
_ENTAILMENT = ("entailment", "not entailment")


def convert(row: Row, classes: tuple[str, ...] = ()) -> ParsedRow:
    """Parse a row: its texts, with the names of their columns if there are several, and the name of its class."""
    texts = [(name, row[name]) for name in row if name in _TEXTS]
    if not texts:
        raise KeyError(" or ".join(_TEXTS))
    label = next((row[name] for name in _LABELS if name in row), None)
    question = texts[0][1] if len(texts) == 1 else "\n".join(f"{name}: {text}" for name, text in texts)
    return ParsedRow(question, _class_name(label, classes), classes)


def _class_name(label: object, classes: tuple[str, ...]) -> str | None:
    text = "" if label is None else str(label).strip()
    if classes and text.lstrip("-").isdigit():
        return None if int(text) < 0 else classes[int(text)]
    return text.replace("_", " ") if classes else text


def headless_rows(file: Path, columns: tuple[str, ...]) -> list[Row]:
    """Read the rows of a TSV file without a header. A file that has one is read as usual."""
    if file.suffix.lower() != ".tsv":
        return read_rows(file)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if rows and columns[-1] in rows[0]:
        return read_rows(file)
    return [dict(zip(columns, row, strict=False)) for row in rows]


def _glue(
    name: str, folder: str, classes: tuple[str, ...], *metrics: str, dev: str = "dev", split: str = "validation"
) -> Task:
    """Define a set of GLUE. In the official download its file is <folder>/<dev>.tsv."""
    listed = FixedChoices(
        "", lead="Please choose the correct class.\n\n", tail=f"\n\nAnswer format: {'/'.join(classes)}", choices=classes
    )
    reader = partial(headless_rows, columns=("source", "label", "mark", "sentence")) if name == "cola" else read_rows
    return Task(
        name, "class" if classes else "score", partial(convert, classes=classes), Hub("nyu-mll/glue", split, name),
        files=(f"{folder}/{dev}.tsv", f"{name}/{dev}.tsv"), wording=listed if classes else None, metrics=metrics,
        ranking="instruction", reader=reader,
    )  # fmt: skip


GLUE = (
    _glue("cola", "CoLA", ("unacceptable", "acceptable"), "matthews"),
    _glue("sst2", "SST-2", ("negative", "positive")),
    _glue("mrpc", "MRPC", ("not equivalent", "equivalent"), "f1"),
    _glue("qqp", "QQP", ("not duplicate", "duplicate"), "f1"),
    _glue("stsb", "STS-B", (), "pearson", "spearman"),
    _glue("mnli", "MNLI", ("entailment", "neutral", "contradiction"), dev="dev_matched", split="validation_matched"),
    _glue("qnli", "QNLI", _ENTAILMENT),
    _glue("rte", "RTE", _ENTAILMENT),
    _glue("wnli", "WNLI", ("not entailment", "entailment")),
)
ANY = Task("classification", "class", convert, metrics=("f1", "matthews"), files=("classification/test.tsv",))
