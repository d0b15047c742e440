"""The names, modules, tensors and parameters of a model's adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from graft.adapters.base import AdapterModule
from graft.adapters.nesting import every_module
from graft.injection.state import State, state_of, unwrapped


def names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the attached adapters, in the order of attaching."""
    state = unwrapped(model).__dict__.get("graft_state")
    return () if state is None else tuple(state.adapters)


def modules_of(root: nn.Module, state: State, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of every module of an adapter: one per site, then the shared ones. See `AttachedAdapter.modules`."""
    yield from state.adapter(name).modules()


def tensors(root: nn.Module, state: State, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of an adapter's parameters and persistent buffers, the tensors themselves and no copies."""
    for path, module in modules_of(root, state, name):
        for key, tensor in module.state_dict(keep_vars=True).items():
            yield f"{path}.{key}", tensor


def parameters(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name, parameter) of everything that trains in an adapter."""
    for path, module in modules_of(unwrapped(model), state_of(model), name):
        for key, parameter in module.named_parameters():
            yield f"{path}.{key}", parameter


def adapter_modules(model: nn.Module, name: str) -> list[AdapterModule]:
    """Return every module of an adapter: one per site, then the shared ones; after each, those inside it."""
    return [module for _, module in _every_module(model, name)]


def _every_module(model: nn.Module, name: str) -> Iterator[tuple[str, AdapterModule]]:
    for path, module in modules_of(unwrapped(model), state_of(model), name):
        yield from every_module(path, module)


def lr_factors(model: nn.Module, name: str) -> dict[str, float]:
    """Return, by parameter name as in `parameters`, the factor of its learning rate."""
    factors: dict[str, float] = {}
    for path, module in _every_module(model, name):
        # A composite comes before the modules inside it, so that these have the last word about their own parameters.
        factors |= {f"{path}.{key}": module.lr_factor(key) for key, _ in module.named_parameters()}
    return factors


def parameter_groups(model: nn.Module, name: str, lr: float) -> list[dict[str, Any]]:
    """Return an adapter's parameters as groups for a torch optimiser, each with its own learning rate (LoRA+ has two).

    lr: the learning rate of parameters with factor 1. Their group comes first.
    """
    factors, groups = lr_factors(model, name), {}
    for key, parameter in parameters(model, name):
        groups.setdefault(factors[key], []).append(parameter)
    ordered = sorted(groups, key=lambda factor: (factor != 1.0, factor))
    return [{"params": groups[factor], "lr": lr * factor} for factor in ordered]


def penalty(model: nn.Module, name: str) -> torch.Tensor | None:
    """Return the scalar that an adapter's kind adds to the loss of an optimizer step, or None.

    AdaLoRA keeps its factors orthogonal with it.
    Graft's engine adds it, and so does `graft.callback` under a Trainer. A loop of your own has to add it to the loss before backward.
    """
    return summed_penalty(adapter_modules(model, name))


def summed_penalty(modules: Iterable[AdapterModule]) -> torch.Tensor | None:
    """Return the sum of the penalties of an adapter's modules, None if there are none."""
    terms = [term for module in modules if (term := module.penalty()) is not None]
    return torch.stack(terms).sum() if terms else None


def after_step(model: nn.Module, name: str, step: int, steps: int) -> None:
    """Let an adapter act after an optimizer step, while its gradients are still there. AdaLoRA gives ranks to the sites that need them.

    Graft's engine calls this, and so does `graft.callback` under a Trainer. A loop of your own has to call it between `optimizer.step()`
    and `optimizer.zero_grad()`.
    step: the number of the step, from 1. steps: the number of all steps. Raises `GraftError` if they are too few for a kind's schedule.
    """
    for module in adapter_modules(model, name):
        module.after_step(step, steps)
