"""Who is measured, asked or merged: a base and the adapters on it, each with the template that it was trained with.

The template comes from the adapter's folder. Another one is taken only where the user names it: prompts that differ from
those of the training are the commonest cause of bad answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graft.bases import Base, load_base, own_classes, own_task
from graft.bases.heads import brings_head
from graft.config.base import BaseConfig
from graft.config.run import RunConfig
from graft.data.label_template import LabelTemplate
from graft.data.labelling import FILE as TASK_FILE
from graft.data.labelling import LABELLED, Labelling, load_labelling, saved_task
from graft.data.sequences import Source
from graft.data.template import FILE, Template
from graft.data.templates import template_of
from graft.errors import GraftError
from graft.formats.loading import load
from graft.generation.engines import Engine, LocalEngine
from graft.injection.state import state_of
from graft.runs.folder import RunFolder

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Candidate:
    """The bare base, or one adapter on it."""

    name: str
    """What tables call it."""
    adapter: str | None
    """The name it is attached under; None is the bare base."""
    template: Template
    folder: Path | None = None
    digest: str | None = None
    """Of the adapter's weights file."""
    settings: Mapping[str, Any] | None = None
    """The adapter's configuration: its kind, its sites, its fields."""
    trained: RunConfig | None = None
    """The run that the adapter comes from, where its folder lies in one."""


@dataclass(frozen=True)
class LoadedModel:
    """A base with its adapters attached."""

    base: Base
    candidates: tuple[Candidate, ...]
    """The bare base first, but for one whose head is fresh."""
    config: RunConfig | None = None
    """Of the run, where there is one."""
    engine: Engine | None = None
    """What makes answers; None is Graft's own generation."""

    jobs: Mapping[str, RunConfig] = field(default_factory=dict)
    """Of a run of several jobs: each as the run that it would be alone."""

    def apart(self, key: Callable[[RunConfig], Any]) -> list[LoadedModel]:
        """A bench for the jobs that have the same key, with the base and whoever is of no job in each; this one where all have."""
        kinds: list[Any] = []
        for own in (key(own) for own in self.jobs.values()):
            kinds += [] if own in kinds else [own]
        found = []
        for kind in kinds:
            own = {name: config for name, config in self.jobs.items() if key(config) == kind}
            there = tuple(each for each in self.candidates if each.name in own or each.name not in self.jobs)
            found.append(replace(self, candidates=there, config=next(iter(own.values())), jobs=own))
        return found or [self]

    @property
    def answering(self) -> Engine:
        """The engine, or Graft's own."""
        return self.engine or LocalEngine(self.base.model)

    @property
    def adapters(self) -> tuple[Candidate, ...]:
        """All but the bare base."""
        return tuple(each for each in self.candidates if each.adapter is not None)

    def find(self, name: str) -> Candidate:
        """By name. Raises `GraftError` with the names that there are."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise GraftError(f"there is no '{name}' here; there is {', '.join(each.name for each in self.candidates)}")


def load_candidates(
    run: str | Path | RunFolder | None = None,
    base: BaseConfig | None = None,
    adapters: Sequence[str] = (),
    template: str | None = None,
    *,
    any_base: bool = False,
) -> LoadedModel:
    """Load a base and its adapters: those of a run, and those in the folders named.

    base: in place of the run's own (and needed without a run). adapters: "FOLDER" or "NAME=FOLDER", where a folder is an
    adapter's or a run's. template: for all, in place of the saved ones.
    Raises `GraftError` for what cannot be read, for an adapter of another base, and for two adapters of one name.
    """
    folder = None if run is None else (run if isinstance(run, RunFolder) else RunFolder(run)).existing()
    jobs = folder.jobs() if folder is not None else {}
    config = next(iter(jobs.values()), None)
    if base is None and config is None:
        raise GraftError("name a run folder, or a base with --base")
    found = [*(_of_run(folder) if folder is not None else []), *(pair for text in adapters for pair in _named(text))]
    _check_names([name for name, _ in found])
    loaded = _base_for(base or config.base, [path for _, path in found])  # pyright: ignore[reportOptionalMemberAccess]
    for name, path in found:
        load(loaded.model, path, name=name, any_base=any_base)
    chosen = _named_template(template, loaded) if template is not None else None
    templates = [chosen or _template(path, config, loaded) for _, path in found]
    of_base = chosen or (templates[0] if templates else _run_template(config, loaded))
    candidates = (
        [Candidate("base", None, of_base)] if not loaded.fresh else []
    )  # a fresh head is noise without its adapter
    candidates += [
        Candidate(name, name, its, path, _digest(path), _settings(loaded, name), _trained_by(path))
        for (name, path), its in zip(found, templates, strict=True)
    ]
    if not candidates:
        raise GraftError(
            f"{loaded.name} has no head for {loaded.task}: name an adapter that brings one with --adapter FOLDER"
        )
    return LoadedModel(loaded, tuple(candidates), config, jobs=jobs if len(jobs) > 1 else {})


def _base_for(base: BaseConfig, folders: Sequence[Path]) -> Base:
    """The base with the head that the adapters were trained with; without adapters, its own."""
    tasks = {saved_task(folder) or "causal": folder for folder in folders}
    if len(tasks) > 1:
        said = "; ".join(f"{task} in {folder}" for task, folder in tasks.items())
        raise GraftError(f"adapters of different tasks do not share a base: {said}")
    task = next(iter(tasks), None) or own_task(base)
    if task != "classification":
        return load_base(base, task)
    classes = {load_labelling(folder).names: folder for folder in folders} or {own_classes(base) or (): None}
    if len({len(names) for names in classes}) > 1:
        raise GraftError("adapters with different numbers of classes do not share a base: evaluate them one at a time")
    names, own = next(iter(classes)), own_classes(base)
    if folders and own is not None and len(own) != len(names) and all(brings_head(folder) for folder in folders):
        base = base.model_copy(update={"head": "fresh"})
    return load_base(base, task, names)


def _named_template(name: str, base: Base) -> Template:
    """The template that the user wants in place of the saved ones."""
    if base.task in LABELLED:
        raise GraftError(f"a template has no effect for {base.task}: texts are read as they are")
    template = template_of(name, base.tokenizer)
    return Source.of(template) if base.task == "seq2seq" else template


def _of_run(folder: RunFolder) -> list[tuple[str, Path]]:
    names = folder.adapters()
    if not names:
        state = folder.read_status().get("state", "not started")
        raise GraftError(f"the run in {folder.path} has no adapter yet (it is {state}): graft resume {folder.path}")
    return [(name, folder.adapter_dir(name)) for name in names]


def _named(text: str) -> list[tuple[str, Path]]:
    """The adapters that one --adapter means."""
    name, given, rest = text.partition("=")
    path = Path(rest if given and not Path(text).exists() else text)
    own = name if str(path) != text else None
    if (path / "config.yaml").is_file() and not (path / "adapter_config.json").is_file():
        inside = _of_run(RunFolder(path))
        if own is not None and len(inside) > 1:
            raise GraftError(
                f"{path} holds several adapters ({', '.join(each for each, _ in inside)}): name one's folder"
            )
        label = own or path.resolve().name
        return [(label if len(inside) == 1 else f"{label}-{each}", folder) for each, folder in inside]
    return [(own or re.sub(r"[^A-Za-z0-9_\-]", "-", path.resolve().name), path)]


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise GraftError(f"two adapters are called '{twice}': give them names, as in --adapter first=FOLDER")
    if "base" in names:
        raise GraftError("'base' is the bare base: give the adapter another name, as in --adapter NAME=FOLDER")


def _template(folder: Path, config: RunConfig | None, base: Base) -> Template:
    """The adapter's own; for an adapter of other software, that of the run it is looked at in, else the automatic choice."""
    if base.task in LABELLED:
        return LabelTemplate.of(load_labelling(folder))
    if base.task == "seq2seq":
        return Source.of(template_of(folder, base.tokenizer))
    return template_of(folder, base.tokenizer) if (folder / FILE).is_file() else _run_template(config, base)


