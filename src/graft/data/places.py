"""Find the messages of a conversation in the text that a chat template makes of it. Nothing is searched for in the text.

- An answer starts where the prompt before it ends, when that prompt is rendered with the generation prompt.
- The content of a message is located by a second rendering in which a single character that occurs nowhere else replaces it. The
  text before and after this character belongs to the template. For example, with the question "x" and the marker "#":

      conversation     <|user|>x<|end|><|assistant|>x<|end|>
      answer marked    <|user|>x<|end|><|assistant|>#<|end|>    before: "<|user|>x<|end|><|assistant|>", after: "<|end|>"

- An answer with tool calls goes on behind its content. It is all that the template writes between the prompt and the end mark.
- A template that marks passages with `{% generation %}` says itself what is learnt.
- Some templates write an answer differently once the conversation goes on (Qwen 3 drops thoughts). A learnt answer reads as it does when
  it is asked for: the text is then put together of the renderings that end with each learnt answer.
- Answers that are not learnt are history. They read as the template writes them.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from dataclasses import replace
from itertools import chain

from graft.data.encoding import Span
from graft.data.rendering import Writer, settings_of
from graft.data.samples import Message
from graft.data.shown import check_shown, writes
from graft.errors import GraftError, listed

SPECIAL = r"<[|｜][^<>|｜]+[|｜]>"
"""A text that looks like a special token. Tool calls end with tokens that the rest of a template does not write."""
Part = list[Span]
"""The spans of one message, after those of the template's words before it."""


def spans_of(
    template: Writer, turns: Sequence[Message], add_generation_prompt: bool, learnt: Container[int]
) -> list[Span]:
    """Return a conversation as spans. Raises `GraftError` for a learnt answer that cannot be located."""
    wanted = [index for index, turn in enumerate(turns) if turn["role"] == "assistant" and index in learnt]
    parts: list[Part] = []
    if len(wanted) > 1 and template.rewrites:
        for index in wanted:
            upto = _parts(template, turns[: index + 1], False, [index])
            parts += _after(template, upto, len(parts))[:-1]
        wanted = []
    parts += _after(template, _parts(template, turns, add_generation_prompt, wanted), len(parts))
    return list(chain.from_iterable(parts))


def around(
    template: Writer, turns: Sequence[Message], index: int, add_generation_prompt: bool
) -> tuple[str, str] | None:
    """Return the text before and after a message's content; None if the template does not write the content exactly once."""
    private_use = map(chr, range(0xE000, 0xF8FF))  # Unicode's private use area
    mark = next(mark for mark in private_use if not any(mark in turn["content"] for turn in turns))
    marked: list[Message] = [*turns[:index], {**turns[index], "content": mark}, *turns[index + 1 :]]
    parts = template.text(marked, add_generation_prompt).split(mark)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _after(template: Writer, parts: list[Part], done: int) -> list[Part]:
    """Return the parts from message `done` on; the message before it must have been located, so that its end is known."""
    if done and not parts[done - 1]:
        raise GraftError(
            f"chat template '{template.name}' writes message {done} so differently once the conversation goes on that it cannot be "
            "located. Set data.train_on to last, split the conversation, or use another template"
        )
    return parts[done:]


def _parts(
    template: Writer, turns: Sequence[Message], add_generation_prompt: bool, learnt: Container[int]
) -> list[Part]:
    """Return a part for each message, empty if it cannot be located, and one for the text behind the last message."""
    full, passages = template.rendered(turns, add_generation_prompt)
    check_shown(template, turns, full, add_generation_prompt, learnt)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    generated = dict(zip(answers, passages, strict=True)) if len(passages) == len(answers) else {}
    if passages and not generated and any(index in learnt for index in answers):
        raise GraftError(
            f"chat template '{template.name}' marks {len(passages)} passages as generated, but the conversation has {len(answers)} answers"
        )
    parts: list[Part] = []
    at = 0  # how much of `full` the parts cover so far
    for index, turn in enumerate(turns):
        place = around(template, turns, index, add_generation_prompt)
        if turn["role"] == "assistant":
            start, stop, inner = _answer(template, turns, index, full, place, generated.get(index), index in learnt)
        else:
            start, stop, inner = _content(index, full, place)
            if place is None and turn["content"].strip() and not writes(template, turns, index, full):
                raise GraftError(
                    f"chat template '{template.name}' does not write message {index + 1} (of role '{turn['role']}')"
                )
        if inner and start < at and index in learnt:
            raise GraftError(
                f"chat template '{template.name}' writes message {index + 1} before the message that precedes it"
            )
        # A question whose content cannot be located stays part of the template's own text: it just cannot be shortened.
        located = bool(inner) and start >= at
        parts.append([Span(full[at:start]), *inner] if located else [])
        at = stop if located else at
    stop = len(full) - (template.marked_header if add_generation_prompt else 0)
    return [*parts, [Span(full[at:stop]), Span(full[stop:], True, answer=len(turns), asked=True)]]


