"""Samples on their way through the engine: each promise of a sample is one request to the running batch."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import traceback
from typing import Any

from graft.bases import Base
from graft.errors import GraftError
from graft.serving.engine import Busy, Engine
from graft.serving.tickets import Mailbox
from graft.serving.tinker.bodies import SampleBody, read
from graft.serving.tinker.promises import Promise, Result
from graft.serving.tinker.samplers import Samplers
from graft.serving.tinker.sampling import request_of, response_of
from graft.serving.tinker.service import OVER, Service

MOST = 2000
"""Samples that may wait; more get status 429, and clients send them again."""


class Drawing:
    """Draws the samples of a service. It belongs to the event loop."""

    def __init__(self, service: Service, engine: Engine, samplers: Samplers, base: Base) -> None:
        self.service, self.engine, self.samplers, self.base = service, engine, samplers, base
        self.tasks: set[asyncio.Task[None]] = set()
        # Half of the engine's places are left to the inference API.
        self._places = asyncio.Semaphore(max(1, engine.most // 2))

    @property
    def full(self) -> bool:
        """Whether no more samples may be asked for."""
        return len(self.tasks) >= MOST

    def start(self, promise: Promise) -> None:
        """Begin with a promise of a sample."""
        task = asyncio.create_task(self._settle(promise))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def stop(self) -> None:
        """Leave what is not drawn yet: it is promised, so the next process draws it."""
        for task in self.tasks:
            task.cancel()

    async def _settle(self, promise: Promise) -> None:
        try:
            async with self._places:
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
                await self.engine.call(lambda: self.samplers.give_back(name))

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
