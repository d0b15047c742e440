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

An adapter whose tokens depend on the row (a gated prefix) has an entry in the stack for each of its rows, and the others have one for all.

Legend: B rows, P virtual tokens (of the adapter with the most), K key-value heads, L queries, D head size,
E entries of the stack.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.hooks import ALL_ROWS, AttentionAdapter
from graft.attention.joining import Joined, entries, entries_in_graph, joined
from graft.errors import GraftError
from graft.injection.state import State
from graft.routing.context import AdapterContext, ForwardContext


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

    def keys_values(self, x: Tensor | None = None, ctx: AdapterContext = ALL_ROWS) -> tuple[Tensor, Tensor]:
        found = self.in_graph if torch.compiler.is_compiling() else (self.state.current.cached_kv or {}).get(self)
        if found is None:
            raise GraftError(
                "virtual tokens in the embedding (prompt, p-tuning) run through the model that owns the blocks: call that model, "
                "not a block alone"
            )
        return found


def virtual_tokens(module: nn.Module, state: State, context: ForwardContext, query: Tensor) -> VirtualTokens | None:
    """Return the virtual tokens that the current forward context adds to this attention module, None if there are none.

    query: [B, H, L, D], or padding-free [1, H, T, D]; there each segment counts as a row.
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
        there = [name for name in table if state.in_memory(name)]
        parts = [joined(container, table[name], [(None, ALL_ROWS)]) for name in there]
        return _gathered(parts, entries_in_graph(parts, compiled_choice(state, there, len(query)))) if there else None
    if state.reached is not None and any(name in context.names for name in container.hooks.keys_values):  # pyright: ignore
        state.reached.add(id(container))
    names = [name for name in table if name in context.names]
    if not names:
        return None
    if isinstance(context.rows, str):
        return _gathered([joined(container, table[context.rows], [(None, context.everything)])], None)
    groups = context.groups(query.transpose(1, 2))
    own = {name: [(index, ctx) for each, index, ctx in groups if each == name] for name in names}
    parts = [joined(container, table[name], own[name], 1 if context.flat else 0) for name in names]
    rows = context.row_names(len(context.lengths or ()) if context.flat else len(query))
    return _gathered(parts, entries(parts, [names.index(name) if name in own else None for name in rows]))


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
        choice = torch.where(slot_B == state.served(name).slot, number, choice)
    return choice.long()


def _gathered(parts: list[Joined], choice: Tensor | None) -> VirtualTokens:
    """Return each row's virtual tokens. choice: [B] entries in the stack of all parts, the last for the bare base; None: the only part."""
    hides = any(part.hides for part in parts)
    if choice is None:
        keys, values = parts[0].keys.transpose(1, 2), parts[0].values.transpose(1, 2)
        offsets, windowed = (each.expand(len(keys), -1) for each in (parts[0].offsets, parts[0].windowed))
        return VirtualTokens(keys, values, torch.ones_like(windowed), offsets, not hides, windowed if hides else None)
    longest, heads = (max(part.keys.shape[dim] for part in parts) for dim in (1, 2))
    # Stack with padding to [E, ...], the bare base with no tokens last, then let each row pick its entry.
    everyone = [*parts, parts[0].nothing]
    keys_E, values_E, offsets_E, windowed_E = (
        torch.cat(found) for found in zip(*(part.as_wide(longest, heads) for part in everyone), strict=True)
    )
    counts_E = torch.tensor([part.keys.shape[1] for part in everyone for _ in part.keys], device=choice.device)
    visible_E = torch.arange(longest, device=choice.device) < counts_E[:, None]
    windowed = windowed_E[choice] if hides else None
    return VirtualTokens(
        keys_E.transpose(1, 2)[choice],
        values_E.transpose(1, 2)[choice],
        visible_E[choice],
        offsets_E[choice],
        False,
        windowed,
    )
