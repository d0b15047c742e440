"""A pair of answers to one prompt as two sequences: the prompt with the preferred answer, and the prompt with the rejected answer.

The template renders the prompt, which is tokenised apart from the answers. So its tokens are the same on both sides; this is checked.
The targets are the answers after the prompt with their end marks, even if the prompt itself holds answers. A pair that is too long is
rejected as a whole, or with `truncate_prompt` it loses the same tokens of the prompt on both sides. Answers are never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.data.encoding import encode, facts_of
from graft.data.samples import Example, Message, Rejected, Sample, is_silent, without_end
from graft.data.template import Template
from graft.data.tokenizing import Overlong, cut_to, targets_of
from graft.errors import GraftError


@dataclass(frozen=True)
class Side:
    """One conversation in tokens, up to its last target."""

    ids: NDArray[np.int32]
    targets: NDArray[np.bool_]
    removable: tuple[int, ...]
    """Positions of the prompt that may be cut, in the order in which they are cut."""

    @property
    def prompt(self) -> NDArray[np.int32]:
        """The tokens before the first target."""
        return self.ids[: int(np.flatnonzero(self.targets)[0])]


def tokenize_pair(
    sample: Sample, tokenizer: Any, template: Template, *, max_length: int, overlong: Overlong = "error"
) -> Example | Rejected:
    """Return both sides of a pair, or the reason why it cannot be trained on. Lengths are those of the longer side, in tokens.

    Raises `GraftError`, naming the row, if the template cannot write a conversation, or if it writes the prompt differently before the
    two answers.
    """
    sides = [side_of(messages, sample, tokenizer, template) for messages in (sample.messages, sample.rejected)]
    if any(side is None for side in sides):
        return Rejected("empty_answer", 0)
    chosen, rejected = (side for side in sides if side is not None)
    if not np.array_equal(chosen.prompt, rejected.prompt):
        raise GraftError(
            f"{sample.where}: the template '{template.name}' writes the prompt differently before the chosen and the rejected answer"
        )
    length = max(len(chosen.ids), len(rejected.ids))
    if np.array_equal(chosen.ids, rejected.ids):
        return Rejected("same_answers", length)
    cut = cut_to(max_length, length, overlong, lambda: chosen.removable)
    if isinstance(cut, Rejected):
        return cut
    ours, theirs = (
        Example(np.delete(side.ids, cut), np.delete(side.targets, cut), sample.source, sample.row, len(cut))
        for side in (chosen, rejected)
    )
    ours.rejected = theirs
    return ours


def side_of(messages: Sequence[Message], sample: Sample, tokenizer: Any, template: Template) -> Side | None:
    """Tokenise one side; None if an answer after the prompt is empty. Raises `GraftError`, naming the row, as `tokenize_pair` does."""
    written = template.complete(without_end(messages, facts_of(tokenizer).eos))
    # The template may have put a system message first; `first` is the first message after the prompt.
    first = len(written) - len(messages) + sample.asked
    learnt = [index for index in range(first, len(written)) if written[index]["role"] == "assistant"]
    learnt = [index for index in learnt if not written[index].get("masked")]
    if any(is_silent(written[index]) for index in learnt):
        return None
    try:
        spans = template.render(written, learnt=learnt)
    except GraftError as error:
        raise GraftError(f"{sample.where}: {error}") from error
    tokens = encode(spans, tokenizer, template.reads_tokens)
    targets = targets_of(tokens, spans, learnt)
    if not targets.any():
        return None
    length, begin = int(np.flatnonzero(targets)[-1]) + 1, int(np.flatnonzero(targets)[0])
    # As in tokenizing.py: questions of the prompt, the oldest message first, and within a message its last span first.
    removable = sorted(
        (message, -index, position)
        for position, index in enumerate(tokens.spans[:begin])
        if index >= 0 and tokens.whole[position] and (message := spans[index].message) is not None
        if written[message]["role"] == "user"
    )
    return Side(
        np.array(tokens.ids, dtype=np.int32)[:length], targets[:length], tuple(position for _, _, position in removable)
    )
