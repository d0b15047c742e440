"""Spans to ids: against the tokenizer's own ids of the whole text, wherever these have a token border at the answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from graft.data.encoding import Span, encode, facts_of
from graft.errors import GraftError

from .conftest import MAKERS

TOKENIZERS = {name: make() for name, make in MAKERS.items()}
WORDS = st.text(alphabet="the cat\nsat 347.?üx", max_size=30)


def asked(question: str, answer: str) -> list[Span]:
    return [Span("Q: "), Span(question, message=0), Span("\nA:\n"), Span(answer, True, 1, True)]


@pytest.mark.parametrize("answer", ["the cat", "347", "ü?", "a\n\nb", "x"])
def test_ids_are_those_of_the_whole_text_and_one_end_token(tokenizer, answer):
    whole = tokenizer("Q: the mat\nA:\n" + answer)["input_ids"]
    assert encode(asked("the mat", answer), tokenizer).ids == [*whole, tokenizer.eos_token_id]


def test_ids_of_real_data_are_those_of_the_whole_text(real, shared):
    lines = (shared / "data/gsm8k/train.jsonl").read_text().splitlines()[:300]
    for row in map(json.loads, lines):
        whole = real(f"Q: {row['question']}\nA:\n{row['answer']}")["input_ids"]
        assert encode(asked(row["question"], row["answer"]), real).ids == [*whole, real.eos_token_id]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(question=WORDS, answer=WORDS, between=st.sampled_from(["", " ", "\n", "A: ", "\n\n"]))
def test_the_ids_of_a_prompt_never_depend_on_the_answer(name, question, answer, between):
    tokenizer = TOKENIZERS[name]
    spans = [Span(question, message=0), Span(between), Span(answer, True, 1, True)]
    prompt = encode(spans[:2], tokenizer).ids
    tokens = encode(spans, tokenizer)
    assert tokens.ids[: len(prompt)] == prompt
    assert all(spans[span].supervised for span in tokens.spans[len(prompt) :])
    assert tokens.ids[-1] == tokenizer.eos_token_id and tokens.ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(question=WORDS, answer=WORDS)
def test_no_character_is_lost_or_added_at_a_border(name, question, answer):
    tokenizer = TOKENIZERS[name]
    ids = encode([Span("Q" + question), Span(answer, True)], tokenizer).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Q" + question + answer


def test_a_word_cut_by_a_border_continues_without_a_space(llama):
    ids = encode([Span("the c"), Span("at", True)], llama).ids
    assert llama.convert_ids_to_tokens(ids)[-1] == "at"
    assert llama.decode(ids, skip_special_tokens=True) == "the cat"


def test_the_start_token_is_the_tokenizer_s_and_never_doubled(llama):
    assert encode([Span("the")], llama).ids == llama("the")["input_ids"]
    assert encode([Span("<s>the")], llama).ids.count(llama.bos_token_id) == 1


def test_what_the_tokenizer_puts_at_the_end_of_a_text_is_left_out(shared):
    bert = PreTrainedTokenizerFast.from_pretrained(shared / "tokenizers/bert-base-uncased", eos_token="[SEP]")
    ids = encode([Span("the cat "), Span("sat", True, ends=True)], bert).ids
    assert bert.convert_ids_to_tokens(ids) == ["[CLS]", "the", "cat", "sat", "[SEP]"]


def test_special_tokens_of_the_data_stay_text_and_those_of_the_template_do_not(tokenizer):
    end = tokenizer.eos_token
    spans = [Span(f"{end}the "), Span(f"a{end}b", message=0), Span("\n"), Span(f"c{end}", True, 1, True)]
    tokens = encode(spans, tokenizer)
    assert tokens.ids.count(tokenizer.eos_token_id) == 2  # the template's, and the one that ends the answer
    assert tokens.ids[-1] == tokenizer.eos_token_id
    assert f"a{end}b" in tokenizer.decode(tokens.ids)


def test_a_token_knows_its_span_and_whether_it_is_the_span_s_alone(gpt):
    spans = [Span("x "), Span("the cat", message=0), Span("\n")]
    tokens = encode(spans, gpt)
    pieces = [(gpt.decode([i]), s, w) for i, s, w in zip(tokens.ids, tokens.spans, tokens.whole, strict=True)]
    assert pieces[0] == ("x", 0, True)
    assert pieces[1] == (" the", 0, False)  # begins with the template's space
    assert {s for text, s, w in pieces[2:-1] if w} == {1}
    assert pieces[-1] == ("\n", 2, True)


def test_a_tokenizer_without_an_end_is_an_error(gpt):
    gpt.eos_token = None
    with pytest.raises(GraftError, match="no end-of-sequence token"):
        encode([Span("x")], gpt)


def test_facts_follow_a_change_of_special_tokens(gpt):
    before = facts_of(gpt)
    assert facts_of(gpt) is before
    gpt.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert facts_of(gpt).holds_control("a<|new|>") and not before.holds_control("a<|new|>")
