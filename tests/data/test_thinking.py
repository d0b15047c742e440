"""Templates that move, open or drop thoughts, that end an answer with two tokens or with none, and that read settings.

Their wording is our own; each does what a published template does.
"""

from __future__ import annotations

import json

import pytest

from graft.config.data import DataConfig
from graft.data.chat import ChatTemplate
from graft.data.inspect import coloured
from graft.data.preparing import prepare
from graft.data.templates import template_of
from graft.errors import GraftError

MARKS = ["<|user|>", "<|assistant|>", "<|end|>", "<|turn|>"]
LAST_QUESTION = (
    "{%- set ns = namespace(last=0) -%}{%- for m in messages if m.role == 'user' -%}{%- set ns.last = ns.last + 1 -%}{%- endfor -%}"
    "{%- set seen = namespace(n=0) -%}"
)
# Qwen 3.5 and 3.6: a thought is opened in the prompt, and written behind the last question only.
OPENS = (
    LAST_QUESTION + "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set seen.n = seen.n + 1 -%}{{ '<|user|>' + m.content }}{%- else -%}"
    "{%- set parts = m.content.split('</think>') -%}{{ '<|assistant|>' }}"
    "{%- if seen.n == ns.last -%}{{ '<think>\n' + (parts[0].replace('<think>', '').strip() if parts | length > 1 else '') "
    "+ '\n</think>\n\n' }}{%- endif -%}{{ parts[-1].lstrip() + '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|><think>\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{ '\n</think>\n\n' }}{%- endif -%}{%- endif -%}"
)
# DeepSeek-R1-Distill: the prompt opens a thought, but a conversation has none.
DROPS = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] }}"
    "{%- if m.role == 'assistant' -%}{{ '<|end|>' }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|><think>\n' }}{%- endif -%}"
)
# Nemotron 3: the prompt opens a thought with a line end, a conversation has an empty one.
EMPTY = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>' }}{%- if m.role == 'assistant' -%}"
    "{{ (m.content if '<think>' in m.content else '<think></think>' + m.content) + '<|end|>' }}"
    "{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|><think>\n' }}{%- endif -%}"
)
# Cohere: two tokens end an answer.
TWO_ENDS = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>' + m.content + ('<|end|>' if m.role == 'assistant' else '') + '<|turn|>' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
# GLM 4.5: no token ends an answer, the mark of the next turn does.
NO_END = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>\n' + m.content }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}"
)
# Phi 3: another token after the last answer. gpt-oss: the last answer ends otherwise.
LAST_END = (
    "{%- for m in messages -%}{{ '<|' + m.role + '|>' + m.content }}"
    "{{- '<|turn|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
TAGGED = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{ '<|user|>' + m.content }}{%- else -%}"
    "{%- generation -%}{{ '<|assistant|>' + m.content + '<|end|>\n' }}{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
ALL = {
    "opens": OPENS,
    "drops": DROPS,
    "empty": EMPTY,
    "two ends": TWO_ENDS,
    "no end": NO_END,
    "last end": LAST_END,
    "tagged": TAGGED,
}


def talk(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


ONE, TWO = talk("the cat", "sat"), talk("the cat", "sat", "the dog", "ate")
THOUGHT = talk("the cat", "<think>\nhm\n</think>\n\nsat")
THOUGHTS = talk("the cat", "<think>\na\n</think>\n\nsat", "the dog", "<think>\nb\n</think>\n\nate")


@pytest.fixture
def marked(gpt, tmp_path):
    """Tokenise a conversation; return its text with the targets in [[ ]]."""
    gpt.add_special_tokens({"additional_special_tokens": MARKS}, replace_extra_special_tokens=False)

    def shown(name, messages, **settings):
        jinja, rows = tmp_path / f"{name}.jinja", tmp_path / "rows.jsonl"
        jinja.write_text(ALL[name])
        rows.write_text(json.dumps({"messages": messages}) + "\n")
        config = DataConfig.model_validate(
            {"train": str(rows), "template": str(jinja), "cache": False, "max_length": 2000, **settings}
        )
        shown.done = prepare(config, gpt)
        text = coloured(shown.done.train[0], gpt, marks=True).plain
        return text.replace("⟦", "[[").replace("⟧", "]]").replace("\n", "/").replace("]][[", "")

    shown.tokenizer = gpt
    return shown


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("opens", ONE, "<|user|>the cat<|assistant|><think>/[[/</think>//sat<|end|>]]"),
        ("opens", THOUGHT, "<|user|>the cat<|assistant|><think>/[[hm/</think>//sat<|end|>]]"),
        (
            "opens",
            THOUGHTS,
            "<|user|>the cat<|assistant|><think>/[[a/</think>//sat<|end|>]]"
            "<|user|>the dog<|assistant|><think>/[[b/</think>//ate<|end|>]]",
        ),
        ("drops", TWO, "<|user|>the cat<|assistant|>[[sat<|end|>]]<|user|>the dog<|assistant|>[[ate<|end|>]]"),
        ("empty", ONE, "<|user|>the cat<|assistant|><think>[[</think>sat<|end|>]]"),
        ("empty", THOUGHT, "<|user|>the cat<|assistant|><think>[[/hm/</think>//sat<|end|>]]"),
        ("two ends", ONE, "<|user|>the cat<|turn|><|assistant|>[[sat<|end|><|turn|>]]"),
        (
            "no end",
            TWO,
            "<|user|>/the cat<|assistant|>/[[sat<|user|>]]/the dog<|assistant|>/[[ate<|user|>]]",
        ),
        (
            "last end",
            TWO,
            "<|user|>the cat<|end|><|assistant|>[[sat<|end|>]]<|user|>the dog<|end|><|assistant|>[[ate<|turn|>]]",
        ),
        (
            "tagged",
            TWO,
            "<|user|>the cat[[<|assistant|>sat<|end|>/]]<|user|>the dog[[<|assistant|>ate<|end|>/]]",
        ),
    ],
)
def test_every_answer_is_trained_on_as_it_is_asked_for(marked, name, messages, expected):
    assert marked(name, messages) == expected


