"""The points of a study that names them (grid, zip, list), and what has to be right before the first trial."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from graft.config import RunConfig
from graft.errors import GraftError, counted, did_you_mean
from graft.study.definition import Settings, Study
from graft.study.effect import check_distinct, merged
from graft.study.samplers.space import Space

MINIMISED = ("validation_loss", "test_loss", "loss", "parameters", "tokens", "seconds")
MAXIMISED = ("validation_accuracy", "test_accuracy", "answer_accuracy", "validation_margin")
PROBED = 256
"""Most corners of a space that are tried."""


def points_of(study: Study) -> list[dict[str, Any]]:
    """Return the points of grid, zip and list: every variant with every row of zip and every combination of grid."""
    config = study.config
    variants = config.list or [{}]
    rows = [dict(zip(config.zip, row, strict=True)) for row in zip(*config.zip.values(), strict=True)] or [{}]
    grid = [dict(zip(config.grid, row, strict=True)) for row in product(*config.grid.values())]
    found: list[dict[str, Any]] = []
    for variant, row, combination in product(variants, rows, grid):
        settings = {**variant, **row, **combination}
        if len(settings) < len(variant) + len(row) + len(combination):
            twice = next(key for key in settings if sum(key in each for each in (variant, row, combination)) > 1)
            raise GraftError(f"{study.place_of(twice)}: {twice} is set twice, in two of list, zip and grid: remove one")
        if settings in found:
            raise GraftError(f"{study.document.name}: the same point stands there twice: {in_words(settings)}")
        found.append(settings)
    if config.budget is not None and config.budget < len(found):
        where = study.document.where(("budget",))
        raise GraftError(
            f"{where}: budget is {config.budget}, but grid, zip and list make {counted(len(found), 'point')}: raise it, or search instead"
        )
    return found


def check(study: Study) -> list[RunConfig]:
    """Check that every point is a run, or every corner of the space, and that the objectives exist. Returns the runs."""
    search = study.config.search
    points = points_of(study) if search is None else list(_corners(study, Space.of(search)))
    configs, mistakes = [], []
    for settings in points:
        try:
            configs.append(study.config_of(settings, study.config.seeds[0]))
        except GraftError as error:
            mistakes += str(error).splitlines()
    if mistakes:
        raise GraftError("\n".join(dict.fromkeys(mistakes)))
    if search is None:
        check_distinct(points, configs, study.document.name)
    for name in objectives(study):
        _check_objective(study, name, configs)
    for name in ("test", "unrelated"):
        file = getattr(study.config, name)
        if file is not None and Path(file).suffix and not Path(file).expanduser().exists():
            raise GraftError(f"{study.document.where((name,))}: there is no file {file}, which {name} names")
    if study.config.tune:
        _check_objective(study, study.config.tune_by, configs)
    if study.config.pruner.kind != "none" and any(not config.data.validation for config in configs):
        raise GraftError(
            f"{study.document.where(('pruner',))}: pruner {study.config.pruner.kind} compares validation losses: set data.validation"
        )
    return configs


def _corners(study: Study, space: Space) -> Iterator[dict[str, Any]]:
    """Points at the bounds of a space: every choice and bound once, then combinations of them, and the points to start from."""
    assert study.config.search is not None
    ends = space.ends()
    first = {key: values[0] for key, values in ends.items()}
    for key, values in ends.items():
        for value in values:
            yield space.settings({**first, key: value})
    for number, combination in enumerate(product(*({values[0], values[-1]} for values in ends.values()))):
        if number == PROBED:
            break
        yield space.settings(dict(zip(ends, combination, strict=True)))
    for start in study.config.search.start:
        yield space.settings(space.encoded(start, study.document.where(("search", "start"))))


def objectives(study: Study) -> list[str]:
    """Return the names of the objectives; the first one ranks."""
    given = study.config.objective
    return [given] if isinstance(given, str) else list(given)


def is_better_high(name: str) -> bool:
    """Whether more of an objective is better."""
    return name not in MINIMISED


def _check_objective(study: Study, name: str, configs: list[RunConfig]) -> None:
    """Raise `GraftError` for an objective that no trial produces, or not all of them."""
    where = study.document.where(("objective",))
    benchmarks = list(dict.fromkeys(task for config in configs for task in config.eval.tasks))
    known = [*MINIMISED, *MAXIMISED, *benchmarks]
    if name not in known:
        raise GraftError(
            f"{where}: no trial produces '{name}'.{did_you_mean(name, known)} There are: {', '.join(known)}"
        )
    lacking = None
    if name.startswith("validation_") and any(not config.data.validation for config in configs):
        lacking = "data.validation is not set"
    elif name == "validation_accuracy" and any(
        config.data.task not in ("classification", "preference") for config in configs
    ):
        lacking = "data.task has no classes: use answer_accuracy, with train.answers, or test_accuracy"
    elif name == "validation_margin" and any(config.data.task != "preference" for config in configs):
        lacking = "data.task is not preference"
    elif name == "answer_accuracy" and any(not config.train.answers for config in configs):
        lacking = "train.answers is not set: the number of validation samples that are answered while training"
    elif name.startswith("test_") and study.config.test is None:
        lacking = "test is not set: a file of rows that no trial trains on"
    elif name in benchmarks and any(name not in config.eval.tasks for config in configs):
        lacking = "not every trial has it in eval.tasks"
    if lacking is not None:
        raise GraftError(f"{where}: no trial produces '{name}', since {lacking}")


def in_words(settings: Settings) -> str:
    """Name a point in a few words: "lora rank 8, lr 0.001"."""
    return ", ".join(_said(key, value) for key, value in merged(settings).items()) or "as the run says"


def _said(key: str, value: Any) -> str:
    if isinstance(value, dict):
        head = str(value.get("kind", value.get("preset", "")))
        own = [f"{name} {inner}" for name, inner in value.items() if name not in ("kind", "preset")]
        return " ".join([head or key, *own])
    if key == "train.init_from":
        return f"from {Path(str(value)).name}"
    name = key.rsplit(".", 1)[-1]
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return shown if name in ("kind", "preset", "adapter") else f"{name} {shown}"
