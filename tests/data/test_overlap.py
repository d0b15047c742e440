"""Overlap of questions: against brute force over all pairs, against counts of the LLM-Adapters data, and on small cases."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft.config.data import SourceConfig
from graft.data.overlap import THRESHOLD, Question, overlap_report, overlap_reports, questions_of
from graft.data.reading import read
from graft.data.samples import Sample
from graft.errors import GraftError

BOXES = "Ned had 14 boxes and didn't count the others. How many boxes, in all, did Ned have in his shop on Monday?"


def asked(*texts: str) -> list[Question]:
    return [Question(text, f"test, row {row}") for row, text in enumerate(texts, start=1)]


def trained(*texts: str) -> list[Sample]:
    return [
        Sample(({"role": "user", "content": text}, {"role": "assistant", "content": "7"}), "train", row)
        for row, text in enumerate(texts, start=1)
    ]


def test_case_white_space_and_punctuation_do_not_count() -> None:
    (pair,) = overlap_report(trained("x", "  ned HAD\n14 boxes !"), asked("Ned had 14 boxes.")).pairs
    assert (pair.exact, pair.similarity, pair.trained.where) == (True, 1.0, "train, row 2")


def test_a_sign_before_a_number_counts() -> None:
    assert not overlap_report(trained("What is 7 - 3?"), asked("What is 7 + 3?")).pairs
    assert overlap_report(trained("What is 7-3?"), asked("What is 7 - 3?")).exact == 1


@pytest.mark.parametrize(
    "text", [BOXES.replace("didn't", "did n't"), BOXES.replace("his ", ""), BOXES.replace("14", "1,4")]
)
def test_a_retyped_question_is_near(text: str) -> None:
    report = overlap_report(trained(text), asked(BOXES))
    assert (report.exact, report.near) == (0, 1) and THRESHOLD <= report.pairs[0].similarity <= 1


def test_another_question_is_not_near() -> None:
    other = BOXES.replace("Ned", "Georgina").replace("14", "3118").replace("boxes", "marbles")
    assert not overlap_report(trained(other), asked(BOXES)).pairs


def test_the_similarity_is_that_of_the_two_sets_of_5_grams() -> None:
    """abcdefghij and abcdefghik share 5 of the 7 n-grams that either has."""
    (pair,) = overlap_report(trained("abcde fghik"), asked("abcdefghij"), threshold=0.7).pairs
    assert pair.similarity == 5 / 7
    assert not overlap_report(trained("abcde fghik"), asked("abcdefghij"), threshold=0.72).pairs


def test_an_exact_pair_is_reported_before_a_near_one_and_the_first_of_equals() -> None:
    near, same = BOXES.replace("didn't", "did n't"), BOXES.upper()
    (pair,) = overlap_report(trained(near, same, BOXES), asked(BOXES)).pairs
    assert pair.exact and pair.trained.where == "train, row 2"


def test_wording_that_all_test_questions_share_is_left_out() -> None:
    frame = "Please choose the correct answer to the question: {} Answer format: answer1/answer2/answer3/answer4"
    rng = random.Random(0)
    tests = ["".join(rng.choices("abcdefghijklmnopqrst", k=20)) for _ in range(30)]
    others = ["".join(rng.choices("abcdefghijklmnopqrst", k=20)) for _ in range(30)]
    report = overlap_report(trained(*map(frame.format, others)), asked(*map(frame.format, tests)), threshold=0.5)
    assert not report.pairs
    assert overlap_report(trained(*map(frame.format, tests)), asked(*map(frame.format, tests))).exact == 30


def test_every_turn_of_a_conversation_is_a_question_and_so_is_the_whole() -> None:
    turns = ("Hello there.", "Hi.", "How many legs has a spider?", "8", "Thank you.")
    roles = ("user", "assistant", "user", "assistant", "user")
    chat = Sample(tuple({"role": role, "content": text} for role, text in zip(roles, turns, strict=True)), "chat", 1)  # type: ignore[arg-type]
    report = overlap_report(
        [chat], asked("how many legs has a spider", "Hello there. How many legs has a spider? Thank you.")
    )
    assert report.exact == 2 and report.trained == 4


def test_samples_without_a_question_are_not_compared() -> None:
    text = Sample(({"role": "assistant", "content": "Ned had 14 boxes."},), "train", 1)
    report = overlap_report([text, *trained(" ")], asked("Ned had 14 boxes."))
    assert (report.trained, report.pairs) == (0, ())
    assert questions_of([text]) == []


def test_further_context_is_part_of_the_question() -> None:
    row = Sample(({"role": "user", "content": "How many?", "input": "Ned had 14 boxes."},), "train", 1)
    assert overlap_report([row], asked("How many? Ned had 14 boxes.")).exact == 1
    assert not overlap_report([row], asked("How many?")).pairs


@given(
    st.lists(st.text("abc ", min_size=1, max_size=30), min_size=1, max_size=12),
    st.lists(st.text("abc ", min_size=1, max_size=30), min_size=1, max_size=12),
    st.sampled_from([0.3, 0.5, 0.7, 0.85, 1.0]),
)
def test_no_similar_pair_is_missed(tests: list[str], texts: list[str], threshold: float) -> None:
    """Brute force over all pairs; with so few questions no n-gram is left out as wording."""

    def pieces(text: str) -> set[str]:
        letters = text.replace(" ", "")
        return {letters[at : at + 5] for at in range(len(letters) - 4)} or {letters}

    found = {
        pair.tested.where: pair for pair in overlap_report(trained(*texts), asked(*tests), threshold=threshold).pairs
    }
    for question in asked(*tests):
        own, letters = pieces(question.text), question.text.strip()
        best = max(
            (len(own & pieces(text)) / len(own | pieces(text)) for text in texts if text.strip() and letters),
            default=0.0,
        )
        pair = found.get(question.where)
        assert (pair is not None) == (best >= threshold)
        assert pair is None or pair.similarity == pytest.approx(best)
        assert pair is None or pair.exact == any(text.split() == question.text.split() for text in texts)


def test_several_test_sets_are_compared_in_one_pass() -> None:
    texts = iter(trained(BOXES, "How many legs has a spider?"))
    reports = overlap_reports(texts, {"boxes": asked(BOXES, "x"), "legs": asked("How many legs has a spider")})
    assert {name: (found.exact, found.questions) for name, found in reports.items()} == {
        "boxes": (1, 2),
        "legs": (1, 1),
    }


def test_a_report_says_its_threshold_and_becomes_json() -> None:
    report = overlap_report(trained(BOXES.replace("didn't", "did n't"), "How many?"), asked(BOXES, "How many?", "Why?"))
    assert str(report) == "2 of 3 questions: 1 exact, 1 near (similarity of 5-grams at least 0.85)"
    values = json.loads(json.dumps(report.to_dict()))
    assert (values["exact"], values["near"], values["threshold"]) == (1, 1, 0.85)
    assert [example["exact"] for example in values["examples"]] == [True, False]
    assert values["examples"][1]["trained"]["where"] == "train, row 1"


@pytest.mark.parametrize("threshold", [0, -0.5, 1.5])
def test_a_threshold_that_is_no_similarity_is_refused(threshold: float) -> None:
    with pytest.raises(GraftError, match="above 0 and at most 1"):
        overlap_report([], [], threshold=threshold)


def sets(shared: Path, name: str) -> list[Question]:
    return questions_of(read(str(shared / f"data/llm_adapters/{name}/test.json"), need_answers=False))


def test_the_training_questions_of_mawps_hold_most_of_three_test_sets(shared: Path) -> None:
    """Exact: the counts that were published for LLM-Adapters' training data; near ones come on top."""
    fields = {"prompt": "original_text", "completion": "ans"}
    mawps = read(SourceConfig(path=str(shared / "data/llm_adapters/mawps/trainset.json"), fields=fields))
    names = ("AddSub", "MultiArith", "SingleEq", "mawps", "SVAMP")
    reports = overlap_reports(mawps, {name: sets(shared, name) for name in names})
    assert [reports[name].exact for name in names] == [327, 452, 416, 28, 0]
    assert [reports[name].questions for name in names] == [395, 600, 508, 238, 1000]
    assert [0 < reports[name].near < 0.1 * reports[name].questions for name in names] == [True] * 4 + [False]
    assert reports["SVAMP"].near == 0


@pytest.mark.parametrize(
    ("name", "identical"), [("ARC-Easy", 2), ("ARC-Challenge", 0), ("openbookqa", 0), ("boolq", 0)]
)
def test_training_and_test_sets_of_one_benchmark(shared: Path, name: str, identical: int) -> None:
    """Identical strings are counted apart from the guard; in BoolQ one question differs in a space alone."""
    samples, questions = read(str(shared / f"data/llm_adapters/{name}/train.json")), sets(shared, name)
    strings = {sample.messages[0]["content"] for sample in samples}
    assert sum(question.text in strings for question in questions) == identical
    report = overlap_report(samples, questions)
    assert report.exact == identical + (name == "boolq")
    assert report.near < 12
