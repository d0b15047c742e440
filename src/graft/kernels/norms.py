"""Compute RMS norms by one kernel: y = x / sqrt(mean(x^2) + eps) * (offset + w).

Families differ in the offset (1 in Gemma, where weights start at zero) and in where half precision is rounded: LLaMA rounds before it
multiplies by the weight, Gemma after. Both are found by running the forward of the module's class on a stand-in with a random weight.

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467).

Legend: N vectors, D features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.architectures.bare_copy import bare_instance
from graft.architectures.walk import own_class
from graft.injection.substitution import register_mixin
from graft.kernels.liger import Kernels

FORWARD_ERRORS = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, NotImplementedError)
"""The errors that a forward may raise on a stand-in if it computes something else."""
ROUNDING_SHARE = 0.05
"""The share of numbers that may differ in bfloat16 if only the order of operations differs."""


@dataclass(frozen=True)
class Recipe:
    """The constants of an RMS norm."""

    eps: float
    offset: float = 0.0
    casting: Literal["llama", "gemma"] = "llama"
    """llama rounds to x's dtype before the multiplication by the weight, gemma after it."""

    def plain(self, x_ND: Tensor, weight_D: Tensor) -> Tensor:
        """Compute the norm with torch's operations."""
        wide = x_ND.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.casting == "llama":
            return (self.offset + weight_D) * normed.to(x_ND.dtype)
        return (normed * (self.offset + weight_D.float())).to(x_ND.dtype)


@register_mixin
class NormsByKernel:
    """Mixin for an RMS norm."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        recipe, kernels = self.__dict__["graft_norm"]
        if len(args) == 1 and not kwargs and kernels.accepts(args[0], self.weight):
            return kernels.norm(args[0], self.weight, recipe.eps, recipe.offset, recipe.casting)
        return super().forward(*args, **kwargs)  # pyright: ignore


def serve_norm(module: nn.Module, kernels: Kernels) -> bool:
    """Let the kernel compute a module if it is an RMS norm. Return whether it is one."""
    recipe = recipe_of(module)
    if recipe is not None:
        module.__dict__["graft_norm"] = (recipe, kernels)
    return recipe is not None


def recipe_of(module: nn.Module) -> Recipe | None:
    """Return the recipe of an RMS norm. None for any other module, and for torch's own RMSNorm, which is one kernel already."""
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules.keys() - {"graft"}
    if weight is None or weight.dim() != 1 or not alone or isinstance(module, nn.RMSNorm):
        return None
    settings = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return _recipe(own_class(module), weight.shape[0], tuple(settings.items()))


@functools.cache
def _recipe(cls: type[nn.Module], width: int, settings: tuple[tuple[str, Any], ...]) -> Recipe | None:
    """Find the recipe by trying out the class's forward; the result holds for all modules of one class, width and settings.

    The stand-in is an instance that skips `__init__` and gets the settings as attributes. Each positive float among them may be eps; with
    offset 0 or 1 it gives a candidate, and the first that computes the same as the forward is the recipe.
    """
    module = bare_instance(cls, {**dict(settings), "training": False})
    draw = torch.Generator().manual_seed(0)
    weight_D = torch.randn(width, generator=draw)
    x_ND = torch.randn(8, width, generator=draw)
    for eps in dict.fromkeys(value for _, value in settings if type(value) is float and value > 0.0):
        small = torch.cat([x_ND, x_ND * eps**0.5])  # in the second half eps counts as much as x does
        for offset in (0.0, 1.0):
            recipe = Recipe(eps, offset)
            found = _forward_of(module, weight_D, small)
            if found is not None and torch.allclose(found, recipe.plain(small, weight_D), rtol=1e-4, atol=1e-6):
                return _with_casting(module, recipe, weight_D.bfloat16(), x_ND.bfloat16())
    return None


def _forward_of(module: Any, weight_D: Tensor, x_ND: Tensor) -> Tensor | None:
    """Run the class's forward with a weight. None if it fails or returns no tensor of x's shape."""
    module._parameters["weight"] = nn.Parameter(weight_D, requires_grad=False)
    try:
        found = type(module).forward(module, x_ND)
    except FORWARD_ERRORS:
        return None
    return found if isinstance(found, Tensor) and found.shape == x_ND.shape else None


def _with_casting(module: Any, recipe: Recipe, weight_D: Tensor, x_ND: Tensor) -> Recipe | None:
    """Add where the norm rounds, found in bfloat16. None if it rounds in neither way."""
    found = _forward_of(module, weight_D, x_ND)
    if found is None or found.dtype != x_ND.dtype:
        return None
    for casting in ("llama", "gemma"):
        each = Recipe(recipe.eps, recipe.offset, casting)
        if float((each.plain(x_ND, weight_D) != found).float().mean()) < ROUNDING_SHARE:
            return each
    return None
