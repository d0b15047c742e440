"""The training service: promises on the way in, effects in order, results on the way out.

The event loop owns what is here. One thread writes the store, and the engine's thread runs the model. A promise is on the disk before its
client hears of it, a tick before it runs. After a crash the last snapshot is restored, the ticks after it run again, and the promises
without a tick wait for their turn as before.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from graft.errors import GraftError
from graft.serving.tinker.effects import Effects
from graft.serving.tinker.order import Order
from graft.serving.tinker.places import Place, Places, place_of, session_of
from graft.serving.tinker.promises import FILE, Promise, Promises, Record, Result
from graft.serving.tinker.snapshots import restore_snapshot, write_snapshot
from graft.training.tenant import STATE

T = TypeVar("T")
EVERY = 64
"""Ticks between snapshots: after a crash so many run again at most."""
HOLD = 20.0
"""Seconds for which a poll is held before it is answered with "try again"."""
OVER = Result.failed("the session of this request is over")
Call = Callable[[Callable[[], Any]], Coroutine[Any, Any, Any]]


@dataclass
class Books:
    """Sessions, models, samplers and checkpoints by id: what the store's records say, in memory."""

    session: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: dict[str, dict[str, Any]] = field(default_factory=dict)
    sampler: dict[str, dict[str, Any]] = field(default_factory=dict)
    checkpoint: dict[str, dict[str, Any]] = field(default_factory=dict)

    def note(self, record: Record) -> None:
        shelf: dict[str, Any] = getattr(self, record.kind)
        if record.about is None:
            shelf.pop(record.id, None)
        else:
            shelf[record.id] = dict(record.about)


@dataclass(frozen=True)
class _Waiting:
    """A promise without a result, and how to wait for it."""

    promise: Promise
    event: asyncio.Event = field(default_factory=asyncio.Event)


