"""Holes: blocks and tables of the base that another process runs. They stay in the model, with their adapters, and hold no weights.

Adapters keep their places, names and tensors, so that saving, switching and detaching know nothing of holes.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from graft.architectures.walk import base_modules
from graft.distributed.pipeline import Stage
from graft.injection.call import Call
from graft.injection.substitution import register_outermost, substitute

Role = Literal["take", "hand_on", "pass"]
"""What a hole does: take hidden states from the rank before, hand them on to the next rank, or nothing."""


@register_outermost
class Hole:
    """Mixin for a block that another rank runs."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        role, stage, more = self.__dict__["graft_hole"]
        hidden = Call.of(args, kwargs).x
        if role == "take":
            hidden = stage.take(hidden)
        elif role == "hand_on":
            hidden = stage.hand_on(hidden)
        return hidden if more is None else (hidden, *(None,) * more)


@register_outermost
class EmptyTable:
    """Mixin for an embedding whose output no block of this rank reads: zeros of its shape."""

    def __call__(self: Any, ids: Tensor) -> Tensor:
        return self.weight.new_zeros(*ids.shape, self.graft_width, device=ids.device)


def make_hole(block: nn.Module, role: Role, stage: Stage, more: int | None) -> None:
    """Make a hole of a block and free its weights, which become shapes on the meta device.

    more: how many further things the block returns in a tuple with the hidden states; None where it returns these alone.
    """
    block.__dict__["graft_hole"] = (role, stage, more)
    substitute(block, Hole)
    for _, module in base_modules(block):
        free(module)


def empty_table(table: nn.Module, width: int) -> None:
    """Free the weights of an embedding, and let it give zeros [..., width]."""
    table.__dict__["graft_width"] = width
    substitute(table, EmptyTable)
    free(table)


def free(module: nn.Module) -> None:
    """Free the weights that a module holds itself: they become shapes on the meta device."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
