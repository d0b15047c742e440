"""Read a study: its YAML with changes on top, its base run, and the run that each point stands for.

A change on the command line belongs to the study if its first key is one of a study's (`seeds=[0]`, `search.budget=20`), else to the base
run (`base.model=...`, `train.steps=50`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from graft.config import RunConfig
from graft.config.document import Document, dotted, parse_change, read_document
from graft.config.explaining import explain
from graft.config.loading import validated
from graft.config.study import StudyConfig
from graft.errors import GraftError, did_you_mean
from graft.study.effect import check_arrived, check_key, check_run_changes, path_of

Settings = Mapping[str, Any]
"""A point: dotted keys of the run with their values."""
A_STUDY = "a study must be a mapping with run, and with grid, zip, list or search"
PRESETS = Path(__file__).parent / "presets"
DOTTED = (("grid",), ("zip",), ("search", "space"))
"""Where a study has dotted keys: what follows these on the command line is one key."""


@dataclass(frozen=True)
class Study:
    """A study as it was given."""

    name: str
    config: StudyConfig
    document: Document
    base: Document
    """The base run, with the place of each value."""

    def config_of(self, settings: Settings, seed: int | None = None) -> RunConfig:
        """Return the run that a trial is. Raises `GraftError`, with file and line, for settings that no run may have."""
        document = Document(self.base.name, deepcopy(self.base.data), dict(self.base.places))
        changes = [(path_of(key), deepcopy(value), unquoted(self.place_of(key))) for key, value in settings.items()]
        if seed is not None:
            changes.append((("train", "seed"), seed, unquoted(self.document.where(("seeds",)))))
        document.assign(sorted(changes, key=lambda change: len(change[0])))
        check_arrived(document, settings, self.section_of)
        return validated(document)

    def place_of(self, key: str) -> str:
        """Return where the study names a key: "study.yaml:7"."""
        section = self.section_of(key)
        if section == ("list",):
            section = ("list", next(at for at, each in enumerate(self.config.list) if key in each))
        return self.document.where((*section, key) if section else ())

    def section_of(self, key: str) -> tuple[str, ...]:
        """Return the section that varies a key: ("search", "space"); () if none does."""
        config = self.config
        space = config.search.space if config.search is not None else {}
        held = {("grid",): config.grid, ("zip",): config.zip, ("search", "space"): space}
        found = next((section for section, keys in held.items() if key in keys), None)
        return found or (("list",) if any(key in each for each in config.list) else ())

    def dump(self) -> dict[str, Any]:
        """Return everything that the results depend on, as JSON values: by this a study is known."""
        return {"study": json.loads(self.config.model_dump_json(exclude={"run"})), "run": self.base.data}


def read_study(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> Study:
    """Read a study from a YAML file, the name of a preset, or a mapping. Raises a `GraftError` that lists every mistake."""
    found = source if isinstance(source, Mapping) else _file_of(Path(source))
    document = read_document(found, A_STUDY)
    own, run_changes = [], []
    for text in changes:
        check_key(text)
        if parse_change(text)[0][0] in StudyConfig.model_fields:
            own.append(_joined(text))
        else:
            run_changes.append(text)
    document.assign(own)
    try:
        config = StudyConfig.model_validate(document.data)
    except ValidationError as error:
        raise GraftError("\n".join(explain(error, document, StudyConfig))) from error
    base = _base_of(config, document)
    check_run_changes(config, run_changes)
    base.change(run_changes)
    name = "study" if isinstance(source, Mapping) else Path(source).stem
    study = Study(name, config, document, base)
    _check_keys(study)
    return study


def presets() -> list[str]:
    """Return the names of the studies that come with Graft."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _file_of(path: Path) -> Path:
    if path.exists():
        return path
    preset = PRESETS / f"{path.stem}.yaml"
    if str(path.parent) in (".", "studies") and preset.is_file():
        return preset
    raise GraftError(
        f"there is no study {path}.{did_you_mean(path.stem, presets())} Graft's own: {', '.join(presets())}"
    )


def _joined(text: str) -> tuple[tuple[Any, ...], Any, str]:
    """Parse a change of the study. What follows `grid` is one dotted key, as in grid.train.lr=[1e-3]."""
    path, value, _ = parse_change(text)
    for section in DOTTED:
        if path[: len(section)] == section and len(path) > len(section):
            return (*section, dotted(path[len(section) :])), value, text
    return path, value, text


def _base_of(config: StudyConfig, document: Document) -> Document:
    """Return the base run. One that is named is looked for from the working directory, then beside the study."""
    if isinstance(config.run, dict):
        places = {path[1:]: place for path, place in document.places.items() if path[:1] == ("run",) and len(path) > 1}
        base = Document(document.name, deepcopy(config.run), places)
    else:
        path = Path(config.run).expanduser()
        beside = Path(document.name).parent / path
        base = read_document(beside if not path.exists() and beside.exists() else path)
    if "jobs" in base.data:
        raise GraftError(
            f"{base.where(('jobs',))}: a study makes the jobs itself, so its run has no key 'jobs': give each variant under list"
        )
    return base


def unquoted(place: str) -> str:
    """Return the text of a place that is a change: a document puts it into quotes again."""
    return place[1:-1] if len(place) > 1 and place[0] == place[-1] == "'" else place


def _check_keys(study: Study) -> None:
    """Raise `GraftError` for keys that a study may not vary, and for those of `tune` that it does not vary."""
    config = study.config
    space = config.search.space if config.search is not None else {}
    varied = list(dict.fromkeys([*config.grid, *config.zip, *space, *(key for each in config.list for key in each)]))
    for key in varied:
        if key == "train.seed":
            raise GraftError(f"{study.place_of(key)}: the seeds of a study stand under seeds, not under {key}")
        if key.split(".")[0] in ("scheduler", "jobs"):
            raise GraftError(
                f"{study.place_of(key)}: {key} cannot differ between trials: the study schedules them itself"
            )
    for key in config.tune:
        if key not in varied:
            where = study.document.where(("tune",))
            raise GraftError(
                f"{where}: tune names {key}, which no trial varies.{did_you_mean(key, varied)} Varied: {', '.join(varied)}"
            )
    if config.search is not None:
        for key, dimension in space.items():
            if dimension.times is not None and (dimension.times not in space or dimension.times == key):
                place = study.place_of(key)
                raise GraftError(
                    f"{place}: times of {key} must name another key of the space; given: {dimension.times}"
                )
        if config.tune:
            raise GraftError(
                f"{study.document.where(('tune',))}: tune is for grid, zip and list: a search chooses every key itself"
            )
