"""What a base knows of the tokens in the data: whether it has a row for each, and whether it has learnt the special ones.

Rows of tokens that were added to a base, or reserved and never used, are zero, equal to the mean of all rows, or alike. A low-rank update
changes them all in the same way, so that the model cannot tell the end mark from other tokens, and no answer ever ends.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from graft.distributed.sharded import full
from graft.errors import GraftError, listed
from graft.injection.state import unwrapped

SAMPLED = 4096
"""Rows that the usual distance from the mean is measured on."""
NEAR = 0.02
"""Rows closer than this share of the usual distance from the mean are equal: noise of an initialisation, not learnt."""


def refuse_unknown(model: nn.Module, name: str, tokenizer: Any, largest: int, *, prompt: bool = False) -> None:
    """Raise `GraftError` if the largest token id in the data (or in a prompt) has no row in the base's embedding."""
    table = _table(model, "get_input_embeddings")
    if table is None or largest < len(table):
        return
    token = tokenizer.convert_ids_to_tokens(largest)
    held = "the prompt holds the token" if prompt else "the data hold the token"
    raise GraftError(
        f"{held} {token!r} (id {largest}), but the embedding of {name} has only {len(table):,} rows, while its tokenizer "
        f"knows {len(tokenizer):,} tokens. Leave this token out, or resize the base for its tokenizer and save both"
    )


def unlearnt(
    model: nn.Module, adapter: str, tokenizer: Any, read: Collection[int], written: Collection[int]
) -> dict[int, str]:
    """Return the special tokens that neither the base has learnt nor the adapter trains, with the reason in words.

    read, written: ids of the special tokens in the data, and of those among the targets. Rows of the embedding count for the first, and
    rows of the head for the second.
    """
    special = sorted(_special(tokenizer))
    found: dict[int, str] = {}
    for getter, used in (("get_input_embeddings", read), ("get_output_embeddings", written)):
        table = _table(model, getter)
        if table is None or not used:
            continue
        left = {token for token in used if token < len(table)} - _trained_rows(model, getter, adapter, len(table))
        found |= _odd_rows(full(table), sorted(left), [token for token in special if token < len(table)], tokenizer)
    return found


def special_among(tokenizer: Any, ids: Collection[int]) -> set[int]:
    """Return the special and added tokens among some ids."""
    return _special(tokenizer) & set(ids)


def _special(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _table(model: nn.Module, getter: str) -> Tensor | None:
    """Return the rows of tokens [V, D] of the embedding or of the head; None if there is no such table of numbers."""
    module = getattr(unwrapped(model), getter, lambda: None)()
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() else None


def _trained_rows(model: nn.Module, getter: str, adapter: str, height: int) -> set[int]:
    """Return the rows of a table that an adapter changes one by one."""
    container: Any = getattr(unwrapped(model), getter)()._modules.get("graft")
    hosted = container.hooks.adapt.get(adapter, ()) if container is not None else ()
    rows: set[int] = set()
    for each in hosted:
        chosen = each.adapter.replaces_rows
        rows |= set(chosen) if chosen else set(range(height))
    return rows


@torch.no_grad()
def _odd_rows(table: Tensor, used: list[int], special: list[int], tokenizer: Any) -> dict[int, str]:
    sample = table[:: max(1, len(table) // SAMPLED)].float()
    mean = table.mean(0, dtype=torch.float32)
    usual = (sample - mean).norm(dim=1).median()
    rows, others = table[used].float(), table[special].float()
    found: dict[int, str] = {}
    for token, row in zip(used, rows, strict=True):
        near = [other for other, there in zip(special, others, strict=True) if (row - there).norm() < NEAR * usual]
        alike = [other for other in near if other != token]
        if row.norm() < NEAR * usual:
            found[token] = "is zero"
        elif (row - mean).norm() < NEAR * usual:
            found[token] = "is the mean of all rows"
        elif alike:
            names = [tokenizer.convert_ids_to_tokens(other) for other in alike]
            found[token] = f"equals that of {listed(names, 2)}"
    return found
