"""Places that clients take in turn: whoever asks for many waits for the others."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """So many places at once. When one is free, the client whose last turn is longest ago gets it. It belongs to one event loop."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """The clients that wait, in the order of their turns."""

    def waits(self) -> dict[str, int]:
        """Return how many places each client waits for."""
        return {who: len(own) for who, own in self._waiting.items()}

    @asynccontextmanager
    async def place(self, who: str) -> AsyncIterator[None]:
        """Have a place for a block of code."""
        if self._free and not self._waiting:
            self._free -= 1
        else:
            await self._turn(who)
        try:
            yield
        finally:
            self._free += 1
            self._hand_out()

    async def _turn(self, who: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it had its place already
                self._free += 1
                self._hand_out()
            raise

    def _hand_out(self) -> None:
        while self._free and self._waiting:
            who = next(iter(self._waiting))
            own = self._waiting.pop(who)
            turn = own.popleft()
            if own:
                self._waiting[who] = own  # behind the others
            if not turn.done():
                self._free -= 1
                turn.set_result(None)
