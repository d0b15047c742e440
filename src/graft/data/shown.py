"""Check that a chat template writes what a conversation holds. What it leaves out is found by rendering without it: nothing changes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import cast

from graft.data.rendering import Writer
from graft.data.samples import THOUGHTS, Message
from graft.errors import GraftError


def check_shown(
    template: Writer, turns: Sequence[Message], full: str, add_generation_prompt: bool, learnt: Container[int]
) -> None:
    """Raise `GraftError` for tools and tool calls that the template does not write, and for thoughts of learnt answers."""
    for index, turn in enumerate(turns):
        extra = turn.get("extra", {})
        must = [("tools", {key: value for key, value in turn.items() if key != "tools"})] if "tools" in turn else []
        for key in ("tool_calls", *(THOUGHTS if index in learnt else ())):
            if key in extra:
                must.append((key, {**turn, "extra": {k: v for k, v in extra.items() if k != key}}))
        for key, without in must:
            changed = [*turns[:index], cast(Message, without), *turns[index + 1 :]]
            try:
                shown = template.text(changed, add_generation_prompt) != full
            except GraftError:  # the template cannot do without it
                continue
            if not shown:
                where = "of the conversation" if key == "tools" else f"of message {index + 1}"
                raise GraftError(
                    f"chat template '{template.name}' does not write `{key}` {where}, so the model would not see it: use another "
                    f"template, or leave `{key}` out of the data"
                )


def writes(template: Writer, turns: Sequence[Message], index: int, full: str) -> bool:
    """Whether the rendering depends on the content of a message."""
    turn: Message = {**turns[index], "content": "x" + turns[index]["content"]}
    try:
        return template.text([*turns[:index], turn, *turns[index + 1 :]], False) != full
    except GraftError:
        return True
