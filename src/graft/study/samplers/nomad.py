"""NOMAD's mesh adaptive direct search (Audet and Dennis 2006; NOMAD 4), through PyNomadBBO.

NOMAD calls a black box; a study asks and tells. So each question runs NOMAD from its start with the same seed: points that are known are
answered at once, and the first points that are not are the proposals. NOMAD itself takes milliseconds, so this costs little, and a
search that was killed, or that several processes share, goes on without any state of NOMAD's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graft.errors import require
from graft.study.samplers.base import Known
from graft.study.samplers.chance import Chance
from graft.study.samplers.space import Codes, Dimension, Space

RESTARTS = 5
"""Most searches from the best point so far, once a mesh has become as fine as it may be."""
DIGITS = 9
"""Decimals to which coordinates are compared."""


class Nomad:
    """NOMAD over mixed variables: whole numbers, real numbers and their logarithms; ordered choices by index.

    Choices without an order are indices too, in the order in which they stand. Points that would not fit into memory break a
    constraint. Of several objectives it minimises the first. Proposals beyond NOMAD's own are drawn by chance.
    """

    def __init__(self, space: Space, objectives: int, seed: int) -> None:
        self.space, self.seed = space, seed
        self.nomad: Any = require("PyNomad", "search")

    def ask(self, known: Sequence[Known], count: int) -> list[Codes]:
        told = {self._key(self._point(each.codes)): each for each in known}
        found: list[list[float]] = []
        for restart in range(RESTARTS):
            self._search(known, told, found, count, restart)
            if len(found) >= count:
                break
        proposals = [self._codes(point) for point in found[:count]]
        if not proposals:
            proposals = Chance(self.space, self.seed).ask(known, count)
        return proposals

    def _search(
        self, known: Sequence[Known], told: dict[Any, Known], found: list[list[float]], count: int, restart: int
    ) -> None:
        """Let NOMAD run until it has asked for `count` points that are not known; they are added to `found`."""
        worst = max((each.values[0] for each in known if each.state == "done"), default=0.0)
        start = self._start(known, restart)

        def value(point: list[float]) -> tuple[str, bool]:
            each = told.get(self._key(point))
            if each is None:
                if self._key(point) not in {self._key(one) for one in found}:
                    found.append(point)
                return f"{worst} -1", True  # taken for the worst so far until it is known
            if each.state == "failed":
                return "", False
            said = each.values[0] if each.state == "done" else worst
            return f"{said!r} {1.0 if each.state == 'infeasible' else -1.0}", True

        def box(block: Any) -> list[bool]:
            done = []
            for at in range(block.size()):
                place = block.get_x(at)
                point = [float(place.get_coord(each)) for each in range(place.size())]
                if len(found) >= count and self._key(point) not in told:
                    done.append(False)  # enough is proposed; NOMAD is on its way out
                    continue
                said, ok = value(self._rounded(point))
                if ok:
                    place.setBBO(said.encode())
                done.append(ok)
            return done

        types = " ".join("I" if each.whole and not self._logged(each) else "R" for each in self.space.dimensions)
        lower, upper = (
            [self._scaled(each, bound) for each in self.space.dimensions for bound in (edge(each),)]
            for edge in (_low, _high)
        )
        limit = len(known) + count
        settings = [
            "BB_OUTPUT_TYPE OBJ PB", f"BB_INPUT_TYPE ({types})", f"MAX_BB_EVAL {limit}", "DISPLAY_DEGREE 0",
            # By default NOMAD takes up a seed only where it differs from that of its last run in this process; alternative seeding always
            # does, and has no seed 0.
            f"SEED {1 + self.seed + 7919 * restart}", "RNG_ALT_SEEDING true", f"BB_MAX_BLOCK_SIZE {count}",
            "DIRECTION_TYPE ORTHO 2N", "EVAL_QUEUE_SORT DIR_LAST_SUCCESS",
        ]  # fmt: skip
        if count == 1:
            self.nomad.optimize(lambda place: box(_One(place))[0], start, lower, upper, settings)
        else:
            self.nomad.optimize(box, start, lower, upper, settings)

    def _start(self, known: Sequence[Known], restart: int) -> list[float]:
        """Where NOMAD begins: at the first point of the search, or at its middle; a restart at the best point so far."""
        done = [each for each in known if each.state == "done"]
        if restart and done:
            return self._point(min(done, key=lambda each: each.values[0]).codes)
        if known:
            return self._point(known[0].codes)
        return self._rounded(
            [(self._scaled(each, each.low) + self._scaled(each, each.high)) / 2 for each in self.space.dimensions]
        )

    def _logged(self, dimension: Dimension) -> bool:
        return dimension.log

    def _scaled(self, dimension: Dimension, value: float) -> float:
        return math.log10(value) if dimension.log else float(value)

    def _point(self, codes: Codes) -> list[float]:
        return self._rounded([self._scaled(each, codes[each.key]) for each in self.space.dimensions])

    def _rounded(self, point: list[float]) -> list[float]:
        return [
            float(round(value)) if each.whole and not each.log else round(value, DIGITS)
            for each, value in zip(self.space.dimensions, point, strict=True)
        ]

    def _codes(self, point: list[float]) -> Codes:
        found: Codes = {}
        for each, value in zip(self.space.dimensions, point, strict=True):
            number = 10.0**value if each.log else value
            number = min(max(number, each.low), each.high)
            found[each.key] = round(number) if each.whole else number
        return found

    def _key(self, point: list[float]) -> tuple[float, ...]:
        """A point as it is compared: through its codes, since a whole number on a log scale stands for many coordinates."""
        codes = self._codes(point)
        return tuple(round(self._scaled(each, codes[each.key]), DIGITS - 1) for each in self.space.dimensions)


class _One:
    """A single point in the form of a block."""

    def __init__(self, place: Any) -> None:
        self.place = place

    def size(self) -> int:
        return 1

    def get_x(self, at: int) -> Any:
        return self.place


def _low(dimension: Dimension) -> float:
    return dimension.low


def _high(dimension: Dimension) -> float:
    return dimension.high
