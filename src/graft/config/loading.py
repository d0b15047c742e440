"""Read a run's YAML with changes on top, write the resolved configuration back, and make the JSON schema for editors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from graft.config.document import A_JOB, Document, dotted, parse_change, read_document
from graft.config.explaining import explain
from graft.config.jobs import (
    SECTIONS,
    AnyRun,
    JobConfig,
    JobDocument,
    JobsConfig,
    check_name,
    shared_fields,
)
from graft.config.methods import METHODS
from graft.config.objectives import OBJECTIVES
from graft.config.optimizers import OPTIMIZERS
from graft.config.paths import relocate
from graft.config.run import RunConfig
from graft.errors import GraftError
from graft.utils.files import write_text_atomic


def load_run(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), started_in: Sequence[Path] = ()
) -> Any:
    """Load a run from a YAML file (or a mapping), with `key.sub=value` changes on top. Return a `JobsConfig` if it has `jobs`, else a
    `RunConfig`.

    Paths in it are relative to the working directory or, if they lead somewhere from there, to the first of the folders `started_in`.
    Raises a `GraftError` that lists every mistake with file, line and, for a wrong key, the nearest right one.
    """
    document = read_document(source)
    relocate(document.data, started_in)
    document.change(overrides)
    config = validated(document)
    _refuse_changes_without_effect(document, overrides)
    return config


def validated(document: Document) -> Any:
    """Return the run that a document holds. Raises `GraftError` as `load_run` does."""
    model = JobsConfig if "jobs" in document.data else RunConfig
    config, mistakes = None, []
    try:
        config = model.model_validate(document.data)
    except ValidationError as error:
        mistakes = explain(error, document, model)
    jobs = document.data.get("jobs")
    for name in jobs if isinstance(jobs, dict) else ():
        mistakes += _mistakes_of(document, name)
    if config is None or mistakes:
        raise GraftError("\n".join(dict.fromkeys(mistakes)))
    return config


def load_job(
    source: str | Path | Mapping[str, Any], name: str, run: AnyRun, overrides: Sequence[str] = ()
) -> JobConfig:
    """Load one job for an existing run, from a YAML of `adapter`, `data`, `train`, `eval` and `priority`, each as under `jobs`.

    Fields that it does not set come from the run. Raises `GraftError` as `load_run` does.
    """
    document = read_document(source, A_JOB)
    document.change(overrides)
    if run.base.dropout:
        raise GraftError(
            "no job can join this run, because it has base.dropout: what it drops in one job would depend on the others"
        )
    # Check the job as one of the whole run's: a document with the run's values at the top, and this file's places under jobs.NAME.
    top = run.model_dump(mode="json", exclude={"jobs"})
    whole = Document(document.name, {**top, "jobs": {name: document.data}})
    whole.places = {("jobs", name, *path): place for path, place in document.places.items()}
    mistakes = []
    try:
        check_name(name)
        job = JobConfig.model_validate(document.data)
    except ValidationError as error:
        raise GraftError("\n".join(explain(error, document, JobConfig))) from error
    except ValueError as error:
        raise GraftError(str(error)) from error
    mistakes += _mistakes_of(whole, name)
    if mistakes:
        raise GraftError("\n".join(dict.fromkeys(mistakes)).replace(f"jobs.{name}.", ""))
    return job


def _mistakes_of(whole: Document, name: str) -> list[str]:
    """Return the mistakes in one job of a document, once it is merged with the top level."""
    document = JobDocument(whole, name)
    lines = [
        f"{document.where(path)}: {document.as_typed(path)} is shared by all jobs: set {dotted(path)} at the top level"
        for path in shared_fields(document.own)
    ]
    try:
        RunConfig.model_validate(document.data)
    except ValidationError as error:
        lines += explain(error, document, RunConfig)
    return lines


def _refuse_changes_without_effect(document: Document, overrides: Sequence[str]) -> None:
    """Refuse changes at the top level of fields that every job sets itself."""
    jobs = document.data.get("jobs", {})
    for path, _, _ in map(parse_change, overrides if jobs else ()):
        field = path[:1] == ("adapter",) or (path[0] in SECTIONS and len(path) > 1)
        if field and all(JobDocument(document, name).written(path) != path for name in jobs):
            raise GraftError(
                f"'{dotted(path)}' has no effect, because every job sets its own. Change jobs.NAME.{dotted(path)} ({', '.join(jobs)})"
            )


def dump_run(config: AnyRun, path: str | Path) -> None:
    """Write all settings of a run, defaults included, as YAML. `load_run` reads it back to an equal run."""
    text = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(config.model_dump(mode="json"), text)
    write_text_atomic(path, text.getvalue())


def schema() -> dict[str, Any]:
    """Return the JSON schema of a run's YAML, with one alternative per adapter kind."""
    from graft.adapters.presets import presets
    from graft.adapters.registry import by_name_alone, kinds

    root = RunConfig.model_json_schema()
    # An adapter is the name of a kind or preset, a mapping with a kind or a preset, or a list of these.
    alternatives: list[dict[str, Any]] = [{"type": "string", "enum": [*by_name_alone(), *presets()]}]
    # The definitions that a kind needs move to the root, with the kind as a prefix; `kind` has a default but tells the alternatives apart.
    for name, kind in kinds().items():
        part = kind.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        root["$defs"].update({f"{name}.{key}": value for key, value in part.pop("$defs", {}).items()})
        part["required"] = sorted({*part.get("required", []), "kind"})
        root["$defs"][name] = part
        alternatives.append({"$ref": f"#/$defs/{name}"})
    preset = {"type": "object", "properties": {"preset": {"enum": list(presets())}}, "required": ["preset"]}
    stack = {"type": "array", "items": {"anyOf": [*alternatives, preset]}}
    root["properties"]["adapter"] |= {"anyOf": [*alternatives, preset, stack]}
    fields = root["$defs"]["TrainConfig"]["properties"]
    fields["objective"]["anyOf"].append({"enum": list(OBJECTIVES)})
    fields["optimizer"]["anyOf"].append({"enum": list(OPTIMIZERS)})
    fields["method"] = {"anyOf": [*fields["method"].pop("oneOf"), {"enum": list(METHODS)}], **fields["method"]}
    _add_jobs(root)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Graft run", **_without_one_of(root)}


