"""One call of one block in a forward pass, and how to repeat it in the backward pass: with the same arguments, random numbers and autocast.

Legend: [..., D] hidden features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.two_streams import STREAM
from graft.injection.arguments import given_to
from graft.injection.call import Call
from graft.reversible.couplings import Part
from graft.reversible.halves import Halves


class Draws:
    """The states of torch's random generators, to draw the same numbers again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cpu = device, torch.get_rng_state()
        self.own = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers in a block of code. Afterwards the generators are as they were before it."""
        devices = [] if self.own is None else [self.device]
        with torch.random.fork_rng(devices, device_type="cuda" if self.own is None else self.device.type):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.get_device_module(self.device).set_rng_state(self.own, self.device)
            yield


@dataclass(frozen=True, eq=False)
class Autocast:
    """The autocast settings of a forward pass."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, device: str) -> Autocast:
        """Return the settings in effect."""
        return cls(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))

    def again(self) -> Any:
        """Return a context manager that puts them into effect."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled)


@dataclass(frozen=True, eq=False)
class BlockCall:
    """The call of one block: what it was given besides the hidden states."""

    block: Any
    halves: Halves
    key: str | None
    """The keyword of the hidden states, None if they are the first positional argument."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    """The dtype in which the block computes. The streams may be wider."""

    @classmethod
    def of(cls, block: nn.Module, halves: Halves, call: Call) -> BlockCall:
        """Take the hidden states out of a call."""
        kwargs = {name: value for name, value in call.kwargs.items() if name != call.key}
        return cls(block, halves, call.key, call.args[1:], kwargs, call.x.dtype)

    def without(self, cache: Any) -> BlockCall:
        """Return the call without a cache, which must not be written to again."""
        args = tuple(None if value is cache else value for value in self.args)
        kwargs = {name: None if value is cache else value for name, value in self.kwargs.items()}
        return replace(self, args=args, kwargs=kwargs)

    def arguments(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with these hidden states."""
        return ((x, *self.args), self.kwargs) if self.key is None else (self.args, {**self.kwargs, self.key: x})

    def rounded(self, x: Tensor) -> Tensor:
        """Return what F or G reads of a stream: the stream in the dtype of the block, without history."""
        return x.detach().to(self.dtype)

    def function(self, part: Part, x: Tensor) -> Tensor | None:
        """Return F(x) or G(x), None for a stream without an adapter. x: [..., D] in the dtype of the block -> [..., D]."""
        if part == "stream":
            host = self.block._modules[STREAM]
            return host(x) if host._modules else None
        if part == "mlp":
            return self.halves.mlp(self.block, x)
        args, kwargs = self.arguments(x)
        if part == "attention":
            given = {name: value for name, value in given_to(self.block, args, kwargs).items() if value is not x}
            return self.halves.attention(self.block, x, given)
        return self.block.graft_own_forward(*args, **kwargs)
