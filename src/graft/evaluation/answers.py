"""The metrics that decide whether an answer to a data file's question is right.

`numeric` compares by value the number that the answer gives with that of the reference: 72 equals 72.0 and 1,234 equals 1234,
and 0.5 equals 1/2. `reading` says which number a text gives. An answer without a number is unextractable.

`exact` compares the texts after Unicode normalisation (NFKC), case folding and joining of white space, and without a period
at the end. An empty answer is unextractable. `text` compares in the same way, and answers are scored as free text besides. No
metric sees thoughts, and an answer that ends within one is unextractable.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Literal

from graft.evaluation.reading.numbers import is_number, read_number, written
from graft.evaluation.reading.thoughts import without_thoughts

Metric = Literal["exact", "numeric", "text"]
VERSION = 2
"""Increased with every change to what is extracted, because it changes scores. A part of the hash of data files."""


def normalised(text: str) -> str:
    """Return the form in which `exact` compares texts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def extract(text: str, metric: Metric) -> str | None:
    """Return the part of an answer that is compared, as text; None if there is none."""
    if metric != "numeric":
        return normalised(without_thoughts(text) or "") or None
    number = read_number(text)
    return None if number is None else written(number)


def value_of(number: str) -> float:
    """Return the value of a number as `extract` writes it, which may be a fraction."""
    top, _, bottom = number.partition("/")
    return float(top) / float(bottom or 1)


def choose_metric(wanted: Literal["auto", "exact", "numeric", "text"], references: Iterable[str]) -> Metric:
    """Choose the metric of a data set: `auto` becomes numeric if every reference is a number, else exact.

    A worked answer with its number in the last line after ####, as in GSM8K, is one too; a text that holds a number is not.
    """
    if wanted != "auto":
        return wanted
    return "numeric" if all(is_number(reference.rpartition("####")[2]) for reference in references) else "exact"