def _answer(
    template: Writer,
    turns: Sequence[Message],
    index: int,
    full: str,
    place: tuple[str, str] | None,
    passage: tuple[int, int] | None,
    learnt: bool,
) -> tuple[int, int, Part]:
    """Return where an answer starts and stops in the text, and its spans; no spans for one that is neither learnt nor to be located."""
    try:
        head = template.text(turns[:index], True)
        if not full.startswith(head):
            raise _rewritten(template, index, head)
        if passage is not None:
            start, stop, inner = _marked_answer(index, full, place, len(head), passage)
        elif "tool_calls" in turns[index].get("extra", {}):
            start, stop, inner = _calling_answer(template, turns, index, full, head)
        else:
            start, stop, inner = _plain_answer(template, index, full, place, head)
    except GraftError:
        if learnt:
            raise
        # History is as the template writes it, whatever prompt once came before.
        if place is None or not full.startswith(place[0]) or not full.endswith(place[1]):
            return 0, 0, []
        start, stop, inner = _plain_answer(template, index, full, place, place[0])
    content = _without_spaces(turns[index]["content"])
    written = _without_spaces(full[start:stop])
    # A thought that the prompt opens already begins before the answer.
    if (
        learnt
        and content not in written
        and not _without_spaces(full[:stop].removesuffix(template.end)).endswith(content)
    ):
        raise GraftError(
            f"chat template '{template.name}' omits or changes a part of the answer in message {index + 1}: "
            f"{full[start:stop][:60]!r}. Leave that part out of the data, or use another template"
        )
    spans = [replace(span, answer=index) for span in inner]
    return start, stop, spans


def _plain_answer(
    template: Writer, index: int, full: str, place: tuple[str, str] | None, head: str
) -> tuple[int, int, Part]:
    """Return start, stop and spans of an answer: the template's text before the content, the content, the end mark."""
    start, stop = len(head), len(full) - len(place[1]) if place is not None else -1
    if place is None or not full.endswith(place[1]) or start > stop:
        raise _rewritten(template, index, head)
    before, after = place
    # Some templates write other words before the marker than before the content. The whole answer is then one span that no message is
    # tied to.
    located = full.startswith(before) and start <= len(before) <= stop
    lead = len(before) if located else start
    inner = [Span(full[start:lead], True), Span(full[lead:stop], True, index if located else None)]
    for end in filter(None, (template.end, template.next_end)):
        if after.startswith(end):
            return start, stop + len(end), [*inner, Span(end, True)]
    return start, stop, [*inner, Span(template.end, True, ends=not template.end)]


def _calling_answer(
    template: Writer, turns: Sequence[Message], index: int, full: str, head: str
) -> tuple[int, int, Part]:
    """Return start, stop and spans of an answer with tool calls: all that the template writes for it, and the end mark."""
    upto = template.text(turns[: index + 1], False)
    if not (full.startswith(upto) and upto.startswith(head)):
        raise _rewritten(template, index, head)
    answer, start = upto[len(head) :], len(head)
    if template.tail and (body := answer.removesuffix(template.tail)) != answer:
        ended = bool(template.end) and template.tail.startswith(template.end)
        end = Span(template.end, True) if ended else Span("", True, ends=True)
        return start, start + len(body) + len(end.text), [Span(body, True), end]
    # Some templates end calls with a mark of their own (<|call|>), and some with the one that begins the result (<|observation|>).
    body = answer.rstrip()
    if re.search(rf"{SPECIAL}$", body):
        return start, start + len(body), [Span(body, True)]
    result: Message = {"role": "tool", "content": "x"}
    after = template.text([*turns[: index + 1], result], False)
    if after.startswith(upto) and (found := re.match(SPECIAL, after[len(upto) :].lstrip())):
        width = len(found.group()) if full[len(upto) :].lstrip().startswith(found.group()) else 0
        return start, len(upto) + width, [Span(answer, True), Span(found.group(), True)]
    return start, start + len(body), [Span(body, True, ends=True)]


def _marked_answer(
    index: int, full: str, place: tuple[str, str] | None, head: int, passage: tuple[int, int]
) -> tuple[int, int, Part]:
    """Return start, stop and spans of an answer that the template marks itself. `head` is where the prompt for it ends."""
    start, stop = passage
    begin = max(start, head)
    asked = Span(full[start:begin], True, asked=True)  # the part of the passage that the prompt gives
    if place is not None and full.startswith(place[0]) and full.endswith(place[1]):
        lead, end = len(place[0]), len(full) - len(place[1])
        if begin <= lead <= end <= stop:
            inner = [Span(full[begin:lead], True), Span(full[lead:end], True, index), Span(full[end:stop], True)]
            return start, stop, [asked, *inner]
    return start, stop, [asked, Span(full[begin:stop], True)]


def _content(index: int, full: str, place: tuple[str, str] | None) -> tuple[int, int, Part]:
    """Return start, stop and span of a message that is no answer; no span if the template rewrites the content."""
    if place is None or not full.startswith(place[0]) or not full.endswith(place[1]):
        return 0, 0, []
    start, stop = len(place[0]), len(full) - len(place[1])
    return start, stop, ([Span(full[start:stop], message=index)] if start < stop else [])


def _rewritten(template: Writer, index: int, head: str) -> GraftError:
    names = [name for name in settings_of(template.jinja) if name not in template.special_tokens]
    return GraftError(
        f"chat template '{template.name}' writes message {index + 1} otherwise than it asks for it (its prompt ends with "
        f"{head[-30:]!r}), so the answer cannot be located. Set data.train_on to last, split the conversation, "
        + (f"set data.template_args (the template reads {listed(names)}), " if names else "")
        + "or use another template"
    )


def _without_spaces(text: str) -> str:
    return "".join(text.split())
