"""The context of one forward pass: which adapter serves each row, where each sequence lies, and the dropout seeds.

A row is a sequence: an entry of a padded batch, or a segment of a padding-free batch, in which all tokens lie end to end in one entry.
A `ForwardContext` is immutable; `use`, `route` and the training engine replace it. Under gradient checkpointing a block keeps the one it
first ran with, so that recomputation in backward sees the same routing and draws the same dropout.

Legend: B rows, L padded length, T tokens of a padding-free batch, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from graft.errors import GraftError

Index = slice | Tensor
PromptCache = dict[nn.Module, tuple[Tensor, Tensor]]
"""Attention adapter -> keys and values [P, K, D] of P virtual tokens, for K key-value heads of size D."""


@dataclass(frozen=True, eq=False)
class AdapterContext:
    """What one adapter sees of a forward context: its own rows."""

    lengths: tuple[int, ...] | None = None
    """The number of real tokens in each row, None if the caller did not give it."""
    flat: bool = False
    """Whether the batch is padding-free: rows are segments along dimension 1 of its one entry, and not entries along dimension 0."""
    seeds: tuple[int, ...] | None = None
    """One dropout seed per row. With None, dropout draws from torch's global generator."""
    mask: Tensor | None = None
    """[B, L] with 1 at real tokens, for kinds that need whole sequences."""
    cached: int = 0
    """The number of tokens of each row that earlier calls put into the cache, if the mask is recorded."""

    def mean(self, x: Tensor, over: Literal["tokens", "positions"] = "tokens") -> Tensor:
        """Return the mean of each row of x over its tokens, [R, D] for x [R, L, D] or padding-free [1, T, D].

        over: tokens leaves padding out, wherever it is. positions counts padding too, which only a padded batch has.
        Raises `GraftError` where a row's tokens are not known, or are not all in x because earlier calls put some into a cache.
        """
        if x.dim() != 3:
            raise GraftError(f"a mean over rows needs activations [rows, length, features], not {tuple(x.shape)}")
        if self.cached:
            raise GraftError(
                f"a mean over a whole row cannot be taken in a call that continues a cache of {self.cached} tokens: run whole sequences "
                "(use_cache=False), or compute per token"
            )
        if over == "positions":
            if self.flat:
                raise GraftError(
                    "a mean over all positions, padding included, needs a padded batch, not a padding-free one"
                )
            return x.mean(1)
        if self.flat:
            assert self.lengths is not None
            return torch.stack([row.mean(0) for row in x[0].split(self.lengths)])
        real_BL1 = self._real(x)[..., None].to(x.dtype)
        return (x * real_BL1).sum(1) / real_BL1.sum(1).clamp(min=1)

    def _real(self, x: Tensor) -> Tensor:
        """Return the mask of the real tokens of x, [B, L]: that of the call or, without one, each row's first `lengths` tokens."""
        if self.mask is not None and self.mask.shape == x.shape[:2]:
            return self.mask.to(x.device) != 0
        if self.mask is None and self.lengths is not None and len(self.lengths) == x.shape[0]:
            return torch.arange(x.shape[1], device=x.device) < torch.tensor(self.lengths, device=x.device)[:, None]
        given = "none" if self.mask is None else tuple(self.mask.shape)
        raise GraftError(
            f"a mean over the real tokens of activations {tuple(x.shape)} needs an attention mask [rows, length] (given: {given}): call "
            "the whole model with one, and not a compiled one, since a graph does not know the padding; or take the mean over all positions"
        )

    def spread(self, y: Tensor, like: Tensor) -> Tensor:
        """Lay one vector per row over the row's tokens. y: [R, D] -> [R, 1, D], or [1, T, D] if `like` is padding-free, [1, T, ...]."""
        if not self.flat:
            return y[:, None]
        assert self.lengths is not None
        lengths = torch.tensor(self.lengths, device=y.device)
        return y.repeat_interleave(lengths, 0, output_size=like.shape[1])[None]

    def dropout(self, x: Tensor, p: float, site: int) -> Tensor:
        """Apply inverted dropout to x, [B, L, D] or padding-free [1, T, D].

        With seeds, the mask of a row depends on its seed and the site alone, not on the other rows or on padding. Padding keeps its value,
        since nothing reads it.
        """
        if p == 0.0:
            return x
        if self.seeds is None:
            return torch.nn.functional.dropout(x, p, training=True)
        return x * self.dropout_mask(x, p, site)

    def dropout_mask(self, x: Tensor, p: float, site: int) -> Tensor:
        """Return the mask of seeded dropout in x's shape: 0 or 1 / (1 - p) in each place. Every call gives the same."""
        assert self.seeds is not None
        covered = sum(self.lengths or ()) if self.flat else len(self.seeds)
        if covered != x.shape[1 if self.flat else 0]:
            raise GraftError(
                f"{len(self.seeds)} dropout seeds for {covered} {'tokens' if self.flat else 'rows'} do not fit a tensor of shape "
                f"{tuple(x.shape)}"
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
    """Draw True with probability 1 - p, rounded to a multiple of 1/65536: 16 random bits per element, fewer than `bernoulli_` draws."""
    # One random int64 is viewed as four int16, so 10 elements need 3 words. An int16 n is kept if n >= round(p 65536) - 32768: for p = 0.25
    # that is n >= -16384, which 3 of 4 numbers are. The bound stays within int16, so at p = 1 one number of 65536 is still kept.
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    return (bits >= min(round(p * 2**16) - 2**15, 2**15 - 1)).view(like.shape)


def _mix(seed: int, site: int) -> int:
    """Hash two integers into a 63-bit seed, with the constants of splitmix64."""
    z = (seed * 0x9E3779B97F4A7C15 + site * 0xBF58476D1CE4E5B9 + 1) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """The context of one forward pass, for all its rows. Fields that `AdapterContext` has too mean the same here."""

    rows: str | None | tuple[str | None, ...] = None
    """The adapter that serves all rows, or a tuple with the adapter of each row. None is the bare base."""
    lengths: tuple[int, ...] | None = None
    flat: bool = False
    seeds: tuple[int, ...] | None = None
    prompt_seeds: Mapping[str, int] | None = None
    """Adapter -> dropout seed of its virtual tokens, which run once for all its rows. Without one, it is the seed of its first row."""
    mask: Tensor | None = None
    cached: int = 0
    cached_kv: PromptCache | None = None
    """The keys and values that the model computed in this pass for virtual tokens in the embedding."""
    cache_to_fill: PromptCache | None = None
    """Set while virtual tokens alone run through the model: attention stores their keys and values here."""
    _groups: dict[tuple[int, int], list[tuple[str, Index, AdapterContext]]] = field(default_factory=dict, repr=False)
    """The results of `groups`, by the batch's size and its device."""

    def __post_init__(self) -> None:
        if self.flat and self.lengths is None:
            raise GraftError("a padding-free batch needs the length of every segment (lengths)")
        sizes = {"rows": self.rows, "lengths": self.lengths, "seeds": self.seeds}
        counts = {name: len(value) for name, value in sizes.items() if isinstance(value, tuple)}
        if len(set(counts.values())) > 1:
            said = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise GraftError(f"a forward context needs one entry per row in each field; given {said}")

    @cached_property
    def names(self) -> frozenset[str]:
        """The adapters that serve at least one row."""
        rows = self.rows if isinstance(self.rows, tuple) else (self.rows,)
        return frozenset(name for name in rows if name is not None)

    @cached_property
    def everything(self) -> AdapterContext:
        """The context of an adapter that serves all rows."""
        return AdapterContext(self.lengths, self.flat, self.seeds, self.mask, self.cached)

    def prompt_seed(self, name: str) -> int | None:
        """Return the dropout seed of an adapter's virtual tokens. With None, dropout draws from torch's global generator."""
        if self.seeds is None:
            return None
        if self.prompt_seeds is not None and name in self.prompt_seeds:
            return self.prompt_seeds[name]
        return self.seeds[self.rows.index(name) if isinstance(self.rows, tuple) else 0]

    def row_names(self, num_rows: int) -> tuple[str | None, ...]:
        """Return the adapter of each row of a batch. Raises `GraftError` if the number of rows does not fit.

        Beam search repeats rows: with rows ("a", "b"), a batch of 4 rows has ("a", "a", "b", "b").
        """
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
        """Return (adapter, index, context) for each group of rows of a batch x, [B, ...] or padding-free [1, T, ...].

        Rows of the bare base are in no group.
        Padded: the index is along dimension 0, and an adapter has one group. Rows ("a", None, "b", "a") give a: tensor [0, 3] and
        b: slice(2, 3).
        Padding-free: the index is along dimension 1, and neighbours with one adapter are a group. The same rows with lengths
        (2, 1, 3, 2) give a: slice(0, 2), b: slice(3, 6) and again a: slice(6, 8).
        """
        size = x.shape[1] if self.flat else x.shape[0]
        key = (size, x.device.index or 0)
        if key not in self._groups:
            with torch.inference_mode(False):  # later passes use the indices too, and may train
                self._groups[key] = self._flat_groups(x) if self.flat else self._padded_groups(x)
        return self._groups[key]

    def _flat_groups(self, x: Tensor) -> list[tuple[str, Index, AdapterContext]]:
        assert self.lengths is not None
        if x.shape[0] != 1 or x.shape[1] != sum(self.lengths):
            raise GraftError(
                f"a padding-free batch of {sum(self.lengths)} tokens does not fit a tensor of shape {tuple(x.shape)}"
            )
        names, groups, start = self.row_names(len(self.lengths)), [], 0
        for first, last in _runs(names):
            stop = start + sum(self.lengths[first:last])
            if (name := names[first]) is not None:
                seeds = self.seeds[first:last] if self.seeds is not None else None
                own = AdapterContext(self.lengths[first:last], True, seeds, self.mask, self.cached)
                groups.append((name, slice(start, stop), own))
            start = stop
        return groups

    def _padded_groups(self, x: Tensor) -> list[tuple[str, Index, AdapterContext]]:
        names = self.row_names(x.shape[0])
        groups: list[tuple[str, Index, AdapterContext]] = []
        for name in dict.fromkeys(name for name in names if name is not None):
            chosen = [row for row, other in enumerate(names) if other == name]
            contiguous = chosen == list(range(chosen[0], chosen[-1] + 1))
            index = slice(chosen[0], chosen[-1] + 1) if contiguous else torch.tensor(chosen, device=x.device)
            # Lengths and seeds belong to the rows of the context. Under beams, or with one adapter for all rows, they say nothing here.
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
                        self.cached,
                    ),
                )
            )
        return groups


def _runs(names: Sequence[str | None]) -> list[tuple[int, int]]:
    """Return (first, last + 1) of each run of equal neighbours: a, a, b, a gives (0, 2), (2, 3), (3, 4)."""
    edges = [row for row in range(1, len(names)) if names[row] != names[row - 1]]
    return list(zip([0, *edges], [*edges, len(names)], strict=True)) if names else []
