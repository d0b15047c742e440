"""The shapes of rows: Alpaca, OpenAI messages, ShareGPT, and prompt with completion. Each row becomes a list of messages.

A conversion function takes a row (column -> value) and `need_answer`. It raises `RowError(field, problem)`; the caller adds the file and
the row number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from graft.data.samples import ROLES, Message
from graft.errors import GraftError, did_you_mean

Row = Mapping[str, Any]
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "bot": "assistant",
    "system": "system",
}
"""ShareGPT's names for the speakers, with our roles."""


class RowError(ValueError):
    """A row does not have the expected shape."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field '{field}': {problem}")


def text(row: Row, field: str) -> str:
    """Return the field as text; numbers are converted. Raises `RowError` if it is missing or has another type."""
    if field not in row or row[field] is None:
        raise RowError(field, "is missing")
    value = row[field]
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise RowError(field, f"must be text, but is {_kind(value)}")


def alpaca(row: Row, need_answer: bool) -> list[Message]:
    """Convert {instruction, input, output}, or Dolly's {instruction, context, response}."""
    asked = question_of(row, "instruction")
    answer = "response" if "output" not in row and "response" in row else "output"
    return [*_system(row), asked, *_answer(row, answer, need_answer)]


def question_of(row: Row, field: str) -> Message:
    """Return the field as a user message; an instruction takes along the context that the row may have."""
    asked: Message = {"role": "user", "content": text(row, field)}
    names = ("input", "context") if field == "instruction" else ()
    context = next((name for name in names if row.get(name)), None)
    if context and (extra := text(row, context)).strip():
        asked["input"] = extra
    return asked


def turns_of(value: Any, field: str) -> list[Message]:
    """Convert a list of turns in OpenAI's or in ShareGPT's form; the first turn tells which."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, Mapping) and first.get("from") is not None and first.get("role") is None:
        return _turns(value, field, "from", "value", _sharegpt_role)
    return _turns(value, field, "role", "content", _openai_role)


def completion(row: Row, need_answer: bool) -> list[Message]:
    """Convert a prompt and its completion, each a text or a list of messages, under any of the names in `PAIRS`; or `text` alone."""
    if "text" in row and not any(names[0] in row for names in PAIRS):
        return [{"role": "assistant", "content": text(row, "text")}]
    # Take the pair of which both columns are there, else one with a prompt, else the first one (so that the error names its fields).
    complete = [pair for pair in PAIRS if pair[0] in row and pair[1] in row]
    prompt, answer = next(iter([*complete, *(pair for pair in PAIRS if pair[0] in row), *PAIRS]))
    if isinstance(row.get(prompt), list):
        turns = _turns(row[prompt], prompt, "role", "content", _openai_role)
        return [*turns, *(_turns(row[answer], answer, "role", "content", _openai_role) if row.get(answer) else [])]
    return [*_system(row), {"role": "user", "content": text(row, prompt)}, *_answer(row, answer, need_answer)]


def messages(row: Row, need_answer: bool) -> list[Message]:
    """Convert OpenAI's {messages: [{role, content}, ...]}; content is a text or a list of text parts."""
    return _turns(row.get("messages"), "messages", "role", "content", _openai_role)


def sharegpt(row: Row, need_answer: bool) -> list[Message]:
    """Convert {conversations: [{from, value}, ...]}, with an optional column `system`; some data have role and content there."""
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping) and turns[0].get("role") is not None:
        return [*_system(row), *_turns(turns, "conversations", "role", "content", _openai_role)]
    return [*_system(row), *_turns(turns, "conversations", "from", "value", _sharegpt_role)]


@dataclass(frozen=True)
class Shape:
    """One shape of rows."""

    columns: tuple[tuple[str, ...], ...]
    """Sets of columns; a source that has all columns of any one set has this shape."""
    convert: Callable[[Row, bool], list[Message]]
    """From a row, and whether it must have an answer, to messages."""


