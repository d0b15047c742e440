"""The state of any optimiser as named tensors, for checkpoints and for jobs that are set aside.

A parameter's state is a mapping of tensors and plain numbers. `A:exp_avg` is the tensor `exp_avg` of the parameter `A`; a number becomes a
tensor without dimensions, with a # after its name, as in `A:step#`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

NUMBER = "#"


def optimizer_tensors(optimizer: Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the state as {"<parameter>:<key>": tensor}, which is empty before the first step.

    names: of the optimiser's parameters, in their order.
    """
    found: dict[str, Tensor] = {}
    for name, (_, _, parameter) in zip(names, _places(optimizer), strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and not key.startswith("qmap"):
                found[f"{name}:{key}"] = value
            elif isinstance(value, int | float):
                found[f"{name}:{key}{NUMBER}"] = torch.tensor(
                    value, dtype=torch.int64 if isinstance(value, int) else torch.float64
                )
    return found


def restore_optimizer(optimizer: Optimizer, names: Sequence[str], stored: Mapping[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` returned. Tensors go to the devices of their parameters."""
    own: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        name, _, part = key.rpartition(":")
        own.setdefault(name, {})[part] = tensor
    for name, place in zip(names, _places(optimizer), strict=True):
        if name in own:
            _restore(optimizer, *place, own[name])


def _places(optimizer: Optimizer) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (number of the group, number in the group, parameter)."""
    for at, group in enumerate(optimizer.param_groups):
        for number, parameter in enumerate(group["params"]):
            yield at, number, parameter


def _restore(optimizer: Any, group: int, number: int, parameter: Tensor, stored: Mapping[str, Tensor]) -> None:
    """Load the state of one parameter."""
    state = optimizer.state[parameter] = {}
    if hasattr(optimizer, "init_state"):  # bitsandbytes makes paged tensors, and the tables of 8-bit codes, itself
        optimizer.init_state(optimizer.param_groups[group], parameter, group, number)
        state = optimizer.state[parameter]
    # AdamW counts steps on the CPU, but on the parameter's device in its fused form.
    counts_here = isinstance(optimizer, AdamW) and optimizer.param_groups[group]["fused"]
    for key, tensor in stored.items():
        if key.endswith(NUMBER):
            state[key.removesuffix(NUMBER)] = tensor.item()
        elif isinstance(state.get(key), Tensor):
            state[key].copy_(tensor)
        else:
            state[key] = tensor.to("cpu" if key == "step" and not counts_here else parameter.device)
