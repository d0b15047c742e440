"""The space of a search: its dimensions, and how points are written in numbers.

A point is kept in codes: a choice as its index, a number as itself. `settings` turns codes into values of the run's keys. A list of numbers
in rising order is ordered, so that a sampler may take neighbours for similar; other choices are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graft.config.study import RangeConfig, SearchConfig
from graft.errors import GraftError

Codes = dict[str, int | float]
"""Key -> index of its choice, or its number."""


@dataclass(frozen=True)
class Dimension:
    """One key of the space. It has choices, or numbers from low to high."""

    key: str
    choices: tuple[Any, ...] = ()
    low: int | float = 0
    high: int | float = 0
    log: bool = False
    times: str | None = None

    @classmethod
    def of(cls, key: str, config: RangeConfig) -> Dimension:
        if config.values is not None:
            return cls(key, tuple(config.values), 0, len(config.values) - 1, times=config.times)
        assert config.low is not None and config.high is not None
        return cls(key, (), config.low, config.high, config.log)

    @property
    def whole(self) -> bool:
        """Whether its codes are whole numbers."""
        return bool(self.choices) or (isinstance(self.low, int) and isinstance(self.high, int))

    @property
    def ordered(self) -> bool:
        """Whether neighbouring codes mean similar values."""
        numbers = [each for each in self.choices if isinstance(each, int | float) and not isinstance(each, bool)]
        return len(numbers) == len(self.choices) and numbers == sorted(numbers)

    def ends(self) -> list[int | float]:
        """Return the codes at its bounds; all of them if it has choices."""
        return list(range(len(self.choices))) if self.choices else [self.low, self.high]


@dataclass(frozen=True)
class Space:
    """The dimensions of a search."""

    dimensions: tuple[Dimension, ...]

    @classmethod
    def of(cls, config: SearchConfig) -> Space:
        return cls(tuple(Dimension.of(key, each) for key, each in config.space.items()))

    def ends(self) -> dict[str, list[int | float]]:
        """Return, for each key, the codes at its bounds."""
        return {each.key: each.ends() for each in self.dimensions}

    def settings(self, codes: Mapping[str, int | float]) -> dict[str, Any]:
        """Return the values of the run's keys at a point."""
        found: dict[str, Any] = {}
        for each in self.dimensions:
            code = codes[each.key]
            found[each.key] = each.choices[int(code)] if each.choices else code
        for each in self.dimensions:
            if each.times is not None:
                product = found[each.times] * found[each.key]
                found[each.key] = int(product) if float(product).is_integer() else product
        return found

    def encoded(self, settings: Mapping[str, Any], where: str) -> Codes:
        """Return the codes of a point that the user gave. A key with `times` is given as its multiple. Raises `GraftError`."""
        missing = [each.key for each in self.dimensions if each.key not in settings]
        unknown = [key for key in settings if key not in {each.key for each in self.dimensions}]
        if missing or unknown:
            said = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}, which the space has not"
            raise GraftError(f"{where}: a point of search.start {said}")
        found: Codes = {}
        for each in self.dimensions:
            value = settings[each.key]
            if each.choices:
                if value not in each.choices:
                    raise GraftError(
                        f"{where}: {each.key} of search.start is {value!r}, which is not among {list(each.choices)}"
                    )
                found[each.key] = each.choices.index(value)
            else:
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if not number or not each.low <= value <= each.high:
                    raise GraftError(
                        f"{where}: {each.key} of search.start must be a number from {each.low} to {each.high}; given: {value!r}"
                    )
                found[each.key] = value
        return found

    def size(self) -> float:
        """Return the number of points; infinite where a dimension has real numbers."""
        return math.prod((each.high - each.low + 1) if each.whole else math.inf for each in self.dimensions)
