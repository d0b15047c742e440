"""Turn a sample into an example: token ids, and a mask of those that are targets.

The mask comes from the template's spans. `completion` trains on every answer and its end mark, `last` on the last
answer only, and `all` on every token. The first token of a sample is never a target, because nothing predicts it. Tokens after the
last target are dropped, because they do not change the loss.

A sample longer than `max_length` is rejected, or with `truncate_prompt` it is shortened. Questions (and answers that are not trained on)
lose their tokens from the left, the oldest message first; if a template writes the further context of a question apart, as alpaca
does, the context goes before the question. The template's own words, the system prompt, the trained answers and their end marks
stay. If these alone are too long, the sample is rejected. For example, with max_length=6 and t for the template's words, q for
questions and a for trained answers:

    t q1 q1 q1 a t q2 a a    ->    t a t q2 a a      (9 tokens, so 3 go; the older question has enough to lose)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graft.data.encoding import Span, Tokens, encode, facts_of
from graft.data.samples import Example, Message, Rejected, Sample, is_silent, without_end
from graft.data.template import Template
from graft.errors import GraftError

TrainOn = Literal["completion", "last", "all"]
Overlong = Literal["error", "drop", "truncate_prompt", "split"]


def tokenize(
    sample: Sample,
    tokenizer: Any,
    template: Template,
    *,
    max_length: int,
    overlong: Overlong = "error",
    train_on: TrainOn = "completion",
    system: str | None = None,
) -> Example | Rejected:
    """Return the token ids and targets of a sample, or the reason why it cannot be trained on.

    `system` is the system prompt for conversations that have none (default: the template's). Lengths are in tokens.
    Raises `GraftError`, naming the row, for a conversation that the template cannot write.
    """
    messages = template.with_system(system).complete(without_end(sample.messages, facts_of(tokenizer).eos))
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return Rejected("no_answer", 0)
    learnt = [i for i in (answers[-1:] if train_on == "last" else answers) if not messages[i].get("masked")]
    if not learnt:
        return Rejected("masked", 0)
    if any(is_silent(messages[index]) for index in learnt):
        return Rejected("empty_answer", 0)
    try:
        spans = template.with_system(system).render(messages, learnt=answers if train_on == "all" else learnt)
    except GraftError as error:
        raise GraftError(f"{sample.where}: {error}") from error
    tokens = encode(spans, tokenizer, template.reads_tokens)
    targets = targets_of(tokens, spans, learnt, everything=train_on == "all")
    length = int(np.flatnonzero(targets)[-1]) + 1 if targets.any() else 0  # up to the last target
    if not length:
        return Rejected("empty_answer", len(tokens.ids))
    cut = cut_to(max_length, length, overlong, lambda: _removable(tokens, spans, targets, messages, train_on))
    if isinstance(cut, Rejected):
        return cut
    ids = np.array(tokens.ids[:length], dtype=np.int32)
    return Example(np.delete(ids, cut), np.delete(targets[:length], cut), sample.source, sample.row, cut=len(cut))


def tokenize_document(
    sample: Sample, tokenizer: Any, template: Template, max_length: int, train_on: TrainOn
) -> list[Example | Rejected]:
    """Tokenise a row of plain text; one that is longer than `max_length` becomes pieces of at most this many tokens.

    Every token after the first is a target once. Each piece begins with the tokens that the tokenizer puts first, or else with the last
    token of the piece before it, which is no target there. Raises `GraftError` for a row that is no plain text and too long.
    """
    whole = tokenize(sample, tokenizer, template, max_length=2**62, train_on=train_on)
    if isinstance(whole, Rejected) or len(whole.input_ids) <= max_length:
        return [whole]
    if [message["role"] for message in sample.messages] != ["assistant"]:
        raise GraftError(
            f"{sample.where}: the row has {len(whole.input_ids):,} tokens, but data.overlong split cuts rows of plain text alone; use "
            "drop or truncate_prompt for conversations"
        )
    start = facts_of(tokenizer).start_ids
    if len(start) + 1 >= max_length:
        raise GraftError(
            f"data.max_length {max_length} leaves no room for text after the {len(start)} tokens that come first"
        )
    given = len(start) if whole.input_ids[: len(start)].tolist() == start else 0
    ids, targets = whole.input_ids[given:], whole.supervised[given:]
    before = 0 if start else 1
    pieces: list[Example | Rejected] = []
    for at in range(0, len(ids) - before, max_length - len(start) - before):
        piece, on = ids[at : at + max_length - len(start)], targets[at : at + max_length - len(start)].copy()
        on[:before] = False
        first = np.zeros(len(start), np.bool_)
        made = Example(
            np.concatenate([np.array(start, np.int32), piece]), np.concatenate([first, on]), sample.source, sample.row
        )
        made.piece = len(pieces)
        pieces.append(made)
    return pieces


def cut_to(
    max_length: int, length: int, overlong: Overlong, removable: Callable[[], Sequence[int]]
) -> Sequence[int] | Rejected:
    """Return the positions to cut from a sample of this length, none if it is short enough, or the reason why it cannot be trained on.

    removable: gives the positions that may be cut, in the order in which they are cut.
    """
    if length <= max_length:
        return ()
    if overlong != "truncate_prompt":
        return Rejected("overlong", length)
    positions = removable()
    return (
        positions[: length - max_length]
        if length - len(positions) <= max_length
        else Rejected("answer_too_long", length)
    )


def targets_of(
    tokens: Tokens, spans: Sequence[Span], learnt: Container[int], everything: bool = False
) -> NDArray[np.bool_]:
    """Return a mask that is True at the tokens that count in the loss: those of the learnt answers.

    everything: also all tokens that belong to no answer.
    """
    counts = [everything if span.answer is None else span.answer in learnt for span in spans]
    # The tokens that the tokenizer puts at the start have the span -1.
    targets = np.array([counts[span] if span >= 0 else everything for span in tokens.spans], dtype=np.bool_)
    targets[:1] = False
    return targets


def _removable(
    tokens: Tokens, spans: Sequence[Span], targets: NDArray[np.bool_], messages: Sequence[Message], train_on: TrainOn
) -> list[int]:
    """Return the positions of the tokens that may be cut, in the order in which they are cut."""
    found = []
    for position, index in enumerate(tokens.spans):
        # A token that also holds characters of the template's words, or that the tokenizer puts at the start, stays.
        message = spans[index].message if index >= 0 and tokens.whole[position] else None
        if message is None:
            continue
        role = messages[message]["role"]
        if role == "user" or (role == "assistant" and train_on == "last" and not targets[position]):
            # Oldest message first; within it the last span first (the context comes after the question); within that from the left.
            found.append((message, -index, position))
    return [position for _, _, position in sorted(found)]
