"""Compute the log-likelihood of texts that follow a context, as ranking the choices of a question needs it.

Context and text are tokenised as prompt and answer are in training: no token spans the boundary between them, and the
tokenizer's special tokens for the start of a sequence come first. Rows are padded on the right, each with its own adapter.
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
    """Return the log-likelihood in nats of each text given its context, summed over the tokens of the text.

    A pair that does not fit into the model's context gives None. pairs: (context, text). adapters: one per pair; None is the
    bare base. token_budget: most tokens of a batch, padding counted.
    Raises `GraftError` for a text without tokens, and for a text with no token before it, which nothing predicts.
    """
    return likelihoods(model, tokenize_pairs(tokenizer, pairs), adapters, token_budget=token_budget)


def tokenize_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Example]:
    """Tokenise (context, text) pairs; only the tokens of the text are supervised. Raises `GraftError` as `log_likelihoods` does."""
    return [_example(number, *pair, tokenizer) for number, pair in enumerate(pairs)]


def likelihoods(
    model: nn.Module, examples: Sequence[Example], adapters: Sequence[str | None], *, token_budget: int = 8192
) -> list[float | None]:
    """Return the log-likelihood in nats of each example's supervised tokens under its adapter; None: longer than the context."""
    fits = fitting_examples(model, [len(example) for example in examples], adapters)
    chosen = [examples[row] for row in fits]
    losses = sample_losses(model, chosen, [adapters[row] for row in fits], token_budget=token_budget) if fits else []
    found: list[float | None] = [None] * len(examples)
    for row, loss in zip(fits, losses, strict=True):
        found[row] = -loss
    return found


def fitting_examples(model: nn.Module, lengths: Sequence[int], adapters: Sequence[str | None]) -> list[int]:
    """Return the indices of the examples that fit into the model's context under their adapters. lengths: in tokens."""
    room = {adapter: context_length(model, adapter) for adapter in set(adapters)}
    limits = [room[adapter] for adapter in adapters]
    return [place for place, limit in enumerate(limits) if limit is None or lengths[place] <= limit]


def _example(number: int, context: str, text: str, tokenizer: Any) -> Example:
    tokens = encode([Span(context, message=0), Span(text, supervised=True, message=1)], tokenizer)
    supervised = np.array([span == 1 for span in tokens.spans])
    if not supervised.any() or supervised[0]:
        raise GraftError(
            f"{text!r} after {context!r} has no likelihood: a text needs tokens, and at least one token before it"
        )
    return Example(np.array(tokens.ids, dtype=np.int32), supervised, "likelihood", number + 1)
