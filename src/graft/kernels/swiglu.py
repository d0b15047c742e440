"""Compute the product of a gated MLP, silu(e) * u, by one kernel, wherever Graft runs the MLP (`injection/gated_mlp.py`).

Its gradients stay torch's: Liger's kernel writes them over e and u, which a second backward pass may need. With copies of both, the kernel
would pass over memory nine times instead of torch's eleven, and hold one more tensor.

Dauphin et al. 2017 (arXiv 1612.08083); Shazeer 2020, "GLU variants improve transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from graft.injection.gated_mlp import GATED
from graft.injection.state import State
from graft.kernels.liger import Kernels


def serve_products(root: nn.Module, kernels: Kernels) -> int:
    """Let the kernel compute the products in a model with adapters. Return how many MLPs have one."""
    state: State | None = root.__dict__.get("graft_state")
    if state is None:
        return 0
    state.silu_product = _product(kernels)
    return sum(
        note.activation == "silu" for module in root.modules() if (note := module.__dict__.get(GATED)) is not None
    )


def release_products(root: nn.Module) -> None:
    """Let torch compute the products again."""
    state: State | None = root.__dict__.get("graft_state")
    if state is not None:
        state.silu_product = None


def _product(kernels: Kernels) -> Callable[[Tensor, Tensor], Tensor | None]:
    """Return a function that computes the product, or returns None if the kernel does not accept the tensors."""

    def product(e: Tensor, u: Tensor) -> Tensor | None:
        fit = e.shape == u.shape and e.is_contiguous() and u.is_contiguous()
        return kernels.silu_product(e, u) if fit and kernels.accepts(e, u) else None

    return product
