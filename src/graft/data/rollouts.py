"""Answers that a model drew, as token ids with what a policy gradient needs: {prompt_ids, completion_ids, logprobs, advantage}.

The tokens are those that were drawn, so no template and no tokenizer comes between. `logprobs` are the log-probabilities, in nats and at
temperature 1, with which the completion's tokens were drawn. The advantage is one number for all of them, or one for each.

Legend: N tokens of the completion, which are the targets.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from graft.data.cells import Row, RowError, parsed
from graft.data.samples import Example, Message, Rejected, Rollout, Sample
from graft.data.tokenizing import Overlong, cut_to

COLUMNS = ("prompt_ids", "completion_ids")


def rollout_sample(row: Row, source: str, number: int) -> Sample:
    """Convert a row. Raises `RowError` for lists of other lengths, and for what are no token ids or no finite numbers."""
    prompt, answer = (_ids(row, name) for name in COLUMNS)
    count = len(answer)
    logprobs = _numbers(row, "logprobs", count)
    if ("advantage" in row) == ("advantages" in row):
        raise RowError(
            "advantage", "is needed, one number, or advantages, one for each token of the completion; not both"
        )
    advantages = _numbers(row, "advantages", count) if "advantages" in row else _numbers(row, "advantage", count, True)
    shown: tuple[Message, ...] = (
        {"role": "user", "content": " ".join(map(str, prompt))},
        {"role": "assistant", "content": " ".join(map(str, answer))},
    )
    return Sample(shown, source, number, asked=1, rollout=Rollout(prompt, answer, logprobs, advantages))


def rollout_example(sample: Sample, max_length: int, overlong: Overlong) -> Example | Rejected:
    """Return the tokens of a sample with its numbers, or the reason why it cannot be trained on."""
    own = sample.rollout
    assert own is not None
    # Nothing predicts the first token of a row without a prompt, and a prompt is cut at its start.
    cut = cut_to(max_length, len(own.prompt) + len(own.answer), overlong, lambda: range(len(own.prompt) - 1))
    if isinstance(cut, Rejected):
        return cut
    ids = np.delete(np.concatenate([own.prompt, own.answer]), list(cut))
    supervised = np.arange(len(ids)) >= len(ids) - len(own.answer)
    return Example(
        ids, supervised, sample.source, sample.row, len(cut), logprobs=own.logprobs, advantages=own.advantages
    )


def _ids(row: Row, name: str) -> NDArray[np.int32]:
    value = parsed(row.get(name))
    if not isinstance(value, list) or not value:
        raise RowError(name, "must be a list of token ids, at least one")
    if not all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 2**31 for each in value):
        raise RowError(name, "must hold token ids, whole numbers from 0 on")
    return np.array(value, np.int32)


def _numbers(row: Row, name: str, count: int, one: bool = False) -> NDArray[np.float32]:
    value = parsed(row.get(name))
    given = [value] * count if one else value
    if not isinstance(given, list) or len(given) != count:
        said = f"{len(given)} of them" if isinstance(given, list) else "none"
        raise RowError(
            name, f"must be a list with a number for each of the {count} tokens of completion_ids; there is {said}"
        )
    if not all(isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) for each in given):
        raise RowError(name, "must be finite numbers" if not one else "must be a finite number")
    return np.array(given, np.float32)
