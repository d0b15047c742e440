"""The adapters of a server as their folders are now: a folder that is new, changed or gone counts from the next request on.

A folder that has changed is read when it has stayed the same for a moment, since somebody may still be writing it. Until then, and if it
cannot be read, nobody answers under its name, least of all the adapter that was there before.

    served        style                style-2              style-2
    requests      ---- style ----|     |--- style-2 ----    the ones that run go on with the adapter that they began with;
    in the model  style          style, style-2   style-2   it is detached when the last of them is over
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from graft.adapters.files import CONFIG
from graft.attaching.attach import NAME, NAMES, detach
from graft.attaching.parameters import names as names_of
from graft.errors import GraftError
from graft.generation.candidates import Candidate, Stamp, stamp_of
from graft.generation.loaded import LoadedModel
from graft.serving.engine import Engine
from graft.serving.errors import ApiError

SETTLED = 1.0
"""Seconds for which the files of a folder stay the same before it is read."""
TRIES = 10
"""How often a request looks whether a folder stays the same before it is told to come again."""


@dataclass
class _Place:
    """A folder, and what was found in it last."""

    folder: Path
    stamp: Stamp | None = None
    """Of its files when they were read; empty if there was no adapter."""
    candidate: Candidate | None = None
    problem: str | None = None
    """Why nobody answers, if an adapter is there."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Adapters:
    """The adapters that answer. It belongs to the event loop; they are attached and detached in the engine's thread."""

    def __init__(self, loaded: LoadedModel, engine: Engine, shelf: Path | None = None) -> None:
        """shelf: a folder, of which every adapter folder is served."""
        self._loaded, self._engine, self._shelf = loaded, engine, shelf
        self._places = {each.name: _Place(each.folder, each.stamp, each) for each in loaded.adapters if each.folder}
        self._users: Counter[str] = Counter()
        """Requests that are open, by the adapter's name in the model."""
        self._retired: set[str] = set()
        self._numbers = count(2)

    @property
    def all(self) -> list[Candidate]:
        """The adapters that answer, as they were looked at last."""
        return [place.candidate for place in self._places.values() if place.candidate is not None]

    @property
    def unreadable(self) -> list[str]:
        """The adapters whose folders could not be read when they were looked at last."""
        return [name for name, place in self._places.items() if place.problem is not None]

    def get(self, name: str) -> Candidate | None:
        """Return the adapter of this name as it was looked at last, None if there is none. Raises `ApiError` if it cannot be read."""
        place = self._places.get(name)
        if place is not None and place.problem is not None:
            raise ApiError(503, place.problem, param="model", code="model_not_readable")
        return None if place is None else place.candidate

    async def look(self, names: Iterable[str] | None = None) -> None:
        """Look at the folders of these adapters, or of all, and attach anew what has changed."""
        if names is None:
            found = [] if self._shelf is None else await asyncio.to_thread(adapters_in, self._shelf)
            for path in found:
                if not NAME.fullmatch(path.name) and path.name not in self._places:
                    problem = f"'{path.name}' is not a name that an adapter can have ({NAMES}): rename its folder"
                    self._places[path.name] = _Place(path, await asyncio.to_thread(stamp_of, path), problem=problem)
            names = [*self._places, *(path.name for path in found)]
        await asyncio.gather(*map(self._look, dict.fromkeys(names)))

    async def _look(self, name: str) -> None:
        place = self._places.get(name)
        if place is None:
            if self._shelf is None or not NAME.fullmatch(name) or not (self._shelf / name / CONFIG).is_file():
                return
            place = self._places[name] = _Place(self._shelf / name)
        async with place.turn:
            stamp = await asyncio.to_thread(stamp_of, place.folder)
            if stamp != place.stamp:
                self._retire(place)
                await self._read(name, place, stamp)

    async def _read(self, name: str, place: _Place, stamp: Stamp) -> None:
        """Attach the adapter in a folder, once its files stay the same while it is read. stamp: of the files now."""
        for _ in range(TRIES):
            await asyncio.sleep(SETTLED)
            before, stamp = stamp, await asyncio.to_thread(stamp_of, place.folder)
            if stamp != before:
                continue
            place.stamp, place.problem = stamp, None
            if not stamp:  # it is gone
                return
            try:
                place.candidate = await self._engine.call(lambda: self._attached(name, place.folder))
            except GraftError as error:
                place.problem = f"the adapter '{name}' cannot be read: {error}"
            if (stamp := await asyncio.to_thread(stamp_of, place.folder)) == place.stamp:
                return
            self._retire(place)
        place.stamp, place.problem = None, f"the adapter '{name}' is being written: ask again later"

    def _attached(self, name: str, folder: Path) -> Candidate:
        """Attach what a folder holds, under a name in the model that none has had, so that whoever had an older one cannot take it for
        that."""
        taken = names_of(self._loaded.base.model)
        free = next(each for number in self._numbers if (each := f"{name}-{number}") not in taken)
        assert self._loaded.attaching is not None  # what is served was loaded from folders
        return self._loaded.attaching.one_more(name, folder, free)

    def _retire(self, place: _Place) -> None:
        """Let no further request have the adapter that was read from a folder."""
        place.stamp = place.problem = None
        if place.candidate is not None and (name := place.candidate.adapter) is not None:
            place.candidate = None
            self._retired.add(name)
            self._detach_unused([name])

    @contextmanager
    def held(self, names: Sequence[str]) -> Iterator[None]:
        """Keep adapters attached for a block of code, by their names in the model."""
        self.hold(names)
        try:
            yield
        finally:
            self.release(names)

    def hold(self, names: Sequence[str]) -> None:
        """Keep adapters attached until they are released."""
        self._users.update(names)

    def release(self, names: Sequence[str]) -> None:
        """Say that a request that held adapters is over."""
        self._users.subtract(names)
        self._detach_unused(names)

    def _detach_unused(self, names: Sequence[str]) -> None:
        for name in names:
            if not self._users[name]:
                del self._users[name]
                if name in self._retired:
                    self._retired.discard(name)
                    self._engine.do(lambda name=name: detach(self._loaded.base.model, name))


def adapters_in(folder: Path) -> list[Path]:
    """Return every adapter folder in a folder, in alphabetical order. What is hidden is not finished, or not wanted any longer."""
    return sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if not path.parent.name.startswith("."))


def check_shelf(folder: Path) -> Path:
    """Return a folder of adapter folders. Raises `GraftError` if it is not there, and if it is an adapter itself."""
    if not folder.is_dir():
        raise GraftError(f"there is no folder {folder} of adapters")
    if (folder / CONFIG).is_file():
        raise GraftError(f"{folder} is an adapter, and no folder of adapters: name it with --adapter")
    return folder
