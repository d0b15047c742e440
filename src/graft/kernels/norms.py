"""RMS norms by one kernel: y = x / sqrt(mean(x^2) + eps) * (offset + w).

Families differ in the offset (1 in Gemma, where weights start at zero) and in where half precision is rounded: LLaMA rounds before it
multiplies by the weight, Gemma after. Both are read off the module's own forward, run by a stand-in with a random weight.

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization" (arXiv 1910.07467).

Legend: R rows, D features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.injection.substitution import own_class, register_mixin
from graft.kernels.liger import Kernels

FOREIGN = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, NotImplementedError)
"""What a forward that is no RMS norm's may make of the stand-in."""
ROUNDED_ELSEWHERE = 0.05
"""Share of numbers that may differ in bfloat16 where only the order of operations does."""


@dataclass(frozen=True)
class Recipe:
    """What tells one RMS norm from another."""

    eps: float
    offset: float = 0.0
    casting: Literal["llama", "gemma"] = "llama"
    """Rounded to x's dtype before the weight, or after."""

    def plain(self, x_RD: Tensor, weight_D: Tensor) -> Tensor:
        """The norm by torch's operations."""
        wide = x_RD.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.casting == "llama":
            return (self.offset + weight_D) * normed.to(x_RD.dtype)
        return (normed * (self.offset + weight_D.float())).to(x_RD.dtype)


@register_mixin
class NormsByKernel:
    """Mixin of an RMS norm."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        recipe, kernels = self.__dict__["graft_norm"]
        if len(args) == 1 and not kwargs and kernels.take(args[0], self.weight):
            return kernels.norm(args[0], self.weight, recipe.eps, recipe.offset, recipe.casting)
        return super().forward(*args, **kwargs)  # pyright: ignore


def serve_norm(module: nn.Module, kernels: Kernels) -> bool:
    """Let the kernel compute a module that is an RMS norm; whether it is one."""
    recipe = recipe_of(module)
    if recipe is not None:
        module.__dict__["graft_norm"] = (recipe, kernels)
    return recipe is not None


def recipe_of(module: nn.Module) -> Recipe | None:
    """What an RMS norm computes; None for any other module, and for torch's own, which is one kernel already."""
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._buffers and not module._modules.keys() - {"graft"}
    if weight is None or weight.dim() != 1 or not alone or isinstance(module, nn.RMSNorm):
        return None
    settings = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    return _recipe(own_class(module), weight.shape[0], tuple(settings.items()))


@functools.cache
def _recipe(cls: type[nn.Module], width: int, settings: tuple[tuple[str, Any], ...]) -> Recipe | None:
    """The same for all modules of one class, width and settings."""
    module: Any = cls.__new__(cls)
    nn.Module.__init__(module)
    module.__dict__.update({**dict(settings), "training": False})
    draw = torch.Generator().manual_seed(0)
    weight_D = torch.randn(width, generator=draw)
    x_RD = torch.randn(8, width, generator=draw)
    for eps in dict.fromkeys(value for _, value in settings if type(value) is float and value > 0.0):
        small = torch.cat([x_RD, x_RD * eps**0.5])  # where eps counts as much as x
        for offset in (0.0, 1.0):
            recipe = Recipe(eps, offset)
            found = _own(module, weight_D, small)
            if found is not None and torch.allclose(found, recipe.plain(small, weight_D), rtol=1e-4, atol=1e-6):
                return _with_casting(module, recipe, weight_D.bfloat16(), x_RD.bfloat16())
    return None


def _own(module: Any, weight_D: Tensor, x_RD: Tensor) -> Tensor | None:
    module._parameters["weight"] = nn.Parameter(weight_D, requires_grad=False)
    try:
        found = type(module).forward(module, x_RD)
    except FOREIGN:
        return None
    return found if isinstance(found, Tensor) and found.shape == x_RD.shape else None


def _with_casting(module: Any, recipe: Recipe, weight_D: Tensor, x_RD: Tensor) -> Recipe | None:
    found = _own(module, weight_D, x_RD)
    if found is None or found.dtype != x_RD.dtype:
        return None
    for casting in ("llama", "gemma"):
        each = Recipe(recipe.eps, recipe.offset, casting)
        if float((each.plain(x_RD, weight_D) != found).float().mean()) < ROUNDED_ELSEWHERE:
            return each
    return None
