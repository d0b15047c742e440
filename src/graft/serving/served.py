"""Who answers under which name: the bare base, an adapter, or several adapters with weights ("style+0.5*task").

A name that is not there is an error, and never the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graft.attaching.together import name_of
from graft.bases import Base
from graft.bases.context import context_length
from graft.data.labelling import LABELLED
from graft.data.template import Template
from graft.errors import GraftError, did_you_mean, listed
from graft.generation.loaded import Candidate, LoadedModel, digest_of_weights
from graft.injection.state import state_of
from graft.serving.engine import Engine
from graft.utils.files import stamps

MOST_COMBINATIONS = 256
"""Choices of several adapters that a server keeps."""
_WEIGHTED = re.compile(r"(?:(-?\d*\.?\d+)\*)?(.+)")


class UnknownModel(GraftError):
    """A client names a model that is not served."""


@dataclass(frozen=True)
class Answerer:
    """What answers a request."""

    name: str
    adapter: str | None
    """The name that rows of the batch carry; None is the bare base."""
    template: Template
    fingerprint: str
    context: int | None
    """Most tokens of a prompt with its answer; None if there is no limit."""


class Served:
    """The base and the adapters of a server."""

    def __init__(self, loaded: LoadedModel, engine: Engine) -> None:
        """Raises `GraftError` for a base that writes no text."""
        check_task(loaded.base)
        self.loaded, self.base, self._engine = loaded, loaded.base, engine
        self.candidates = {each.name: each for each in loaded.candidates}
        self._stamps: dict[str, tuple[tuple[int, int], ...]] = {}
        self._digests: dict[str, str | None] = {}
        """Of the weights on the disk, when they were looked at last."""
        self._base_digest = str(loaded.base.identity.get("digest") or "unknown").rpartition(":")[2][:12]
        self._known: dict[str, Answerer] = {name: self._single(each) for name, each in self.candidates.items()}

    def changed(self) -> list[str]:
        """Return the adapters whose weights on the disk are other ones now than those that answer, or are gone."""
        found = []
        for name, candidate in self.candidates.items():
            if candidate.folder is None or candidate.digest is None:
                continue
            stamp = stamps(sorted(candidate.folder.glob("*")))
            if stamp != self._stamps.get(name):  # only then is the file read
                self._stamps[name] = stamp
                self._digests[name] = digest_of_weights(candidate.folder)
            if self._digests[name] != candidate.digest:
                found.append(name)
        return found

    @property
    def base_label(self) -> str:
        """The base's name without the folders above it."""
        return Path(self.base.name).name

    async def find(self, model: str) -> Answerer:
        """Return who answers under this name. Raises `UnknownModel`, and `GraftError` for adapters that do not act together."""
        if model not in self._known:
            weights = self._weights(model)
            combinations = len(self._known) - len(self.candidates)
            if combinations >= MOST_COMBINATIONS:
                raise GraftError(
                    f"this server keeps at most {MOST_COMBINATIONS} combinations of adapters, and has them"
                )
            self._known[model] = await self._together(model, weights)
        return self._known[model]

    def _weights(self, model: str) -> dict[str, float]:
        """Read "a+0.5*b". Raises `UnknownModel` unless every part is an adapter."""
        parts = [_WEIGHTED.fullmatch(part.strip()) for part in model.split("+")]
        found: dict[str, float] = {}
        for part in parts:
            name = part[2] if part is not None else ""
            if part is None or self.candidates.get(name) is None or self.candidates[name].adapter is None:
                break
            if name in found:
                raise GraftError(f"adapter '{name}' is named twice in '{model}': give it one weight")
            found[name] = float(part[1] or 1)
        else:
            if found:
                return found
        near = did_you_mean(model, self.candidates)
        raise UnknownModel(f"the model '{model}' does not exist here.{near} There is: {listed(list(self.candidates))}")

    async def _together(self, model: str, weights: Mapping[str, float]) -> Answerer:
        chosen = [self.candidates[name] for name in weights]
        templates = {each.template.digest: each.name for each in chosen}
        if len(templates) > 1:
            raise GraftError(
                f"adapters {' and '.join(templates.values())} were trained with different templates, so no prompt fits both"
            )
        name = await self._engine.call(lambda: name_of(self.base.model, weights))
        digests = "-".join(f"{weights[each.name]:g}*{each.digest or 'unknown'}" for each in chosen)
        return Answerer(
            model, name, chosen[0].template, f"fp_{self._base_digest}_{digests}", context_length(self.base.model, name)
        )

    def _single(self, candidate: Candidate) -> Answerer:
        digest = "" if candidate.adapter is None else f"_{candidate.digest or 'unknown'}"
        context = context_length(self.base.model, candidate.adapter)
        return Answerer(
            candidate.name, candidate.adapter, candidate.template, f"fp_{self._base_digest}{digest}", context
        )

    def kind(self, name: str) -> str | None:
        """Return the kind of an adapter, None for the base."""
        adapter = self.candidates[name].adapter
        return (
            None
            if adapter is None
            else " + ".join(sorted({each.kind for each in state_of(self.base.model).adapter(adapter).config.parts()}))
        )


def check_task(base: Base) -> None:
    """Raise `GraftError` for a base that writes no text."""
    if base.task in LABELLED or base.task != "causal":
        raise GraftError(f"{base.name} is loaded for {base.task}: a server answers with causal language models")


def adapters_in(folder: Path) -> list[str]:
    """Return every adapter folder in a folder as NAME=FOLDER, in alphabetical order. Raises `GraftError` if there is none."""
    if not folder.is_dir():
        raise GraftError(f"there is no folder {folder} of adapters")
    found = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if not found:
        raise GraftError(f"{folder} holds no adapter: each is a folder in it with an adapter_config.json")
    return [f"{path.name}={path}" for path in found]
