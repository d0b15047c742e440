"""The rows of a run's own data on which a merged model is measured: some it was trained on, and some that it was not."""

from __future__ import annotations

from collections.abc import Sequence

from graft.bases import pad_id
from graft.bases.into_bits import IntoBits
from graft.bases.loading import Base, own_classes
from graft.bases.requantising import Target
from graft.config.run import RunConfig
from graft.data.batches import Batch, padded
from graft.data.datasets import TokenDataset
from graft.data.preparing import prepare
from graft.errors import counted
from graft.training.reading import cache_folder, room_of

CALIBRATION, HELD_OUT = 1024, 256
"""Most rows of each sort."""
ROWS = 8
"""Rows of a batch."""


def rows_of_run(config: RunConfig, base: Base, target: Target) -> IntoBits:
    """Read the run's data. Raises `GraftError` where they cannot be read any more."""
    classes = own_classes(config.base) if base.task == "classification" else None
    data = prepare(config.data, base.tokenizer, cache_folder(), classes=classes, room=lambda: room_of(config))
    rows = len(data.train)
    room = rows if data.validation is not None else max(rows - HELD_OUT, (rows + 1) // 2)
    calibration = range(min(CALIBRATION, room))
    if data.validation is not None:
        held, at = data.validation, range(min(HELD_OUT, len(data.validation)))
        said = f"{counted(len(at), 'row')} of data.validation"
    else:  # rows that the adapter was trained on, but other ones than those that choose the rounding
        held, at = data.train, range(len(calibration), min(len(calibration) + HELD_OUT, rows))
        at = at if len(at) else calibration
        said = f"{counted(len(at), 'row')} of the training data, since the run has no data.validation"
    return IntoBits(target, _batches(data.train, calibration, base), _batches(held, at, base), said)


def _batches(data: TokenDataset, numbers: Sequence[int], base: Base) -> list[Batch]:
    pad = pad_id(base.tokenizer, base.model)
    cut = [numbers[start : start + ROWS] for start in range(0, len(numbers), ROWS)]
    return [padded([data[at].sequences[0] for at in some], list(some), pad).to(base.device) for some in cut]
