"""How much each varied key matters: the share of the scores' variance that lies between its values.

Each key is taken by itself, so that the shares need not add up to one: what several keys do together belongs to none of them. Numbers with
many values are put into four equally full bins. In a search, points are not spread evenly, so there the shares are a hint only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 4
MOST_VALUES = 8
"""Most different values of a key that are not put into bins."""


def importance(settings: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> dict[str, float]:
    """Return, for each key that varies, the share of variance between its values, the largest first."""
    values = np.asarray(scores, dtype=float)
    total = float(((values - values.mean()) ** 2).sum()) if len(values) else 0.0
    keys = dict.fromkeys(key for each in settings for key in each)
    found = {}
    for key in keys:
        groups = _grouped([each.get(key) for each in settings])
        if len(set(groups)) < 2 or not total:
            continue
        between = sum(
            float((own.mean() - values.mean()) ** 2) * len(own)
            for label in set(groups)
            for own in [values[[group == label for group in groups]]]
        )
        found[key] = between / total
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _grouped(values: Sequence[Any]) -> list[str]:
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > MOST_VALUES:
        edges = np.quantile(numbers, np.linspace(0, 1, BINS + 1)[1:-1])
        return [str(int(np.searchsorted(edges, value, side="right"))) for value in numbers]
    return [json.dumps(value, sort_keys=True) for value in values]
