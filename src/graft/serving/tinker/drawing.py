"""Samples on their way through the engine: each promise of a sample is one request to the running batch."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import traceback
from collections import Counter
from typing import Any

from graft.bases import Base
from graft.errors import GraftError
from graft.serving.engine import Busy, Engine
from graft.serving.tickets import Mailbox
from graft.serving.tinker.bodies import SampleBody, read
from graft.serving.tinker.places import session_of
from graft.serving.tinker.promises import Promise, Result
from graft.serving.tinker.samplers import Samplers
from graft.serving.tinker.sampling import request_of, response_of
from graft.serving.tinker.service import OVER, Service
from graft.serving.tinker.turns import Turns

MOST = 2000
"""Samples of a session that may wait; more get status 429, and clients send them again."""


class Drawing:
    """Draws the samples of a service. It belongs to the event loop."""

    def __init__(self, service: Service, engine: Engine, samplers: Samplers, base: Base) -> None:
        self.service, self.engine, self.samplers, self.base = service, engine, samplers, base
        self.tasks: dict[int, asyncio.Task[None]] = {}
        """By the promise's id."""
        self.open: Counter[str] = Counter()
        """Samples of each session that are not drawn yet."""
        # Half of the engine's places are left to the inference API.
        self.turns = Turns(max(1, engine.most // 2))

    def full(self, sampler: str) -> bool:
        """Whether no more samples may be asked for by the session of a sampler."""
        return self.open[session_of(sampler)] >= MOST

    def start(self, promise: Promise) -> None:
        """Begin with a promise of a sample."""
        session = session_of(promise.owner)
        self.open[session] += 1
        self.tasks[promise.id] = asyncio.create_task(self._settle(promise))
        self.tasks[promise.id].add_done_callback(lambda _: self._ended(promise.id, session))

    def _ended(self, number: int, session: str) -> None:
        del self.tasks[number]
        self.open[session] -= 1
        if not self.open[session]:
            del self.open[session]

    def cancel(self, number: int) -> bool:
        """Draw a sample no further. Returns whether it was being drawn, so that its promise has no result yet."""
        task = self.tasks.get(number)
        return task is not None and task.cancel()

    def stop(self) -> None:
        """Leave what is not drawn yet: it is promised, so the next process draws it."""
        for task in self.tasks.values():
            task.cancel()

    async def _settle(self, promise: Promise) -> None:
        try:
            async with self.turns.place(session_of(promise.owner)):
                result = Result("protobuf", await self._drawn(promise))
        except GraftError as error:
            result = Result.failed(str(error))
        except Exception:
            traceback.print_exc(file=sys.stderr)
            result = Result.failed("drawing the sample failed; the server's log says how", "server")
        await self.service.settle({promise.id: result})

    async def _drawn(self, promise: Promise) -> bytes:
        body = read(SampleBody, json.loads(promise.content))
        about = self._newest(promise.owner)
        if about is None:
            raise GraftError(json.loads(OVER.body)["error"])
        name = None
        if (owner := about.get("folder")) is not None:
            folder = self.service.places.sampler(owner)
            name = await self.engine.call(lambda: self.samplers.take(folder, owner))
        try:
            seed = int.from_bytes(hashlib.sha256(promise.name.encode()).digest()[:4])
            return await self._answered(body, *request_of(body, self.base, name, seed))
        finally:
            if name is not None:
                self.engine.do(lambda: self.samplers.give_back(name))

    async def _answered(self, body: SampleBody, request: Any, settings: Any) -> bytes:
        mailbox = Mailbox()
        while True:
            try:
                ticket = self.engine.submit(request, settings, mailbox, whole=True)
                break
            except Busy:
                await asyncio.sleep(0.05)
        try:
            while ticket.open:
                await mailbox.take()
            return response_of(body, ticket.samples)
        finally:
            self.engine.release(ticket)

    def _newest(self, sampler: str) -> dict[str, Any] | None:
        """Return what is known of a sampler. One that is in flight has the weights of its model's latest such save."""
        shelf = self.service.books.sampler
        about = shelf.get(sampler)
        if about is None or not about.get("inflight"):
            return about
        return [each for each in shelf.values() if each.get("inflight") and each["model"] == about["model"]][-1]
