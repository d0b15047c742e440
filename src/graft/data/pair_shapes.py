"""The shapes of rows with a preferred and a rejected answer. Each becomes a prompt and what follows it on either side.

    prompt, chosen, rejected     a question as text or messages; answers as text, one message, or messages
    chosen, rejected             two whole conversations as messages; what they have in common at the start is the prompt
    conversations, chosen, rejected    ShareGPT's {from, value}
    instruction, input, chosen, rejected    Alpaca's question

A conversation may stand whole on both sides although a prompt is given beside it (UltraFeedback): its own turns are then taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from graft.data.samples import Message
from graft.data.shapes import Row, RowError, question_of, text, turns_of
from graft.errors import GraftError

SIDES = ("chosen", "rejected")
QUESTIONS = ("prompt", "conversations", "messages", "instruction", "question", "query")
"""Columns that may hold what is asked, the first that is there."""
Pair = tuple[list[Message], list[Message], list[Message]]
"""What is asked, the preferred and the rejected answer."""


def check_pairs(columns: Iterable[str], wanted: str, source: str) -> None:
    """Raises `GraftError` for a source whose columns are not those of pairs."""
    found = list(columns)
    if wanted != "auto":
        raise GraftError(
            f"{source}: `format: {wanted}` is a shape of conversations; rows of preferences have {' and '.join(SIDES)}"
        )
    missing = [name for name in SIDES if name not in found]
    if missing:
        raise GraftError(
            f"{source}: rows of preferences have the columns prompt, chosen and rejected; no column is called "
            f"{' or '.join(missing)}. Its columns are {', '.join(found)}. Name yours with `fields`: "
            "fields: {chosen: THEIRS, rejected: THEIRS}"
        )


def pair(row: Row) -> Pair:
    """The prompt and both answers of a row. Raises `RowError` for a row that holds none."""
    chosen, rejected = (_turns(row, name) for name in SIDES)
    asked = next((name for name in QUESTIONS if row.get(name)), None)
    prompt = [] if asked is None else _prompt(row, asked)
    if not prompt or all(_whole(prompt, side) for side in (chosen, rejected)):
        shared = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)  # the last turn is an answer
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise RowError("prompt", "is missing, and chosen and rejected have no turn in common that could be the prompt")
    for name, side in zip(SIDES, (chosen, rejected), strict=True):
        if not side or side[-1]["role"] != "assistant":
            raise RowError(name, "must end with an answer, that is a message of the assistant behind the prompt")
    return prompt, chosen, rejected


def _turns(row: Row, name: str) -> list[Message]:
    """One side: a text is an answer; a mapping is one message."""
    value = row.get(name)
    if isinstance(value, (list, Mapping)):
        return turns_of(value if isinstance(value, list) else [value], name)
    return [{"role": "assistant", "content": text(row, name)}]


def _prompt(row: Row, name: str) -> list[Message]:
    system: list[Message] = [{"role": "system", "content": text(row, "system")}] if row.get("system") else []
    value = row[name]
    turns = turns_of(value, name) if isinstance(value, list) else [question_of(row, name)]
    return turns if turns[0]["role"] == "system" else [*system, *turns]


def _whole(prompt: list[Message], side: list[Message]) -> bool:
    """Whether a side begins with the prompt that stands beside it."""
    asked = [turn for turn in prompt if turn["role"] != "system"]
    own = [turn for turn in side if turn["role"] != "system"]
    return len(own) > len(asked) and _shared(asked, own) == len(asked)


def _shared(one: list[Message], other: list[Message]) -> int:
    """How many turns two conversations have in common at the start."""
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    return shared
