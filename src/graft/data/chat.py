"""Chat templates (Jinja, as tokenizers carry them): what is known of one, and what is saved of it.

Where the messages of a conversation lie in its text is found in `places.py`, the Jinja code runs in `rendering.py`.

- The end mark is what the template writes behind the last answer of a conversation: special tokens, or a text up to the first one. If it
  writes none there (GLM 4.5), the special token that begins the next turn ends the answer. If there is none either, the end-of-sequence
  token is added. The model learns to write the end mark.
- Tools, tool calls and thoughts are handed to the template. What it does not write is an error (`shown.py`).
- `arguments` are what the user gives to the template besides the conversation: `enable_thinking` and the like.

The special tokens that the Jinja code reads are saved with the template, and the arguments.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os.path import commonprefix
from typing import Any

from graft.data.encoding import Span, facts_of
from graft.data.places import around, spans_of
from graft.data.rendering import Rendered, limited, reads, run, settings_of
from graft.data.samples import THOUGHTS, Message, question
from graft.data.template import Template
from graft.errors import GraftError, did_you_mean

ASKED: Message = {"role": "user", "content": "x"}
ANSWERED: Message = {"role": "assistant", "content": "x"}


@dataclass(frozen=True, kw_only=True)
class ChatTemplate(Template):
    """A Jinja chat template, with the facts that rendering a probe has shown."""

    jinja: str
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    """The special tokens that the tokenizer passes to Jinja: bos_token, eos_token and others."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the user passes to Jinja."""
    header: str = ""
    """The text before an answer, if the template ignores `add_generation_prompt`; else empty."""
    unwritten: str = ""
    """The end of the generation prompt that conversations lack, as DeepSeek-R1's "<think>\\n". Prompts leave it out too."""
    end: str = ""
    """The end mark of an answer; empty if it is the end-of-sequence token that the template does not write."""
    next_end: str = ""
    """The end mark of an answer that is not the last, where it is another one."""
    end_token: str | None = None
    """The first special token in `end`."""

    @classmethod
    def of(
        cls, jinja: str, tokenizer: Any, name: str = "chat", arguments: Mapping[str, Any] | None = None
    ) -> ChatTemplate:
        """Probe a template with one question and one answer.

        Raises `GraftError` without a tokenizer, for arguments that the template does not read, and for a template that omits answers
        or writes them so that they cannot be located.
        """
        if tokenizer is None:
            raise GraftError("a chat template needs its tokenizer, but none was given")
        controls = "|".join(map(re.escape, facts_of(tokenizer).controls))
        known = {
            "name": name,
            "jinja": jinja,
            "special_tokens": {
                key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, (str, list))
            },
            "arguments": dict(arguments or {}),
        }
        probe = cls(**known)
        with limited(jinja, name):
            probe._check_arguments()
            place = around(probe, [ASKED, ANSWERED], 1, False)
            without, prompt = probe.text([ASKED], False), probe.text([ASKED], True)
            later = probe._after_answer()
        if place is None:
            raise GraftError(
                f"chat template '{name}' does not write the answers of a conversation, so they cannot be trained on"
            )
        before, after = place
        # Some templates ignore `add_generation_prompt`. What they write between the question and the answer then is the header.
        header = unwritten = ""
        if prompt == without and before.startswith(without) and before[len(without) :].strip():
            header = before[len(without) :].rstrip(" ")
        elif (shared := commonprefix([prompt, before])) != prompt and _ends_a_header(shared, without, before):
            unwritten = prompt[len(shared) :]
        if not before.startswith(prompt.removesuffix(unwritten) + header):
            raise GraftError(
                f"chat template '{name}': answers cannot be told apart from the rest, because the text before an answer "
                f"does not begin with the prompt for it. Prompt: {prompt[-60:]!r}; before an answer: {before[-60:]!r}"
            )
        end, next_end = _ends(after, later, controls)
        token = re.search(controls, end) if end else None
        marks = {"end": end, "next_end": next_end, "end_token": token.group() if token else None}
        return cls(**known, header=header, unwritten=unwritten, **marks)

    @classmethod
    def saved(cls, name: str, content: Mapping[str, Any], jinja: str) -> ChatTemplate:
        """Rebuild a template from the content of its files."""
        try:
            template = cls(name=name, jinja=jinja, **content)
        except TypeError as error:
            raise GraftError(f"cannot read the saved template '{name}': {error}") from error
        with limited(jinja, name):
            template.text([ASKED], True)
        return template

    def content(self) -> dict[str, Any]:
        found = {
            "kind": "chat",
            "system_prompt": self.system_prompt,
            "jinja": self.jinja,
            "special_tokens": dict(self.special_tokens),
            "header": self.header,
            "end": self.end,
            "end_token": self.end_token,
        }
        # Without these keys where they say nothing, the digest is that of templates saved by earlier releases.
        rare = {"arguments": dict(self.arguments), "unwritten": self.unwritten, "next_end": self.next_end}
        return found | {key: value for key, value in rare.items() if value}

    def stop_ids(self, tokenizer: Any) -> tuple[int, ...]:
        ids = {facts_of(tokenizer).eos_id}
        if self.end_token is not None:
            ids.add(tokenizer.convert_tokens_to_ids(self.end_token))
        return tuple(sorted(ids))

    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool, learnt: Container[int]) -> list[Span]:
        turns: list[Message] = [{**m, "content": question(m)} for m in messages]
        if [turn["role"] for turn in turns] == ["assistant"]:
            raise GraftError(
                f"there is a text without a question, which chat template '{self.name}' would write as an answer to nothing. To train on "
                "plain text, set data.template to plain"
            )
        return spans_of(self, turns, add_generation_prompt, learnt)

    def rendered(self, turns: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        """Render turns. Raises `GraftError` with the template's own message if it refuses them."""
        tools = next((turn["tools"] for turn in turns if "tools" in turn), None)
        values = {**self.special_tokens, **self.arguments}
        text, passages = run(
            self.jinja, self.name, [self._as_mapping(turn) for turn in turns], tools, add_generation_prompt, values
        )
        return Rendered((text + self.header).removesuffix(self.unwritten) if add_generation_prompt else text, passages)

    def text(self, turns: Sequence[Message], add_generation_prompt: bool) -> str:
        """Render turns to text alone."""
        return self.rendered(turns, add_generation_prompt).text

    @cached_property
    def tail(self) -> str:
        """What the template writes behind the content of the last answer."""
        place = around(self, [ASKED, ANSWERED], 1, False)
        return place[1] if place is not None else ""

    @cached_property
    def rewrites(self) -> bool:
        """Whether an answer reads differently once the conversation goes on: Qwen 3 writes an empty thought before the last one only."""
        try:
            asked, later = (around(self, [ASKED, ANSWERED, *more], 1, False) for more in ([], [ASKED, ANSWERED]))
        except GraftError:
            return False
        return asked is not None and later is not None and asked[0] != later[0]

    @cached_property
    def marked_header(self) -> int:
        """How many characters at the end of a prompt the template marks as generated."""
        passages = self.rendered([ASKED, ANSWERED], False).generated
        return max(0, len(self.text([ASKED], True)) - passages[0][0]) if passages else 0

    def _as_mapping(self, turn: Message) -> dict[str, Any]:
        """Return a message as the template takes it: with the thoughts under the name that the template reads."""
        made = {"role": turn["role"], "content": turn["content"], **turn.get("extra", {})}
        for name in THOUGHTS:
            if name in made and name not in self.jinja:
                made |= {other: made[name] for other in THOUGHTS if other in self.jinja and other not in made}
        return made

    def _check_arguments(self) -> None:
        """Raise `GraftError` for arguments that the template does not read."""
        for key in self.arguments:
            if not reads(self.jinja, key) or key in self.special_tokens:
                names = [name for name in settings_of(self.jinja) if name not in self.special_tokens]
                what = f"it reads {', '.join(names)}" if names else "it reads nothing besides the conversation"
                raise GraftError(
                    f"data.template_args: chat template '{self.name}' does not read '{key}'; {what}."
                    f"{did_you_mean(key, names)}"
                )

    def _after_answer(self) -> str:
        """Return what follows the content of an answer where another question comes; empty if the template refuses that."""
        try:
            place = around(self, [ASKED, ANSWERED, ASKED], 1, False)
        except GraftError:
            return ""
        return place[1] if place is not None else ""


def _ends_a_header(shared: str, without: str, before: str) -> bool:
    """Whether a prompt and the text before an answer are equal up to a border behind the question."""
    return len(shared) > len(without) and (shared == before or shared.endswith((">", "]", "\n")))


def _ends(last: str, later: str, controls: str) -> tuple[str, str]:
    """Return the end marks of the last answer and of an earlier one, given what follows the content of each."""
    only_marks = re.fullmatch(rf"(?:\s*(?:{controls}))+\s*", last)
    upto_mark = re.search(controls, last)
    next_turn = re.match(rf"\s*(?:{controls})", later)
    following = next_turn.group() if next_turn else ""
    end = last.rstrip() if only_marks else last[: upto_mark.end()] if upto_mark else following
    return end, "" if later.startswith(end) else following
