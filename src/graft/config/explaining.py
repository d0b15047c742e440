"""Turn pydantic's list of errors into helpful messages: file and line, the key as the user typed it, and what is allowed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from graft.config.document import Document, Key, KeyPath
from graft.errors import GraftError, did_you_mean
from graft.utils.strict import joined, requirement, short


def explain(error: ValidationError, document: Document, model: type[BaseModel], prefix: KeyPath = ()) -> list[str]:
    """Return one line per mistake. `prefix` is the path of the value that `model` was validated from."""
    lines: list[str] = []
    # Of a union (int | float), pydantic reports one error per member: collect the requirements of each path, to join them with "or".
    wrong: dict[KeyPath, tuple[list[str], Any]] = {}
    for item in error.errors():
        path, cause = _real_path(item, document.data, prefix), item.get("ctx", {}).get("error")
        if path[:1] == ("adapter",) and isinstance(cause, (GraftError, ValidationError)):
            lines += _explain_adapter(cause, document, path)
        elif item["type"] in ("extra_forbidden", "invalid_key"):
            lines.append(
                f"{document.where(path)}: unknown key '{document.as_typed(path)}'.{_allowed(model, path[len(prefix) :], item['loc'])}"
            )
        elif item["type"] == "missing" and isinstance(path[-1], int):
            wrong.setdefault(path[:-1], ([], item["input"]))[0].append(f"must hold a value at position {path[-1]}")
        elif item["type"] == "missing":
            lines.append(f"{document.where(path[:-1])}: missing key '{document.as_typed(path)}'{document.label}")
        elif isinstance(cause, Exception):  # raised by a validator of ours; "must ..." lacks the key and the value
            text = str(cause)
            if text.startswith("must "):
                text = f"{document.as_typed(path)} {text}; given: {short(item['input'])}"
            lines.append(f"{document.where(path)}: {text}")
        else:
            wrong.setdefault(path, ([], item["input"]))[0].append(requirement(item))
    for path, (requirements, given) in wrong.items():
        lines.append(f"{document.where(path)}: {document.as_typed(path)} {joined(requirements)}; given: {short(given)}")
    return lines


def _real_path(item: ErrorDetails, data: Any, prefix: KeyPath) -> KeyPath:
    """Return the path of an error without the tags of unions, which the user did not write: (data, train, list, 0) is data.train.0."""
    path: list[Key] = []
    loc = (*prefix, *item["loc"])
    for depth, key in enumerate(loc):
        inside = isinstance(data, Mapping) and key in data
        entry = isinstance(data, (list, tuple)) and isinstance(key, int) and key < len(data)
        if inside or entry:
            data = data[key]  # type: ignore[index]
            path.append(key)
        elif item["type"] == "missing" and depth == len(loc) - 1:
            path.append(key)
    return tuple(path)


def _allowed(model: type[BaseModel], path: KeyPath, tags: KeyPath) -> str:
    """Return the keys that are allowed beside an unknown key, with a guess at the one that was meant.

    tags: the path with the tags of unions, which tell the kind of a section that has several.
    """
    for key in path[:-1]:
        if isinstance(key, str) and key in model.model_fields:
            found = list(_models_in(model.model_fields[key]))
            meant = (each for each in found if (kind := each.model_fields.get("kind")) and kind.default in tags)
            model = next(meant, found[0] if found else model)
    names, given = [*model.model_fields, *getattr(model, "BESIDE", ())], str(path[-1])
    inner = [f"{name}.{given}" for name in names if len(path) == 1 and given in _fields_of(model, name)]
    hint = f" Did you mean {' or '.join(map(repr, inner))}?" if inner else did_you_mean(given, names)
    return f"{hint} Allowed: {', '.join(names)}"


def _fields_of(model: type[BaseModel], name: str) -> set[str]:
    """Return the keys of a block of the YAML: `lr` is a key of `train`."""
    field = model.model_fields.get(name)
    return {key for part in _models_in(field) for key in part.model_fields} if field is not None else set()


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that a field may hold."""
    if isinstance(annotation, FieldInfo):
        annotation = annotation.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _explain_adapter(cause: GraftError | ValidationError, document: Document, path: KeyPath) -> list[str]:
    """Explain an error from `graft.adapters`, which validates adapters: find the key that it complains about."""
    if lines := _explain_parts(document, path):
        return lines
    detail = cause if isinstance(cause, ValidationError) else cause.__cause__
    if isinstance(detail, ValidationError):
        from graft.adapters.registry import kinds

        model = next((kind for kind in kinds().values() if kind.__name__ == detail.title), None)
        if model is not None:
            return explain(detail, document, model, path)
    return [f"{document.where((*path, *_key_at_fault(_at(document.data, path))))}: {cause}"]


def _explain_parts(document: Document, path: KeyPath) -> list[str]:
    """Explain the mistakes in the adapters inside the one at this path: those of a stack, and what is under `of`."""
    from graft.adapters.parsing import parse

    lines: list[str] = []
    for inside, part in _parts(_at(document.data, path), path):
        try:
            parse(part)
        except GraftError as error:
            lines += _explain_adapter(error, document, inside)
    return lines


def _parts(value: Any, path: KeyPath) -> list[tuple[KeyPath, Any]]:
    """Return the adapters inside an adapter as it is written, each with its path. The folders of a fusion are none."""
    if isinstance(value, dict):
        key = "adapters" if value.get("kind") in ("stack", "fusion") else "of"
        path, value = (*path, key), value.get(key)
        if key == "of" and value is not None and (value == [] or not isinstance(value, list)):
            return [(path, value)]
    return [((*path, index), part) for index, part in enumerate(value if isinstance(value, list) else ())]


def _at(data: Any, path: KeyPath) -> Any:
    for key in path:
        data = data[key]
    return data


def _key_at_fault(value: Any) -> KeyPath:
    """Return the path, within an adapter that was refused, of the key at fault: an unknown kind, preset or field."""
    from graft.adapters.registry import kinds

    if not isinstance(value, dict):
        return ()
    kind = kinds().get(str(value.get("kind")))
    unknown = [key for key in value if kind is not None and key not in kind.model_fields]
    return next(((key,) for key in (*unknown, "preset", "kind") if key in value), ())
