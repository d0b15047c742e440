"""What every sampler has in common: it is told all that is known, and proposes points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from graft.study.samplers.space import Codes, Space

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


def sampler_of(name: str, space: Space, objectives: int, seed: int) -> Sampler:
    """Return a sampler by its name. Raises `MissingExtra` if its package is not installed."""
    if name == "random":
        from graft.study.samplers.chance import Chance

        return Chance(space, seed)
    if name == "nomad":
        from graft.study.samplers.nomad import Nomad

        return Nomad(space, objectives, seed)
    from graft.study.samplers.tpe import TPE

    return TPE(space, objectives, seed)
