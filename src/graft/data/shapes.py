"""The shapes of rows: Alpaca, OpenAI messages, ShareGPT, and prompt with completion. Each row becomes a list of messages.

A conversion function takes a row (column -> value) and `need_answer`. It raises `RowError(field, problem)`; the caller adds the file and
the row number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from graft.data.cells import Row, text
from graft.data.columns import is_empty
from graft.data.samples import Message
from graft.data.turns import history_of, sharegpt_turns, turns_of, with_row_keys, with_row_masks
from graft.errors import GraftError, did_you_mean

CONTEXTS = ("input", "context", "passage")
"""Columns that may hold further context of a question; the first one that is not empty is taken."""


def alpaca(row: Row, need_answer: bool) -> list[Message]:
    """Convert {instruction, input, output}, or Dolly's {instruction, context, response}, with an optional `history`."""
    asked = question_of(row, "instruction")
    answer = "response" if "output" not in row and "response" in row else "output"
    return [*history_of(row), asked, *_answer(row, answer, need_answer)]


def question_of(row: Row, field: str) -> Message:
    """Return the field as a user message; it takes along the context that the row may have."""
    asked: Message = {"role": "user", "content": text(row, field)}
    context = next((name for name in CONTEXTS if name != field and not is_empty(row.get(name))), None)
    if context and (extra := text(row, context)).strip():
        asked["input"] = extra
    return asked


def completion(row: Row, need_answer: bool) -> list[Message]:
    """Convert a prompt and its completion, each a text or a list of messages, under any of the names in `PAIRS`; or `text` alone."""
    if "text" in row and not any(names[0] in row for names in PAIRS):
        return [{"role": "assistant", "content": text(row, "text")}]
    # Take the pair of which both columns are there, else one with a prompt, else the first one (so that the error names its fields).
    complete = [pair for pair in PAIRS if pair[0] in row and pair[1] in row]
    prompt, answer = next(iter([*complete, *(pair for pair in PAIRS if pair[0] in row), *PAIRS]))
    if isinstance(row.get(prompt), list):
        return [*turns_of(row, prompt), *(turns_of(row, answer) if row.get(answer) else [])]
    return [*history_of(row), question_of(row, prompt), *_answer(row, answer, need_answer)]


def messages(row: Row, need_answer: bool) -> list[Message]:
    """Convert OpenAI's {messages: [{role, content}, ...]}; content is a text or a list of text parts."""
    return turns_of(row, "messages")


def sharegpt(row: Row, need_answer: bool) -> list[Message]:
    """Convert {conversations: [{from, value}, ...]}; some data have role and content there."""
    return sharegpt_turns(row, "conversations")


@dataclass(frozen=True)
class Shape:
    """One shape of rows."""

    columns: tuple[tuple[str, ...], ...]
    """Sets of columns; a source that has all columns of any one set has this shape."""
    convert: Callable[[Row, bool], list[Message]]
    """From a row, and whether it must have an answer, to messages."""


def conversation(shape: Shape, row: Row, need_answer: bool) -> list[Message]:
    """Convert a row, with its system prompt, its tools, and the marks of what is not trained on."""
    turns = shape.convert(row, need_answer)
    is_text = len(turns) == 1 and turns[0]["role"] == "assistant"
    return turns if is_text else with_row_keys(row, with_row_masks(row, turns))


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
    """Return the shape of a source with these columns, with the set of columns that it has.

    Raises `GraftError` with the columns found and the shapes known.
    """
    found = list(columns)
    if wanted not in ("auto", *SHAPES):
        raise GraftError(
            f"unknown data format '{wanted}', expected auto, {_listed(SHAPES)}.{did_you_mean(wanted, SHAPES)}"
        )
    for name, shape in SHAPES.items():
        for columns_of_shape in shape.columns:
            needed = columns_of_shape if need_answer else columns_of_shape[:1]
            if wanted in ("auto", name) and all(column in found for column in needed):
                return replace(shape, columns=(columns_of_shape,))
    expected = "fit no known format" if wanted == "auto" else f"do not fit the format '{wanted}'"
    raise GraftError(f"{source}: the columns {_listed(found)} {expected}. The formats are:\n{KNOWN}")


def _answer(row: Row, field: str, need_answer: bool) -> list[Message]:
    if not need_answer and row.get(field) is None:
        return []
    return [{"role": "assistant", "content": text(row, field)}]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
