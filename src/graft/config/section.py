"""The base class of all blocks of the YAML."""

from __future__ import annotations

from graft.utils.strict import Strict


class Section(Strict):
    """One block of the YAML, with a docstring under each field."""
