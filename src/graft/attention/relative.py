"""T5's bias by relative position, for the columns of virtual tokens. Raffel et al. 2020 (arXiv 1910.10683).

A column gets bias 0 if its token has no position, and otherwise the bias of a position before the sequence.

Only the first layer of a stack holds the table of biases. The other layers receive its bias as an argument, and find its module in
`graft_relative`.

Legend: B rows, H heads, L queries, S keys, P virtual tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.attention.virtual import VirtualTokens

TABLE = "relative_attention_bias"


def with_columns(module: nn.Module, bias: Tensor, rows: VirtualTokens, query: Tensor, key: Tensor) -> Tensor:
    """Add columns for the virtual tokens: bias [B or 1, H, L, S] -> [B, H, L, P + S].

    Offsets below 0 are positions before the sequence. Offsets above 0 come from AdapterHub's `positions: moved_keys`, where the virtual
    tokens take the positions from 0 on, and the keys of the sequence (but not its queries) move after them. With 2 virtual tokens and 3
    tokens, the queries are then at 0 1 2, the virtual tokens at 0 1, and the sequence's keys at 2 3 4.
    """
    bias = bias.expand(rows.keys.shape[0], -1, -1, -1)
    columns = bias.new_zeros(*bias.shape[:3], rows.count)
    owner: Any = module.__dict__.get("graft_relative", (None,))[0]
    if owner is None:
        return torch.cat([columns, bias], -1)
    # Queries are the last L of the S positions: with a cache of 5 tokens, the query of the sixth is at 5.
    at_L = torch.arange(query.shape[2], device=key.device) + key.shape[2] - query.shape[2]
    # 2 virtual tokens with moved keys have offsets 2 and 3, and positions 0 and 1.
    moved_BP = rows.offsets > 0
    count_B1 = moved_BP.sum(-1, keepdim=True)
    front = _bias_at(owner, rows.offsets - count_B1 * moved_BP, at_L).to(bias.dtype)
    columns = torch.where((rows.offsets != 0)[:, None, None, :], front, columns)
    container: Any = module._modules["graft"]
    table = container.hooks.keys_values
    if any(adapter.position_shift < 0 for adapters in table.values() for adapter in adapters):
        at_BS = torch.arange(key.shape[2], device=key.device) + count_B1
        bias = torch.where((count_B1 > 0)[:, None, None, :], _bias_at(owner, at_BS, at_L).to(bias.dtype), bias)
    return torch.cat([columns, bias], -1)


def _bias_at(owner: Any, keys_BS: Tensor, queries_L: Tensor) -> Tensor:
    """Look up the bias [B, H, L, S] of keys and queries at these positions."""
    buckets_BLS = owner._relative_position_bucket(
        keys_BS[:, None, :] - queries_L[None, :, None], bidirectional=not owner.is_decoder,
        num_buckets=owner.relative_attention_num_buckets, max_distance=owner.relative_attention_max_distance,
    )  # fmt: skip
    return getattr(owner, TABLE)(buckets_BLS).permute(0, 3, 1, 2)
