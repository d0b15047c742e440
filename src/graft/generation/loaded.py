"""Load a base with its adapters to evaluate, chat with or merge them, each with the template that it was trained with.

The template comes from the adapter's folder. Another one is used only if the user names it, because prompts that differ from
those of the training are the commonest cause of bad answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graft.attaching.resizing import resize_tables
from graft.bases import Base, load_base, own_classes, own_task
from graft.bases.heads import brings_head
from graft.config.base import BaseConfig
from graft.config.run import RunConfig
from graft.data.labelling import FILE as TASK_FILE
from graft.data.labelling import LABELLED, Labelling, LabelTemplate, load_labelling, saved_task
from graft.data.seq2seq import EncoderTemplate
from graft.data.template import FILE, Template
from graft.data.templates import template_of
from graft.distributed.group import ALONE, Group
from graft.errors import GraftError
from graft.formats.loading import load
from graft.formats.own import coupling_of
from graft.formats.rows import has_tokenizer, needed_rows
from graft.generation.adapter_folders import named_folders, run_adapters, trained_by
from graft.generation.beside import template_beside, template_source, tokenizer_for
from graft.generation.engines import Engine, LocalEngine
from graft.generation.whole import trained_base
from graft.injection.state import state_of
from graft.runs.folder import RunFolder

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Candidate:
    """One of the models that answer: the bare base, or one adapter on it."""

    name: str
    """The name that tables and results use."""
    adapter: str | None
    """The name under which the adapter is attached; None is the bare base."""
    template: Template
    folder: Path | None = None
    digest: str | None = None
    """Digest of the adapter's weights file."""
    settings: Mapping[str, Any] | None = None
    """The adapter's configuration: its kind, its sites, its other fields."""
    trained: RunConfig | None = None
    """Configuration of the run that trained the adapter, if its folder lies in a run folder."""
    template_file: str | None = None
    """The file beside the adapter that the template comes from; None if it comes from elsewhere."""


@dataclass(frozen=True)
class LoadedModel:
    """A base with its adapters attached."""

    base: Base
    candidates: tuple[Candidate, ...]
    """The bare base comes first, or the model of a run that trained it. It is left out if its head is fresh: that answers at random."""
    config: RunConfig | None = None
    """Configuration of the run, if the adapters come from one."""
    engine: Engine | None = None
    """What generates the answers; None is Graft's own generation."""
    jobs: Mapping[str, RunConfig] = field(default_factory=dict)
    """For a run of several jobs: each job as the configuration it would have alone."""
    group: Group = ALONE
    """The ranks that have loaded this model and share the questions."""

    def split_jobs(self, key: Callable[[RunConfig], Any]) -> list[LoadedModel]:
        """Group the jobs by a key of their configuration and return one loaded model per group.

        Each group also has the candidates that belong to no job, such as the base. Without jobs the result is [self].
        """
        groups: list[tuple[Any, dict[str, RunConfig]]] = []  # keys need not be hashable
        for name, config in self.jobs.items():
            value = key(config)
            group = next((jobs for known, jobs in groups if known == value), None)
            if group is None:
                groups.append((value, {name: config}))
            else:
                group[name] = config
        found = []
        for _, jobs in groups:
            candidates = tuple(each for each in self.candidates if each.name in jobs or each.name not in self.jobs)
            found.append(replace(self, candidates=candidates, config=next(iter(jobs.values())), jobs=jobs))
        return found or [self]

    @property
    def active_engine(self) -> Engine:
        """The engine that was chosen, else Graft's own."""
        return self.engine or LocalEngine(self.base.model, group=self.group)

    @property
    def adapters(self) -> tuple[Candidate, ...]:
        """All candidates except the bare base."""
        return tuple(each for each in self.candidates if each.adapter is not None)

    def find(self, name: str) -> Candidate:
        """Return the candidate of this name. Raises `GraftError`, listing the known names, if there is none."""
        for candidate in self.candidates:
            if candidate.name == name:
                return candidate
        raise GraftError(f"there is no adapter '{name}'; there is {', '.join(each.name for each in self.candidates)}")