def _run_template(config: RunConfig | None, base: Base) -> Template:
    own = Path(base.name)
    if base.task in LABELLED:
        merged = (own / TASK_FILE).is_file()
        names = tuple(base.model.config.id2label[number] for number in range(base.model.config.num_labels))
        names = names if base.task == "classification" else ()
        return LabelTemplate.of(load_labelling(own) if merged else Labelling(base.task, names, names))
    if base.task == "seq2seq":
        return Source.of(template_of(own if (own / FILE).is_file() else "plain", base.tokenizer))
    if config is None:  # a merged model brings the template of its adapter along
        return template_of(own if (own / FILE).is_file() else "auto", base.tokenizer)
    return template_of(config.data.template, base.tokenizer).with_system(config.data.system)


def _settings(base: Base, name: str) -> dict[str, Any]:
    return state_of(base.model).adapter(name).config.model_dump(mode="json")


def _trained_by(folder: Path) -> RunConfig | None:
    """The run of an adapter that lies where runs keep theirs, adapters/<name>."""
    inside = folder.resolve()
    run = RunFolder(inside.parent.parent)
    if inside.parent.name != "adapters" or not run.config_path.is_file():
        return None
    jobs = run.jobs()
    return next(iter(jobs.values())) if len(jobs) == 1 else jobs.get(inside.name)


def _digest(folder: Path) -> str | None:
    """SHA-256 of the weights, 16 digits."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
