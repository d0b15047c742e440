"""The samplers by name."""

from __future__ import annotations

from graft.study.samplers.base import Sampler
from graft.study.samplers.space import Space


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