@pytest.mark.parametrize(
    ("name", "messages", "expected"),
    [
        ("opens", THOUGHTS, "<|user|>the cat<|assistant|>sat<|end|><|user|>the dog<|assistant|><think>/[[b/</think>//ate<|end|>]]"),
        ("drops", [*THOUGHTS[:3], TWO[3]], "<|user|>the cat<|assistant|>//sat<|end|><|user|>the dog<|assistant|>[[ate<|end|>]]"),
        ("no end", TWO, "<|user|>/the cat<|assistant|>/sat<|user|>/the dog<|assistant|>/[[ate<|user|>]]"),
        ("tagged", TWO, "<|user|>the cat<|assistant|>sat<|end|>/<|user|>the dog[[<|assistant|>ate<|end|>/]]"),
    ],
)  # fmt: skip
def test_history_is_as_the_template_writes_it_where_only_the_last_answer_is_learnt(marked, name, messages, expected):
    assert marked(name, messages, train_on="last") == expected


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("messages", [ONE, TWO], ids=["one", "two"])
def test_prompts_are_what_came_before_the_answer_in_training(marked, name, messages):
    marked(name, messages, train_on="last")
    example, template = marked.done.train[0], marked.done.template
    prompt = template.prompt_ids(messages[:-1], marked.tokenizer)
    assert example.input_ids.tolist()[: len(prompt)] == prompt
    first = int(example.supervised.argmax())
    header = len(marked.tokenizer("<|assistant|>").input_ids) if name == "tagged" else 0
    assert first == len(prompt) - header


def test_a_thought_that_the_template_drops_is_an_error_that_names_the_message(marked):
    with pytest.raises(GraftError, match="omits or changes a part of the answer in message 2"):
        marked("drops", THOUGHT)


def test_notes_say_what_the_template_writes_otherwise(marked):
    marked("opens", TWO)
    assert any("earlier answers of a conversation" in note for note in marked.done.report.notes)
    marked("opens", ONE)
    assert not any("earlier answers of a conversation" in note for note in marked.done.report.notes)
    marked("drops", ONE)
    assert any("ends prompts with '<think>\\n'" in note for note in marked.done.report.notes)


def test_generation_stops_at_the_first_token_of_the_end_mark(marked):
    for name, token in {"two ends": "<|end|>", "no end": "<|user|>", "last end": "<|turn|>"}.items():
        marked(name, ONE)
        stops = marked.done.template.stop_ids(marked.tokenizer)
        assert set(stops) == set(marked.tokenizer.convert_tokens_to_ids([token, marked.tokenizer.eos_token]))