class Service:
    """One training service on one engine."""

    def __init__(self, effects: Effects, call: Call, places: Places, known_as: Mapping[str, Any]) -> None:
        """call: runs a function in the engine's thread. known_as: what the results depend on; the store of another base is refused."""
        self.effects, self.call, self.places = effects, call, places
        self.books, self.order = Books(), Order()
        self.turn = asyncio.Lock()
        """Held while a tick runs, and by whoever changes what a tick may read."""
        self._known_as = known_as
        self._promises: Promises
        self._writer = ThreadPoolExecutor(1, "graft-store")
        self._open: dict[int, _Waiting] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._wake = asyncio.Event()
        self._since = 0
        self._loop: asyncio.Task[None] | None = None

    async def store(self, work: Callable[[Promises], T]) -> T:
        """Run a function on the store, in the thread that owns it."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, lambda: work(self._promises))

    async def start(self) -> list[Promise]:
        """Open the store and go on where the last process was. Returns the samples that nobody has drawn yet."""

        def opened() -> None:
            self.places.root.mkdir(parents=True, exist_ok=True)
            self._promises = Promises.open(self.places.root / FILE, self._known_as)

        await asyncio.get_running_loop().run_in_executor(self._writer, opened)
        for record in await self.store(Promises.records):
            self.books.note(record)
        self.effects.checkpoints |= set(self.books.checkpoint)
        await self._recover()
        waiting, samples = await self.store(Promises.waiting), list[Promise]()
        closing = {promise.owner for promise in waiting if promise.kind == "close"}
        for model, number in (await self.store(Promises.reached)).items():
            if not (model in closing or self.books.model.get(model, {}).get("closed")):
                self.order.open(model, number)
        for promise in waiting:
            self._open[promise.id] = _Waiting(promise)
            samples.append(promise) if promise.kind == "sample" else self.order.put(promise)
        self._wake.set()
        self._loop = asyncio.create_task(self._run())
        return samples

    async def _recover(self) -> None:
        tick, folder = await self.store(lambda store: store.last_snapshot)
        if folder is not None:
            await self.call(lambda: restore_snapshot(self.effects.session, self.places.root / folder))
        for promises in await self.store(lambda store: store.ticks_after(tick)):
            outcomes = await self.call(lambda promises=promises: self.effects.again(promises))
            await self._keep(outcomes)
            self._since += 1

    async def stop(self) -> None:
        """End after the tick that runs, with a snapshot, so that the next start has nothing to run again."""
        if self._loop is not None:
            async with self.turn:
                self._loop.cancel()
            if self._since:
                await self._snapshot()
        await self.store(Promises.close)
        self._writer.shutdown()

    async def promise(
        self, kind: str, key: Sequence[Any], owner: str, seq: int, content: bytes, canonical: bytes
    ) -> tuple[Promise, bool]:
        """Promise to do something, once: the same key gets the same promise. Returns it, and whether it is new.

        Raises `OtherContent`.
        """
        return await asyncio.shield(self._promise(kind, key, owner, seq, content, canonical))

    async def _promise(
        self, kind: str, key: Sequence[Any], owner: str, seq: int, content: bytes, canonical: bytes
    ) -> Any:
        made, new = await self.store(lambda store: store.promise(key, kind, owner, seq, content, canonical))
        if new:
            self._open[made.id] = _Waiting(made)
            if seq and kind != "sample" and owner not in self.order:  # closed while the promise was written
                await self.settle({made.id: OVER})
            elif kind != "sample":
                self.order.put(made)
                self._wake.set()
        return made, new

    async def result(self, number: int, seconds: float = HOLD) -> Result | None:
        """Return what came of a promise; None if nothing has come after so many seconds. Raises `KeyError` for an unknown one."""
        if (waiting := self._open.get(number)) is not None:
            try:
                await asyncio.wait_for(waiting.event.wait(), seconds)
            except TimeoutError:
                return None
        return await self.store(lambda store: store.result(number))

    def state(self, number: int) -> dict[str, str]:
        """Return what a poll is told about a promise that has no result yet."""
        if self._loop is not None and self._loop.done():
            return {"queue_state": "paused_capacity", "queue_state_reason": "the server failed; its log says how"}
        promise = self._open.get(number)
        gap = None if promise is None else self.order.gap(promise.promise)
        return {"queue_state": "active"} if gap is None else {
            "queue_state": "active", "queue_state_reason": f"waits for request {gap} of its model, which has not arrived"
        }  # fmt: skip

    async def settle(self, results: Mapping[int, Result], records: Sequence[Record] = ()) -> None:
        """Keep results and records, and tell those who wait."""
        await self.store(lambda store: store.settle(results, records))
        for record in records:
            self.books.note(record)
        for number in results:
            if (waiting := self._open.pop(number, None)) is not None:
                waiting.event.set()
                if (news := self._news.pop(waiting.promise.owner, None)) is not None:
                    news.set()

    def news_of(self, owner: str) -> asyncio.Event:
        """Return what is set when a promise of a model or sampler gets its result."""
        return self._news.setdefault(owner, asyncio.Event())

    async def _keep(self, outcomes: Mapping[int, tuple[Result, list[Record]]]) -> None:
        results = {number: result for number, (result, _) in outcomes.items()}
        await self.settle(results, [record for _, records in outcomes.values() for record in records])

    async def _run(self) -> None:
        """Take one tick after the other."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                while promises := self.order.take():
                    async with self.turn:
                        await self._tick(promises)
            except Exception:  # a full disk, a store that is gone: nothing more is promised or done
                traceback.print_exc(file=sys.stderr)
                raise

    async def _tick(self, promises: Sequence[Promise]) -> None:
        await self.store(lambda store: store.begin(promises))
        await self._keep(await self.call(lambda: self.effects.run(promises)))
        for each in promises:
            if each.kind == "close":
                self.order.close(each.owner)
        self._since += 1
        # What a load read may be replaced later, so it must not be read again.
        if self._since >= EVERY or any(each.kind == "load_weights" for each in promises):
            await self._snapshot()

    async def _snapshot(self) -> None:
        tick = await self.store(lambda store: store.last_tick)
        folder = self.places.snapshot(tick)
        await self.call(lambda: write_snapshot(self.effects.session, folder))
        _, old = await self.store(lambda store: store.last_snapshot)
        await self.store(lambda store: store.snapshot(tick, str(folder.relative_to(self.places.root))))
        if old is not None and self.places.root / old != folder:
            shutil.rmtree(self.places.root / old, ignore_errors=True)
        self._since = 0

    async def put(self, *records: Record) -> None:
        """Keep records that belong to no promise."""
        await self.settle({}, records)

    async def close(self, session: str, samplers: Sequence[str]) -> None:
        """Close the models of a session after what they do now. What waits for them fails, and its samplers are forgotten."""
        async with self.turn:
            models = [name for name in self.order.models if session_of(name) == session]
            for model in models:
                left = self.order.close(model)
                closing = [each for each in left if each.kind == "close"]  # promised by a process that was killed
                await self.settle({each.id: OVER for each in left if each not in closing})
                if closing:
                    self.order.put(closing[0])
                elif model in self.books.model:  # it was made
                    content = Result.json(self.books.model[model]).body
                    await self._promise("close", ("close", model), model, 0, content, b"")
            self._wake.set()
            for each in samplers:
                self._news.pop(each, None)
        await self.put(*(Record("sampler", name, None) for name in samplers))
        await self.store(lambda store: store.forget([*models, *samplers], OVER))

    async def drop(self, session: str) -> None:
        """Forget a session that was closed long ago, if that can be; its checkpoints stay, and the models that have some."""
        async with self.turn:
            own = [name for name, about in self.books.model.items() if about["session"] == session]
            if any(name in self.order.models for name in own) or not await self.store(
                lambda store: store.drop(session)
            ):
                return
            kept = {place_of(path).model for path in self.books.checkpoint}
            gone = [Record("model", name, None) for name in own if name not in kept]
            await self.put(Record("session", session, None), *gone)

    async def copy(self, place: Place, sampler: str) -> None:
        """Give a sampler weights of its own, those of a checkpoint. Raises `GraftError` if there is none."""
        async with self.turn:
            if str(place) not in self.books.checkpoint:
                raise GraftError(f"there is no checkpoint {place}")
            target = self.places.sampler(sampler)
            shutil.rmtree(target, ignore_errors=True)  # of a process that was killed before it noted the sampler
            names = shutil.ignore_patterns(STATE)
            await asyncio.to_thread(shutil.copytree, self.places.checkpoint(place), target, ignore=names)

    async def remove(self, path: str) -> None:
        """Remove a checkpoint. Raises `GraftError` if there is none."""
        async with self.turn:
            if path not in self.books.checkpoint:
                raise GraftError(f"there is no checkpoint {path[:200]!r}")
            model = place_of(path).model
            others = any(place_of(each).model == model for each in self.books.checkpoint if each != path)
            gone = not others and self.books.model[model]["session"] not in self.books.session
            await self.put(Record("checkpoint", path, None), *([Record("model", model, None)] if gone else []))
            await self.call(lambda: self.effects.checkpoints.discard(path))
            shutil.rmtree(self.places.checkpoint(place_of(path)), ignore_errors=True)
