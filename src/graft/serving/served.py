"""Who answers under which name: the bare base, an adapter, or several adapters with weights ("style+0.5*task").

A name that is not there is an error, and never the base.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from graft.attaching.together import name_of
from graft.bases import Base
from graft.bases.context import context_length
from graft.data.template import Template
from graft.errors import GraftError, did_you_mean, listed
from graft.generation.candidates import Candidate
from graft.generation.loaded import LoadedModel
from graft.injection.state import state_of
from graft.serving.adapters import Adapters
from graft.serving.engine import Engine
from graft.serving.errors import ApiError

MOST_COMBINATIONS = 256
"""Choices of several adapters that a server keeps."""
_WEIGHTED = re.compile(r"(?:(-?\d*\.?\d+)\*)?(.+)")


@dataclass(frozen=True)
class Answerer:
    """What answers a request."""

    adapter: str | None
    """The name that rows of the batch carry; None is the bare base."""
    parts: tuple[str, ...]
    """The adapters that act, by their names in the model."""
    template: Template
    fingerprint: str
    context: int | None
    """Most tokens of a prompt with its answer; None if there is no limit."""


class Served:
    """The base and the adapters of a server."""

    def __init__(self, loaded: LoadedModel, engine: Engine, shelf: Path | None = None) -> None:
        """shelf: a folder, of which every adapter folder is served."""
        self.base, self._engine = loaded.base, engine
        self.adapters = Adapters(loaded, engine, shelf)
        self._bare = {each.name: each for each in loaded.candidates if each.adapter is None}
        self._base_digest = str(loaded.base.identity.get("digest") or "unknown").rpartition(":")[2][:12]
        self._combinations: dict[str, Answerer] = {}

    @property
    def base_label(self) -> str:
        """The base's name without the folders above it."""
        return Path(self.base.name).name

    async def candidates(self) -> list[Candidate]:
        """Return the base and all adapters that can be read."""
        await self.adapters.look()
        return [*self._bare.values(), *self.adapters.all]

    async def candidate(self, name: str) -> Candidate:
        """Return the base or the adapter of this name. Raises `ApiError`."""
        if name in self._bare:
            return self._bare[name]
        await self.adapters.look([name])
        return self._known(name, name)

    def _known(self, name: str, model: str) -> Candidate:
        if (found := self.adapters.get(name)) is None:
            names = [*self._bare, *(each.name for each in self.adapters.all)]
            said = f"the model '{model}' does not exist here.{did_you_mean(model, names)} There is: {listed(names)}"
            raise ApiError(404, said, param="model", code="model_not_found")
        return found

    @asynccontextmanager
    async def answering(self, model: str) -> AsyncIterator[Answerer]:
        """Return who answers under this name. Its adapters stay for a block of code, whatever happens to their folders.

        Raises `ApiError` for a name that is not there, and for adapters that do not act together.
        """
        if model in self._bare:
            yield self._answerer([self._bare[model]], None, "")
            return
        weights = weights_in(model)
        await self.adapters.look(weights)
        # What was looked at first may have changed since, so all are taken at one moment.
        chosen = [self._known(name, model) for name in weights]
        parts = [str(each.adapter) for each in chosen]
        with self.adapters.held(parts):
            if model in weights:
                yield self._answerer(chosen, parts[0], f"_{chosen[0].digest or 'unknown'}")
            else:
                yield await self._together(model, chosen, list(weights.values()))

    async def _together(self, model: str, chosen: Sequence[Candidate], weights: Sequence[float]) -> Answerer:
        parts = {str(each.adapter): weight for each, weight in zip(chosen, weights, strict=True)}
        known = self._combinations.get(model)
        if known is not None and known.parts == tuple(parts):
            return known
        there = {str(each.adapter) for each in self.adapters.all}
        self._combinations = {each: its for each, its in self._combinations.items() if there.issuperset(its.parts)}
        if len(self._combinations) >= MOST_COMBINATIONS:
            raise _unfit(f"this server keeps at most {MOST_COMBINATIONS} combinations of adapters, and has them")
        templates = {each.template.digest: each.name for each in chosen}
        if len(templates) > 1:
            names = " and ".join(templates.values())
            raise _unfit(f"adapters {names} were trained with different templates, so no prompt fits both")
        try:
            name = await self._engine.call(lambda: name_of(self.base.model, parts))
        except GraftError as error:
            raise _unfit(str(error)) from error
        digests = "-".join(
            f"{weight:g}*{each.digest or 'unknown'}" for each, weight in zip(chosen, weights, strict=True)
        )
        self._combinations[model] = self._answerer(chosen, name, f"_{digests}")
        return self._combinations[model]

    def _answerer(self, chosen: Sequence[Candidate], adapter: str | None, digests: str) -> Answerer:
        parts = tuple(each.adapter for each in chosen if each.adapter is not None)
        context = context_length(self.base.model, adapter)
        return Answerer(adapter, parts, chosen[0].template, f"fp_{self._base_digest}{digests}", context)

    def kind(self, candidate: Candidate) -> str | None:
        """Return the kind of an adapter, None for the base."""
        if candidate.adapter is None:
            return None
        config = state_of(self.base.model).adapter(candidate.adapter).config
        return " + ".join(sorted({each.kind for each in config.parts()}))


def weights_in(model: str) -> Mapping[str, float]:
    """Read "a+0.5*b" as the weight of each name. Raises `ApiError` for a name that stands twice."""
    found: dict[str, float] = {}
    for part in model.split("+"):
        weighted = _WEIGHTED.fullmatch(part.strip())
        name, weight = (part, "1") if weighted is None else (weighted[2], weighted[1] or "1")
        if name in found:
            raise _unfit(f"adapter '{name}' is named twice in '{model}': give it one weight")
        found[name] = float(weight)
    return found


def _unfit(said: str) -> ApiError:
    return ApiError(400, said, param="model")


def check_task(base: Base) -> None:
    """Raise `GraftError` for a base that writes no text."""
    if base.task != "causal":
        raise GraftError(f"{base.name} is loaded for {base.task}: a server answers with causal language models")
