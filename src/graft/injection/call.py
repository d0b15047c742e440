"""One call of a module: which argument is the input, and which part of the output is the activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

INPUT_NAMES = ("hidden_states", "input", "x", "inputs", "input_ids")
"""Names under which modules take their input, most common first. Under any other names, the first keyword is the input."""


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of a call. The input x is the first positional one (`key` is None) or the keyword `key`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None
    x: Tensor

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Find the input among the arguments."""
        key = None if args else next(name for name in (*INPUT_NAMES, *kwargs) if name in kwargs)
        return cls(args, kwargs, key, args[0] if key is None else kwargs[key])

    @property
    def has_more(self) -> bool:
        """Whether there are arguments besides the input."""
        return len(self.args) + len(self.kwargs) > 1

    def with_input(self, x: Tensor) -> Call:
        """Return the call with another input, which is brought into the shape of this one."""
        x = x.reshape(self.x.shape)
        if self.key is None:
            return Call((x, *self.args[1:]), self.kwargs, None, x)
        return Call(self.args, {**self.kwargs, self.key: x}, self.key, x)

    def in_shape(self, h: Tensor) -> Tensor:
        """Return an output [B, L, O] with the leading dimensions of the input."""
        return h.reshape(*self.x.shape[:-1], h.shape[-1])

    def first(self, output: Any) -> Tensor:
        """Return the activation h: the output, or the first of several."""
        return output[0] if isinstance(output, tuple) else output

    def with_first(self, output: Any, h: Tensor) -> Any:
        """Return the output with another activation, which is brought into the shape of this one."""
        h = h.reshape(self.first(output).shape)
        return (h, *output[1:]) if isinstance(output, tuple) else h