def load_candidates(
    run: str | Path | RunFolder | None = None,
    base: BaseConfig | None = None,
    adapters: Sequence[str] = (),
    template: str | None = None,
    *,
    any_base: bool = False,
) -> LoadedModel:
    """Load a base and attach adapters to it: all adapters of a run, and those in the given folders.

    base: replaces the run's own base; required without a run. adapters: "FOLDER" or "NAME=FOLDER", where FOLDER is an adapter
    folder or a run folder. template: replaces the saved template of every adapter. any_base: accept an adapter that was made
    for other base weights.
    Raises `GraftError` for folders that cannot be read, for an adapter of another base, and for two adapters of one name.
    """
    folder = None if run is None else (run if isinstance(run, RunFolder) else RunFolder(run)).existing()
    jobs = folder.jobs() if folder is not None else {}
    config = next(iter(jobs.values()), None)
    if base is None and config is None:
        raise GraftError("name a run folder, or a base with --base")
    whole = trained_base(folder, config, base) if folder is not None and config is not None else None
    base = whole or base
    found = [
        *(run_adapters(folder) if folder is not None and whole is None else []),
        *(pair for text in adapters for pair in named_folders(text)),
    ]
    _check_names(found)
    paths = [path for _, path in found]
    named: BaseConfig = base or config.base  # pyright: ignore[reportOptionalMemberAccess]
    wanted = _with_coupling(_with_tokenizer(named, paths), paths)
    loaded = _base_for(wanted, paths)
    if wanted.resize == "auto" and (rows := needed_rows(loaded.model, paths)) is not None:
        resize_tables(loaded.model, rows)
    if named.tokenizer is None and not named.new_tokens:  # another one was not named
        loaded = replace(loaded, tokenizer=tokenizer_for(paths, loaded.tokenizer, loaded.model))
    for name, path in found:
        load(loaded.model, path, name=name, any_base=any_base)
    chosen = _named_template(template, loaded) if template is not None else None
    templates = [chosen or _template(path, config, loaded) for _, path in found]
    # The base is asked with the first adapter's template, so that both see the same prompt.
    base_template = chosen or (templates[0] if templates else _run_template(None if whole else config, loaded))
    # A fresh head is noise without the adapter that trained it, so such a base is no candidate.
    name_of_base = next(iter(jobs)) if whole else "base"
    trained = config if whole else None
    candidates = [Candidate(name_of_base, None, base_template, trained=trained)] if not loaded.fresh else []
    candidates += [
        Candidate(
            name,
            name,
            its,
            path,
            digest_of_weights(path),
            _settings(loaded, name),
            trained_by(path),
            None if chosen else template_source(path),
        )
        for (name, path), its in zip(found, templates, strict=True)
    ]
    if not candidates:
        raise GraftError(
            f"{loaded.name} has no head for {loaded.task}: name an adapter that has one with --adapter FOLDER"
        )
    return LoadedModel(loaded, tuple(candidates), config, jobs=jobs if len(jobs) > 1 else {})


def _with_tokenizer(config: BaseConfig, folders: Sequence[Path]) -> BaseConfig:
    """With `resize: auto`, take the tokenizer beside the first adapter that has one, unless another is named: it knows the added tokens."""
    own = next((folder for folder in folders if has_tokenizer(folder)), None)
    if config.resize == "off" or config.tokenizer is not None or config.new_tokens or own is None:
        return config
    return config.model_copy(update={"tokenizer": str(own)})


def _with_coupling(config: BaseConfig, folders: Sequence[Path]) -> BaseConfig:
    """Make the base reversible if all adapters were trained on one of the same coupling: on an ordinary base they cannot answer."""
    coupling = None if config.reversible is not None else coupling_of(folders)
    return config if coupling is None else BaseConfig.model_validate({**config.model_dump(), "reversible": coupling})


