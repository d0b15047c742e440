"""The virtual tokens of one adapter in one attention module, end to end, and where each row of a batch finds its own.

An adapter has one entry for all of its rows or, if its tokens depend on the row, one for each.

Legend: E entries, B rows, P virtual tokens, K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.hooks import AttentionAdapter
from graft.routing.context import AdapterContext
from graft.routing.rows import gather


@dataclass(frozen=True)
class Joined:
    """The virtual tokens of one adapter, end to end."""

    keys: Tensor
    """[E, P, K, D]"""
    values: Tensor
    """[E, P, K, D]"""
    offsets: Tensor
    """[P]"""
    windowed: Tensor
    """[P]"""
    hides: bool
    """Whether a sliding window hides any of them."""

    @property
    def nothing(self) -> Joined:
        """The entry of a row without virtual tokens."""
        return Joined(self.keys[:1, :0], self.values[:1, :0], self.offsets[:0], self.windowed[:0], False)

    def as_wide(self, length: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys, values [E, length, heads, D], offsets and windowed [E, length], padded to a length and with heads repeated."""
        offsets, windowed = (
            nn.functional.pad(each, (0, length - len(each))).expand(len(self.keys), -1)
            for each in (self.offsets, self.windowed)
        )
        return padded(self.keys, length, heads), padded(self.values, length, heads), offsets, windowed


def entries(parts: list[Joined], numbers: list[int | None]) -> Tensor:
    """Return each row's entry in the stack of all parts [B]. numbers: the part of each row, None for the bare base."""
    sizes, seen, entries = [len(part.keys) for part in parts], [0] * len(parts), []
    for number in numbers:
        if number is None:
            entries.append(sum(sizes))
            continue
        entries.append(sum(sizes[:number]) + (seen[number] if sizes[number] > 1 else 0))
        seen[number] += 1
    return torch.tensor(entries, device=parts[0].keys.device)


def entries_in_graph(parts: list[Joined], choice_B: Tensor) -> Tensor:
    """Return each row's entry in the stack of all parts [B]. choice_B: the part of each row, len(parts) for the bare base."""
    sizes = [len(part.keys) for part in parts]
    if all(size == 1 for size in sizes):
        return choice_B
    starts = torch.tensor([sum(sizes[:number]) for number in range(len(sizes) + 1)], device=choice_B.device)
    by_row = torch.tensor([*(size > 1 for size in sizes), False], device=choice_B.device)
    return starts[choice_B] + by_row[choice_B] * torch.arange(len(choice_B), device=choice_B.device)


def joined(
    container: Any, adapters: list[AttentionAdapter], groups: list[tuple[Any, AdapterContext]], dim: int = 0
) -> Joined:
    """Lay the virtual tokens of one adapter end to end; a stack may have several.

    groups: the index and the context of each group of its rows; index None: all rows. dim: the dimension of the index.
    E.g. a prefix of 2 tokens without positions and a prompt of 3 tokens that shifts positions by 3 have offsets 0, 0, -3, -2, -1.
    """
    pairs = [_pair(container, adapter, groups, dim) for adapter in adapters]
    heads, start, offsets, windowed = max(keys.shape[2] for keys, _ in pairs), 0, [], []
    total = sum(adapter.position_shift for adapter in adapters)
    for adapter, (keys, _) in zip(adapters, pairs, strict=True):
        places = torch.arange(keys.shape[1], device=keys.device)
        offsets.append(places + (start - total) if adapter.position_shift else torch.zeros_like(places))
        windowed.append(torch.full_like(places, adapter.windowed, dtype=torch.bool))
        start += adapter.position_shift
    hides = any(adapter.windowed for adapter in adapters)
    if len(pairs) == 1:
        return Joined(*pairs[0], offsets[0], windowed[0], hides)
    rows = max(len(keys) for keys, _ in pairs)
    keys, values = (
        torch.cat([padded(pair[i], pair[i].shape[1], heads).expand(rows, -1, -1, -1) for pair in pairs], 1)
        for i in (0, 1)
    )
    return Joined(keys, values, torch.cat(offsets), torch.cat(windowed), hides)


def _pair(
    container: Any, adapter: AttentionAdapter, groups: list[tuple[Any, AdapterContext]], dim: int
) -> tuple[Tensor, Tensor]:
    """Return the keys and values [E, P, K, D] of one adapter module: one entry for all rows, or one for each."""
    if not adapter.per_row:
        keys, values = adapter.keys_values(ctx=groups[0][1])
        return keys[None], values[None]
    reads = adapter.reads == "input"
    found = []
    for index, ctx in groups:
        x = container.input_of_attention() if reads else None
        found.append(adapter.keys_values(x if x is None or index is None else gather(x, index, dim), ctx))
    keys, values = zip(*found, strict=True)
    return (keys[0], values[0]) if len(found) == 1 else (torch.cat(keys), torch.cat(values))


def padded(x_EPKD: Tensor, length: int, heads: int) -> Tensor:
    """Pad with zero tokens up to a length, and repeat heads up to a number."""
    repeated = x_EPKD if x_EPKD.shape[2] == heads else x_EPKD.repeat_interleave(heads // x_EPKD.shape[2], 2)
    return nn.functional.pad(repeated, (0, 0, 0, 0, 0, length - x_EPKD.shape[1]))
