"""The virtual tokens of one attention module, gathered for the rows of a batch.

Those of the adapters that take part are stacked once; each row picks its own by number, and the bare base picks none. The same
code serves one adapter, a mixed batch and compiled graphs.

Legend: N adapters, B rows, P virtual tokens (of the adapter that has most), K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.hooks import AttentionAdapter
from graft.errors import GraftError
from graft.injection.state import State
from graft.routing.context import ForwardContext


@dataclass(frozen=True)
class Virtual:
    """Keys and values [B, K, P, D], who sees them [B, P], and where they stand, counted from the sequence's first token [B, P]: below
    0, or 0 for tokens that have no position."""

    keys: Tensor
    values: Tensor
    visible: Tensor
    offsets: Tensor
    always_visible: bool
    windowed: Tensor | None = None
    """[B, P] which of them a sliding window hides; None for none."""

    @property
    def count(self) -> int:
        """Virtual tokens per row."""
        return self.keys.shape[2]

    def of_rows(self, num_rows: int, num_heads: int) -> Virtual:
        """One adapter's tokens for all rows, expanded; their heads repeated where the module holds its own repeated (Falcon)."""
        if self.keys.shape[:2] == (num_rows, num_heads):
            return self
        keys, values = (
            part.repeat_interleave(num_heads // part.shape[1], 1).expand(num_rows, -1, -1, -1)
            for part in (self.keys, self.values)
        )
        visible, offsets = (part.expand(num_rows, -1) for part in (self.visible, self.offsets))
        windowed = None if self.windowed is None else self.windowed.expand(num_rows, -1)
        return Virtual(keys, values, visible, offsets, self.always_visible, windowed)

    def seen(self, positions: Tensor | None, window: int | None) -> Tensor:
        """Who sees them [B, L or 1, P], under a layer's sliding window. positions [B or 1, L] of the queries, None if not known."""
        visible = self.visible[:, None, :]
        if not window or self.windowed is None:
            return visible
        if positions is None:
            raise GraftError(
                "this model's attention does not know positions, so a sliding window cannot hide virtual tokens: use window: shows"
            )
        first = -self.offsets.amin(1)  # the position of the sequence's first token
        far = (positions - first[:, None])[..., None] - self.offsets[:, None, :] >= window
        return visible & ~(far & self.windowed[:, None, :])

    def row(self, row: int) -> Virtual | None:
        """One row's own, cut to what it sees; None for none."""
        seen = int(self.visible[row].sum())
        if not seen:
            return None
        cut = slice(row, row + 1)
        keys, values = self.keys[cut, :, :seen], self.values[cut, :, :seen]
        windowed = None if self.windowed is None else self.windowed[cut, :seen]
        return Virtual(keys, values, self.visible[cut, :seen], self.offsets[cut, :seen], True, windowed)


class CachedPrompt(AttentionAdapter):
    """Virtual tokens whose keys and values in this module the model itself has computed, from their embeddings."""

    cached_kv = True

    def __init__(self, state: State, tokens: int, windowed: bool) -> None:
        nn.Module.__init__(self)
        self.state, self.position_shift, self.windowed = state, tokens, windowed
        self.in_graph: tuple[Tensor, Tensor] | None = None
        """Of a compiled graph, which does not know the pass."""

    def keys_values(self) -> tuple[Tensor, Tensor]:
        found = self.in_graph if torch.compiler.is_compiling() else (self.state.current.cached_kv or {}).get(self)
        if found is None:
            raise GraftError(
                "virtual tokens in the embedding (prompt, p-tuning) run through the model that owns the blocks: call that model, "
                "not a block alone"
            )
        return found


def virtual_tokens(module: nn.Module, state: State, context: ForwardContext, num_rows: int) -> Virtual | None:
    """What the pass in effect adds to this module's keys and values, or None. Flat batches have one row per segment."""
    container: Any = module._modules.get("graft")
    table: dict[str, list[AttentionAdapter]] = {} if container is None else container.hooks.keys_values
    if not table or state.merged is not None:
        return None
    if context.recording is not None or state.recording_in_graph is not None:
        kept = {name: [each for each in adapters if not each.cached_kv] for name, adapters in table.items()}
        table = {name: adapters for name, adapters in kept.items() if adapters}
    if torch.compiler.is_compiling():
        there = [name for name in table if not state.adapters[name].offloaded]
        return _gathered(there, table, compiled_choice(state, there, num_rows)) if there else None
    if state.reached is not None and any(name in context.names for name in container.hooks.keys_values):  # pyright: ignore
        state.reached.add(id(container))
    names = [name for name in table if name in context.names]
    if not names:
        return None
    if isinstance(context.rows, str):
        return _gathered(names, table, None)
    num_rows = len(context.lengths or ()) if context.flat else num_rows
    numbers = [names.index(name) if name in names else len(names) for name in context.row_names(num_rows)]
    device = table[names[0]][0].keys_values()[0].device
    return _gathered(names, table, torch.tensor(numbers, device=device))


def position_shifts(
    table: dict[str, int], state: State, context: ForwardContext, num_rows: int, device: torch.device
) -> int | Tensor:
    """Positions by which each row is moved: one number, [B, 1], or [1, T] for a flat batch."""
    if torch.compiler.is_compiling():
        shifts = torch.tensor([*table.values(), 0], device=device)
        return shifts[compiled_choice(state, list(table), num_rows)][:, None]
    if not isinstance(context.rows, tuple):
        return table.get(context.rows or "", 0)
    if context.flat:
        assert context.lengths is not None
        per_row = torch.tensor([table.get(name or "", 0) for name in context.rows], device=device)
        return per_row.repeat_interleave(torch.tensor(context.lengths, device=device))[None]
    return torch.tensor([table.get(name or "", 0) for name in context.row_names(num_rows)], device=device)[:, None]


def compiled_choice(state: State, names: list[str], num_rows: int) -> Tensor:
    """[B] numbers into `names`; the bare base gets the number behind the last."""
    slot_B = state.slots_of_rows(num_rows)
    choice = torch.full_like(slot_B, len(names))
    for number, name in enumerate(names):
        choice = torch.where(slot_B == state.adapters[name].slot, number, choice)
    return choice.long()


def _gathered(names: list[str], table: dict[str, list[AttentionAdapter]], choice: Tensor | None) -> Virtual:
    parts = [_joined(table[name]) for name in names]
    hides = any(adapter.windowed for name in names for adapter in table[name])
    if choice is None:
        keys, values, offsets, windowed = parts[0]
        visible = torch.ones(1, keys.shape[0], dtype=torch.bool, device=keys.device)
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        return Virtual(keys, values, visible, offsets[None], not hides, windowed[None] if hides else None)
    longest, heads = (max(part[0].shape[dim] for part in parts) for dim in (0, 1))
    parts.append(tuple(each[:0] for each in parts[0]))  # pyright: ignore[reportArgumentType]
    keys_N, values_N = (
        torch.stack([_padded(part[i], longest, heads) for part in parts]).transpose(1, 2) for i in (0, 1)
    )
    counts_N = torch.tensor([len(part[0]) for part in parts], device=keys_N.device)
    visible_N = torch.arange(longest, device=keys_N.device) < counts_N[:, None]
    offsets_N, windowed_N = (
        torch.stack([nn.functional.pad(part[i], (0, longest - len(part[i]))) for part in parts]) for i in (2, 3)
    )
    windowed = windowed_N[choice] if hides else None
    return Virtual(keys_N[choice], values_N[choice], visible_N[choice], offsets_N[choice], False, windowed)


def _joined(adapters: list[AttentionAdapter]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The virtual tokens of one adapter name (a stack may hold several kinds) as one: keys, values, offsets, windowed."""
    pairs = [adapter.keys_values() for adapter in adapters]
    heads, start, offsets, windowed = max(keys.shape[1] for keys, _ in pairs), 0, [], []
    total = sum(adapter.position_shift for adapter in adapters)
    for adapter, (keys, _) in zip(adapters, pairs, strict=True):
        places = torch.arange(keys.shape[0], device=keys.device)
        offsets.append(places + (start - total) if adapter.position_shift else torch.zeros_like(places))
        windowed.append(torch.full_like(places, adapter.windowed, dtype=torch.bool))
        start += adapter.position_shift
    if len(pairs) == 1:
        return *pairs[0], offsets[0], windowed[0]
    keys, values = (torch.cat([_padded(pair[i], len(pair[i]), heads) for pair in pairs]) for i in (0, 1))
    return keys, values, torch.cat(offsets), torch.cat(windowed)


def _padded(x_PKD: Tensor, length: int, heads: int) -> Tensor:
    """Empty tokens up to a length; heads repeated up to a number."""
    repeated = x_PKD if x_PKD.shape[1] == heads else x_PKD.repeat_interleave(heads // x_PKD.shape[1], 1)
    return nn.functional.pad(repeated, (0, 0, 0, 0, 0, length - x_PKD.shape[0]))
