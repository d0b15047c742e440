"""The Hugging Face hub when it does not answer: ask once, briefly, and then read what is cached.

The libraries would try each file six times, for half a minute, and print every attempt.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 5.0
"""How long the hub may take to answer."""


@functools.cache
def answers() -> bool:
    """Whether the hub answers. The answer is kept for this process."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # which one depends on the library that makes the request
        return False
    return True


@contextmanager
def cached_if_silent() -> Iterator[None]:
    """Let a block of code use only what is cached, at once, if the hub does not answer."""
    from huggingface_hub import constants

    if answers():
        yield
        return
    places: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value
