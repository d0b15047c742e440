"""TRL's training templates, over its whole list: the same targets as its masks, or a named refusal.

`X_training.jinja` marks with `{% generation %}` what the model learns of `X.jinja`. Graft reads both. Under the first, its targets are
those marks. Under the second, they are the marks less what the prompt gives already, as an opened `<think>`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from graft.data.chat import ChatTemplate
from graft.errors import GraftError

from .conftest import gpt_like

trl = pytest.importorskip("trl", reason="the reference is TRL")
FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.name.removesuffix("_training.jinja") for path in FOLDER.glob("*_training.jinja"))
MARK = re.compile(r"<\|[^|>\s]+\|>|<｜[^｜>]+｜>|<[a-z_]+_of_[a-z_]+>|<\|[a-z_]+>|<[a-z_]+\|>|\[gMASK\]|<sop>|</?s>")
PARTS = ("idefics3", "llava_next", "smolvlm")
"""Templates of vision models, which need a list of parts as content and write no plain text."""


def talk(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


THOUGHT = "<think>\n{}\n</think>\n\n"
TALKS = {
    "one": talk("the cat", "sat"),
    "two": talk("the cat", "sat", "the dog", "ate"),
    "system": [{"role": "system", "content": "Be kind."}, *talk("the cat", "sat")],
    "thought": talk("the cat", THOUGHT.format("hm") + "sat"),
    "thoughts": talk("the cat", THOUGHT.format("a") + "sat", "the dog", THOUGHT.format("b") + "ate"),
}


def tokenizer_for(name):
    """A small tokenizer that has the special tokens of a template."""
    tokenizer = gpt_like()
    text = (FOLDER / f"{name}.jinja").read_text() + (FOLDER / f"{name}_training.jinja").read_text()
    marks = sorted({mark for mark in MARK.findall(text) if mark not in ("</tool_call>", "<|end|>")} | {"<s>"})
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": marks})
    return tokenizer


def marks_of(name, tokenizer, messages):
    """What TRL trains on: the passages inside `{% generation %}`, neighbours joined."""
    tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, (str, list))}
    jinja = (FOLDER / f"{name}_training.jinja").read_text()
    texts, passages = render_jinja_template(
        [messages], chat_template=jinja, return_assistant_tokens_mask=True, **tokens
    )
    found, last = [], None
    for start, end in passages[0]:
        found[len(found) - (last == start) :] = [(found[-1] if last == start else "") + texts[0][start:end]]
        last = end
    return [text.strip() for text in found if text.strip()]


def learnt_of(template, messages, learnt):
    """What Graft trains on, one text for each answer, and the prompt of the last one."""
    found: dict[int, str] = {}
    for span in template.render(messages, learnt=learnt):
        if span.answer in learnt:
            found[span.answer] = found.get(span.answer, "") + span.text
    return [text.strip() for text in found.values()]


@pytest.mark.skipif(not NAMES, reason="this release of TRL has no folder of chat templates")
@pytest.mark.parametrize("name", NAMES)
def test_targets_are_those_of_trl_or_the_template_is_refused(name):
    tokenizer, agreed = tokenizer_for(name), 0
    for messages in TALKS.values():
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for learnt in ([answers[-1]], answers):
            try:
                expected = marks_of(name, tokenizer, messages)[-len(learnt) :]
            except Exception:  # the template refuses this conversation
                expected = None
            for variant in ("_training", ""):
                try:
                    template = ChatTemplate.of((FOLDER / f"{name}{variant}.jinja").read_text(), tokenizer, name)
                    ours = learnt_of(template, messages, learnt)
                except GraftError as error:
                    assert f"chat template '{name}'" in str(error)
                    continue
                assert expected is not None and len(ours) == len(expected)
                for index, own, theirs in zip(learnt, ours, expected, strict=True):
                    if own != theirs:
                        given = theirs.removesuffix(own)
                        assert given != theirs and not variant
                        assert template.text(messages[:index], True).rstrip().endswith(given.strip())
                agreed += 1
    assert agreed >= (0 if name in PARTS else 6)
