"""Reading a run's YAML with changes on top, writing the resolved one back, and the JSON schema for editors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from graft.config.document import read_document
from graft.config.explaining import explain
from graft.config.schema import RunConfig
from graft.errors import GraftError
from graft.files import write_text_atomic


def load_run(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file (or mapping) describes, with `key.sub=value` changes on top.

    Relative paths in it are relative to the working directory. Raises a `GraftError` that lists every mistake with
    file, line and, for a wrong key, the nearest right one.
    """
    document = read_document(source)
    document.change(overrides)
    try:
        return RunConfig.model_validate(document.data)
    except ValidationError as error:
        raise GraftError("\n".join(explain(error, document, RunConfig))) from error


def dump_run(config: RunConfig, path: str | Path) -> None:
    """Write every setting of a run, defaults included, as YAML that `load_run` reads back to an equal run."""
    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(config.model_dump(mode="json"), text)
    write_text_atomic(path, text.getvalue())


def schema() -> dict[str, Any]:
    """The JSON schema of a run's YAML, with one alternative per adapter kind."""
    from graft.adapters import kinds, presets

    root = RunConfig.model_json_schema()
    alternatives: list[dict[str, Any]] = [{"type": "string", "enum": list(presets())}]
    for name, kind in kinds().items():
        part = kind.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        root["$defs"].update({f"{name}.{key}": value for key, value in part.pop("$defs", {}).items()})
        part["required"] = sorted({*part.get("required", []), "kind"})
        root["$defs"][name] = part
        alternatives.append({"$ref": f"#/$defs/{name}"})
    preset = {"type": "object", "properties": {"preset": {"enum": list(presets())}}, "required": ["preset"]}
    stack = {"type": "array", "items": {"anyOf": [*alternatives, preset]}}
    root["properties"]["adapter"] |= {"anyOf": [*alternatives, preset, stack]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Graft run", **_without_one_of(root)}


def _without_one_of(value: Any) -> Any:
    """`anyOf` in place of `oneOf`: 0 is a whole number and a number, and an editor would refuse it as both."""
    if isinstance(value, dict):
        return {("anyOf" if key == "oneOf" else key): _without_one_of(item) for key, item in value.items()}
    return [_without_one_of(item) for item in value] if isinstance(value, list) else value
