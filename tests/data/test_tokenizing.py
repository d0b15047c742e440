"""Masks, lengths and cuts: against counts made by tokenising the parts on their own."""

from __future__ import annotations

import numpy as np
import pytest

from graft.data.encoding import encode
from graft.data.inspect import LEARNT, READ, coloured
from graft.data.samples import Example, Rejected, Sample
from graft.data.templates import template_of
from graft.data.tokenizing import tokenize
from graft.errors import GraftError


def sample(*contents, system=None):
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return Sample(tuple([{"role": "system", "content": system}] * (system is not None) + turns), "data.json", 7)


def run(conversation, tokenizer, template="alpaca", *, max_length=10_000, **options):
    loaded = template_of(template, tokenizer) if isinstance(template, str) else template
    return tokenize(conversation, tokenizer, loaded, max_length=max_length, **options)


def learnt(example, tokenizer):
    return tokenizer.decode(example.input_ids[example.supervised].tolist())


TALK = sample("the cat", "sat", "the dog", "ate the bone")


@pytest.mark.parametrize("template", ["alpaca", "llm-adapters", "plain"])
def test_the_answer_and_one_end_are_trained_on(tokenizer, template):
    example = run(sample("the cat", "sat on"), tokenizer, template)
    ids = example.input_ids.tolist()
    assert learnt(example, tokenizer) == "sat on" + tokenizer.eos_token
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert example.input_ids.dtype == np.int32 and example.supervised.dtype == np.bool_
    assert (example.source, example.row, example.cut) == ("data.json", 7, 0)


def test_an_end_that_the_data_bring_along_is_not_doubled(tokenizer):
    end = tokenizer.eos_token
    assert (
        run(sample("a", f"b{end}"), tokenizer).input_ids.tolist() == run(sample("a", "b"), tokenizer).input_ids.tolist()
    )


@pytest.mark.parametrize(
    ("train_on", "expected"), [("completion", "sat{end}ate the bone{end}"), ("last", "ate the bone{end}")]
)
def test_train_on_chooses_all_answers_or_the_last(tokenizer, train_on, expected):
    example = run(TALK, tokenizer, train_on=train_on)
    assert learnt(example, tokenizer) == expected.format(end=tokenizer.eos_token)


def test_train_on_last_takes_one_answer_of_a_chat_template(chatty):
    assert learnt(run(TALK, chatty, "chat", train_on="last"), chatty) == "ate the bone<|im_end|>"
    assert learnt(run(TALK, chatty, "chat"), chatty) == "sat<|im_end|>ate the bone<|im_end|>"


def test_train_on_all_takes_every_token_but_the_first(tokenizer):
    example = run(TALK, tokenizer, train_on="all")
    assert not example.supervised[0] and example.supervised[1:].all()


def test_the_first_token_is_never_a_target(gpt):
    example = run(Sample(({"role": "assistant", "content": "the cat"},), "x", 1), gpt, "plain")
    assert not example.supervised[0] and example.supervised[1:].all()


def test_an_example_ends_with_its_last_target(chatty):
    example = run(TALK, chatty, "chat")
    assert example.input_ids[-1] == chatty.convert_tokens_to_ids("<|im_end|>") and example.supervised[-1]


@pytest.mark.parametrize("template", ["alpaca", "plain", "chat"])
def test_prompt_ids_are_what_training_saw_before_each_answer(chatty, template):
    loaded = template_of(template, chatty)
    example = run(TALK, chatty, loaded)
    starts = np.flatnonzero(np.diff(example.supervised.astype(int)) == 1) + 1
    for start, turns in zip(starts, (1, 3), strict=True):
        assert loaded.prompt_ids(TALK.messages[:turns], chatty) == example.input_ids[:start].tolist()


def test_prompt_ids_drop_an_end_that_an_earlier_answer_brings_along_as_training_does(tokenizer):
    end = tokenizer.eos_token
    talk = sample("a", f"b{end}", "c")
    assert template_of("plain").prompt_ids(talk.messages, tokenizer) == template_of("plain").prompt_ids(
        sample("a", "b", "c").messages, tokenizer
    )


def test_a_system_prompt_is_for_conversations_that_bring_none(tokenizer):
    with_default = run(sample("a", "b"), tokenizer, "plain", system="the")
    with_own = run(sample("a", "b", system="the"), tokenizer, "plain", system="dog")
    assert with_default.input_ids.tolist() == with_own.input_ids.tolist()


