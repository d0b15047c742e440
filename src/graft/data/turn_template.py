"""Turn templates: one text with placeholders for each kind of turn.

A template file (YAML or JSON) has these keys; only `user` is required:

    opening: "..."              # starts a conversation without a system message
    opening_with_input: "..."   # replaces `opening` if the first question has further context (an Alpaca row's input)
    system: "{system}\\n\\n"      # starts a conversation with a system message; without this key such conversations are refused
    user: "Q: {user}\\nA: "      # a question, up to where the answer begins
    user_with_input: "..."      # replaces `user` if the question has further context; holds {user} and {input}
    between: "\\n\\n"             # comes between an answer and the next question
    system_prompt: "..."        # the system message of conversations that have none

The answer follows `user` directly, and the tokenizer's end-of-sequence token follows the answer.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from graft.data.encoding import Span
from graft.data.samples import THOUGHTS, Message, question
from graft.data.template import Template
from graft.errors import GraftError, did_you_mean

OUTSIDE = ("name", "reads_tokens")
"""Fields that are no keys of a template file."""
PLACEHOLDER = re.compile(r"\{(system|user|input)\}")


@dataclass(frozen=True, kw_only=True)
class TurnTemplate(Template):
    """A template with one text per kind of turn. The fields are the keys of its file."""

    user: str
    user_with_input: str | None = None
    opening: str = ""
    opening_with_input: str | None = None
    system: str | None = None
    between: str = "\n\n"

    def content(self) -> dict[str, Any]:
        return {"kind": "turns", **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in OUTSIDE}}

    def _spans(self, messages: Sequence[Message], add_generation_prompt: bool, learnt: Container[int]) -> list[Span]:
        spans: list[Span] = []
        for index, message in enumerate(messages):
            self._refuse_what_has_no_place(message, index)
            before = messages[index - 1]["role"] if index else None
            role, first = message["role"], before in (None, "system")
            if role == before or (role == "system" and index):
                raise GraftError(
                    f"message {index + 1} ('{role}') is out of turn: template '{self.name}' needs questions and answers in turn, "
                    "after a system message if there is one"
                )
            if role == "system":
                if self.system is None:
                    raise GraftError(
                        f"template '{self.name}' has no place for a system message: it lacks the key `system`"
                    )
                spans += _filled(self.system, {"system": message["content"]}, index)
                continue
            if not index:
                with_input = bool(message.get("input")) and self.opening_with_input is not None
                spans.append(Span((self.opening_with_input if with_input else self.opening) or ""))
            if role == "user":
                spans += ([] if first else [Span(self.between)]) + self._question(message, index)
            elif first and self.user != "{user}":
                raise GraftError(
                    f"there is an answer without a question; template '{self.name}' needs one ('plain' does not)"
                )
            else:
                spans.append(Span(message["content"], supervised=True, message=index, ends=True, answer=index))
        return spans

    def _refuse_what_has_no_place(self, message: Message, index: int) -> None:
        """Raise `GraftError` for tools, tool calls and thoughts: only chat templates write them."""
        extra = message.get("extra", {})
        found = [key for key in ("tool_calls", *THOUGHTS) if key in extra]
        found += ["tools"] if "tools" in message else []
        if found or message["role"] == "tool":
            raise GraftError(
                f"message {index + 1} has {' and '.join(f'`{key}`' for key in found) or 'the role tool'}, for which template "
                f"'{self.name}' has no place: use a chat template that writes them"
            )

    def _question(self, message: Message, index: int) -> list[Span]:
        if message.get("input") and self.user_with_input is not None:
            return _filled(self.user_with_input, {"user": message["content"], "input": message.get("input", "")}, index)
        return _filled(self.user, {"user": question(message)}, index)


def parse_turn_template(content: Any, *, name: str, where: str) -> TurnTemplate:
    """Build a template from the keys of its file.

    Raises `GraftError` for an unknown key, a value that is not text, and a text without its placeholders.
    """
    content = _checked_mapping(content, where)
    allowed = [f.name for f in fields(TurnTemplate) if f.name not in OUTSIDE]
    for key, value in content.items():
        if key not in allowed:
            raise GraftError(
                f"{where}: unknown key '{key}', expected {', '.join(allowed)}.{did_you_mean(key, allowed)}"
            )
        if value is not None and not isinstance(value, str):
            raise GraftError(f"{where}: '{key}' must be text, but is {type(value).__name__}")
    if content.get("user") is None:
        raise GraftError(
            f"{where}: the key 'user' is missing; it holds the text of a question, up to where the answer begins"
        )
    # Each text must hold exactly its own placeholders: the ones in `needed`, or none.
    needed = {"user": ["user"], "user_with_input": ["user", "input"], "system": ["system"]}
    for key in content:
        text = content[key]
        found = [] if text is None or key == "system_prompt" else PLACEHOLDER.findall(text)
        if text is not None and key != "system_prompt" and sorted(found) != sorted(needed.get(key, [])):
            wanted = " and ".join(f"{{{placeholder}}}" for placeholder in needed.get(key, [])) or "no placeholder"
            raise GraftError(f"{where}: '{key}' must hold {wanted} once, but holds {', '.join(found) or 'none'}")
    return TurnTemplate(name=name, **{key: value for key, value in content.items() if value is not None})


def _filled(pattern: str, values: dict[str, str], index: int) -> list[Span]:
    """Fill a pattern and return its own words and the values as spans.

    `PLACEHOLDER.split("Q: {user}\\nA: ")` is ["Q: ", "user", "\\nA: "]: every second part is the name of a placeholder.
    """
    spans = []
    for position, part in enumerate(PLACEHOLDER.split(pattern)):
        spans.append(Span(values[part], message=index) if position % 2 else Span(part))
    return spans


def _checked_mapping(value: Any, where: str) -> Mapping[str, Any]:
    """Return the value if it is a mapping with text keys, else raise `GraftError`."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise GraftError(f'{where}: a template is a mapping of texts, e.g. user: "Q: {{user}}\\nA: "')
    return value
