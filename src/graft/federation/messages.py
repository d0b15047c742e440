"""What travels between the server and a client: tensors as safetensors, with one line of metadata. Nothing is unpickled.

"1|train|3|client-007|61c9..."     version of the protocol, kind, round, client, digest of the base's weights

hello     the server asks who is there            card      the client's number of rows and its terms, in `text`
train     the server's state for a round          update    what the client learnt from it
                                                  problem   why it could not, in `text`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from graft.errors import GraftError

VERSION = "1"
Kind = Literal["hello", "train", "card", "update", "problem"]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Message:
    """One message."""

    kind: Kind
    round: int
    client: str
    base: str
    """Digest of the base's weights."""
    tensors: Tensors = field(default_factory=dict)
    text: str = ""

    def encoded(self) -> bytes:
        """Return the message as it travels."""
        line = "|".join((VERSION, self.kind, str(self.round), self.client, self.base))
        metadata = {"graft": line, **({"text": self.text} if self.text else {})}
        return packed(self.tensors, metadata)


def packed(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    """Return tensors as safetensors."""
    return save({key: each.detach().cpu().contiguous() for key, each in tensors.items()}, metadata)


def decoded(data: bytes) -> Message:
    """Read a message. Raises `GraftError` for bytes that are none, or of another version of the protocol."""
    try:
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = load(data)
        version, kind, number, client, base = str(metadata["graft"]).split("|")
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise GraftError(f"{len(data)} bytes arrived that are no message of a federation of Graft") from error
    if version != VERSION:
        raise GraftError(
            f"a message is of version {version} of the protocol, and this is version {VERSION}: install the same release of graft-llm on "
            "the server and on every client"
        )
    if kind not in get_args(Kind) or not number.isdecimal():
        raise GraftError(f"a message of the unknown kind '{kind}' arrived, for round {number}")
    return Message(kind, int(number), client, base, tensors, str(metadata.get("text", "")))  # pyright: ignore[reportArgumentType]
