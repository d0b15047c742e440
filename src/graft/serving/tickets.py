"""Tickets: requests on their way through the engine, and the mailbox in which the event loop finds what became of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from graft.generation.requests import Request
from graft.generation.sampling import End, Sample, Sampling, Top


@dataclass(frozen=True)
class Token:
    """One token of an answer. Without log-probabilities the score is None."""

    id: int
    logprob: float | None = None
    top: Top = ()


@dataclass(frozen=True)
class Piece:
    """What is new in one sample of a ticket."""

    index: int
    text: str
    tokens: tuple[Token, ...]
    end: End | None
    problem: str | None = None
    exact: tuple[float, ...] | None = None
    """With `end`: the log-probabilities of all tokens of the sample by the trainer's own pass, if the ticket asks for them."""


class Ticket:
    """One request on its way through the engine."""

    def __init__(self, request: Request, sampling: Sampling, mailbox: Mailbox, exact: bool, whole: bool) -> None:
        """mailbox: where the pieces go. whole: send one piece of each sample, when it has ended."""
        self.request, self.sampling, self.mailbox = request, sampling, mailbox
        self.exact, self.whole = exact, whole
        self.samples: list[Sample] = []
        """There from the first piece on."""
        self.open = sampling.n
        """Samples that have not ended, as the event loop knows it."""
        self._sent = [0] * sampling.n

    def new(self, sample: Sample, exact: tuple[float, ...] | None) -> Piece:
        """Return what is new in a sample. Called by the engine."""
        first, self._sent[sample.index] = self._sent[sample.index], len(sample.ids)
        scores, tops = sample.logprobs[first:], sample.top[first:]
        tokens = tuple(
            Token(token, scores[at] if scores else None, tops[at] if tops else ())
            for at, token in enumerate(sample.ids[first:])
        )
        text = sample.stream.take(ended=sample.end is not None) if sample.stream is not None else ""
        return Piece(sample.index, text, tokens, sample.end, sample.problem, exact)


Letter = tuple[Ticket, Piece | Exception]


class Mailbox:
    """Pieces of one or several tickets, in the order in which they are made. Made in the event loop that reads it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Letter] = asyncio.Queue()

    async def take(self) -> tuple[Ticket, Piece]:
        """Return the next piece and its ticket. Raises the error that refused a request."""
        ticket, found = await self._arrived.get()
        if isinstance(found, Exception):
            raise found
        ticket.open -= found.end is not None
        return ticket, found

    def put(self, letter: Letter) -> None:
        """Add a letter, in the event loop."""
        self._arrived.put_nowait(letter)


def post(letters: Sequence[Letter]) -> None:
    """Hand letters over from another thread: each event loop is woken once. A loop that is closed wants nothing any longer."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Letter]] = {}
    for letter in letters:
        by_loop.setdefault(letter[0].mailbox.loop, []).append(letter)
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_arrive, own)
        except RuntimeError:
            if not loop.is_closed():
                raise


def _arrive(letters: Sequence[Letter]) -> None:
    for letter in letters:
        letter[0].mailbox.put(letter)
