"""The sessions of clients: they begin, give signs of life, and end, by their own word or by silence."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from typing import Any

from graft.errors import GraftError
from graft.serving.tinker.bodies import SessionBody
from graft.serving.tinker.promises import Record
from graft.serving.tinker.samplers import Samplers
from graft.serving.tinker.service import Service

SILENCE = 3600.0
"""Seconds without a sign of life after which a session is over. Clients send one every ten seconds."""
KEPT = 3600.0
"""Seconds for which it is remembered that a session is over, for clients that ask once more."""
LOOK = 30.0
"""Seconds between two looks at what is over."""


class Sessions:
    """The sessions of one service. It belongs to the event loop."""

    def __init__(self, service: Service, samplers: Samplers) -> None:
        self.service, self.samplers = service, samplers
        self._seen: dict[str, float] = {}
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Close what a crash left half closed, and begin to look for what is over."""
        for name, about in list(self.service.books.session.items()):
            if about.get("finished"):
                await self._close(name)
        self._looking = asyncio.create_task(self._look())

    def stop(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    async def begin(self, body: SessionBody) -> str:
        """Make a session and return its id."""
        name = f"s{secrets.token_hex(8)}"
        about = {"made": time.time(), "name": body.display_name, "labels": body.user_metadata, "tags": body.tags}
        await self.service.put(Record("session", name, about))
        self.seen(name)
        return name

    def open(self, name: Any) -> str:
        """Return the name of a session that goes on. Raises `GraftError` for any other."""
        about = self.service.books.session.get(name) if isinstance(name, str) else None
        if about is None or about.get("finished"):
            raise GraftError(f"there is no session {str(name)[:200]!r}, or it is over")
        return str(name)

    def seen(self, name: str) -> None:
        """Note a sign of life."""
        self._seen[name] = time.monotonic()

    async def finish(self, name: str) -> None:
        """End a session. What its clients saved stays; its models and samplers go."""
        about = self.service.books.session[name]
        if not about.get("finished"):
            await self.service.put(Record("session", name, {**about, "finished": time.time()}))
            await self._close(name)

    async def _close(self, name: str) -> None:
        samplers = [each for each, about in self.service.books.sampler.items() if about["session"] == name]
        await self.service.close(name, samplers)
        for sampler in samplers:
            await self.service.call(lambda sampler=sampler: self.samplers.drop(sampler))
            shutil.rmtree(self.service.places.sampler(sampler), ignore_errors=True)
        self._seen.pop(name, None)

    async def _look(self) -> None:
        """End sessions that are silent, and remove checkpoints whose time has come."""
        while True:
            now, books = time.time(), self.service.books
            for name in [name for name, about in books.session.items() if not about.get("finished")]:
                if time.monotonic() - self._seen.setdefault(name, time.monotonic()) > SILENCE:
                    await self.finish(name)
            for name in [name for name, about in books.session.items() if (about.get("finished") or now) < now - KEPT]:
                await self.service.drop(name)
            for path in [path for path, about in books.checkpoint.items() if (about.get("expires") or now) < now]:
                await self.service.remove(path)
            await asyncio.sleep(LOOK)
