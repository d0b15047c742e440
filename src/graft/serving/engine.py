"""The engine thread: the only one that runs the model. Others hand it requests, and it hands back pieces of answers.

A request becomes a `Ticket`. After every step of the running batch, its mailbox gets what is new in each sample: the text that is sure to
stay, the tokens with their log-probabilities, and how a sample ended. A failing step ends the samples that run, and the thread goes on.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from graft.generation.requests import Request
from graft.generation.running import RunningBatch
from graft.generation.sampling import Sample, Sampling
from graft.serving.tickets import Letter, Mailbox, Ticket, post
from graft.training.forward.scoring import Scorer


class Busy(Exception):
    """As many requests are open as the engine takes."""


class Engine(threading.Thread):
    """Runs a batch as long as there are requests, and waits otherwise."""

    def __init__(self, batch: RunningBatch, tokenizer: Any, most: int = 256) -> None:
        """most: requests that may be open at once, those that wait included."""
        super().__init__(name="graft-engine", daemon=True)
        self.batch, self.tokenizer, self.most = batch, tokenizer, most
        self.scorer = Scorer(batch.model)
        self.steps = self.tokens = 0
        """Steps so far, and tokens that were generated in them."""
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._open: set[Ticket] = set()
        self._stopping = False

    @property
    def load(self) -> dict[str, int]:
        """Open requests, rows that run, requests that wait, and what was done so far."""
        batch = self.batch
        counts = {"open": len(self._open), "running": len(batch.samples), "waiting": len(batch.waiting)}
        return {**counts, "steps": self.steps, "tokens": self.tokens, "prefix_hits": batch.reader.prefixes.hits}

    def submit(
        self, request: Request, sampling: Sampling, mailbox: Mailbox, exact: bool = False, whole: bool = False
    ) -> Ticket:
        """Hand over a request, whose pieces go to a mailbox. Raises `Busy`.

        exact: score samples that ended by the trainer's own pass. whole: send no piece of a sample before it has ended.
        """
        if len(self._open) >= self.most or self._stopping:
            raise Busy
        ticket = Ticket(request, sampling, mailbox, exact, whole)
        self._open.add(ticket)
        self._inbox.put(lambda: self._start(ticket))
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Take leave of a ticket: rows of it that still run are freed."""
        if ticket in self._open:
            self._open.discard(ticket)
            self._inbox.put(lambda: self.batch.drop([each for each in ticket.samples if each.end is None]))

    async def call(self, function: Callable[[], Any]) -> Any:
        """Run a function in the engine thread, between two steps, and return its result."""
        loop, future = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(result)

        def work() -> None:
            try:
                result, error = function(), None
            except Exception as raised:
                result, error = None, raised
            loop.call_soon_threadsafe(settle, result, error)

        self._inbox.put(work)
        return await future

    def do(self, function: Callable[[], Any]) -> None:
        """Run a function in the engine thread, between two steps. Nobody waits for it."""

        def work() -> None:
            try:
                function()
            except Exception:
                traceback.print_exc(file=sys.stderr)

        self._inbox.put(work)

    def stop(self, seconds: float = 30.0) -> None:
        """Take no more requests, finish those that are open, and end. What is open after so many seconds is left."""
        self._stopping = True
        self._inbox.put(lambda: None)
        self.join(seconds)

    def run(self) -> None:
        while not (self._stopping and self.batch.idle and self._inbox.empty()):
            self._read_inbox()
            if not self.batch.idle:
                self._publish(self._step())

    def _read_inbox(self) -> None:
        """Do what was asked for since the last step; with nothing to run, wait for something."""
        wait = self.batch.idle and not self._stopping
        while True:
            try:
                work = self._inbox.get(block=wait)
            except queue.Empty:
                return
            work()
            wait = False

    def _start(self, ticket: Ticket) -> None:
        if ticket not in self._open:  # its reader left before it began
            return
        try:
            ticket.samples = self.batch.add(ticket.request, ticket.sampling, self.tokenizer, owner=ticket)
        except Exception as error:  # the ticket's own; the thread goes on
            post([(ticket, error)])
            return
        self._publish([sample for sample in ticket.samples if sample.end is not None])

    def _step(self) -> Sequence[Sample]:
        try:
            changed = self.batch.step()
        except Exception:
            # The batch may be half changed, so nothing of it goes on.
            traceback.print_exc(file=sys.stderr)
            changed = [*self.batch.samples, *(each for group in self.batch.waiting for each in group)]
            self.batch.drop(changed)
            for sample in changed:
                sample.end, sample.problem = "failed", "the model failed; the server's log says how"
        self.steps += 1
        self.tokens += sum(bool(sample.ids) for sample in changed)
        return changed

    def _publish(self, samples: Sequence[Sample]) -> None:
        letters: list[Letter] = []
        for sample in samples:
            ticket: Ticket = sample.owner
            if ticket.whole and sample.end is None:
                continue
            try:
                exact = self._exact(sample) if ticket.exact and sample.end in ("stop", "length") else None
                letters.append((ticket, ticket.new(sample, exact)))
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                letters.append((ticket, error))
        post(letters)

    def _exact(self, sample: Sample) -> tuple[float, ...]:
        ids = (*sample.request.ids, *sample.ids)
        return tuple(self.scorer.logprobs([(ids, len(sample.request.ids))], [sample.request.adapter])[0])
