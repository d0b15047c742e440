"""Lists of turns, in OpenAI's form {role, content} or ShareGPT's {from, value}, and what a row says about all of its turns.

Every key of a turn is used, handed to the chat template, or noted as unread:

    role, content, from, value          the speaker and the text
    tool_calls, function_call           what an answer calls; role `tool` gives the result
    reasoning_content, thinking, reasoning      the thoughts before an answer
    name, tool_call_id, tool_plan       handed to the template
    weight, train, trainable, loss      0 or false: this answer is not trained on
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from graft.data.cells import Row, RowError, kind_of, parsed, text
from graft.data.columns import MEDIA, TrackedRow, as_flag, is_empty
from graft.data.samples import ROLES, THOUGHTS, Message

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
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names for the speakers, with our roles."""
OPENAI = {**{role: role for role in ROLES}, "developer": "system", "function": "tool"}
"""OpenAI's names for the roles, with ours."""
HANDED = ("tool_calls", *THOUGHTS, "name", "tool_call_id", "tool_plan")
"""Keys of a turn that the chat template gets as they are."""
MASKS = ("weight", "train", "trainable", "loss")
"""Keys of a turn that say whether it is trained on."""
REFUSED = ("mask", "loss_mask", "loss_scale", "loss_weight", "train_detail", *MEDIA)
"""Keys of a turn that change what it means or how much of it is trained on, and that nothing can read."""


def turns_of(row: Row, field: str, value: Any = None) -> list[Message]:
    """Convert a list of turns in OpenAI's or in ShareGPT's form; the first turn tells which. `value` defaults to the field's."""
    value = parsed(row.get(field) if value is None else value)
    first = value[0] if isinstance(value, list) and value else None
    sharegpt = isinstance(first, Mapping) and first.get("from") is not None and first.get("role") is None
    who, what, roles = ("from", "value", SPEAKERS) if sharegpt else ("role", "content", OPENAI)
    return _turns(row, value, field, who, what, roles)


def sharegpt_turns(row: Row, field: str) -> list[Message]:
    """Convert ShareGPT's list of turns; some data have role and content there."""
    value = parsed(row.get(field))
    openai = isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0].get("role") is not None
    who, what, roles = ("role", "content", OPENAI) if openai else ("from", "value", SPEAKERS)
    return _turns(row, value, field, who, what, roles)


def with_row_keys(row: Row, turns: Sequence[Message]) -> list[Message]:
    """Return the turns with what columns of the row say about all of them: the system prompt, and the tools that may be called."""
    found = list(turns)
    for name in ("system", "system_prompt"):
        if is_empty(row.get(name)):
            continue
        system: Message = {"role": "system", "content": text(row, name)}
        if found and found[0]["role"] == "system":
            if found[0]["content"] != system["content"]:
                raise RowError(name, "differs from the system message that the conversation begins with")
        else:
            found.insert(0, system)
    if found and (tools := _tools(row)):
        found[0] = {**found[0], "tools": tools}
    return found


def with_row_masks(row: Row, turns: Sequence[Message]) -> list[Message]:
    """Return the turns with the marks that columns of the row give to its answers: `weight`, `train`, and a `loss_mask` by turn."""
    marks: list[tuple[str, Any]] = []
    for name in ("weight", "train"):
        if not is_empty(row.get(name)):
            marks += [(name, _flag(row[name], name))] if _flag(row[name], name) is False else []
    masked = [bool(marks) and turn["role"] == "assistant" or turn.get("masked", False) for turn in turns]
    if not is_empty(row.get("loss_mask")):
        given = parsed(row["loss_mask"])
        if not isinstance(given, list) or len(given) != len(turns):
            raise RowError(
                "loss_mask",
                f"must be a list with one entry for each of the {len(turns)} turns, but is {_entries(given)}",
            )
        for index, (turn, value) in enumerate(zip(turns, given, strict=True)):
            masked[index] |= _masked_by(turn["role"], value, f"loss_mask[{index}]")
    return [{**turn, "masked": True} if off else turn for turn, off in zip(turns, masked, strict=True)]


def history_of(row: Row) -> list[Message]:
    """Return the earlier turns of the column `history`: a list of [question, answer], as LLaMA-Factory has it, or of turns."""
    if is_empty(row.get("history")):
        return []
    value = parsed(row["history"])
    if isinstance(value, list) and isinstance(value[0], Mapping):
        return turns_of(row, "history", value)
    turns: list[Message] = []
    for number, pair in enumerate(value if isinstance(value, list) else [None]):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError("history", "must be a list of pairs of a question and an answer")
        at = {f"history[{number}][0]": pair[0], f"history[{number}][1]": pair[1]}
        for role, field in zip(("user", "assistant"), at, strict=True):
            turns.append({"role": role, "content": text(at, field)})
    return turns


