"""The base class of all blocks of the YAML: frozen, strict, with a docstring under each field."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One block of the YAML. Unknown keys are errors, and types are not converted: "16" is not a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
