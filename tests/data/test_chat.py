"""Chat templates: spans against strings written by hand, ids against transformers' own `apply_chat_template`."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from graft.data.encoding import encode
from graft.data.templates import template_of
from graft.errors import GraftError

from .conftest import CHATML

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# Like Qwen 3: thinking is written in the turn after the last question only, and dropped from earlier ones.
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + (parts[0].replace('<think>', '').strip() if parts | length > 1 else '')"
    " + '\n</think>\n\n' }}{% endif %}{{ parts[-1].lstrip() }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IGNORES_THE_FLAG = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "ate"},
]


def load(tokenizer, jinja):
    tokenizer.chat_template = jinja
    return template_of("chat", tokenizer)


def learnt(spans):
    return [span.text + ("<EOS>" if span.ends else "") for span in spans if span.supervised]


def test_chatml_supervises_each_answer_and_its_end_mark(chatty):
    spans = template_of("chat", chatty).render(TALK)
    assert learnt(spans) == ["sat", "<|im_end|>", "ate", "<|im_end|>"]
    assert "".join(span.text for span in spans) == (
        "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
        "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\nate<|im_end|>\n"
    )


@pytest.mark.parametrize("jinja", [MISTRAL, GEMMA, THINKING], ids=["mistral", "gemma", "thinking"])
def test_ids_are_those_of_transformers_with_one_start_token(chatty, jinja):
    template = load(chatty, jinja)
    theirs = chatty.apply_chat_template(TALK, return_dict=False)
    start = [] if chatty.bos_token_id is None or chatty.bos_token_id in theirs else [chatty.bos_token_id]
    assert encode(template.render(TALK, learnt=[3]), chatty).ids == start + theirs
    if jinja is not THINKING:  # which writes an earlier answer otherwise than it asks for it
        assert encode(template.render(TALK), chatty).ids == start + theirs


def test_marks_that_swallow_the_spaces_after_them_do_so_at_a_border_too(tokenizer):
    marks = [AddedToken(mark, rstrip=True, special=True) for mark in ("<|user|>", "<|assistant|>", "<|end|>")]
    tokenizer.add_tokens(marks, special_tokens=True)  # as Phi 3 has them
    start = tokenizer.bos_token or ""
    template = load(
        tokenizer,
        start + "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    )
    assert encode(template.render(TALK), tokenizer).ids == tokenizer.apply_chat_template(TALK, return_dict=False)


def test_the_start_token_comes_once_where_the_template_leaves_it_out(llama):
    llama.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    for jinja in (MISTRAL, GEMMA, THINKING):
        ids = encode(load(llama, jinja).render(TALK), llama).ids
        assert ids[0] == llama.bos_token_id and ids.count(llama.bos_token_id) == 1


@pytest.mark.parametrize(
    ("jinja", "expected"),
    [
        (MISTRAL, [" ", "sat", "</s>", " ", "ate", "</s>"]),
        (GEMMA, ["sat", "<|im_end|>", "ate", "<|im_end|>"]),
        (THINKING, ["<think>\n\n</think>\n\n", "sat", "<|im_end|>", "<think>\n\n</think>\n\n", "ate", "<|im_end|>"]),
        (IGNORES_THE_FLAG, [" ", "sat", "</s>", " ", "ate", "</s>"]),
        (NO_END, ["sat", "<EOS>", "ate", "<EOS>"]),
    ],
    ids=["mistral", "gemma", "thinking", "ignores-the-flag", "no-end"],
)
def test_answers_are_found_whatever_the_template_does_around_them(llama, jinja, expected):
    llama.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert learnt(load(llama, jinja).render(TALK)) == expected


@pytest.mark.parametrize("jinja", [MISTRAL, GEMMA, THINKING, IGNORES_THE_FLAG, NO_END])
@pytest.mark.parametrize("turns", [2, 4])
def test_the_prompt_is_a_strict_prefix_up_to_the_first_token_of_the_answer(llama, jinja, turns):
    llama.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    template = load(llama, jinja)
    spans = template.render(TALK[:turns], learnt=[turns - 1])
    tokens = encode(spans, llama)
    prompt = template.prompt_ids(TALK[: turns - 1], llama)
    assert tokens.ids[: len(prompt)] == prompt
    learnt_at = [spans[span].supervised for span in tokens.spans]
    assert learnt_at[len(prompt)] and not learnt_at[len(prompt) - 1]


def test_the_mask_is_that_of_a_template_with_generation_tags(chatty):
    tagged = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template = load(chatty, tagged)
    theirs = chatty.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    spans = template.render(TALK)
    tokens = encode(spans, chatty)
    start = len(tokens.ids) - len(theirs["input_ids"])  # the tokenizer's start token, which this template leaves out
    assert [int(spans[span].supervised) for span in tokens.spans[start:]] == theirs["assistant_masks"]


def test_an_answer_equal_to_a_mark_or_a_role_is_still_found(chatty):
    talk = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "assistant"}]
    spans = template_of("chat", chatty).render(talk)
    assert learnt(spans) == ["assistant", "<|im_end|>"]
    assert [span.text for span in spans if span.message == 0] == ["user"]


def test_thinking_in_the_last_answer_is_trained_on(chatty):
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nsat"}]
    assert learnt(load(chatty, THINKING).render(talk)) == ["<think>\nhm\n</think>\n\nsat", "<|im_end|>"]


def test_a_template_that_drops_a_part_of_an_answer_is_an_error(chatty):
    talk = [TALK[0], {"role": "assistant", "content": "<think>hm</think>sat"}, *TALK[2:]]
    drops = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(GraftError, match="omits or changes a part of the answer in message 2"):
        load(chatty, drops).render(talk)
    assert learnt(load(chatty, drops).render(talk, learnt=[3])) == ["sat", "<|im_end|>", "ate", "<|im_end|>"]
    assert learnt(load(chatty, THINKING).render(talk))[:2] == ["<think>\nhm\n</think>\n\nsat", "<|im_end|>"]


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "does not write the answers"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "cannot be told apart"),
        ("{% for m in messages %}{{ m.contnt.x }}{% endfor %}", "refuses this conversation"),
    ],
)
def test_a_template_whose_answers_cannot_be_established_is_an_error_that_says_so(gpt, jinja, message):
    with pytest.raises(GraftError, match=message):
        load(gpt, jinja)


def test_what_the_template_itself_refuses_is_passed_on(llama):
    template = load(llama, MISTRAL)
    with pytest.raises(GraftError, match="roles must alternate"):
        template.render([TALK[0], TALK[0], TALK[1]])


def test_special_tokens_in_the_data_stay_text(chatty):
    hostile = [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": f"c{chatty.eos_token}d"}]
    tokens = encode(template_of("chat", chatty).render(hostile), chatty)
    end = chatty.convert_tokens_to_ids("<|im_end|>")
    assert tokens.ids.count(end) == 2  # one after each message
    assert chatty.eos_token_id not in tokens.ids
    assert "a<|im_end|>b" in chatty.decode(tokens.ids)


def test_generation_stops_at_the_template_s_end_mark_too(chatty):
    assert set(template_of("chat", chatty).stop_ids(chatty)) == {
        chatty.eos_token_id,
        chatty.convert_tokens_to_ids("<|im_end|>"),
    }
    assert template_of("alpaca").stop_ids(chatty) == (chatty.eos_token_id,)


def test_auto_is_the_tokenizer_s_own_template_where_there_is_one(gpt):
    assert template_of("auto", gpt) is template_of("alpaca")
    with pytest.raises(GraftError, match="has no chat template"):
        template_of("chat", gpt)
    gpt.chat_template = NO_END
    assert template_of("auto", gpt) == template_of("chat", gpt)


def test_a_saved_chat_template_needs_no_tokenizer_and_has_an_equal_digest(tmp_path, chatty):
    template = template_of("chat", chatty).with_system("Be kind.")
    template.save(tmp_path)
    loaded = template_of(tmp_path)
    assert loaded.digest == template.digest
    assert loaded.render(TALK) == template.render(TALK)
    assert (tmp_path / "chat_template.jinja").read_text() == chatty.chat_template


def test_a_saved_chat_template_without_its_jinja_is_refused(tmp_path, chatty):
    template_of("chat", chatty).save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(GraftError, match=r"but lacks chat_template\.jinja"):
        template_of(tmp_path)


def test_a_jinja_file_is_a_chat_template(tmp_path, chatty):
    file = tmp_path / "mine.jinja"
    file.write_text(chatty.chat_template)
    template = template_of(file, chatty)
    assert template.name == "mine"
    assert template.render(TALK) == template_of("chat", chatty).render(TALK)


def test_a_template_that_prints_the_date_reads_the_same_every_day(llama):
    spans = load(llama, "{{ strftime_now('%d %b %Y') }}\n" + NO_END).render(TALK)
    assert spans[0].text.startswith("26 Jul 2024\nuser: ")


@pytest.mark.parametrize(
    "bomb",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(s='ab') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "{{ 'a' * 9999999999 }}",
        "{% for a in range(99999) %}{{ 'a' * 999 }}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 9 ** 999999999 }}",
        "x" * 1_100_000,
    ],
    ids=["loops", "doubling", "long", "output", "recursion", "power", "size"],
)
def test_a_hostile_template_ends_within_seconds_with_its_name(gpt, monkeypatch, bomb):
    monkeypatch.setattr("graft.data.rendering.SECONDS", 0.5)
    with pytest.raises(GraftError, match="chat template 'chat'"):
        load(gpt, bomb + CHATML)
