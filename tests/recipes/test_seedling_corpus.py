"""The corpus of the embedded base: seeded, true, varied, and free of the downstream task."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "seedling"
if not RECIPE.is_dir():
    pytest.skip("the recipes are not part of this installation", allow_module_level=True)
ROOM = ("words", "cast", "facts", "stories", "drills", "corpus")


@pytest.fixture(scope="module")
def corpus():
    """The recipe's `corpus` module; its plain module names do not stay importable afterwards."""
    sys.path.insert(0, str(RECIPE))
    try:
        import corpus as module  # pyright: ignore[reportMissingImports]

        yield module
    finally:
        sys.path.remove(str(RECIPE))
        while str(RECIPE) in sys.path:
            sys.path.remove(str(RECIPE))
        for name in ROOM:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def texts(corpus) -> list[str]:
    return list(corpus.documents(seed=7, count=4000, with_drills=True))


def test_the_same_seed_writes_the_same_documents(corpus, texts):
    assert list(corpus.documents(seed=7, count=200, with_drills=True)) == texts[:200]
    assert list(corpus.documents(seed=8, count=200, with_drills=True)) != texts[:200]
    assert list(corpus.documents(seed=7, count=200)) == list(corpus.documents(seed=7, count=200))


def test_documents_hardly_ever_repeat(texts):
    assert len(set(texts)) > 0.99 * len(texts)


def test_the_vocabulary_is_wide(texts):
    assert len(set(re.findall(r"[a-z]+", " ".join(texts).lower()))) > 700


def test_every_equation_is_true(texts):
    text = " ".join(texts)
    operations = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
    equations = re.findall(r"\b(\d+) ?([-+x]) ?(\d+) ?= ?(\d+)\b(?! ?[-+x])", text)
    assert len(equations) > 2000
    assert [e for e in equations if operations[e[1]](int(e[0]), int(e[2])) != int(e[3])] == []


def test_every_number_has_its_own_token(texts):
    assert all(int(number) < 100 for number in re.findall(r"\d+", " ".join(texts)))


def test_no_document_is_a_word_problem_with_a_worked_answer(texts):
    for text in texts:
        assert "answer" not in text.lower()
        asks = "How many" in text or "how many" in text
        assert not (asks and re.search(r"\d ?[-+x] ?\d+ ?=", text)), text


def test_no_story_works_out_a_result(texts):
    """A story with an equation would be half of a worked answer; equations stand on pages of number facts only."""
    people = re.compile(r"\b(He|She|he|she|his|her)\b")
    assert [text for text in texts if people.search(text) and "=" in text] == []
