"""Chat templates (Jinja, as tokenizers carry them), with the place of every answer found by rendering.

Nothing is searched for in the text. The start of an answer is where the prompt before it ends, rendered with the
generation prompt. The place of a message's content is found by rendering the conversation once more with that content
replaced by a single character that occurs nowhere else: what stands before and after it is the template's. The end mark is
the text after the content up to the first special token, which the model learns to write; where a template writes no
special token there, the end-of-sequence token is put in.

The special tokens that Jinja reads are kept with the template. A template that prints today's date gets a fixed one: the
same run must read the same tomorrow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from graft.data.encoding import Span, facts_of
from graft.data.samples import Message, question
from graft.data.template import Template
from graft.errors import GraftError

# The date that Llama 3's own template falls back to. A macro hides the function of the same name.
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024'}.get(format, '26 Jul 2024') }}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate(Template):
    """A Jinja chat template and what was found out about it."""

    jinja: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    """What the tokenizer hands to Jinja: bos_token, eos_token and others."""
    header: str = ""
    """What stands before an answer where the template takes no notice of `add_generation_prompt`."""
    end: str = ""
    """What stands after an answer, up to and including a special token; empty where the template writes none."""
    end_token: str | None = None
    """The special token in `end`."""

    @classmethod
    def of(cls, jinja: str, tokenizer: Any, name: str = "chat") -> ChatTemplate:
        """Probe a template with one question and one answer."""
        if tokenizer is None:
            raise GraftError("a chat template needs the tokenizer that it belongs to")
        facts = facts_of(tokenizer)
        tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, (str, list))}
        template = cls(name=name, jinja=jinja, special_tokens=tokens)
        asked: Message = {"role": "user", "content": "x"}
        place = template._around([asked, {"role": "assistant", "content": "x"}], 1, False)
        if place is None:
            raise GraftError(
                f"chat template '{name}' leaves out the answers of a conversation, so it cannot train them"
            )
        before, after = place
        without, prompt = template._text([asked], False), template._text([asked], True)
        header = ""
        if prompt == without and before.startswith(without) and before[len(without) :].strip():
            header = before[len(without) :].rstrip(" ")
        if not before.startswith(prompt + header):
            raise GraftError(
                f"chat template '{name}': the answers cannot be told apart from the rest, because the text before an answer "
                f"is not the prompt for one. Prompt: {prompt[-60:]!r}; before an answer: {before[-60:]!r}"
            )
        found = re.search("|".join(map(re.escape, facts.controls)), after)
        end, end_token = (after[: found.end()], found.group()) if found else ("", None)
        return cls(name=name, jinja=jinja, special_tokens=tokens, header=header, end=end, end_token=end_token)

    @classmethod
    def saved(cls, name: str, content: Mapping[str, Any], jinja: str) -> ChatTemplate:
        """From the content of its files."""
        try:
            return cls(name=name, jinja=jinja, **content)
        except TypeError as error:
            raise GraftError(f"the saved template '{name}' cannot be read: {error}") from error

    def content(self) -> dict[str, Any]:
        return {
            "kind": "chat",
            "system_prompt": self.system_prompt,
            "jinja": self.jinja,
            "special_tokens": dict(self.special_tokens),
            "header": self.header,
            "end": self.end,
            "end_token": self.end_token,
        }

    def stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        ids = {facts_of(tokenizer).eos_id}
        if self.end_token is not None:
            ids.add(tokenizer.convert_tokens_to_ids(self.end_token))
        return tuple(sorted(ids))

    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Span]:
        turns: list[Message] = [{"role": m["role"], "content": question(m)} for m in messages]
        full = self._text(turns, add_generation_prompt)
        spans: list[Span] = []
        at = 0
        for index, turn in enumerate(turns):
            around = self._around(turns, index, add_generation_prompt)
            answer = turn["role"] == "assistant"
            start, inner = self._answer(turns, index, full, around) if answer else _content(index, full, around)
            if start < at and answer:
                raise GraftError(
                    f"chat template '{self.name}' writes message {index + 1} before the one that precedes it"
                )
            if inner and start >= at:
                spans += [Span(full[at:start]), *inner]
                at = start + sum(len(span.text) for span in inner)
        return [*spans, Span(full[at:])]

    def _answer(
        self, turns: list[Message], index: int, full: str, around: tuple[str, str] | None
    ) -> tuple[int, list[Span]]:
        """Where an answer starts, and its spans: what the template writes before the content, the content, the end mark."""
        head = self._text(turns[:index], True)
        if not full.startswith(head) or around is None or not full.endswith(around[1]):
            raise GraftError(
                f"chat template '{self.name}' writes message {index + 1} differently within the conversation than when it "
                "is asked for, so its place cannot be established; split the conversation, or use another template"
            )
        before, after = around
        start, stop = len(head), len(full) - len(after)
        if _squeezed(turns[index]["content"]) not in _squeezed(full[start:stop]):
            raise GraftError(
                f"chat template '{self.name}' leaves out or changes a part of message {index + 1}, an answer: "
                f"{full[start:stop][:60]!r}"
            )
        located = full.startswith(before) and start <= len(before) <= stop
        lead = len(before) if located else start
        body = Span(full[lead:stop], True, index if located else None)
        ended = bool(self.end) and after.startswith(self.end)
        spans = [Span(full[start:lead], True), body]
        spans.append(Span(self.end, True) if ended else Span("", True, ends=True))
        return start, spans

    def _around(self, turns: list[Message], index: int, add_generation_prompt: bool) -> tuple[str, str] | None:
        """The text before and after a message's content; None where the template does not write it once, as it is."""
        private = map(chr, range(0xE000, 0xF8FF))
        mark = next(mark for mark in private if not any(mark in turn["content"] for turn in turns))
        marked: list[Message] = [*turns[:index], {"role": turns[index]["role"], "content": mark}, *turns[index + 1 :]]
        parts = self._text(marked, add_generation_prompt).split(mark)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _text(self, turns: list[Message], add_generation_prompt: bool) -> str:
        date = FIXED_DATE if "strftime_now" in self.jinja else ""
        try:
            rendered = render_jinja_template(
                [[dict(turn) for turn in turns]],
                chat_template=date + self.jinja,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )[0][0]
        except TemplateError as error:
            raise GraftError(f"chat template '{self.name}' refuses this conversation: {error}") from error
        return rendered + (self.header if add_generation_prompt else "")


def _content(index: int, full: str, around: tuple[str, str] | None) -> tuple[int, list[Span]]:
    """Where the content of a message starts, and its span; no span where the template rewrites it."""
    if around is None or not full.startswith(around[0]) or not full.endswith(around[1]):
        return 0, []
    start, stop = len(around[0]), len(full) - len(around[1])
    return start, ([Span(full[start:stop], message=index)] if start < stop else [])


def _squeezed(text: str) -> str:
    return "".join(text.split())
