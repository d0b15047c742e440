"""The product of a gated MLP, silu(e) * u, by one kernel, wherever Graft runs the MLP (`gated_forward.py`).

Its gradients stay torch's: Liger's kernel writes them over e and u, which a second backward pass may need. With copies of both it would
go over memory nine times where torch's operations go eleven times, and hold a tensor more.

Dauphin et al. 2017 (arXiv 1612.08083); Shazeer 2020, "GLU variants improve transformer" (arXiv 2002.05202).

Legend: F features of the MLP's middle.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from graft.injection.gated_mlp import NOTE
from graft.injection.state import State
from graft.kernels.liger import Kernels


def serve_products(root: nn.Module, kernels: Kernels) -> int:
    """Let the kernel compute the products of a model with adapters; how many MLPs have one."""
    state: State | None = root.__dict__.get("graft_state")
    if state is None:
        return 0
    state.silu_product = _product(kernels)
    return sum(
        note.activation == "silu" for module in root.modules() if (note := module.__dict__.get(NOTE)) is not None
    )


def release_products(root: nn.Module) -> None:
    """Give them back to torch."""
    state: State | None = root.__dict__.get("graft_state")
    if state is not None:
        state.silu_product = None


def _product(kernels: Kernels) -> Callable[[Tensor, Tensor], Tensor | None]:
    def product(e: Tensor, u: Tensor) -> Tensor | None:
        fit = e.shape == u.shape and e.is_contiguous() and u.is_contiguous()
        return kernels.silu_product(e, u) if fit and kernels.take(e, u) else None

    return product
