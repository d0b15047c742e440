"""What a block of a reversible base carries: how the blocks are coupled, and which one it is.

The room `reversible` makes such bases. The site table and the fingerprint of a base only have to know that it is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from graft.architectures.walk import base_modules

Variant = Literal["meft1", "meft2", "meft3"]
STREAM = "stream"
"""The submodule of a block at which the other function of the coupling acts, and the name of this site."""
_PLACE = "graft_two_streams"


@dataclass(eq=False)
class TwoStreams:
    """How the blocks of one base are coupled. All its blocks share this object."""

    variant: Variant
    count: int
    """The number of blocks."""
    anchor_every: int | None
    """Both streams are kept before every so many blocks; None keeps those after the last block alone."""


@dataclass(frozen=True, eq=False)
class Place:
    """The place of one block in a reversible base."""

    streams: TwoStreams
    number: int

    @property
    def runs_whole_blocks(self) -> bool:
        """Whether the block is one function of the coupling, and the other function an adapter at `stream`."""
        return self.streams.variant != "meft3"


def place_of(block: nn.Module) -> Place | None:
    """Return the place of a block, None if it is not one of a reversible base."""
    return block.__dict__.get(_PLACE)


def put_in_place(block: nn.Module, place: Place) -> None:
    """Make a module a block of a reversible base."""
    block.__dict__[_PLACE] = place


def two_streams_of(model: nn.Module) -> TwoStreams | None:
    """Return how a model's blocks are coupled, None for an ordinary base."""
    found = (place_of(module) for _, module in base_modules(model))
    return next((place.streams for place in found if place is not None), None)
