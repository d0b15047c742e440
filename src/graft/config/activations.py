"""The field `train.activations`: what becomes of the activations that the backward pass needs, for all blocks or by range of layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator

Way = Literal["keep", "recompute", "offload"]
"""What a block does with the activations that its backward pass needs."""
OTHER_NAME = "gradient_checkpointing"
"""The name that other trainers have for `activations: recompute`, as true or false."""
_SPAN = re.compile(r"(\d+(-\d+)?|(first|last)\d+)(,(\d+(-\d+)?|(first|last)\d+))*")


def _ranges_as_text(value: Any) -> Any:
    """Let a single layer be a number: `3: recompute`. Raises `ValueError` for a range that is there twice, and for an unknown way."""
    if not isinstance(value, Mapping):
        return value
    ranges = {str(key) if type(key) is int else key: way for key, way in value.items()}
    if len(ranges) < len(value):
        raise ValueError("must name each range of layers once")
    for span, way in ranges.items():
        if way not in get_args(Way):
            raise ValueError(f"must say keep, recompute or offload of each range of layers; '{span}' has {way!r}")
    return ranges


def _are_ranges(value: Way | dict[str, Way]) -> Way | dict[str, Way]:
    if isinstance(value, str):
        return value
    if not value:
        raise ValueError("must be keep, recompute, offload, or a mapping from ranges of layers to these")
    for span in value:
        if not _SPAN.fullmatch(span):
            raise ValueError(f"must name ranges of layers such as 3, 0-15, 0,4-7, first4 or last4; '{span}' is none")
    return value


Activations = Annotated[Way | dict[str, Way], BeforeValidator(_ranges_as_text), AfterValidator(_are_ranges)]
"""One way for all blocks, or one for each range of layers; blocks in no range keep theirs."""


def by_one_name(train: Any) -> Any:
    """Return the block `train` with `gradient_checkpointing` as what it means: activations recompute (true) or keep (false).

    Raises `ValueError` where it is neither, or where it contradicts `activations`.
    """
    if not isinstance(train, Mapping) or OTHER_NAME not in train:
        return train
    given, rest = train[OTHER_NAME], {key: value for key, value in train.items() if key != OTHER_NAME}
    if not isinstance(given, bool):
        raise ValueError(f"{OTHER_NAME} must be true or false; given: {given!r}")
    if given and rest.get("activations", "recompute") != "recompute":
        raise ValueError(f"{OTHER_NAME}: true means activations: recompute, but activations is set too: remove one")
    return {"activations": "recompute" if given else "keep", **rest}
