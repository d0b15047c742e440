"""The virtual tokens of one attention module, gathered for the rows of a batch.

Prefixes of the adapters that take part are stacked once; each row picks its own by number, and the bare base picks none. The same
code serves one adapter, a mixed batch and compiled graphs.

Legend: N prefixes, B rows, P virtual tokens (the longest prefix), K key-value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.adapters.base import AttentionAdapter
from graft.passes import Pass
from graft.state import State


@dataclass(frozen=True)
class Virtual:
    """Keys and values [B, K, P, D], who sees them [B, P], and by how many positions each row's sequence is moved [B]."""

    keys: Tensor
    values: Tensor
    visible: Tensor
    shifts: Tensor | None
    always_visible: bool

    @property
    def count(self) -> int:
        """Virtual tokens per row."""
        return self.keys.shape[2]

    def of_rows(self, num_rows: int, num_heads: int) -> Virtual:
        """One prefix for all rows, expanded; its heads repeated where the module holds its own repeated (Falcon)."""
        if self.keys.shape[:2] == (num_rows, num_heads):
            return self
        keys, values = (
            part.repeat_interleave(num_heads // part.shape[1], 1).expand(num_rows, -1, -1, -1)
            for part in (self.keys, self.values)
        )
        shifts = None if self.shifts is None else self.shifts.expand(num_rows)
        return Virtual(keys, values, self.visible.expand(num_rows, -1), shifts, self.always_visible)

    def row(self, row: int) -> Virtual | None:
        """One row's own, cut to what it sees; None for none."""
        seen = int(self.visible[row].sum())
        if not seen:
            return None
        cut = slice(row, row + 1)
        shifts = None if self.shifts is None else self.shifts[cut]
        return Virtual(self.keys[cut, :, :seen], self.values[cut, :, :seen], self.visible[cut, :seen], shifts, True)


def virtual_tokens(module: nn.Module, state: State, pass_: Pass, num_rows: int) -> Virtual | None:
    """What the pass in effect adds to this module's keys and values, or None. Flat batches have one row per segment."""
    grafts = module._modules.get("graft")
    table: dict[str, list[AttentionAdapter]] = getattr(grafts, "attention", {})
    if not table or state.merged is not None:
        return None
    if torch.compiler.is_compiling():
        return _gathered(list(table), table, _compiled_choice(state, list(table), num_rows))
    names = [name for name in table if name in pass_.names]
    if not names:
        return None
    if state.fired is not None:
        state.fired.add(id(grafts))
    if isinstance(pass_.rows, str):
        return _gathered(names, table, None)
    num_rows = len(pass_.lengths or ()) if pass_.flat else num_rows
    numbers = [names.index(name) if name in names else len(names) for name in pass_.row_names(num_rows)]
    device = table[names[0]][0].keys_values()[0].device
    return _gathered(names, table, torch.tensor(numbers, device=device))


def position_shifts(
    table: dict[str, int], state: State, pass_: Pass, num_rows: int, device: torch.device
) -> int | Tensor:
    """Positions by which each row is moved: one number, [B, 1], or [1, T] for a flat batch."""
    if torch.compiler.is_compiling():
        shifts = torch.tensor([*table.values(), 0], device=device)
        return shifts[_compiled_choice(state, list(table), num_rows)][:, None]
    if not isinstance(pass_.rows, tuple):
        return table.get(pass_.rows or "", 0)
    if pass_.flat:
        assert pass_.lengths is not None
        per_row = torch.tensor([table.get(name or "", 0) for name in pass_.rows], device=device)
        return per_row.repeat_interleave(torch.tensor(pass_.lengths, device=device))[None]
    return torch.tensor([table.get(name or "", 0) for name in pass_.row_names(num_rows)], device=device)[:, None]


def _compiled_choice(state: State, names: list[str], num_rows: int) -> Tensor:
    """[B] numbers into `names`; the bare base gets the number behind the last."""
    slot_B = state.slots_of_rows(num_rows)
    choice = torch.full_like(slot_B, len(names))
    for number, name in enumerate(names):
        choice = torch.where(slot_B == state.entries[name].slot, number, choice)
    return choice.long()


def _gathered(names: list[str], table: dict[str, list[AttentionAdapter]], choice: Tensor | None) -> Virtual:
    parts = [_joined(table[name]) for name in names]
    if choice is None:
        keys, values, shift = parts[0]
        visible = torch.ones(1, keys.shape[0], dtype=torch.bool, device=keys.device)
        shifts = torch.full((1,), shift, device=keys.device)
        return Virtual(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], visible, shifts, True)
    longest = max(keys.shape[0] for keys, _, _ in parts)
    parts.append((parts[0][0][:0], parts[0][1][:0], 0))
    keys_N = torch.stack([_padded(keys, longest) for keys, _, _ in parts]).transpose(1, 2)
    values_N = torch.stack([_padded(values, longest) for _, values, _ in parts]).transpose(1, 2)
    counts_N = torch.tensor([keys.shape[0] for keys, _, _ in parts], device=keys_N.device)
    visible_N = torch.arange(longest, device=keys_N.device) < counts_N[:, None]
    shifts_N = torch.tensor([shift for _, _, shift in parts], device=keys_N.device)
    return Virtual(keys_N[choice], values_N[choice], visible_N[choice], shifts_N[choice], False)


def _joined(adapters: list[AttentionAdapter]) -> tuple[Tensor, Tensor, int]:
    """The prefixes of one adapter name (a stack may hold several) as one."""
    pairs = [adapter.keys_values() for adapter in adapters]
    keys = torch.cat([keys for keys, _ in pairs]) if len(pairs) > 1 else pairs[0][0]
    values = torch.cat([values for _, values in pairs]) if len(pairs) > 1 else pairs[0][1]
    return keys, values, sum(adapter.position_shift for adapter in adapters)


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, length - x.shape[0]))
