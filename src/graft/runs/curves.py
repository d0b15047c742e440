"""The losses of a run, as its metrics.jsonl has them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

Points = list[tuple[int, float]]
"""(step of the job, loss)"""

_LOSSES = ("loss", "validation_loss")


def loss_curves(metrics: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Collect the losses of the lines of metrics.jsonl: name of a curve -> its points. Losses that are not finite are left out."""
    found: dict[tuple[str, str], Points] = {}
    for line in metrics:
        for name in _LOSSES:
            loss, step = line.get(name), line.get("job_step", line.get("step"))
            if isinstance(loss, (int, float)) and math.isfinite(loss) and isinstance(step, int):
                found.setdefault((str(line.get("job", "")), name), []).append((step, float(loss)))
    several = len({job for job, _ in found}) > 1
    return {
        f"{job}: {name}" if several else name: points
        for (job, raw), points in found.items()
        for name in [raw.replace("_", " ")]
    }
