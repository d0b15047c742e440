"""Thoughts in texts and in token ids."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from graft.evaluation.reading.thoughts import with_thoughts, without_thoughts

WORDS = ["<unk>", "so", "72", "<think>", "</think>", "<eos>", "user"]


def tokenizer(special: bool) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>")
    found.add_tokens(["<think>", "</think>"], special_tokens=special)
    return found


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("72", "72"),
        ("<think>so</think>72", "72"),
        ("so</think>72", "72"),
        ("<think>so", None),
        ("<think>so</think>72<think>no", None),
        ("[THINK]so[/THINK]72", "72"),
        ("<Thinking>so", None),
        ("a < think > b", "a < think > b"),
    ],
)
def test_what_is_left_without_thoughts(text: str, rest: str | None) -> None:
    assert without_thoughts(text) == rest


@pytest.mark.parametrize("special", [True, False])
def test_marks_stay_in_the_text_even_if_they_are_special_tokens(special: bool) -> None:
    ids = [WORDS.index(word) for word in ("<think>", "so", "</think>", "72", "<eos>")]
    text = with_thoughts(tokenizer(special), [6], ids)
    assert "<think>" in text and "<eos>" not in text
    assert without_thoughts(text) is not None and (without_thoughts(text) or "").strip() == "72"
    assert without_thoughts(with_thoughts(tokenizer(special), [6], ids[:2])) is None


def test_a_thought_that_the_prompt_opens_belongs_to_the_answer() -> None:
    asked, thought = [6, WORDS.index("<think>")], [1, 2]
    assert without_thoughts(with_thoughts(tokenizer(True), asked, thought)) is None
    assert (without_thoughts(with_thoughts(tokenizer(True), asked, [*thought, 4, 2])) or "").strip() == "72"
    assert with_thoughts(tokenizer(True), [WORDS.index("<think>"), 4], [2]) == "72"
