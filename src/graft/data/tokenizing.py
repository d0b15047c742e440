"""One sample to one example: token ids, and which of them are targets.

The mask comes from the template's spans. `completion` trains on every answer and the end mark after it, `last` on the last
answer, `all` on every token. The first token of a sample is never a target: nothing predicts it. What stands after the
last target is left out, for it would change no loss.

A sample longer than `max_length` is rejected, or with `truncate_prompt` shortened: the words of questions (and of answers
that are not trained on) go from the left, the oldest message first; where a template keeps a question's further context
apart, as alpaca does, that goes before the question. The template's own words, the system prompt, every trained answer
and its end mark stay; where that alone is too long, the sample is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from graft.data.encoding import Span, Tokens, encode, facts_of
from graft.data.samples import Example, Message, Rejected, Sample, without_end
from graft.data.template import Template
from graft.errors import GraftError

TrainOn = Literal["completion", "last", "all"]
Overlong = Literal["error", "drop", "truncate_prompt"]


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
    """Token ids and targets of a sample, or why it cannot be trained on.

    `system` is the system prompt of conversations that bring none (default: the template's). Lengths are in tokens.
    Raises `GraftError`, naming the row, for a conversation that the template cannot write.
    """
    messages = template.with_system(system).complete(without_end(sample.messages, facts_of(tokenizer).eos))
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        return Rejected("no_answer", 0)
    if not all(message["content"].strip() for message in (answers[-1:] if train_on == "last" else answers)):
        return Rejected("empty_answer", 0)
    try:
        spans = template.with_system(system).render(messages)
    except GraftError as error:
        raise GraftError(f"{sample.where}: {error}") from error
    tokens = encode(spans, tokenizer)
    targets = _targets(tokens, spans, train_on)
    length = int(np.flatnonzero(targets)[-1]) + 1 if targets.any() else 0
    if not length:
        return Rejected("empty_answer", len(tokens.ids))
    keep = np.arange(length)
    if length > max_length:
        if overlong != "truncate_prompt":
            return Rejected("overlong", length)
        spare = _spare(tokens, spans, targets, messages, train_on)
        if length - len(spare) > max_length:
            return Rejected("answer_too_long", length)
        keep = np.delete(keep, spare[: length - max_length])
    ids = np.array(tokens.ids, dtype=np.int32)
    return Example(ids[keep], targets[keep], sample.source, sample.row, cut=length - len(keep))


def _targets(tokens: Tokens, spans: Sequence[Span], train_on: TrainOn) -> NDArray[np.bool_]:
    """True at the tokens that count in the loss."""
    if train_on == "all":
        targets = np.ones(len(tokens.ids), dtype=np.bool_)
    else:
        last = max(index for index, span in enumerate(spans) if span.supervised) if train_on == "last" else 0
        first = start_of_answers(spans, last) if train_on == "last" else 0
        targets = np.array([span >= first and spans[span].supervised for span in tokens.spans], dtype=np.bool_)
    targets[:1] = False
    return targets


def start_of_answers(spans: Sequence[Span], start: int) -> int:
    """Index of the first of the run of supervised spans that a span lies in."""
    while start and spans[start - 1].supervised and not spans[start - 1].ends:
        start -= 1
    return start


def _spare(
    tokens: Tokens, spans: Sequence[Span], targets: NDArray[np.bool_], messages: Sequence[Message], train_on: TrainOn
) -> list[int]:
    """Positions of the tokens that may be cut, in the order in which they go."""
    spare = []
    for position, index in enumerate(tokens.spans):
        message = spans[index].message if index >= 0 and tokens.whole[position] else None
        if message is None:
            continue
        role = messages[message]["role"]
        if role == "user" or (role == "assistant" and train_on == "last" and not targets[position]):
            spare.append((message, -index, position))
    return [position for _, _, position in sorted(spare)]
