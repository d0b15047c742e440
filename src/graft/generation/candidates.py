"""Put the adapter of a folder on a base, with the template that it was trained with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.adapters.files import CONFIG
from graft.attaching.attach import check_name
from graft.bases import Base
from graft.config.run import RunConfig
from graft.data.labelling import FILE as TASK_FILE
from graft.data.labelling import LABELLED, Labelling, LabelTemplate, load_labelling, saved_task
from graft.data.seq2seq import EncoderTemplate
from graft.data.template import FILE, Template
from graft.data.templates import template_of
from graft.errors import GraftError
from graft.formats.guarding import named_errors
from graft.formats.loading import load
from graft.generation.adapter_folders import trained_by
from graft.generation.beside import refuse_other_tokens, template_beside, template_source
from graft.injection.state import state_of
from graft.utils.files import stamps

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
Stamp = tuple[tuple[int, int], ...]
"""Times and sizes of files."""


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
    stamp: Stamp = ()
    """Of the folder's files when they were read."""


@dataclass(frozen=True)
class Attaching:
    """How adapters are put on one base."""

    base: Base
    """With the tokenizer that all of them were trained with."""
    tokenizer: Any
    """The base's own; None if the user named one, whatever lies beside the adapters."""
    config: RunConfig | None = None
    """Of the run whose adapters these are."""
    template: Template | None = None
    """Replaces the saved template of every adapter."""
    any_base: bool = False

    def candidate(self, name: str, folder: Path, attached_as: str | None = None) -> Candidate:
        """Attach the adapter in a folder. attached_as: its name in the model, if that is another.

        Raises `GraftError` for a folder that cannot be read, and for an adapter of another base; the model is then unchanged.
        """
        stamp = stamp_of(folder)
        template = self.template or _template(folder, self.config, self.base)
        source = None if self.template else template_source(folder)
        digest, adapter = digest_of_weights(folder), attached_as or name
        load(self.base.model, folder, name=adapter, any_base=self.any_base)
        settings = state_of(self.base.model).adapter(adapter).config.model_dump(mode="json")
        return Candidate(name, adapter, template, folder, digest, settings, trained_by(folder), source, stamp)

    def one_more(self, name: str, folder: Path, attached_as: str) -> Candidate:
        """Attach an adapter beside those that answer already.

        Raises `GraftError` as `candidate` does, and for an adapter with another task or other tokens than theirs.
        """
        with named_errors(folder):
            check_name(name)
            if name == "base":
                raise GraftError("'base' is the bare base: give the folder another name")
            if (task := saved_task(folder) or "causal") != self.base.task:
                raise GraftError(f"{folder} holds an adapter for {task}, and the base is loaded for {self.base.task}")
            if self.tokenizer is not None:
                refuse_other_tokens(folder, self.tokenizer, self.base.tokenizer, self.base.model)
            return self.candidate(name, folder, attached_as)


def _template(folder: Path, config: RunConfig | None, base: Base) -> Template:
    """Return the adapter's own template, which lies beside it. Without one, take the run's, else choose automatically."""
    if base.task in LABELLED:
        return LabelTemplate.of(load_labelling(folder))
    if base.task == "seq2seq":
        return EncoderTemplate.of(template_of(folder, base.tokenizer))
    return template_beside(folder, base.tokenizer) or run_template(config, base)


def run_template(config: RunConfig | None, base: Base) -> Template:
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


def digest_of_weights(folder: Path) -> str | None:
    """Return the first 16 digits of the SHA-256 of the weights file."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def stamp_of(folder: Path) -> Stamp:
    """Return what changes when a file of an adapter does; nothing if there is no adapter."""
    if folder.is_file():  # a loralib file
        return stamps([folder])
    return stamps(sorted(folder.glob("*"))) if (folder / CONFIG).is_file() else ()
