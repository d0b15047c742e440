"""Holes: blocks of the base that another process runs. They stay in the model, with their adapters, and hold no weights.

Adapters keep their places, names and tensors, so that saving, switching and detaching know nothing of holes.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

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


def make_hole(block: nn.Module, role: Role, stage: Stage, more: int | None) -> None:
    """Make a hole of a block and free its weights, which become shapes on the meta device.

    more: how many further things the block returns in a tuple with the hidden states; None where it returns these alone.
    """
    block.__dict__["graft_hole"] = (role, stage, more)
    substitute(block, Hole)
    for _, module in base_modules(block):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
