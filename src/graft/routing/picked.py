"""The context of some tokens of each row, for a module that runs on these alone: the head, on supervised tokens.

The tokens lie end to end, as in a padding-free batch. What an adapter draws for a token is what it draws for it in the whole row. What it
computes from a whole row is an error, since the row is not here.

Example: a row of 5 tokens, of which the module gets numbers 1 and 3. Dropout draws for all 5 and takes these two.

Legend: R rows, T tokens at hand, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graft.errors import GraftError
from graft.routing.context import AdapterContext, ForwardContext
from graft.routing.seeded import kept, other_stream, stream


class Places(NamedTuple):
    """Which tokens of a row are here."""

    at: Tensor
    """Their numbers in the row, on the CPU."""
    length: int
    """Tokens of the whole row."""


@dataclass(frozen=True, eq=False)
class PickedContext(AdapterContext):
    """What one adapter sees: some tokens of its own rows."""

    places: tuple[Places, ...] = ()

    def tokens(self, x: Tensor) -> list[Tensor]:
        raise _no_rows()

    def mean(self, x: Tensor, over: Literal["tokens", "positions"] = "tokens") -> Tensor:
        raise _no_rows()

    def dropout_mask(self, x: Tensor, p: float, site: int) -> Tensor:
        def drawn(seed: int, whole: Tensor) -> Tensor:
            return kept(whole, p, stream(seed, site, whole.device)).to(whole.dtype).div_(1.0 - p)

        return self._drawn(x, x.shape[2:], x.dtype, drawn)

    def draw_by_token(self, x: Tensor, choices: int, site: int) -> Tensor:
        if self.seeds is None:
            return super().draw_by_token(x, choices, site)

        def drawn(seed: int, whole: Tensor) -> Tensor:
            return whole.random_(0, choices, generator=other_stream(seed, site, whole.device))

        return self._drawn(x, (), torch.long, drawn)

    def _drawn(self, x: Tensor, shape: Sequence[int], dtype: torch.dtype, draw: Any) -> Tensor:
        """Draw for each whole row, and return what belongs to the tokens at hand, [1, T, *shape]."""
        assert self.seeds is not None and len(self.seeds) == len(self.places)
        pairs = zip(self.seeds, self.places, strict=True)
        wholes = [
            (draw(seed, torch.empty(each.length, *shape, dtype=dtype, device=x.device)), each) for seed, each in pairs
        ]
        return torch.cat([whole[each.at.to(x.device)] for whole, each in wholes])[None]


@dataclass(frozen=True, eq=False)
class PickedForward(ForwardContext):
    """The context of a call on some tokens of each row: flat, with as many `lengths` as rows have tokens here."""

    places: tuple[Places, ...] = ()

    @cached_property
    def everything(self) -> AdapterContext:
        return _picked(super().everything, self.places)

    def _own(self, name: str, rows: Sequence[int], mask: Tensor | None, names: Sequence[str | None]) -> AdapterContext:
        return _picked(super()._own(name, rows, mask, names), tuple(self.places[row] for row in rows))


def _picked(context: AdapterContext, places: tuple[Places, ...]) -> PickedContext:
    return PickedContext(**{each.name: getattr(context, each.name) for each in fields(AdapterContext)}, places=places)


def _no_rows() -> GraftError:
    return GraftError("an adapter reads whole rows, and only some of their tokens are here")
