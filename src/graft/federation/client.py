"""A client: it answers the messages of the server, on the base of its process. The same in one process and over Flower."""

from __future__ import annotations

import json

from graft.errors import GraftError
from graft.federation.messages import Kind, Message, Tensors, decoded
from graft.federation.methods.base import Method
from graft.federation.workplace import Workplace
from graft.runs.storage import differing
from graft.utils.files import to_json


class Client:
    """The client of a name."""

    def __init__(self, place: Workplace, method: Method, name: str) -> None:
        self.place, self.method, self.name = place, method, name

    def answer(self, data: bytes) -> bytes:
        """Answer a message. What goes wrong here is answered too, so that the server can leave the client out by name."""
        number = 0
        try:
            message = decoded(data)
            number = message.round
            if message.kind == "hello":
                return self._message("card", number, text=to_json(self._card())).encoded()
            if message.kind != "train" or message.client != self.name:
                raise GraftError(
                    f"a message of kind '{message.kind}' for '{message.client}' came to client '{self.name}'"
                )
            if message.base != self.place.digest:
                raise GraftError(other_base(message.base, self.place.digest))
            tensors, text = self.method.work(message.tensors, number, self.name)
            return self._message("update", number, text, tensors).encoded()
        except Exception as error:
            said = str(error) if isinstance(error, GraftError) else f"{type(error).__name__}: {error}"
            return self._message("problem", number, text=said).encoded()

    def _card(self) -> dict[str, object]:
        return {"rows": len(self.place.clients[self.name]), "terms": self.place.federation.terms}

    def _message(self, kind: Kind, number: int, text: str, tensors: Tensors | None = None) -> Message:
        return Message(kind, number, self.name, self.place.digest, tensors or {}, text)


def read_card(message: Message, place: Workplace) -> int:
    """Return the number of rows of a client that introduces itself. Raises `GraftError` for another base or other terms, and no rows."""
    if message.kind == "problem":
        raise GraftError(message.text)
    if message.kind != "card":
        raise GraftError(f"it answered hello by a message of kind '{message.kind}'")
    if message.base != place.digest:
        raise GraftError(other_base(message.base, place.digest))
    try:
        card = json.loads(message.text)
        rows, terms = int(card["rows"]), card["terms"]
    except (ValueError, KeyError, TypeError) as error:
        raise GraftError(f"what it says of itself cannot be read: {message.text[:60]!r}") from error
    mine = json.loads(to_json(place.federation.terms))
    if changed := differing(mine, terms):
        raise GraftError(f"it trains by other settings, which differ in {', '.join(changed[:6])}: give it the server's")
    if rows < 1:
        raise GraftError("it has no rows to train on")
    return rows


def other_base(theirs: str, ours: str) -> str:
    return f"it has another base (digest {theirs}, here {ours}): load the same weights, in the same form, everywhere"