def _base_for(base: BaseConfig, folders: Sequence[Path]) -> Base:
    """Load the base with the head that the adapters were trained with; without adapters, with its own head."""
    tasks = {saved_task(folder) or "causal": folder for folder in folders}
    if len(tasks) > 1:
        listed = "; ".join(f"{task} in {folder}" for task, folder in tasks.items())
        raise GraftError(f"adapters of different tasks do not share a base: {listed}. Load them one at a time")
    task = next(iter(tasks), None) or own_task(base)
    if task != "classification":
        return load_base(base, task)
    classes = {load_labelling(folder).names: folder for folder in folders} or {own_classes(base) or (): None}
    if len({len(names) for names in classes}) > 1:
        raise GraftError("adapters with different numbers of classes do not share a base: evaluate them one at a time")
    names, own = next(iter(classes)), own_classes(base)
    # A saved head with another number of classes would not fit; if the adapters have heads of their own, it is not needed.
    if folders and own is not None and len(own) != len(names) and all(brings_head(folder) for folder in folders):
        base = base.model_copy(update={"head": "fresh"})
    return load_base(base, task, names)


def _named_template(name: str, base: Base) -> Template:
    """Return the template that the user named to replace the saved ones."""
    if base.task in LABELLED:
        raise GraftError(f"a template has no effect for {base.task}, which reads texts as they are: leave it out")
    template = template_of(name, base.tokenizer)
    return EncoderTemplate.of(template) if base.task == "seq2seq" else template


def _check_names(found: Sequence[tuple[str, Path]]) -> None:
    """Raise `GraftError` for two adapters of one name, and for one that is called like the bare base."""
    known: dict[str, Path] = {}
    for name, path in found:
        if name == "base":
            raise GraftError("'base' is the bare base: give the adapter another name, as in --adapter NAME=FOLDER")
        if name in known and known[name].resolve() == path.resolve():
            raise GraftError(f"the adapter in {path} is named twice: name it once (a run folder brings its adapters)")
        if name in known:
            raise GraftError(
                f"two adapters are called '{name}', in {known[name]} and in {path}: give one another name, as in --adapter {name}-2={path}"
            )
        known[name] = path


def _template(folder: Path, config: RunConfig | None, base: Base) -> Template:
    """Return the adapter's own template, which lies beside it. Without one, take the run's, else choose automatically."""
    if base.task in LABELLED:
        return LabelTemplate.of(load_labelling(folder))
    if base.task == "seq2seq":
        return EncoderTemplate.of(template_of(folder, base.tokenizer))
    return template_beside(folder, base.tokenizer) or _run_template(config, base)


def _run_template(config: RunConfig | None, base: Base) -> Template:
    """Return the template for a base without an adapter's: the one in the base's own folder, the run's, or the automatic one."""
    own = Path(base.name)
    if base.task in LABELLED:
        merged = (own / TASK_FILE).is_file()
        names = tuple(base.model.config.id2label[number] for number in range(base.model.config.num_labels))
        names = names if base.task == "classification" else ()
        return LabelTemplate.of(load_labelling(own) if merged else Labelling(base.task, names, names))
    if base.task == "seq2seq":
        return EncoderTemplate.of(template_of(own if (own / FILE).is_file() else "plain", base.tokenizer))
    if config is None:  # the folder of a merged model holds the template of its adapter
        return template_of(own if (own / FILE).is_file() else "auto", base.tokenizer)
    data = config.data
    return template_of(data.template, base.tokenizer, data.template_args).with_system(data.system)


def _settings(base: Base, name: str) -> dict[str, Any]:
    return state_of(base.model).adapter(name).config.model_dump(mode="json")


def digest_of_weights(folder: Path) -> str | None:
    """Return the first 16 digits of the SHA-256 of the weights file."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
