"""What every sampler has in common: it is told all that is known, and proposes points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from graft.study.samplers.space import Codes

State = Literal["done", "failed", "infeasible", "pending"]


@dataclass(frozen=True)
class Known:
    """What is known of one point. Values are to be minimised."""

    codes: Codes
    state: State
    values: tuple[float, ...] = ()
    """One value per objective, where the state is done."""


class Sampler(Protocol):
    """Proposes points. The same knowledge gives the same proposals."""

    def ask(self, known: Sequence[Known], count: int) -> list[Codes]:
        """Return at most `count` points. One that is known already is no use, but may be returned."""
        ...
