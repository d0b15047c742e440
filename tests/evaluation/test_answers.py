"""What counts as the answer, case by case."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from graft.evaluation.answers import choose_metric, extract, normalised
from graft.evaluation.reading.numbers import read_number

NUMBERS = [
    ("The answer is 72.", "72"),
    ("#### 72", "72"),
    ("It costs $1,234.50 in all.", "1234.50"),
    ("1,000,000 people", "1000000"),
    ("first 3, then 4, last 5,", "5"),
    ("1,2,3", "3"),
    ("1,2345", "2345"),
    ("-5 degrees", "-5"),
    ("a loss of -$7", "-7"),
    ("a loss of $-7", "-7"),
    ("a loss of $ -7", "-7"),
    ("\u22128", "-8"),
    ("10-4", "4"),
    ("x-4", "4"),
    ("(10)-4", "4"),
    ("2 - 3 = -1", "-1"),
    (".5 of it", "0.5"),
    ("50%", "50"),
    ("3.0", "3"),
    ("007", "7"),
    ("€12", "12"),
    ("He has 12 apples and 3.5 kg.", "3.5"),
    ("3.14.", "3.14"),
]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_the_last_number_of_a_text(text: str, value: str) -> None:
    assert read_number(text) == Fraction(value)


@pytest.mark.parametrize("text", ["", "none", "twelve", "- $ ,."])
def test_a_text_without_a_number_has_none(text: str) -> None:
    assert read_number(text) is None
    assert extract(text, "numeric") is None


@pytest.mark.parametrize(
    ("one", "other"), [("72", "72.0"), ("1,234", "1234"), ("$5.00.", "the answer: 5"), ("0", "-0.0")]
)
def test_equal_values_are_equal_answers(one: str, other: str) -> None:
    assert extract(one, "numeric") == extract(other, "numeric") is not None


@pytest.mark.parametrize(("one", "other"), [("72", "720"), ("0.5", "5"), ("-3", "3"), ("1/3", "0.333")])
def test_other_values_are_other_answers(one: str, other: str) -> None:
    assert extract(one, "numeric") != extract(other, "numeric")


@pytest.mark.parametrize(
    ("one", "other"), [(" Paris.\n", "paris"), ("A  B\tC", "a b c"), ("ﬁne", "FINE"), ("Straße", "STRASSE")]
)
def test_texts_that_differ_in_form_alone_are_equal(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)


def test_an_empty_text_is_no_answer() -> None:
    assert extract(" . ", "exact") is None
    assert extract("Paris or Rome", "exact") != extract("Paris", "exact")


def test_auto_is_numeric_where_every_reference_is_a_number() -> None:
    assert choose_metric("auto", ["4", "-5.5", "3/4", "$1,200", "50%"]) == "numeric"
    assert choose_metric("auto", ["48 + 24 = 72\n#### 72", "#### 4"]) == "numeric"
    assert choose_metric("auto", ["#### 4", "so 5"]) == "exact"
    assert choose_metric("auto", ["4", "yes"]) == "exact"
    assert choose_metric("auto", ["May 3, 2021", "October 30, 2021"]) == "exact"
    assert choose_metric("exact", ["4"]) == "exact"
    assert extract("3/4", "numeric") != extract("1/4", "numeric")


def test_thoughts_are_no_part_of_an_answer() -> None:
    assert extract("<think>Rome? No.</think>\n\nParis.", "exact") == "paris"
    assert extract("<think>Paris", "exact") is None
    assert extract("<think>So 72", "numeric") is None


def test_every_gsm8k_answer_gives_the_number_behind_its_marks(shared: Path) -> None:
    rows = [json.loads(line) for line in (shared / "data/gsm8k/test.jsonl").read_text().splitlines()]
    for row in rows:
        assert read_number(row["answer"]) == Fraction(row["answer"].split("####")[1].strip().replace(",", ""))
    assert len(rows) == 1319
