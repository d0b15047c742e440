"""What Graft uses of torch that is private.

Why: torch has no public way to ask whether a function transform is running, which backward pass is running, whether hooks are set on all
modules, how many graphs one function may have, or to check a condition inside a compiled graph without a graph break.
Breaks: with an AttributeError at the first use, if a release of torch renames one of these functions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def in_function_transform() -> bool:
    """Whether a function transform (`torch.func.grad`, `vmap`, ...) is running, which has to see every operation."""
    return torch._C._are_functorch_transforms_active()


def backward_pass_number() -> int:
    """Return the number of the backward pass that is running, -1 outside of one."""
    return torch._C._current_graph_task_id()


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class's forward: hooks of its own or of all modules, or a forward on the instance."""
    tables = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return "forward" in module.__dict__ or any(map(len, tables)) or bool(nn.modules.module._has_any_global_hook())


def raise_recompile_limit(least: int) -> None:
    """Let torch.compile make at least this many graphs of one function."""
    torch._dynamo.config.recompile_limit = max(least, torch._dynamo.config.recompile_limit)


def assert_in_graph(condition: Tensor, message: str) -> None:
    """Raise a RuntimeError when a compiled graph runs and the condition (a tensor of one bool) is false."""
    torch.ops.aten._assert_async.msg(condition, message)
