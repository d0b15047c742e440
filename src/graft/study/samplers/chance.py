"""Points by chance: each dimension is drawn by itself, numbers with `log` by their logarithm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from graft.study.samplers.base import Known
from graft.study.samplers.space import Codes, Dimension, Space


class Chance:
    """Random search. Draw n of a search depends on its seed and n alone, so that it goes on where it was."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space, self.seed = space, seed

    def ask(self, known: Sequence[Known], count: int) -> list[Codes]:
        seen = {tuple(sorted(each.codes.items())) for each in known}
        found: list[Codes] = []
        at = 0
        # Points that were drawn before are skipped; in a small space none may be left.
        while len(found) < count and at < len(known) + 100 * count:
            generator = np.random.default_rng((self.seed, at))
            codes = {each.key: _draw(each, generator) for each in self.space.dimensions}
            at += 1
            if (key := tuple(sorted(codes.items()))) not in seen:
                seen.add(key)
                found.append(codes)
        return found


def _draw(dimension: Dimension, generator: np.random.Generator) -> int | float:
    low, high = dimension.low, dimension.high
    if dimension.whole and not dimension.log:
        return int(generator.integers(int(low), int(high) + 1))
    if dimension.log:
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
        return min(max(round(value), int(low)), int(high)) if dimension.whole else min(max(value, low), high)
    return float(generator.uniform(low, high))
