"""Chat templates (Jinja, as tokenizers carry them). Rendering locates every answer; nothing is searched for in the text.

- An answer starts where the prompt before it ends, when that prompt is rendered with the generation prompt.
- The content of a message is located by a second rendering in which a single character that occurs nowhere else replaces it. The
  text before and after this character belongs to the template. For example, with the question "x" and the marker "#":

      conversation     <|user|>x<|end|><|assistant|>x<|end|>
      answer marked    <|user|>x<|end|><|assistant|>#<|end|>    before: "<|user|>x<|end|><|assistant|>", after: "<|end|>"

- The end mark is the text after the content up to the first special token. The model learns to write it. If the template writes no
  special token there, the end-of-sequence token is added.
- An answer with tool calls goes on behind its content. It is all that the template writes between the prompt and the end mark.

Tools, tool calls and thoughts are handed to the template. What it does not write is an error: without it the rendering is the same.

The special tokens that the Jinja code reads are saved with the template. A template that prints today's date gets a fixed date, so that
a run renders the same text tomorrow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from graft.data.encoding import Span, facts_of
from graft.data.samples import THOUGHTS, Message, question
from graft.data.template import Template
from graft.errors import GraftError

# Llama 3's template falls back to this date. The macro shadows the function `strftime_now` that transformers passes in.
FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%B %d, %Y': 'July 26, 2024'}.get(format, '26 Jul 2024') }}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True, kw_only=True)
class ChatTemplate(Template):
    """A Jinja chat template, with the facts that rendering a probe has shown."""

    jinja: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    """The special tokens that the tokenizer passes to Jinja: bos_token, eos_token and others."""
    header: str = ""
    """The text before an answer, if the template ignores `add_generation_prompt`; else empty."""
    end: str = ""
    """The end mark: the text after an answer, up to and including a special token; empty if there is no such token."""
    end_token: str | None = None
    """The special token in `end`."""

    @classmethod
    def of(cls, jinja: str, tokenizer: Any, name: str = "chat") -> ChatTemplate:
        """Probe a template with one question and one answer.

        Raises `GraftError` without a tokenizer, and for a template that omits answers or writes them so that they cannot be located.
        """
        if tokenizer is None:
            raise GraftError("a chat template needs its tokenizer, but none was given")
        facts = facts_of(tokenizer)
        tokens = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, (str, list))}
        template = cls(name=name, jinja=jinja, special_tokens=tokens)
        asked: Message = {"role": "user", "content": "x"}
        place = template._around([asked, {"role": "assistant", "content": "x"}], 1, False)
        if place is None:
            raise GraftError(
                f"chat template '{name}' does not write the answers of a conversation, so they cannot be trained on"
            )
        before, after = place
        without, prompt = template._text([asked], False), template._text([asked], True)
        # Some templates ignore `add_generation_prompt`. What they write between the question and the answer then is the header.
        header = ""
        if prompt == without and before.startswith(without) and before[len(without) :].strip():
            header = before[len(without) :].rstrip(" ")
        if not before.startswith(prompt + header):
            raise GraftError(
                f"chat template '{name}': answers cannot be told apart from the rest, because the text before an answer "
                f"does not begin with the prompt for it. Prompt: {prompt[-60:]!r}; before an answer: {before[-60:]!r}"
            )
        found = re.search("|".join(map(re.escape, facts.controls)), after)
        end, end_token = (after[: found.end()], found.group()) if found else ("", None)
        return cls(name=name, jinja=jinja, special_tokens=tokens, header=header, end=end, end_token=end_token)

    @classmethod
    def saved(cls, name: str, content: Mapping[str, Any], jinja: str) -> ChatTemplate:
        """Rebuild a template from the content of its files."""
        try:
            return cls(name=name, jinja=jinja, **content)
        except TypeError as error:
            raise GraftError(f"cannot read the saved template '{name}': {error}") from error

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
        turns: list[Message] = [{**m, "content": question(m)} for m in messages]
        full = self._text(turns, add_generation_prompt)
        self._check_shown(turns, full, add_generation_prompt)
        spans: list[Span] = []
        at = 0  # how much of `full` the spans cover so far
        for index, turn in enumerate(turns):
            around = self._around(turns, index, add_generation_prompt)
            answer = turn["role"] == "assistant"
            if around is None and not answer and turn["content"].strip() and not self._writes(turns, index, full):
                raise GraftError(
                    f"chat template '{self.name}' does not write message {index + 1} (of role '{turn['role']}')"
                )
            if answer and "tool_calls" in turn.get("extra", {}):
                start, inner = self._calling_answer(turns, index, full)
            else:
                start, inner = self._answer(turns, index, full, around) if answer else _content(index, full, around)
            if turn.get("masked"):
                inner = [replace(span, masked=True) for span in inner]
            if start < at and answer:
                raise GraftError(
                    f"chat template '{self.name}' writes message {index + 1} before the message that precedes it"
                )
            # A question whose content cannot be located stays part of the template's own text: it just cannot be shortened.
            if inner and start >= at:
                spans += [Span(full[at:start]), *inner]
                at = start + sum(len(span.text) for span in inner)
        return [*spans, Span(full[at:])]

    def _answer(
        self, turns: list[Message], index: int, full: str, around: tuple[str, str] | None
    ) -> tuple[int, list[Span]]:
        """Return where an answer starts, and its spans: the template's text before the content, the content, the end mark."""
        head = self._text(turns[:index], True)
        if not full.startswith(head) or around is None or not full.endswith(around[1]):
            raise GraftError(
                f"chat template '{self.name}' writes the prompt for message {index + 1} differently once the conversation goes on, "
                "so the answer cannot be located; split the conversation, or use another template"
            )
        before, after = around
        start, stop = len(head), len(full) - len(after)
        if _without_spaces(turns[index]["content"]) not in _without_spaces(full[start:stop]):
            raise GraftError(
                f"chat template '{self.name}' omits or changes a part of the answer in message {index + 1}: "
                f"{full[start:stop][:60]!r}"
            )
        # Some templates write other words before the marker than before the content. The whole answer is then one span that no
        # message is tied to.
        located = full.startswith(before) and start <= len(before) <= stop
        lead = len(before) if located else start
        body = Span(full[lead:stop], True, index if located else None)
        ended = bool(self.end) and after.startswith(self.end)
        spans = [Span(full[start:lead], True), body]
        spans.append(Span(self.end, True) if ended else Span("", True, ends=True))
        return start, spans

    def _calling_answer(self, turns: list[Message], index: int, full: str) -> tuple[int, list[Span]]:
        """Return where an answer with tool calls starts, and its spans: all that the template writes for it, and the end mark."""
        head, upto = self._text(turns[:index], True), self._text(turns[: index + 1], False)
        if not (full.startswith(upto) and upto.startswith(head)):
            raise GraftError(
                f"chat template '{self.name}' writes the tool calls of message {index + 1} differently once the conversation goes on, "
                "so the answer cannot be located; split the conversation, or use another template"
            )
        answer, tail = upto[len(head) :], self._tail
        body = answer.removesuffix(tail)
        if body != answer:
            ended = bool(self.end) and tail.startswith(self.end)
            return len(head), [Span(body, True), Span(self.end, True) if ended else Span("", True, ends=True)]
        # Some templates end calls with a mark of their own: a special token that is the last thing written.
        token = next((t for t in self._end_tokens if answer.rstrip().endswith(t)), None)
        body = answer.rstrip() if token else answer
        return len(head), [Span(body, True, ends=token is None)]

    @cached_property
    def _tail(self) -> str:
        """What the template writes behind the content of an answer."""
        place = self._around([{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}], 1, False)
        return place[1] if place is not None else ""

    @property
    def _end_tokens(self) -> list[str]:
        """The texts in the template that look like special tokens, as <|eom_id|>."""
        return re.findall(r"<\|?[\w./-]+\|?>", self.jinja)

    def _check_shown(self, turns: list[Message], full: str, add_generation_prompt: bool) -> None:
        """Raise `GraftError` for tools, tool calls and thoughts that the template does not write."""
        for index, turn in enumerate(turns):
            extra = turn.get("extra", {})
            must = [("tools", {key: value for key, value in turn.items() if key != "tools"})] if "tools" in turn else []
            for key in ("tool_calls", *THOUGHTS):
                if key in extra:
                    must.append((key, {**turn, "extra": {k: v for k, v in extra.items() if k != key}}))
            for key, without in must:
                changed = [*turns[:index], cast(Message, without), *turns[index + 1 :]]
                try:
                    shown = self._text(changed, add_generation_prompt) != full
                except GraftError:  # the template cannot do without it
                    continue
                if not shown:
                    where = "of the conversation" if key == "tools" else f"of message {index + 1}"
                    raise GraftError(
                        f"chat template '{self.name}' does not write `{key}` {where}, so the model would not see it: use another "
                        f"template, or leave `{key}` out of the data"
                    )

    def _writes(self, turns: list[Message], index: int, full: str) -> bool:
        """Whether the rendering depends on the content of a message."""
        changed: list[Message] = [
            *turns[:index],
            {**turns[index], "content": "x" + turns[index]["content"]},
            *turns[index + 1 :],
        ]
        try:
            return self._text(changed, False) != full
        except GraftError:
            return True

    def _around(self, turns: list[Message], index: int, add_generation_prompt: bool) -> tuple[str, str] | None:
        """Return the text before and after a message's content; None if the template does not write the content exactly once."""
        private_use = map(chr, range(0xE000, 0xF8FF))  # Unicode's private use area
        mark = next(mark for mark in private_use if not any(mark in turn["content"] for turn in turns))
        marked: list[Message] = [*turns[:index], {**turns[index], "content": mark}, *turns[index + 1 :]]
        parts = self._text(marked, add_generation_prompt).split(mark)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _text(self, turns: list[Message], add_generation_prompt: bool) -> str:
        """Render turns to text. Raises `GraftError` with the template's own message if it refuses them."""
        date = FIXED_DATE if "strftime_now" in self.jinja else ""
        tools = next((turn["tools"] for turn in turns if "tools" in turn), None)
        try:
            rendered = render_jinja_template(
                [[self._as_mapping(turn) for turn in turns]],
                tools=tools,
                chat_template=date + self.jinja,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )[0][0]
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise GraftError(f"chat template '{self.name}' refuses this conversation: {error}") from error
        return rendered + (self.header if add_generation_prompt else "")

    def _as_mapping(self, turn: Message) -> dict[str, Any]:
        """Return a message as the template takes it: with the thoughts under the name that the template reads."""
        made = {"role": turn["role"], "content": turn["content"], **turn.get("extra", {})}
        for name in THOUGHTS:
            if name in made and name not in self.jinja:
                made |= {other: made[name] for other in THOUGHTS if other in self.jinja and other not in made}
        return made


def _content(index: int, full: str, around: tuple[str, str] | None) -> tuple[int, list[Span]]:
    """Return where the content of a message starts, and its span; no span if the template rewrites the content."""
    if around is None or not full.startswith(around[0]) or not full.endswith(around[1]):
        return 0, []
    start, stop = len(around[0]), len(full) - len(around[1])
    return start, ([Span(full[start:stop], message=index)] if start < stop else [])


def _without_spaces(text: str) -> str:
    return "".join(text.split())
