"""The fields that a format's config may have: each is used, stands at what changes nothing, or is named in an error.

A format describes the fields of a kind as a pydantic model. Fields that a file leaves out get the format's own default.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from graft.errors import GraftError, did_you_mean

OFF = (None, False, 0, "", [], {})
"""The values of a field that say that it is not used."""


def _must_be_off(value: Any) -> Any:
    if value not in OFF:
        raise ValueError("has no equal in Graft")
    return value


Ignored = Any
"""A field that says nothing of what a trained adapter computes."""
Unused = Annotated[Any, AfterValidator(_must_be_off)]
"""A field of something that Graft lacks, which must be off."""


class Fields(BaseModel):
    """The known fields of a config. Types are not converted, and numbers are finite."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


def known(fields: type[Fields], config: Mapping[str, Any], where: str, what: str) -> dict[str, Any]:
    """Return a config with its defaults. where: the file, what: the format and kind, both for the errors.

    Raises `GraftError` that names unknown fields which are not off, fields that Graft has no equal of, and values of a wrong type.
    """
    unknown = sorted(key for key, value in config.items() if key not in fields.model_fields and value not in OFF)
    if unknown:
        said = ", ".join(f"{key}: {config[key]!r}" for key in unknown)
        classes = [cls for cls in fields.__mro__ if issubclass(cls, Fields)]
        own = [name for cls in classes for name in inspect.get_annotations(cls) if name in fields.model_fields]
        near = did_you_mean(unknown[0], own)
        names = ", ".join(dict.fromkeys(own))
        raise GraftError(f"{where}: {what} with {said} has no equal in Graft, which knows its fields {names}.{near}")
    try:
        return fields.model_validate({key: config[key] for key in fields.model_fields if key in config}).model_dump()
    except ValidationError as error:
        raise GraftError(f"{where}: " + "; ".join(_said(each, what) for each in error.errors())) from None


def _said(error: Any, what: str) -> str:
    name, given = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] == "value_error":
        return f"{what} with {name}: {given!r} has no equal in Graft"
    if error["type"] == "missing" or given is None and len(error["loc"]) == 1:
        return f"lacks the field '{name}'"
    return f"{name}: {given!r} is not allowed ({error['msg']})"