def _turns(row: Row, value: Any, field: str, who: str, what: str, roles: Mapping[str, str]) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(field, f"must be a list of {{{who}, {what}}}, but is {kind_of(value)}")
    turns: list[Message] = []
    for number, turn in enumerate(value):
        at = f"{field}[{number}]"
        if not isinstance(turn, Mapping):
            raise RowError(at, f"must hold {who} and {what}, but is {kind_of(turn)}")
        speaker = turn.get(who)
        role = roles.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RowError(f"{at}.{who}", f"must be one of {', '.join(roles)}, but is {speaker!r}")
        turns.append(_turn(turn, cast(Literal["system", "user", "assistant", "tool"], role), what, at))
        if isinstance(row, TrackedRow):
            known = {who, what, *HANDED, *MASKS, "function_call"}
            row.seen.unread |= {
                f"{field}[].{key}" for key, content in turn.items() if key not in known and not is_empty(content)
            }
    return turns


def _turn(turn: Mapping[str, Any], role: Literal["system", "user", "assistant", "tool"], what: str, at: str) -> Message:
    extra = {key: turn[key] for key in HANDED if not is_empty(turn.get(key))}
    if not is_empty(turn.get("function_call")):
        extra["tool_calls"] = [turn["function_call"]]
    calls_in_text = turn.get("from") == "function_call"
    if calls_in_text:
        called = parsed(turn.get(what))
        extra["tool_calls"] = called if isinstance(called, list) else [called]
    if "tool_calls" in extra:
        extra["tool_calls"] = _calls(parsed(extra["tool_calls"]), f"{at}.tool_calls")
    for key in THOUGHTS:
        if key in extra:
            text(turn, key, f"{at}.{key}")
    says = not calls_in_text and ("tool_calls" not in extra or not is_empty(turn.get(what)))
    made: Message = {"role": role, "content": _content(turn, what, at) if says else ""}
    if extra:
        made["extra"] = extra
    for key in REFUSED:
        if not is_empty(turn.get(key)):
            raise RowError(
                f"{at}.{key}", "changes what this turn teaches, and nothing reads it: leave it out of the data"
            )
    marks = [_masked_by(role, turn[key], f"{at}.{key}") for key in MASKS if not is_empty(turn.get(key))]
    if any(marks):
        made["masked"] = True
    return made


def _content(turn: Row, what: str, at: str) -> str:
    value = turn.get(what)
    if not isinstance(value, list):
        return text(turn, what, f"{at}.{what}")
    parts = []
    for number, part in enumerate(value):
        place = f"{at}.{what}[{number}]"
        if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise RowError(place, "only parts of type 'text' can be trained on")
        parts.append(text(part, "text", place))
    return "".join(parts)


def _masked_by(role: str, value: Any, at: str) -> bool:
    """Whether a mark says not to train on a turn. Only answers can be trained on, so other turns may only say no."""
    flag = _flag(value, at)
    if flag and role != "assistant":
        raise RowError(at, f"asks to train on a message of role '{role}', but only answers can be trained on")
    return not flag and role == "assistant"


def _flag(value: Any, at: str) -> bool:
    flag = as_flag(value)
    if flag is None:
        raise RowError(at, f"must be 0 or 1 (true or false), but is {value!r}; whole sources have a `weight`")
    return flag


def _calls(value: Any, at: str) -> list[dict[str, Any]]:
    """Return tool calls as chat templates expect them: {type, function: {name, arguments}}, with the arguments as a mapping."""
    made = []
    for number, call in enumerate(value if isinstance(value, list) else [value]):
        place = f"{at}[{number}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(
                place, f"must be a call {{function: {{name, arguments}}}}, but is {json.dumps(call, default=str)[:60]}"
            )
        arguments = parsed(function.get("arguments"), "{")
        inner = {**function, "arguments": {} if arguments is None else arguments}
        outer = dict(call) if call is not function else {"type": "function"}
        made.append({**outer, "function": inner})
    return _utf8(made, at)


def _tools(row: Row) -> list[Any]:
    """Return the tools of a row as chat templates expect them: {type, function: {name, description, parameters}}."""
    given = next((name for name in ("tools", "functions") if not is_empty(row.get(name))), None)
    if given is None:
        return []
    value = parsed(row[given])
    tools = []
    for number, tool in enumerate(value if isinstance(value, list) else [value]):
        tool = parsed(tool, "{")
        if not isinstance(tool, Mapping):
            raise RowError(f"{given}[{number}]", f"must describe a tool, but is {kind_of(tool)}")
        bare = "function" not in tool and isinstance(tool.get("name"), str)
        tools.append({"type": "function", "function": dict(tool)} if bare else dict(tool))
    return _utf8(tools, given)


def _utf8(value: Any, at: str) -> Any:
    """Check that no text inside a value holds half of a character."""
    text({at: json.dumps(value, ensure_ascii=False, default=str)}, at)
    return value


def _entries(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else kind_of(value)
