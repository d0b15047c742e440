"""Every setting of a study has an effect: what is given arrives in the runs, and what cannot arrive is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from graft.config import RunConfig
from graft.config.document import Document, KeyPath, dotted, parse_change
from graft.config.study import StudyConfig
from graft.errors import GraftError, did_you_mean

NOTHING = object()


def path_of(key: str) -> KeyPath:
    """Return the path of a dotted key: (data, train, 0, weight) for data.train.0.weight."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def merged(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point with every key that lies inside another's value moved into it: adapter.rank into adapter."""
    found: dict[str, Any] = {}
    for key, value in sorted(settings.items(), key=lambda each: len(path_of(each[0]))):
        path = path_of(key)
        outer = next((each for each in found if path[: len(path_of(each))] == path_of(each)), None)
        document = Document("the point", {})
        if outer is not None:
            document.assign([(path_of(outer), deepcopy(found[outer]), "")])
        document.assign([(path, deepcopy(value), "")])
        found[outer or key] = _at(document.data, path_of(outer or key))
    return {key: found[key] for key in settings if key in found}


def check_arrived(
    document: Document, settings: Mapping[str, Any], section_of: Callable[[str], tuple[str, ...]]
) -> None:
    """Raise `GraftError` if a value of a point is not in its document: another key of the point has replaced it."""
    paths = {key: path_of(key) for key in settings}
    whole = {key: path for key, path in paths.items() if not any(_inside(each, path) for each in paths.values())}
    expected = {**{key: settings[key] for key in whole}, **merged(settings)}
    for key, value in expected.items():
        if _at(document.data, paths[key]) != value:
            rivals = [
                each
                for each in settings
                if each != key
                and paths[each][0] == paths[key][0]
                and (_inside(paths[key], paths[each]) or paths[each][-1] in ("kind", "preset"))
            ]
            by = [f"{each} is set by {'.'.join(section_of(each)) or 'the study'}" for each in (*rivals, key)]
            raise GraftError(
                f"{document.where(paths[key])}: {' and '.join(by)}: one would replace the other, so only one may be set. "
                "A mapping holds both: {kind: dora, rank: 4}"
            )


def _inside(path: KeyPath, outer: KeyPath) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def check_distinct(points: Sequence[Mapping[str, Any]], configs: Sequence[RunConfig], name: str) -> None:
    """Raise `GraftError` if two points are one run, however they are written. name: the file of the study."""
    known: dict[str, Mapping[str, Any]] = {}
    for settings, config in zip(points, configs, strict=True):
        first = known.setdefault(config.model_dump_json(), settings)
        if first is not settings:
            raise GraftError(
                f"{name}: two points are the same run, so they would be one setting counted twice: {dict(first)} "
                f"and {dict(settings)}: remove one"
            )


def check_key(text: str) -> None:
    """Raise `GraftError` for a change whose first key is neither the study's nor its run's."""
    given = str(parse_change(text)[0][0])
    own, runs = list(StudyConfig.model_fields), [*RunConfig.model_fields, *RunConfig.BESIDE]
    if given in own or given in runs:
        return
    hint = did_you_mean(given, [*own, *runs])
    if not hint:
        from graft.config.run import DataConfig, TrainConfig

        parts = {"train": TrainConfig, "data": DataConfig}
        inner = [f"{part}.{given}" for part, model in parts.items() if given in model.model_fields]
        hint = f" Did you mean '{inner[0]}'?" if inner else ""
    raise GraftError(
        f"'{text}': unknown key '{given}'.{hint} Keys of a study: {', '.join(own)}; keys of its run: {', '.join(runs)}"
    )


def check_run_changes(config: StudyConfig, changes: Sequence[str]) -> None:
    """Raise `GraftError` for changes of the run that every trial would replace."""
    space = config.search.space if config.search is not None else {}
    common = [key for key in (config.list or [{}])[0] if all(key in each for each in config.list)]
    for text in changes:
        path = parse_change(text)[0]
        if path == ("train", "seed"):
            raise GraftError(
                f"'{text}': train.seed would have no effect, because seeds sets it for every trial: give seeds=[...]"
            )
        for section, keys in (("grid", config.grid), ("zip", config.zip), ("search.space", space), ("list", common)):
            key = next((each for each in keys if path[: len(path_of(each))] == path_of(each)), None)
            if key is not None:
                raise GraftError(
                    f"'{text}': {dotted(path)} would have no effect, because {section} sets {key} for every trial"
                )


def _at(data: Any, path: KeyPath) -> Any:
    for key in path:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return NOTHING
    return data
