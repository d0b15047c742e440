"""The parts of the training API, put together on a server's engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from graft.bases import pad_id
from graft.errors import GraftError
from graft.generation.loaded import LoadedModel
from graft.serving.engine import Engine
from graft.serving.tinker.api import Api
from graft.serving.tinker.drawing import Drawing
from graft.serving.tinker.effects import Effects
from graft.serving.tinker.listing import Listing
from graft.serving.tinker.places import Places
from graft.serving.tinker.samplers import Samplers
from graft.serving.tinker.service import Service
from graft.serving.tinker.sessions import Sessions
from graft.training.session import Session
from graft.utils.files import explain_write_errors

KEY_START = "tml-"
"""What clients require a key to begin with."""


class Training:
    """The training API of one server."""

    def __init__(self, loaded: LoadedModel, engine: Engine, folder: Path, token: str | None) -> None:
        """folder: what the service remembers. Raises `GraftError` for a token that no client would send."""
        if token is not None and not token.startswith(KEY_START):
            raise GraftError(
                f"clients of the training API send only tokens that begin with {KEY_START}: choose such a one"
            )
        base = loaded.base
        places = Places(folder)
        bases = dict.fromkeys([base.name, Path(base.name).name])
        effects = Effects(Session(base.model, pad_id=pad_id(base.tokenizer, base.model)), places, list(bases))
        samplers = Samplers(base.model)
        self.service = Service(effects, engine.call, places, {"base": base.identity})
        self.sessions = Sessions(self.service, samplers)
        self.drawing = Drawing(self.service, engine, samplers, base)
        self.api = Api(self.service, self.sessions, self.drawing, Listing(self.service))
        self._folder = folder
        self._lock = FileLock(folder / ".lock", thread_local=False)

    def claim(self) -> None:
        """Keep other processes from serving this folder until `running` is over. Raises `GraftError` where one serves it."""
        with explain_write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise GraftError(f"another process serves {self._folder}: stop it, or name another folder") from error

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Go on where the last process was, and serve in a block of code. Raises `GraftError` as `claim` does."""
        self.claim()
        try:
            samples = await self.service.start()
            for promise in samples:
                self.drawing.start(promise)
            await self.sessions.start()
            yield
            self.sessions.stop()
            self.drawing.stop()
            await self.service.stop()
        finally:
            self._lock.release(force=True)

    def add_to(self, app: Any) -> None:
        """Add the routes to an application."""
        self.api.add_to(app)
