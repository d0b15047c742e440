"""Load a base with its adapters to evaluate, chat with or merge them, each with the template that it was trained with.

The template comes from the adapter's folder. Another one is used only if the user names it, because prompts that differ from
those of the training are the commonest cause of bad answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graft.attaching.resizing import resize_tables
from graft.bases import Base, load_base, own_classes, own_task
from graft.bases.heads import brings_head
from graft.config.base import BaseConfig
from graft.config.run import RunConfig
from graft.data.labelling import LABELLED, load_labelling, saved_task
from graft.data.seq2seq import EncoderTemplate
from graft.data.template import Template
from graft.data.templates import template_of
from graft.distributed.group import ALONE, Group
from graft.errors import GraftError
from graft.formats.own import coupling_of
from graft.formats.rows import has_tokenizer, needed_rows
from graft.generation.adapter_folders import named_folders, run_adapters
from graft.generation.beside import tokenizer_for
from graft.generation.candidates import Attaching, Candidate, run_template
from graft.generation.engines import Engine, LocalEngine
from graft.generation.whole import trained_base
from graft.runs.folder import RunFolder


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
    attaching: Attaching | None = None
    """How its adapters were put on the base, for those that come later."""

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
    own_tokenizer = None
    if named.tokenizer is None and not named.new_tokens:  # another one was not named
        own_tokenizer = loaded.tokenizer
        loaded = replace(loaded, tokenizer=tokenizer_for(paths, own_tokenizer, loaded.model))
    chosen = _named_template(template, loaded) if template is not None else None
    attaching = Attaching(loaded, own_tokenizer, config, chosen, any_base)
    answering = [attaching.candidate(name, path) for name, path in found]
    # The base is asked with the first adapter's template, so that both see the same prompt.
    base_template = answering[0].template if answering else chosen or run_template(None if whole else config, loaded)
    # A fresh head is noise without the adapter that trained it, so such a base is no candidate.
    name_of_base = next(iter(jobs)) if whole else "base"
    trained = config if whole else None
    candidates = [Candidate(name_of_base, None, base_template, trained=trained)] if not loaded.fresh else []
    candidates += answering
    if not candidates:
        raise GraftError(
            f"{loaded.name} has no head for {loaded.task}: name an adapter that has one with --adapter FOLDER"
        )
    return LoadedModel(loaded, tuple(candidates), config, jobs=jobs if len(jobs) > 1 else {}, attaching=attaching)


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
