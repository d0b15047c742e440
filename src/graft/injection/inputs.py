"""Keep the input of an attention module while it runs, for adapters with keys, values or gates that depend on it."""

from __future__ import annotations

from typing import Any

from graft.injection.call import Call
from graft.injection.substitution import ORDER, GraftedForward


class KeepsInput:
    """Mixin for an attention module: its container has the input x [B, L, D] as `attention_input` during a call."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        container = self._modules["graft"]
        container.attention_input = Call.of(args, kwargs).x
        output = super().forward(*args, **kwargs)  # pyright: ignore
        container.attention_input = None
        return output


# Around Graft's own attention forwards, and inside of adapters that change the module's input.
ORDER.insert(ORDER.index(GraftedForward) + 1, KeepsInput)
