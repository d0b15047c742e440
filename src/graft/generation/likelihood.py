"""How likely a model finds a text behind a context: what ranking the choices of a question needs.

Contexts and texts are tokenised as prompts and answers are in training: no token straddles their border, and the tokens that
the tokenizer puts at the start of a text come first. Rows are padded on the right and masked, each under its own adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from graft.bases.context import context_length
from graft.data.encoding import Span, encode
from graft.data.samples import Example
from graft.errors import GraftError
from graft.generation.loss import sample_losses


def log_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    adapters: Sequence[str | None],
    *,
    token_budget: int = 8192,
) -> list[float | None]:
    """Log-likelihood in nats of each text behind its context, summed over its tokens; None: longer than the model's context.

    pairs: (context, text). adapters: of each pair; None is the bare base. token_budget: tokens of a batch, padding counted.
    Raises `GraftError` for a text of no tokens, and for one at the very start, which nothing predicts.
    """
    return likelihoods(model, tokenized(tokenizer, pairs), adapters, token_budget=token_budget)


def tokenized(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """(context, text) as tokens of which those of the text count. Raises `GraftError` as `log_likelihoods` does."""
    return [_example(number, *pair, tokenizer) for number, pair in enumerate(pairs)]


def likelihoods(
    model: nn.Module, examples: Sequence[Example], adapters: Sequence[str | None], *, token_budget: int = 8192
) -> list[float | None]:
    """Log-likelihood in nats of the supervised tokens of each example under its adapter; None: longer than the context."""
    fits = fitting(model, [len(example) for example in examples], adapters)
    chosen = [examples[row] for row in fits]
    losses = sample_losses(model, chosen, [adapters[row] for row in fits], token_budget=token_budget) if fits else []
    found: list[float | None] = [None] * len(examples)
    for row, loss in zip(fits, losses, strict=True):
        found[row] = -loss
    return found


def fitting(model: nn.Module, lengths: Sequence[int], adapters: Sequence[str | None]) -> list[int]:
    """Places of the lengths in tokens that the model's context holds under their adapters."""
    room = {adapter: context_length(model, adapter) for adapter in set(adapters)}
    limits = [room[adapter] for adapter in adapters]
    return [place for place, limit in enumerate(limits) if limit is None or lengths[place] <= limit]


def _example(number: int, context: str, text: str, tokenizer: Any) -> Example:
    tokens = encode([Span(context, message=0), Span(text, supervised=True, message=1)], tokenizer)
    supervised = np.array([span == 1 for span in tokens.spans])
    if not supervised.any() or supervised[0]:
        raise GraftError(
            f"there is no likelihood of {text!r} behind {context!r}: a text needs tokens, and one before them"
        )
    return Example(np.array(tokens.ids, dtype=np.int32), supervised, "likelihood", number + 1)