def _add_jobs(root: dict[str, Any]) -> None:
    """Add `jobs`: a run needs an adapter and data, or jobs. With jobs, all fields of a section are optional, there and at the top level."""
    own = JobConfig.model_json_schema()
    # SomeDataConfig is DataConfig without required fields, and so on.
    for name, model in SECTIONS.items():
        part = {key: value for key, value in root["$defs"][model.__name__].items() if key != "required"}
        root["$defs"][f"Some{model.__name__}"] = part
        own["properties"][name] = {"$ref": f"#/$defs/Some{model.__name__}"}
        root["properties"][name] = {**root["properties"][name], "$ref": f"#/$defs/Some{model.__name__}"}
    # A job's adapter is a complete one, or a mapping without kind and preset that changes the one at the top level.
    changes = {"type": "object", "not": {"anyOf": [{"required": ["kind"]}, {"required": ["preset"]}]}}
    own["properties"]["adapter"] = {"anyOf": [*root["properties"]["adapter"]["anyOf"], changes]}
    root["$defs"]["JobConfig"] = own
    named = {"anyOf": [{"$ref": "#/$defs/JobConfig"}, {"type": "null"}]}
    root["properties"]["jobs"] = {"type": "object", "additionalProperties": named, "minProperties": 1}
    root["required"] = ["base"]
    # Without jobs, data.train is required after all, and so is the adapter unless a method is named, which may train the base.
    data = {"data": {"required": ["train"]}}
    root["anyOf"] = [
        {"required": ["jobs"]},
        {"required": ["adapter", "data"], "properties": data},
        {"required": ["train", "data"], "properties": {**data, "train": {"required": ["method"]}}},
    ]


def _without_one_of(value: Any) -> Any:
    """Replace `oneOf` by `anyOf`: 0 is both an integer and a number, so an editor would refuse it under `oneOf`."""
    if isinstance(value, dict):
        return {("anyOf" if key == "oneOf" else key): _without_one_of(item) for key, item in value.items()}
    return [_without_one_of(item) for item in value] if isinstance(value, list) else value
