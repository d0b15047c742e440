"""A field that takes one of several sections, or the name of one: `objective: dpo` is `objective: {kind: dpo}`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from graft.config.section import Section
from graft.errors import nearest


def named(sections: Mapping[str, type[Section]], *, optional: bool = False) -> Callable[[Any], Any]:
    """Return a validator that expands a name. It raises `ValueError` if the kind is unknown or missing. `sections` are by kind.

    optional: whether the field may be null.
    """

    def expand(value: Any) -> Any:
        if isinstance(value, Section) or (optional and value is None):
            return value
        given = value if isinstance(value, str) else value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(given, str) or given not in sections:
            near = nearest(str(given), sections) if given is not None else None
            hint = f" (did you mean '{near}'?)" if near else ""
            raise ValueError(f"must be one of {', '.join(sections)}, or a mapping whose kind is one of them{hint}")
        return {"kind": value} if isinstance(value, str) else value

    return expand