PAIRS = (
    ("prompt", "completion"),
    ("question", "answer"),
    ("prompt", "response"),
    ("query", "response"),
    ("source", "target"),
)
SHAPES = {
    "messages": Shape((("messages",),), messages),
    "sharegpt": Shape((("conversations",),), sharegpt),
    "alpaca": Shape((("instruction", "output"), ("instruction", "response")), alpaca),
    "completion": Shape((*PAIRS, ("text",)), completion),
}
KNOWN = """  alpaca      instruction, output (and input); or instruction, response (and context)
  messages    messages: a list of {role, content}
  sharegpt    conversations: a list of {from, value}
  completion  prompt, completion; question, answer; prompt, response; query, response; source, target; or text alone"""


def detect(columns: Iterable[str], wanted: str, source: str, need_answer: bool) -> Shape:
    """Return the shape of a source with these columns. Raises `GraftError` with the columns found and the shapes known."""
    found = list(columns)
    if wanted not in ("auto", *SHAPES):
        raise GraftError(
            f"unknown data format '{wanted}', expected auto, {_listed(SHAPES)}.{did_you_mean(wanted, SHAPES)}"
        )
    for name, shape in SHAPES.items():
        for columns_of_shape in shape.columns:
            needed = columns_of_shape if need_answer else columns_of_shape[:1]
            if wanted in ("auto", name) and all(column in found for column in needed):
                return shape
    expected = "fit no known format" if wanted == "auto" else f"do not fit the format '{wanted}'"
    raise GraftError(
        f"{source}: the columns {_listed(found)} {expected}. The formats are:\n{KNOWN}\n"
        "Rename columns with `fields`, from the expected name to the name in the data, e.g. fields: {instruction: "
        f"{found[0] if found else 'question'}}}"
    )


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": text(row, "system")}] if row.get("system") else []


def _answer(row: Row, field: str, need_answer: bool) -> list[Message]:
    if not need_answer and row.get(field) is None:
        return []
    return [{"role": "assistant", "content": text(row, field)}]


def _openai_role(role: str) -> str | None:
    return "system" if role == "developer" else role if role in ROLES else None


def _sharegpt_role(speaker: str) -> str | None:
    return SPEAKERS.get(speaker)


def _turns(value: Any, field: str, who: str, what: str, role_of: Callable[[str], str | None]) -> list[Message]:
    """Convert a list of turns; the keys for the speaker (`who`) and the text (`what`), and the names of roles, depend on the shape."""
    if not isinstance(value, list) or not value:
        raise RowError(field, f"must be a list of {{{who}, {what}}}, but is {_kind(value)}")
    turns: list[Message] = []
    for number, turn in enumerate(value):
        at = f"{field}[{number}]"
        if not isinstance(turn, Mapping):
            raise RowError(at, f"must hold {who} and {what}, but is {_kind(turn)}")
        role = role_of(text(turn, who)) if turn.get(who) is not None else None
        if role is None:
            allowed = ROLES if who == "role" else SPEAKERS
            raise RowError(f"{at}.{who}", f"must be one of {_listed(allowed)}, but is {turn.get(who)!r}")
        turns.append({"role": cast(Literal["system", "user", "assistant"], role), "content": _content(turn, what, at)})
    return turns


def _content(turn: Row, what: str, at: str) -> str:
    value = turn.get(what)
    if not isinstance(value, list):
        try:
            return text(turn, what)
        except RowError as error:
            raise RowError(
                f"{at}.{what}", str(error).split(": ", 1)[1]
            ) from None  # the same problem, with the full path
    parts = []
    for number, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"{at}.{what}[{number}]", "only parts of type 'text' can be trained on")
        parts.append(part["text"])
    return "".join(parts)


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "a mapping", type(None): "nothing", bool: "true or false"}
    if value == []:
        return "an empty list"
    return names.get(type(value), type(value).__name__)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
