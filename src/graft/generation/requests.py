"""Requests, the answers to them, and how requests are split into batches.

Prompts are never truncated. A prompt that leaves no room for an answer in the model's context comes back as `no_room`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from graft.bases.context import classes_of, context_length
from graft.errors import GraftError
from graft.generation.decoding import Decoding
from graft.injection.state import unwrapped

__all__ = ["Decoding", "Generated", "Request", "apart", "limits", "plan"]


@dataclass(frozen=True)
class Request:
    """One prompt for one adapter."""

    ids: tuple[int, ...]
    adapter: str | None = None
    """None is the bare base."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer."""
    total: int | None = None
    """Tokens of the whole prompt, if it is so long that `ids` hold only enough of it to fill the context."""

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.ids) if self.total is None else self.total


@dataclass(frozen=True)
class Generated:
    """The answer to a request."""

    ids: tuple[int, ...]
    """The tokens of the answer, without the stop token."""
    reason: Literal["stopped", "truncated", "no_room"]
    """stopped: a stop token ended the answer. truncated: it reached the limit of new tokens or of the context.
    no_room: the prompt filled the context."""


def limits(model: nn.Module, requests: Sequence[Request], decoding: Decoding) -> list[int]:
    """Return how many new tokens each request may get; 0 where there is no room.

    In an encoder-decoder the prompt is in the encoder, so the decoder has the whole context for the answer.
    """
    encoder_decoder = getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False)
    lengths = {adapter: context_length(model, adapter) for adapter in {request.adapter for request in requests}}
    found = []
    for request in requests:
        if not request.ids:
            raise GraftError("a prompt of no tokens cannot be answered: both the template and the text are empty")
        length = lengths[request.adapter]
        room = decoding.max_new_tokens if length is None else length - len(request.ids)
        if length is not None and encoder_decoder and room >= 0:
            room = length
        found.append(max(0, min(room, decoding.max_new_tokens)))
    return found


def apart(model: nn.Module, requests: Sequence[Request], limit: Sequence[int]) -> list[Hashable] | None:
    """Return a class for each request, so that only requests of one class may share a batch; None if all may.

    A request whose answer may take it from one class to another has a batch of its own (`Company`).
    """
    adapters = [request.adapter for request in requests]
    first, last = (
        classes_of(model, [len(request.ids) + more for request, more in zip(requests, added, strict=True)], adapters)
        for added in ([0] * len(requests), limit)
    )
    if first is None or last is None:
        return None
    return [one if one == other else number for number, (one, other) in enumerate(zip(first, last, strict=True))]


def plan(
    requests: Sequence[Request],
    limit: Sequence[int],
    decoding: Decoding,
    token_budget: int,
    classes: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Split request numbers into batches of at most `token_budget` tokens, counting padding, beams and answers; longest first.

    Requests are ordered by adapter and then by length. Requests of one adapter therefore share batches, which spares splitting
    rows by adapter; a few requests for several adapters still fit into one batch. A request above the budget has a batch of
    its own. For example, with a budget of 40, one beam and a limit of 10 new tokens each, prompts of 10, 9 and 3 tokens
    become [10, 9] and [3]: two rows take 2 * (10 + 10) = 40 tokens, three would take 60.

    classes: of each request; a batch holds requests of one class.
    """
    if classes is not None and len(set(classes)) > 1:
        own = [
            [limit[number] * (classes[number] == each) for number in range(len(requests))]
            for each in dict.fromkeys(classes)
        ]
        return [batch for each in own for batch in plan(requests, each, decoding, token_budget)]

    def adapter_order(number: int) -> tuple[bool, str]:
        return requests[number].adapter is not None, requests[number].adapter or ""

    runnable = [number for number in range(len(requests)) if limit[number]]
    runnable.sort(key=lambda number: (adapter_order(number), -len(requests[number].ids), number))
    batches: list[list[int]] = []
    # `longest` and `most` are the longest prompt and the largest limit of the batch that is being filled.
    longest = most = 0
    for number in runnable:
        longest, most = max(longest, len(requests[number].ids)), max(most, limit[number])
        if batches and (len(batches[-1]) + 1) * (longest + most) * decoding.beams <= token_budget:
            batches[-1].append(number)
        else:
            batches.append([number])
            longest, most = len(requests[number].ids), limit[number]
    return sorted(batches, key=lambda batch: -max(len(requests[number].ids) for number in batch))
