"""The virtual tokens of one attention module, gathered for the rows of a batch.

An adapter has its own keys and values, and each row of a batch may have another adapter. So the tokens of all adapters in the batch are
stacked once, padded to the longest, and each row picks its adapter's by number; a row of the bare base picks an empty entry at the end.
The same code serves one adapter, a mixed batch and compiled graphs. An example with four rows:

    rows of the batch      french, bare base, german, french
    adapters               french with 3 virtual tokens, german with 2
    stack [N + 1, K, 3, D] french f0 f1 f2    german g0 g1 -    bare - - -
    choice [B]             0, 2, 1, 0
    keys [B, K, 3, D]      f0 f1 f2 | - - - | g0 g1 - | f0 f1 f2
    visible [B, 3]         1 1 1    | 0 0 0 | 1 1 0   | 1 1 1

Legend: N adapters, B rows, P virtual tokens (of the adapter with the most), K key-value heads, L queries, D head size.
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
class VirtualTokens:
    """The virtual tokens of each row. With one adapter for all rows, B is 1 until `of_rows` expands it."""

    keys: Tensor
    """[B, K, P, D]"""
    values: Tensor
    """[B, K, P, D]"""
    visible: Tensor
    """[B, P] which of them the row has at all."""
    offsets: Tensor
    """[B, P] their positions, counted from the sequence's first token: -3, -2, -1 for three tokens before it. 0 means no position, and
    numbers above 0 mean T5's `moved_keys` (`relative.py`)."""
    always_visible: bool
    """Whether every query sees all of them, in every row."""
    windowed: Tensor | None = None
    """[B, P] which of them a sliding window hides; None if none."""

    @property
    def count(self) -> int:
        """The number of virtual tokens per row, P."""
        return self.keys.shape[2]

    def of_rows(self, num_rows: int, num_heads: int) -> VirtualTokens:
        """Expand one adapter's tokens to all rows, and repeat heads if the module holds its own repeated (Falcon)."""
        if self.keys.shape[:2] == (num_rows, num_heads):
            return self
        keys, values = (
            part.repeat_interleave(num_heads // part.shape[1], 1).expand(num_rows, -1, -1, -1)
            for part in (self.keys, self.values)
        )
        visible, offsets = (part.expand(num_rows, -1) for part in (self.visible, self.offsets))
        windowed = None if self.windowed is None else self.windowed.expand(num_rows, -1)
        return VirtualTokens(keys, values, visible, offsets, self.always_visible, windowed)

    def seen(self, positions: Tensor | None, window: int | None) -> Tensor:
        """Return which queries see which tokens [B, L or 1, P] under a layer's sliding window.

        positions: [B or 1, L] of the queries, None if the attention does not know them. window: the number of latest tokens that a query
        sees. Raises `GraftError` if a window has to hide tokens and the positions are not known.
        """
        visible = self.visible[:, None, :]
        if not window or self.windowed is None:
            return visible
        if positions is None:
            raise GraftError(
                "this model's attention does not know positions, so a sliding window cannot hide virtual tokens: use window: shows"
            )
        # With 3 virtual tokens before it the sequence starts at position 3. In a window of 4 the query at position 5 is 2 after the first
        # token, so it is 3, 4 and 5 after the tokens at offsets -1, -2 and -3, and sees the first of these only.
        first = -self.offsets.amin(1)
        far = (positions - first[:, None])[..., None] - self.offsets[:, None, :] >= window
        return visible & ~(far & self.windowed[:, None, :])

    def row(self, row: int) -> VirtualTokens | None:
        """Return the tokens of one row without padding, None if it has none."""
        count = int(self.visible[row].sum())
        if not count:
            return None
        own = slice(row, row + 1)
        keys, values = self.keys[own, :, :count], self.values[own, :, :count]
        windowed = None if self.windowed is None else self.windowed[own, :count]
        return VirtualTokens(keys, values, self.visible[own, :count], self.offsets[own, :count], True, windowed)


class CachedPrompt(AttentionAdapter):
    """The virtual tokens of a prompt in one attention module: the model itself computes their keys and values from their embeddings."""

    cached_kv = True

    def __init__(self, state: State, tokens: int, windowed: bool) -> None:
        nn.Module.__init__(self)
        self.state, self.position_shift, self.windowed = state, tokens, windowed
        self.in_graph: tuple[Tensor, Tensor] | None = None
        """Keys and values in a compiled graph, which cannot read the forward context."""

    def keys_values(self) -> tuple[Tensor, Tensor]:
        found = self.in_graph if torch.compiler.is_compiling() else (self.state.current.cached_kv or {}).get(self)
        if found is None:
            raise GraftError(
                "virtual tokens in the embedding (prompt, p-tuning) run through the model that owns the blocks: call that model, "
                "not a block alone"
            )
        return found


def virtual_tokens(module: nn.Module, state: State, context: ForwardContext, num_rows: int) -> VirtualTokens | None:
    """Return the virtual tokens that the current forward context adds to this attention module, None if there are none.

    num_rows: rows of the batch. In a padding-free batch each segment counts as a row, whatever is given.
    """
    container: Any = module._modules.get("graft")
    table: dict[str, list[AttentionAdapter]] = {} if container is None else container.hooks.keys_values
    if not table or state.merged is not None:
        return None
    if context.cache_to_fill is not None or state.cache_in_graph is not None:
        # A prompt is running through the model to get its keys and values, so it must not see the ones that it will have.
        own = {name: [each for each in adapters if not each.cached_kv] for name, adapters in table.items()}
        table = {name: adapters for name, adapters in own.items() if adapters}
    if torch.compiler.is_compiling():
        # A graph cannot depend on who has which row: it stacks all adapters in memory.
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
    """Return by how many positions each row moves: one number, [B, 1], or [1, T] for the T tokens of a padding-free batch.

    table: the shift of each adapter. E.g. with {"french": 3}, rows of french and of the bare base with 2 and 4 tokens, laid end to end,
    move by [[3, 3, 0, 0, 0, 0]].
    """
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
    """Return each row's index into `names` [B], read from the slot numbers of a compiled graph. The bare base gets `len(names)`."""
    slot_B = state.slots_of_rows(num_rows)
    choice = torch.full_like(slot_B, len(names))
    for number, name in enumerate(names):
        choice = torch.where(slot_B == state.adapters[name].slot, number, choice)
    return choice.long()


def _gathered(names: list[str], table: dict[str, list[AttentionAdapter]], choice: Tensor | None) -> VirtualTokens:
    """Return each row's virtual tokens. choice: [B] indices into `names`, len(names) for the bare base; None: names[0] for all rows."""
    parts = [_joined(table[name]) for name in names]
    hides = any(adapter.windowed for name in names for adapter in table[name])
    if choice is None:
        keys, values, offsets, windowed = parts[0]
        visible = torch.ones(1, keys.shape[0], dtype=torch.bool, device=keys.device)
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        return VirtualTokens(keys, values, visible, offsets[None], not hides, windowed[None] if hides else None)
    longest, heads = (max(part[0].shape[dim] for part in parts) for dim in (0, 1))
    parts.append(tuple(each[:0] for each in parts[0]))  # pyright: ignore[reportArgumentType]  # the bare base: no tokens
    # Stack with padding to [N + 1, ...], then let each row pick its entry.
    keys_N, values_N = (
        torch.stack([_padded(part[i], longest, heads) for part in parts]).transpose(1, 2) for i in (0, 1)
    )
    counts_N = torch.tensor([len(part[0]) for part in parts], device=keys_N.device)
    visible_N = torch.arange(longest, device=keys_N.device) < counts_N[:, None]
    offsets_N, windowed_N = (
        torch.stack([nn.functional.pad(part[i], (0, longest - len(part[i]))) for part in parts]) for i in (2, 3)
    )
    windowed = windowed_N[choice] if hides else None
    return VirtualTokens(keys_N[choice], values_N[choice], visible_N[choice], offsets_N[choice], False, windowed)


def _joined(adapters: list[AttentionAdapter]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay the virtual tokens of one adapter end to end; a stack may have several. Return keys, values, offsets and windowed.

    E.g. a prefix of 2 tokens without positions and a prompt of 3 tokens that shifts positions by 3 have offsets 0, 0, -3, -2, -1.
    """
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
    """Pad with zero tokens up to a length, and repeat heads up to a number."""
    repeated = x_PKD if x_PKD.shape[1] == heads else x_PKD.repeat_interleave(heads // x_PKD.shape[1], 1)
    return nn.functional.pad(repeated, (0, 0, 0, 0, 0, length - x_PKD.shape[0]))
