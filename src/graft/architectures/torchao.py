"""The quantised weights of torchao, and how layers that round their input stay trainable.

Why: some of torchao's weights round the input of their layer too. Such a layer passes no gradient to its input, so that adapters in
earlier layers would learn through the residual stream alone, without an error; and what it computes no merged weight could compute. The
rounding is an attribute of the weight, for which torchao has no public switch.
Breaks: if torchao renames these attributes, training on such a base ends in an error before its first step
(`graft.training.forward.packed`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

ROUNDING = ("act_quant_kwargs", "activation_quantization")
"""The attributes of a weight that say how its layer's input is rounded; None is not at all."""
FORBIDDEN = "graft_rounds_input"
"""An attribute that keeps, on a layer where Graft has turned it off, how the input was rounded."""


def is_torchao(tensor: Any) -> bool:
    """Whether a tensor is of a class of torchao."""
    return type(getattr(tensor, "data", None)).__module__.startswith("torchao.")


def forbid_rounding(root: nn.Module, for_good: bool = False) -> None:
    """Let every layer with a weight of torchao compute with its input as it is. for_good: `allow_rounding` will not undo it."""
    for module in root.modules():
        weight: Any = module._parameters.get("weight")
        if not is_torchao(weight):
            continue
        given = {name: how for name in ROUNDING if (how := getattr(weight, name, None)) is not None}
        if given and not for_good:
            module.__dict__[FORBIDDEN] = given
        for name in given:
            setattr(weight, name, None)


def allow_rounding(root: nn.Module) -> None:
    """Undo `forbid_rounding`."""
    for module in root.modules():
        for name, how in module.__dict__.pop(FORBIDDEN, {}).items():
            setattr(module.weight, name, how)