def test_template_args_reach_the_template_and_are_saved_with_it(marked, tmp_path):
    thinking = {"template_args": {"enable_thinking": False}}
    assert marked("opens", ONE, **thinking) == "<|user|>the cat<|assistant|><think>//</think>//[[sat<|end|>]]"
    saved = tmp_path / "adapter"
    saved.mkdir()
    template = marked.done.template
    template.save(saved)
    loaded = template_of(saved)
    assert isinstance(loaded, ChatTemplate) and loaded.digest == template.digest
    asked = loaded.prompt_ids(ONE[:1], marked.tokenizer)
    assert marked.tokenizer.decode(asked).endswith("<|assistant|><think>\n\n</think>\n\n")
    again = template_of(saved, marked.tokenizer, {"enable_thinking": True})
    assert marked.tokenizer.decode(again.prompt_ids(ONE[:1], marked.tokenizer)).endswith("<|assistant|><think>\n")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"template_args": {"enable_thinkin": True}}, "it reads enable_thinking. Did you mean 'enable_thinking'"),
        ({"template": "alpaca", "template_args": {"a": 1}}, "no effect with template 'alpaca'"),
        ({"template_args": {"messages": 1}}, "does not read 'messages'"),
    ],
)
def test_settings_that_nothing_reads_are_refused(marked, settings, said):
    with pytest.raises(GraftError, match=said):
        marked("opens", ONE, **settings)


def test_a_thought_under_a_prompt_that_closes_thoughts_is_refused_with_the_setting(marked):
    with pytest.raises(GraftError, match=r"otherwise than it asks for it.*enable_thinking"):
        marked("opens", THOUGHT, template_args={"enable_thinking": False})


@pytest.mark.parametrize("think", ["", "<think>\nhm\n</think>\n\n"])
def test_pairs_whose_answers_the_template_rewrites(marked, tmp_path, think):
    rows, jinja = tmp_path / "pairs.jsonl", tmp_path / "opens.jinja"
    jinja.write_text(OPENS)
    rows.write_text(json.dumps({"prompt": "the cat", "chosen": f"{think}sat", "rejected": "ate"}) + "\n")
    config = DataConfig.model_validate(
        {"train": str(rows), "template": str(jinja), "task": "preference", "cache": False}
    )
    example = prepare(config, marked.tokenizer).train[0]
    learnt = [marked.tokenizer.decode(side.input_ids[side.supervised]) for side in example.sequences]
    assert learnt == [f"{'hm' if think else ''}\n</think>\n\nsat<|end|>", "\n</think>\n\nate<|end|>"]


def test_special_tokens_that_occur_equally_often_are_named_in_the_order_of_the_text(marked, tmp_path):
    rows = tmp_path / "items.jsonl"
    rows.write_text(json.dumps({"prompt": "<|turn|> next <|user|> <|end|>", "completion": "x"}) + "\n")
    config = DataConfig.model_validate({"train": str(rows), "template": "plain", "cache": False})
    notes = prepare(config, marked.tokenizer).report.notes
    assert any("(<|turn|> in 1, <|user|> in 1, <|end|> in 1)" in note for note in notes)


def test_special_tokens_in_the_data_are_counted_and_become_tokens_where_the_user_says_so(marked, tmp_path):
    tokenizer, rows = marked.tokenizer, tmp_path / "items.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": p, "completion": "<|turn|>"}) + "\n" for p in ("next?", "<|user|> next?"))
    )
    config = DataConfig.model_validate({"train": str(rows), "template": "plain", "cache": False})
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    text, tokens = (
        prepare(config.model_copy(update={"special_tokens": setting}), tokenizer) for setting in ("text", "tokens")
    )
    assert turn not in text.train[0].input_ids and not text.template.reads_tokens
    assert any(
        "2 of 2 training samples spell special tokens (<|turn|> in 2, <|user|> in 1)" in note
        for note in text.report.notes
    )
    assert tokens.train[0].input_ids[tokens.train[0].supervised].tolist() == [turn, tokenizer.eos_token_id]
    saved = tmp_path / "adapter"
    saved.mkdir()
    tokens.template.save(saved)
    loaded = template_of(saved)
    assert loaded.digest == tokens.template.digest != text.template.digest
    asked = loaded.prompt_ids([{"role": "user", "content": "<|user|> next?"}], tokenizer)
    assert asked[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    with pytest.raises(GraftError, match=r"special_tokens has no effect"):
        prepare(
            config.model_copy(update={"special_tokens": "tokens", "task": "classification", "template": "auto"}),
            tokenizer,
        )


def test_plain_text_under_a_chat_template_names_plain(marked, tmp_path):
    rows, jinja = tmp_path / "text.jsonl", tmp_path / "opens.jinja"
    jinja.write_text(OPENS)
    rows.write_text(json.dumps({"text": "the cat sat"}) + "\n")
    config = DataConfig.model_validate({"train": str(rows), "template": str(jinja), "cache": False})
    with pytest.raises(GraftError, match=r"row 1: there is a text without a question.*data.template to plain"):
        prepare(config, marked.tokenizer)
