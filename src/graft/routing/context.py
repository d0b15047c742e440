"""What one forward pass knows beyond its tensors: whose rows these are, where each sequence lies, and the dropout seeds.

A row is a sequence: an entry of a padded batch, or a segment of a token-flat batch (all tokens laid end to end in one entry).
A `ForwardContext` is immutable; `use`, `route` and the training engine exchange it. A checkpointed block keeps the one it first ran with,
so that recomputation in backward sees the same routing and draws the same dropout.

Legend: B rows, L padded length, T tokens of a flat batch, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from graft.errors import GraftError

Index = slice | Tensor
PromptCache = dict[nn.Module, tuple[Tensor, Tensor]]
"""Keys and values [P, K, D] of P virtual tokens for K key-value heads of size D, by who gives them to an attention module."""


@dataclass(frozen=True, eq=False)
class AdapterContext:
    """The part of a pass that one adapter sees: its own rows only."""

    lengths: tuple[int, ...] | None = None
    """Real tokens of each row, or None when the caller did not say."""
    flat: bool = False
    """Rows are segments of one batch entry (dimension 1) instead of entries (dimension 0)."""
    seeds: tuple[int, ...] | None = None
    """One dropout seed per row; None draws from torch's global generator."""
    mask: Tensor | None = None
    """[B, L] with 1 at real tokens, for kinds that read whole sequences."""

    def dropout(self, x: Tensor, p: float, site: int) -> Tensor:
        """Inverted dropout. With seeds, each row's mask depends on (seed, site) alone, never on its company or on padding.

        x: [B, L, D], or [1, T, D] when flat. Padding keeps its value; nothing reads it.
        """
        if p == 0.0:
            return x
        if self.seeds is None:
            return torch.nn.functional.dropout(x, p, training=True)
        return x * self.dropout_mask(x, p, site)

    def dropout_mask(self, x: Tensor, p: float, site: int) -> Tensor:
        """What seeded dropout multiplies x by: 0, or 1 / (1 - p). The same at every call."""
        assert self.seeds is not None
        covered = sum(self.lengths or ()) if self.flat else len(self.seeds)
        if covered != x.shape[1 if self.flat else 0]:
            raise GraftError(
                f"{len(self.seeds)} dropout seeds for {covered} {'tokens' if self.flat else 'rows'} met a tensor of shape {tuple(x.shape)}"
            )
        keep = torch.ones_like(x)
        start = 0
        for row, seed in enumerate(self.seeds):
            length = self.lengths[row] if self.lengths is not None else x.shape[1]
            part = keep[0, start : start + length] if self.flat else keep[row, :length]
            generator = torch.Generator(x.device).manual_seed(_mix(seed, site))
            part.copy_(_drawn(part, p, generator)).div_(1.0 - p)
            start += length
        return keep


