"""The word problems of the quickstart: right, seeded, and with nothing in common between training and held-out rows."""

from __future__ import annotations

import re

import pytest

from graft.quickstart import problems

EQUATION = re.compile(r"(\d+) ([-+x]) (\d+) = (\d+)")


def rows(split: problems.Split) -> list[dict[str, str]]:
    return problems.generate(split, 3000, seed=3)


def pairs_of(generated: list[dict[str, str]]) -> set[frozenset[str]]:
    """The unordered pairs of numbers, read from the text alone."""
    return {frozenset(EQUATION.search(row["output"]).group(1, 3)) for row in generated}


def skeleton(row: dict[str, str]) -> str:
    """The wording of a problem without what is filled in: numbers, names, things and pronouns."""
    text = re.sub(r"\d+", "#", row["instruction"])
    text = re.sub(rf"\b({'|'.join([*problems.SHE, *problems.HE])})\b", "N", text)
    text = re.sub(rf"\b({'|'.join(problems.THINGS)})\b", "T", text)
    text = re.sub(r"\b(he|she)\b", "P", text)
    text = re.sub(r"\b(He|She)\b", "P", text)
    return re.sub(r"\b(him|her)\b", "P", text)


@pytest.mark.parametrize("split", problems.SPLITS)
def test_the_answer_is_the_result_of_the_equation(split):
    compute = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}
    for row in rows(split):
        ((a, operation, b, stated),) = EQUATION.findall(row["output"])
        result = compute[operation](int(a), int(b))
        assert int(stated) == int(row["answer"]) == result >= 0
        assert row["output"].endswith(f"The answer is {result}.")


@pytest.mark.parametrize("split", problems.SPLITS)
def test_the_numbers_of_the_equation_are_those_of_the_problem(split):
    for row in rows(split):
        equation = EQUATION.search(row["output"])
        assert sorted(re.findall(r"\d+", row["instruction"])) == sorted(equation.group(1, 3))


def test_the_splits_share_no_pair_of_numbers():
    train, heldout = pairs_of(rows("train")), pairs_of(rows("heldout"))
    assert len(train) > 200 and len(heldout) > 40
    assert train & heldout == set()


def test_the_splits_share_no_template():
    train, heldout = ({skeleton(row) for row in rows(split)} for split in ("train", "heldout"))
    assert len(train) == len(problems.TEMPLATES["train"])
    assert len(heldout) == len(problems.TEMPLATES["heldout"])
    assert train & heldout == set()


def test_every_operation_occurs_in_both_splits():
    for split in problems.SPLITS:
        assert {EQUATION.search(row["output"]).group(2) for row in rows(split)} == {"+", "-", "x"}


def test_rows_are_seeded():
    assert problems.generate("train", 50, seed=1) == problems.generate("train", 50, seed=1)
    assert problems.generate("train", 50, seed=1) != problems.generate("train", 50, seed=2)
    assert problems.generate("train", 20, seed=1) == problems.generate("train", 50, seed=1)[:20]


def test_an_unknown_split_names_the_allowed_ones():
    with pytest.raises(ValueError, match="unknown split 'test'.*train, heldout"):
        problems.generate("test", 1)  # pyright: ignore[reportArgumentType]


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="-1"):
        problems.generate("train", -1)
