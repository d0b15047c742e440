"""The shapes of rows with a preferred and a rejected answer. Each row becomes a prompt and two continuations.

    prompt, chosen, rejected                the question is a text or messages; an answer is a text, one message, or messages
    chosen, rejected                        two whole conversations as messages; the turns they share at the start are the prompt
    conversations, chosen, rejected         the question as ShareGPT's {from, value}
    instruction, input, chosen, rejected    the question as in Alpaca

A row may have a prompt and still repeat the whole conversation on both sides (UltraFeedback); the conversations then count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graft.data.cells import Row, RowError, parsed, text
from graft.data.columns import is_empty
from graft.data.samples import Message
from graft.data.shapes import question_of
from graft.data.turns import turns_of, with_row_keys
from graft.errors import GraftError

SIDES = ("chosen", "rejected")
CHATS = ("messages", "conversations")
"""Columns of chat text."""
QUESTIONS = ("prompt", "conversations", "messages", "instruction", "question", "query")
"""Columns that may hold the question; the first one that the row has is taken."""
Pair = tuple[list[Message], list[Message], list[Message]]
"""The prompt, the turns of the preferred side after it, and those of the rejected side."""


def check_pairs(columns: Iterable[str], wanted: str, source: str) -> None:
    """Check that a source has the columns of pairs. Raises `GraftError` if not."""
    found = list(columns)
    if wanted != "auto":
        raise GraftError(
            f"{source}: `format: {wanted}` is for conversations, but preference rows have {' and '.join(SIDES)}: remove `format`"
        )
    missing = [name for name in SIDES if name not in found]
    chat = next((name for name in CHATS if name in found), None)
    if len(missing) == len(SIDES) and chat is not None:
        raise GraftError(
            f"{source}: the rows hold chat text (`{chat}`) with one answer, but a preference compares two: add the columns "
            f"{' and '.join(SIDES)} with the two answers, and let `{chat}` end with the question. If each answer is marked good or bad, "
            "add the column label (true or false) and set train.objective to kto. To learn the conversations as they are, leave data.task "
            "out"
        )
    if missing:
        raise GraftError(
            f"{source}: preference rows need the columns prompt, chosen and rejected (for kto: prompt, completion and label), but "
            f"no column is called {' or '.join(missing)}. The columns are {', '.join(found)}"
        )


def pair(row: Row) -> Pair:
    """Return the prompt and both answers of a row. Raises `RowError` if one of them is missing."""
    chosen, rejected = (_turns(row, name) for name in SIDES)
    asked = next((name for name in QUESTIONS if not is_empty(row.get(name))), None)
    prompt = [] if asked is None else _prompt(row, asked)
    if not prompt or all(_repeats(prompt, side) for side in (chosen, rejected)):
        # Both sides are whole conversations. The prompt ends where they differ, at the latest before the last turn: that is the answer.
        shared = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise RowError(
            "prompt", "is missing, and chosen and rejected do not begin with a common turn that could be the prompt"
        )
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        if not side or side[-1]["role"] != "assistant":
            raise RowError(name, "must end with an answer: a message of the assistant after the prompt")
    return with_row_keys(row, prompt), chosen, rejected


def _turns(row: Row, name: str) -> list[Message]:
    """Return the turns of one side. A text is an answer, a mapping is one message."""
    value = row.get(name)
    if isinstance(value, (list, Mapping)):
        return turns_of(row, name, value if isinstance(value, list) else [value])
    return [{"role": "assistant", "content": text(row, name)}]


def _prompt(row: Row, name: str) -> list[Message]:
    value = parsed(row[name]) if name in ("conversations", "messages") else row[name]
    return turns_of(row, name, value) if isinstance(value, list) else [question_of(row, name)]


def _repeats(prompt: list[Message], side: list[Message]) -> bool:
    """Whether a side begins with the row's prompt; system messages do not count."""
    asked = [turn for turn in prompt if turn["role"] != "system"]
    own = [turn for turn in side if turn["role"] != "system"]
    return len(own) > len(asked) and _shared(asked, own) == len(asked)


def _shared(one: list[Message], other: list[Message]) -> int:
    """Count the turns that two conversations have in common at the start."""
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    return shared
