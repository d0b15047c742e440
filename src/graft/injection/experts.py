"""The forward of a module of experts with adapters on its weights.

Such a module picks its matrices itself, in a loop or in one grouped product, so an adapter has to change the matrices: the module runs on
the tokens of each adapter with W + D in place of W. D has the size of the weights. So each adapter in use costs one copy of them per
forward pass, which training keeps for every layer until backward, unless blocks are checkpointed. Dropout of the input has no place in
W + D, so there is none. Under torch.compile the module runs outside the graph.

Why: the module reads its parameters as attributes, and an attribute in the instance's `__dict__` is found before a parameter.
Breaks: if a release of transformers passes the weights in another way. The adapters then have no effect, and the tests of experts fail.

Legend: E experts, I input features, O output features, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graft.adapters.hooks import ExpertsAdapter
from graft.architectures.experts import PARTS
from graft.errors import GraftError
from graft.injection.substitution import register_mixin
from graft.routing.context import ForwardContext

Base = Callable[..., Any]


@register_mixin
class RunsExperts:
    """Mixin for a module of experts: runs its forward with the weights of the adapters that serve the rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, super().forward, args, kwargs)  # pyright: ignore


@torch.compiler.disable
def _run(host: Any, base: Base, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    container = host._modules["graft"]
    state, context = container.state, container.state.current
    names = [name for name in container.hooks.experts if name in context.names]
    if not names or state.merged is not None:
        return base(*args, **kwargs)
    if state.reached is not None:
        state.reached.add(id(container))
    if isinstance(context.rows, str):
        with _with_weights(host, container.hooks.experts[context.rows]):
            return base(*args, **kwargs)
    return _by_tokens(host, base, args, kwargs, context, container.hooks.experts)


@contextmanager
def _with_weights(host: nn.Module, adapters: Sequence[ExpertsAdapter]) -> Iterator[None]:
    """Let the host read W + D in place of its parameters, for a block of code."""
    weights: dict[str, Tensor] = {}
    for adapter in adapters:
        weights[adapter.parameter] = adapter.changed(
            weights.get(adapter.parameter, host.get_parameter(adapter.parameter))
        )
    host.__dict__.update(weights)
    try:
        yield
    finally:
        for name in weights:
            del host.__dict__[name]


def _by_tokens(
    host: Any,
    base: Base,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: ForwardContext,
    table: dict[str, list[ExpertsAdapter]],
) -> Tensor:
    """Run the host once per adapter, on that adapter's tokens.

    Tokens come as [T, I] in the order of the batch with tensors of routing [T, K], or alone as [E T, I], once per expert. E.g. 2 rows
    of 3 tokens under rows ("a", None) run twice: tokens 0 to 2 with the weights of a, tokens 3 to 5 with those of the base.
    """
    tensors = [item for item in (*args, *kwargs.values()) if isinstance(item, Tensor)]
    x, copies = tensors[0], host.get_parameter(PARTS["down"]).shape[0] if len(tensors) == 1 else 1
    if x.dim() != 2 or x.shape[0] % copies:
        raise GraftError(
            f"{type(host).__name__} got a tensor of shape {tuple(x.shape)}, in which rows cannot be told apart: give all rows one adapter"
        )
    tokens = x.shape[0] // copies
    owner_T, names = _owners(x.view(copies, tokens, -1)[0], context)
    parts: list[tuple[Tensor, Tensor]] = []
    for number, name in enumerate((None, *names)):  # number 0 is the bare base
        index = (owner_T == number).nonzero().flatten()
        if not len(index):
            continue
        some_args = tuple(_select(item, index, copies) for item in args)
        some_kwargs = {key: _select(item, index, copies) for key, item in kwargs.items()}
        with _with_weights(host, table.get(name or "", ())):
            parts.append((index, base(*some_args, **some_kwargs).view(copies, len(index), -1)))
    out = parts[0][1].new_zeros(copies, tokens, parts[0][1].shape[-1])
    for index, part in parts:
        out = out.index_copy(1, index, part)
    return out.flatten(0, 1)


def _owners(x_TI: Tensor, context: ForwardContext) -> tuple[Tensor, list[str]]:
    """Return for each token [T] the number of its adapter, 0 for the bare base and n for the n-th name, and the names."""
    rows = 1 if context.flat else len(context.rows or ())
    if x_TI.shape[0] % rows:
        raise GraftError(
            f"{x_TI.shape[0]} tokens are not {rows} rows of one length, so experts cannot tell the rows apart: give all rows one adapter"
        )
    by_rows = x_TI.view(rows, -1, x_TI.shape[-1])
    owner = torch.zeros(by_rows.shape[:2], dtype=torch.long, device=x_TI.device)
    names: list[str] = []
    for name, index, _ in context.groups(by_rows):
        number = names.index(name) + 1 if name in names else len(names) + 1
        names += [name] if number > len(names) else []
        owner[(slice(None), index) if context.flat else index] = number
    return owner.flatten(), names


def _select(item: Any, index: Tensor, copies: int) -> Any:
    if not isinstance(item, Tensor):
        return item
    return item.view(copies, -1, *item.shape[1:]).index_select(1, index).flatten(0, 1)
