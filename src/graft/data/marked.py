"""Answers that are marked good or bad one by one, for KTO: {prompt, completion, label}, or a conversation with a label.

The model learns from each answer by itself. How far the adapter has moved from its reference is measured on mismatched sequences: the
prompt of a sample with the answer of the sample before it that has another prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from graft.data.cells import Row, RowError
from graft.data.columns import as_flag
from graft.data.pairs import side_of
from graft.data.samples import Example, Rejected, Sample
from graft.data.shapes import Shape, conversation
from graft.data.template import Template
from graft.data.tokenizing import Overlong, cut_to
from graft.errors import GraftError

LABEL = "label"
TRIED = 32
"""Samples that are looked at for one with another prompt."""


def marked_sample(row: Row, shape: Shape, source: str, number: int) -> Sample:
    """Convert a row. Raises `RowError` for a label that says neither yes nor no, and for a row that does not end with an answer."""
    good = as_flag(row.get(LABEL))
    if good is None:
        raise RowError(LABEL, f"must be true for a good answer or false for a bad one, but is {row.get(LABEL)!r}")
    messages = tuple(conversation(shape, row, True))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RowError(shape.columns[0][-1], "must end with an answer to a question")
    return Sample(messages, source, number, asked=len(messages) - 1, desirable=good)


def tokenize_marked(
    sample: Sample, tokenizer: Any, template: Template, *, max_length: int, overlong: Overlong = "error"
) -> Example | Rejected:
    """Return the token ids and targets of a sample, or the reason why it cannot be trained on. Its last answer is the target.

    Raises `GraftError`, naming the row, for a conversation that the template cannot write.
    """
    side = side_of(sample.messages, sample, tokenizer, template)
    if side is None:
        return Rejected("empty_answer", 0)
    cut = cut_to(max_length, len(side.ids), overlong, lambda: side.removable)
    if isinstance(cut, Rejected):
        return cut
    ids, targets = np.delete(side.ids, cut), np.delete(side.targets, cut)
    return Example(ids, targets, sample.source, sample.row, len(cut), desirable=sample.desirable)


def with_mismatched(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Return the examples, each with its mismatched sequence as the second one.

    A mismatched sequence is cut at its end to `max_length` tokens, as TRL does. Raises `GraftError` if there is only one sample.
    """
    if len(examples) < 2:
        raise GraftError(
            "train.objective kto needs two or more samples: it measures the prompt of one with the answer of another"
        )
    prompts = [example.input_ids[: int(np.argmax(example.supervised))] for example in examples]
    return [replace(one, rejected=_mismatched(examples, prompts, at, max_length)) for at, one in enumerate(examples)]


def _mismatched(examples: Sequence[Example], prompts: Sequence[np.ndarray], at: int, max_length: int) -> Example:
    before = [(at - back) % len(examples) for back in range(1, min(TRIED, len(examples)))]
    other = next((place for place in before if not np.array_equal(prompts[place], prompts[at])), before[0])
    own, theirs, prompt = examples[at], examples[other], prompts[at]
    room = max_length - len(prompt)  # at least one: the sample fits, and has an answer
    answer = slice(len(prompts[other]), len(prompts[other]) + room)
    targets = theirs.supervised[answer]
    return Example(
        np.concatenate([prompt, theirs.input_ids[answer]]),
        np.concatenate([np.zeros(len(prompt), np.bool_), targets]),
        own.source,
        own.row,
    )