def test_empty_and_missing_answers_are_rejected_with_the_reason(tokenizer):
    assert run(sample("a", " \n"), tokenizer) == Rejected("empty_answer", 0)
    assert run(sample("a"), tokenizer) == Rejected("no_answer", 0)
    assert run(sample("a", "", "b", "c"), tokenizer) == Rejected("empty_answer", 0)
    assert isinstance(run(sample("a", "", "b", "c"), tokenizer, train_on="last"), Example)


def test_an_overlong_sample_is_rejected_with_its_length(tokenizer):
    length = len(run(TALK, tokenizer))
    assert isinstance(run(TALK, tokenizer, max_length=length), Example)
    for overlong in ("error", "drop"):
        assert run(TALK, tokenizer, max_length=length - 1, overlong=overlong) == Rejected("overlong", length)


def test_truncation_takes_words_of_the_question_from_the_left_and_nothing_else(tokenizer):
    conversation = sample("one two three four five six", "the answer", system="the rules")
    whole = run(conversation, tokenizer, "alpaca")
    for less in (1, 5, 12):
        cut = run(conversation, tokenizer, "alpaca", max_length=len(whole) - less, overlong="truncate_prompt")
        assert len(cut) == len(whole) - less and cut.cut == less
        text, full = (tokenizer.decode(e.input_ids.tolist(), skip_special_tokens=True) for e in (cut, whole))
        head, question, tail = full.partition("one two three four five six")
        assert text.startswith(head.rstrip()) and text.endswith(tail)
        assert question.endswith(text[len(head) : -len(tail)].strip())
        assert learnt(cut, tokenizer) == learnt(whole, tokenizer)


def test_truncation_takes_the_further_context_before_the_question(tokenizer):
    question = {"role": "user", "content": "Who sat?", "input": "the cat sat on the mat and the dog ate the bone"}
    conversation = Sample((question, {"role": "assistant", "content": "the cat"}), "x", 1)
    length = len(run(conversation, tokenizer))
    cut = run(conversation, tokenizer, max_length=length - 8, overlong="truncate_prompt")
    text = tokenizer.decode(cut.input_ids.tolist())
    assert "### Instruction:\nWho sat?\n" in text and "the bone\n" in text and "the cat sat on" not in text


def test_truncation_takes_older_questions_first_and_untrained_answers_only_with_train_on_last(tokenizer):
    talk = sample("one one one one", "two two two two", "three three", "four")
    length = len(run(talk, tokenizer, "plain"))
    words = len(encode(template_of("plain").render(talk.messages[:1]), tokenizer).ids)
    kept = run(talk, tokenizer, "plain", max_length=length - words + 1, overlong="truncate_prompt")
    assert "one one" not in tokenizer.decode(kept.input_ids.tolist())
    assert "two two two two" in tokenizer.decode(kept.input_ids.tolist())
    last = run(talk, tokenizer, "plain", max_length=length - words - 2, overlong="truncate_prompt", train_on="last")
    assert "two two two two" not in tokenizer.decode(last.input_ids.tolist())
    assert learnt(last, tokenizer) == "four" + tokenizer.eos_token


def test_an_answer_that_does_not_fit_is_rejected_not_cut(tokenizer):
    length = len(run(sample("a", "the cat sat on the mat"), tokenizer, "plain"))
    rejected = run(sample("a", "the cat sat on the mat"), tokenizer, "plain", max_length=4, overlong="truncate_prompt")
    assert rejected == Rejected("answer_too_long", length)


def test_a_conversation_that_cannot_be_written_names_its_row(tokenizer):
    twice = Sample((*sample("a").messages, *sample("a", "b").messages), "data.json", 7)
    with pytest.raises(GraftError, match=r"data.json, row 7: message 2 \('user'\) is out of turn"):
        run(twice, tokenizer)


def test_colours_show_what_is_read_and_what_is_learnt(tokenizer):
    shown = coloured(run(sample("the cat", "sat 347"), tokenizer, "plain"), tokenizer)
    by_style = {span.style: shown.plain[span.start : span.end] for span in shown.spans}
    assert by_style[READ].removeprefix("<s>").strip() == "the cat"
    assert by_style[LEARNT] == "sat 347" + tokenizer.eos_token


def test_marks_stand_in_for_colours(gpt):
    shown = coloured(run(TALK, gpt, "plain"), gpt, marks=True)
    assert shown.plain == "the cat⟦sat<|end|>⟧\nthe dog⟦ate the bone<|end|>⟧"


def test_real_data_show_the_answer_in_colour(real, shared):
    from graft.data.reading import read

    row = read(str(shared / "data/gsm8k/train.jsonl"))[0]
    shown = coloured(run(row, real), real)
    learnt_text = "".join(shown.plain[span.start : span.end] for span in shown.spans if span.style == LEARNT)
    assert learnt_text == row.answer + real.eos_token