def _drawn(like: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """True with probability 1 - p, to the nearest 65536th: sixteen random bits per number, a fraction of what `bernoulli_` draws."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    return (bits >= min(round(p * 2**16) - 2**15, 2**15 - 1)).view(like.shape)


def _mix(seed: int, site: int) -> int:
    """One 63-bit seed from two integers (the constants of splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + site * 0xBF58476D1CE4E5B9 + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """One forward pass. `rows` is one adapter name (or None) for all rows, or one entry per row."""

    rows: str | None | tuple[str | None, ...] = None
    lengths: tuple[int, ...] | None = None
    flat: bool = False
    seeds: tuple[int, ...] | None = None
    prompt_seeds: Mapping[str, int] | None = None
    """One dropout seed per adapter for its virtual tokens, which run once for all its rows; without it that of its first row."""
    mask: Tensor | None = None
    cached_kv: PromptCache | None = None
    """Of the virtual tokens that stand in the embedding: the keys and values that the model gave them in this pass."""
    cache_to_fill: PromptCache | None = None
    """Set while virtual tokens alone run through the model: where attention leaves their keys and values."""
    _groups: dict[tuple[int, int], list[tuple[str, Index, AdapterContext]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.flat and self.lengths is None:
            raise GraftError("a token-flat pass needs the length of every segment")
        sizes = {"rows": self.rows, "lengths": self.lengths, "seeds": self.seeds}
        counts = {name: len(value) for name, value in sizes.items() if isinstance(value, tuple)}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise GraftError(f"a pass needs one entry per row everywhere; given {said}")

    @cached_property
    def names(self) -> frozenset[str]:
        """The adapters that take part."""
        rows = self.rows if isinstance(self.rows, tuple) else (self.rows,)
        return frozenset(name for name in rows if name is not None)

    @cached_property
    def everything(self) -> AdapterContext:
        """The context of all rows together."""
        return AdapterContext(self.lengths, self.flat, self.seeds, self.mask)

    def prompt_seed(self, name: str) -> int | None:
        """What dropout on an adapter's virtual tokens is seeded by; None draws from torch's global generator."""
        if self.seeds is None:
            return None
        if self.prompt_seeds is not None and name in self.prompt_seeds:
            return self.prompt_seeds[name]
        return self.seeds[self.rows.index(name) if isinstance(self.rows, tuple) else 0]

    def row_names(self, num_rows: int) -> tuple[str | None, ...]:
        """One name per row of a batch of `num_rows`, repeated under beams. Any other size is an error."""
        if not isinstance(self.rows, tuple):
            return (self.rows,) * num_rows
        copies, rest = divmod(num_rows, len(self.rows))
        if rest or not copies:
            raise GraftError(
                f"the batch has {num_rows} rows, but the routing names {len(self.rows)}: give one adapter name or None "
                "per row (beam search may multiply the rows by a whole number)"
            )
        return tuple(name for name in self.rows for _ in range(copies))

    def groups(self, x: Tensor) -> list[tuple[str, Index, AdapterContext]]:
        """(adapter name, index of its rows, their context) for a batch x; the index is along dimension 1 when flat, else 0."""
        size = x.shape[1] if self.flat else x.shape[0]
        key = (size, x.device.index or 0)
        if key not in self._groups:
            with torch.inference_mode(False):  # the indices serve later passes too, which may train
                self._groups[key] = self._flat_groups(x) if self.flat else self._padded_groups(x)
        return self._groups[key]

    def _flat_groups(self, x: Tensor) -> list[tuple[str, Index, AdapterContext]]:
        assert self.lengths is not None
        if x.shape[0] != 1 or x.shape[1] != sum(self.lengths):
            raise GraftError(f"a token-flat pass of {sum(self.lengths)} tokens met a tensor of shape {tuple(x.shape)}")
        names, groups, start = self.row_names(len(self.lengths)), [], 0
        for first, last in _runs(names):
            stop = start + sum(self.lengths[first:last])
            if (name := names[first]) is not None:
                seeds = self.seeds[first:last] if self.seeds is not None else None
                groups.append(
                    (name, slice(start, stop), AdapterContext(self.lengths[first:last], True, seeds, self.mask))
                )
            start = stop
        return groups

    def _padded_groups(self, x: Tensor) -> list[tuple[str, Index, AdapterContext]]:
        names = self.row_names(x.shape[0])
        groups: list[tuple[str, Index, AdapterContext]] = []
        for name in dict.fromkeys(name for name in names if name is not None):
            chosen = [row for row, other in enumerate(names) if other == name]
            contiguous = chosen == list(range(chosen[0], chosen[-1] + 1))
            index = slice(chosen[0], chosen[-1] + 1) if contiguous else torch.tensor(chosen, device=x.device)
            given = isinstance(self.rows, tuple) and len(names) == len(self.rows)
            pick = (lambda values: tuple(values[row] for row in chosen)) if given else (lambda values: None)  # noqa: B023
            groups.append(
                (
                    name,
                    index,
                    AdapterContext(
                        pick(self.lengths) if self.lengths is not None else None,
                        False,
                        pick(self.seeds) if self.seeds is not None else None,
                        self.mask[index] if self.mask is not None and self.mask.shape[0] == len(names) else None,
                    ),
                )
            )
        return groups


def _runs(names: Sequence[str | None]) -> list[tuple[int, int]]:
    """Half-open runs of equal neighbours."""
    edges = [row for row in range(1, len(names)) if names[row] != names[row - 1]]
    return list(zip([0, *edges], [*edges, len(names)], strict=True)) if names else []
