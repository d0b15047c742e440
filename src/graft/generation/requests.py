"""What is to be generated, what comes back, and how requests are cut into batches.

A prompt is never cut. One that leaves no room for an answer in the model's context comes back as `no_room`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from graft.bases.context import context_length
from graft.errors import GraftError
from graft.generation.decoding import Decoding
from graft.injection.state import unwrapped

__all__ = ["Decoding", "Generated", "Request", "limits", "plan"]


@dataclass(frozen=True)
class Request:
    """One prompt for one adapter."""

    ids: tuple[int, ...]
    adapter: str | None = None
    """None is the bare base."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer."""


@dataclass(frozen=True)
class Generated:
    """The answer to a request."""

    ids: tuple[int, ...]
    """Without the token that ended it."""
    reason: Literal["stopped", "truncated", "no_room"]
    """It ended itself; it met the limit of new tokens or of the context; the prompt filled the context."""


def limits(model: nn.Module, requests: Sequence[Request], decoding: Decoding) -> list[int]:
    """New tokens that each request may get; 0 where there is no room. A decoder beside an encoder has the whole context for its answer."""
    apart = getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False)
    lengths = {adapter: context_length(model, adapter) for adapter in {request.adapter for request in requests}}
    found = []
    for request in requests:
        if not request.ids:
            raise GraftError("a prompt of no tokens cannot be answered: the template and the text are both empty")
        length = lengths[request.adapter]
        room = decoding.max_new_tokens if length is None else length - len(request.ids)
        if length is not None and apart and room >= 0:
            room = length
        found.append(max(0, min(room, decoding.max_new_tokens)))
    return found


def plan(requests: Sequence[Request], limit: Sequence[int], decoding: Decoding, token_budget: int) -> list[list[int]]:
    """Batches of request numbers: longest first, each of at most `token_budget` tokens (padding, beams and answers counted).

    A request that is larger than the budget goes alone. Few requests go through the base together, whoever they are for; of
    many, one adapter's share a batch, which spares taking rows apart.
    """

    def who(number: int) -> tuple[bool, str]:
        return requests[number].adapter is not None, requests[number].adapter or ""

    runnable = [number for number in range(len(requests)) if limit[number]]
    runnable.sort(key=lambda number: (who(number), -len(requests[number].ids), number))
    batches: list[list[int]] = []
    longest = most = 0
    for number in runnable:
        longest, most = max(longest, len(requests[number].ids)), max(most, limit[number])
        if batches and (len(batches[-1]) + 1) * (longest + most) * decoding.beams <= token_budget:
            batches[-1].append(number)
        else:
            batches.append([number])
            longest, most = len(requests[number].ids), limit[number]
    return sorted(batches, key=lambda batch: -max(len(requests[number].ids) for number in batch))
