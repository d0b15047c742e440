"""The context of one forward pass: which adapter serves each row, where each sequence lies, and the dropout seeds.

A row is a sequence: an entry of a padded batch, or a segment of a padding-free batch, in which all tokens lie end to end in one entry.
A `ForwardContext` is immutable; `use`, `route` and the training engine replace it. Under gradient checkpointing a block keeps the one it
first ran with, so that recomputation in backward sees the same routing and draws the same dropout.

Legend: B rows, L padded length, T tokens of a padding-free batch, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.errors import GraftError
from graft.routing.seeded import kept, other_stream, stream, whole_number

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
    pass_seeds: tuple[int, ...] | None = None
    """One seed per row for what the rows of a pass draw together. It is the same for all rows of a job in a step, but for those of a second
    view of each sample."""
    mask: Tensor | None = None
    """[B, L] with 1 at real tokens, for kinds that need whole sequences."""
    cached: int = 0
    """The number of tokens of each row that earlier calls put into the cache, if the mask is recorded."""
    loss_shares: tuple[float, ...] | None = None
    """The share of each row in losses that adapters add. None: the mean over the rows at hand."""
    losses: dict[str, Tensor] | None = None
    """Where losses that the adapter adds are noted by name. None: nobody asks."""
    waiting: list[Any] | None = None
    """Losses that wait for the last hidden states (`ops/added_loss.py`). None: nobody adds them at the end."""

    def tokens(self, x: Tensor) -> list[Tensor]:
        """Return the real tokens of each row of x, [L', D] each; all positions where a padded batch does not say which they are."""
        if self.flat:
            return list(x[0].split(self.lengths or ()))
        if self.mask is None and self.lengths is None:
            return list(x)
        return [row[real] for row, real in zip(x, self._real(x), strict=True)]

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
        keep = torch.ones_like(x)
        for seed, part in self._seeded_rows(keep):
            part.copy_(kept(part, p, stream(seed, site, x.device))).div_(1.0 - p)
        return keep

    def draw(self, choices: int, site: int, per: Literal["pass", "row"] = "pass", rows: int = 1) -> tuple[int, ...]:
        """Draw a number from 0 to `choices` - 1 for each row.

        per: "row": for each row by itself. "pass": one number for all rows of a pass, whatever micro-batches it is cut into.
        With seeds, the numbers depend on the seeds and the site alone, so layout, company and recomputation change nothing. Without,
        torch's global generator draws, and `rows` says how many numbers to return.
        """
        seeds = self.pass_seeds if per == "pass" else self.seeds
        if seeds is not None:
            return tuple(whole_number(seed, site, choices) for seed in seeds)
        if per == "pass":
            return (int(torch.randint(choices, ())),) * rows
        return tuple(torch.randint(choices, (rows,)).tolist())

    def draw_by_token(self, x: Tensor, choices: int, site: int) -> Tensor:
        """Draw a number from 0 to `choices` - 1 for each token of x, [B, L, D] -> [B, L]. Padding gets 0 where there are seeds."""
        if self.seeds is None:
            return torch.randint(choices, x.shape[:2], device=x.device)
        numbers = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device)
        for seed, part in self._seeded_rows(numbers):
            # another stream than that of a dropout mask at the same site
            part.random_(0, choices, generator=other_stream(seed, site, x.device))
        return numbers

    def _seeded_rows(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """Return (seed, view of the real tokens) of each row of x, [B, L, ...] or padding-free [1, T, ...]."""
        assert self.seeds is not None
        covered = sum(self.lengths or ()) if self.flat else len(self.seeds)
        if covered != x.shape[1 if self.flat else 0]:
            raise GraftError(
                f"{len(self.seeds)} dropout seeds for {covered} {'tokens' if self.flat else 'rows'} do not fit a tensor of shape "
                f"{tuple(x.shape)}"
            )
        found, start = [], 0
        for row, seed in enumerate(self.seeds):
            length = self.lengths[row] if self.lengths is not None else x.shape[1]
            found.append((seed, x[0, start : start + length] if self.flat else x[row, :length]))
            start += length
        return found


@dataclass(frozen=True, eq=False)
class ForwardContext:
    """The context of one forward pass, for all its rows. Fields that `AdapterContext` has too mean the same here."""

    rows: str | None | tuple[str | None, ...] = None
    """The adapter that serves all rows, or a tuple with the adapter of each row. None is the bare base."""
    lengths: tuple[int, ...] | None = None
    flat: bool = False
    seeds: tuple[int, ...] | None = None
    pass_seeds: tuple[int, ...] | None = None
    """As in `AdapterContext`. Without them, all rows of an adapter have the dropout seed of its first row."""
    mask: Tensor | None = None
    cached: int = 0
    loss_shares: tuple[float, ...] | None = None
    """As in `AdapterContext`. Without them, the rows of an adapter have equal shares."""
    losses: dict[str, dict[str, Tensor]] | None = None
    """Adapter -> name -> a loss that it added in this pass."""
    adds_at_end: bool = False
    """Whether losses that wait for the last hidden states are added there."""
    cached_kv: PromptCache | None = None
    """The keys and values that the model computed in this pass for virtual tokens in the embedding."""
    cache_to_fill: PromptCache | None = None
    """Set while virtual tokens alone run through the model: attention stores their keys and values here."""
    parts: tuple[ForwardContext, ForwardContext] | None = None
    """Set where the first rows are virtual tokens: the contexts of these rows and of the others, for attention."""
    _groups: dict[Any, Any] = field(default_factory=dict, repr=False)
    """The results of `groups`, and of `stacked.blocks_of`, by the batch's size and its device."""

    def __post_init__(self) -> None:
        if self.flat and self.lengths is None:
            raise GraftError("a padding-free batch needs the length of every segment (lengths)")
        sizes = {"rows": self.rows, "lengths": self.lengths, "seeds": self.seeds, "pass seeds": self.pass_seeds}
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
        seeds, added = (self.seeds, self._shared_seeds), (self.loss_shares, *self._losses_of(self.rows))
        return AdapterContext(self.lengths, self.flat, *seeds, self.mask, self.cached, *added)

    def _losses_of(self, name: Any) -> tuple[dict[str, Tensor] | None, list[Any] | None]:
        noted = self.losses.setdefault(name, {}) if self.losses is not None and isinstance(name, str) else None
        return noted, [] if self.adds_at_end else None

    @cached_property
    def _shared_seeds(self) -> tuple[int, ...] | None:
        """The seeds of passes, one per row."""
        if self.pass_seeds is not None or self.seeds is None:
            return self.pass_seeds
        first = dict(reversed(list(zip(self.row_names(len(self.seeds)), self.seeds, strict=True))))
        return tuple(first[name] for name in self.row_names(len(self.seeds)))

    def prompt_seed(self, name: str) -> int | None:
        """Return the dropout seed of an adapter's virtual tokens. With None, dropout draws from torch's global generator."""
        if (seeds := self._shared_seeds) is None:
            return None
        return seeds[self.rows.index(name) if isinstance(self.rows, tuple) else 0]

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
            total = sum(self.lengths)
            raise GraftError(f"a padding-free batch of {total} tokens does not fit a tensor of shape {tuple(x.shape)}")
        names, groups, start = self.row_names(len(self.lengths)), [], 0
        for name, run in groupby(range(len(names)), names.__getitem__):
            rows = list(run)
            stop = start + sum(self.lengths[rows[0] : rows[-1] + 1])
            if name is not None:
                groups.append((name, slice(start, stop), self._own(name, rows, self.mask, names)))
            start = stop
        return groups

    def _padded_groups(self, x: Tensor) -> list[tuple[str, Index, AdapterContext]]:
        names = self.row_names(x.shape[0])
        groups: list[tuple[str, Index, AdapterContext]] = []
        for name in dict.fromkeys(name for name in names if name is not None):
            chosen = [row for row, other in enumerate(names) if other == name]
            contiguous = chosen == list(range(chosen[0], chosen[-1] + 1))
            index = slice(chosen[0], chosen[-1] + 1) if contiguous else torch.tensor(chosen, device=x.device)
            mask = self.mask[index] if self.mask is not None and self.mask.shape[0] == len(names) else None
            groups.append((name, index, self._own(name, chosen, mask, names)))
        return groups

    def _own(self, name: str, rows: Sequence[int], mask: Tensor | None, names: Sequence[str | None]) -> AdapterContext:
        """Return the context of an adapter for some of its rows. names: the adapters of all rows of the batch."""
        # Lengths and seeds belong to the rows of the context. Under beams, or with one adapter for all rows, they say nothing here.
        given = self.flat or isinstance(self.rows, tuple) and len(names) == len(self.rows)

        def pick(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
            return tuple(values[row] for row in rows) if given and values is not None else None

        shares = pick(self.loss_shares) or (1 / names.count(name),) * len(rows)
        seeds, added = (pick(self.seeds), pick(self._shared_seeds)), (shares, *self._losses_of(name))
        return AdapterContext(pick(self.lengths), self.flat, *seeds, mask, self.cached, *added)
