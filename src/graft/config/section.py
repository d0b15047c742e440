"""The base class of all blocks of the YAML, and the names of files, folders and hub repositories in them."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, Field

from graft.utils.strict import Strict


class Section(Strict):
    """One block of the YAML, with a docstring under each field."""


def _possible_place(value: str) -> str:
    """Raise `ValueError` for text that no file system takes as a path."""
    try:
        parts = os.fsencode(value).split(b"/")
    except UnicodeEncodeError:
        raise ValueError("must be text that can be encoded as UTF-8") from None
    if "\0" in value:
        raise ValueError("must be a name or path without null characters")
    if max(map(len, parts)) > 255 or len(value) > 4000:
        raise ValueError("must be a name or path of at most 4,000 characters, and 255 between slashes")
    return value


Place = Annotated[str, Field(min_length=1), AfterValidator(_possible_place)]
"""A file, a folder, or a name on the hub."""
