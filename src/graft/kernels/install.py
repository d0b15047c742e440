"""Give modules of a model to the kernels for a block of code, and take them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from graft.injection.state import unwrapped
from graft.injection.substitution import restore, substitute
from graft.kernels.liger import NORMS, ROTARY, SWIGLU, Kernels
from graft.kernels.norms import NormsByKernel, serve_norm
from graft.kernels.rotary import RotatesByKernel, serve_rotation
from graft.kernels.swiglu import release_products, serve_products

SERVED: tuple[tuple[str, Callable[[nn.Module, Kernels], bool], type, str], ...] = (
    (NORMS, serve_norm, NormsByKernel, "graft_norm"),
    (ROTARY, serve_rotation, RotatesByKernel, "graft_rotary"),
)
"""What it is called, what finds it, the mixin, and what the mixin reads."""


@dataclass(frozen=True)
class Served:
    """What is given to the kernels."""

    kernels: Kernels
    counts: dict[str, int]
    """Modules of each sort."""

    @property
    def used(self) -> dict[str, int]:
        """The sorts that the kernels have computed since: tensors of another dtype or shape than they take stay torch's."""
        return {sort: count for sort, count in self.counts.items() if count and self.kernels.uses[sort]}

    def __str__(self) -> str:
        return f"Liger {self.kernels.version} ({', '.join(f'{count} {sort}' for sort, count in self.used.items())})"


@contextmanager
def serving(model: nn.Module, kernels: Kernels) -> Iterator[Served]:
    """Let the kernels compute what they can of a model in a block of code. Modules whose forward is their instance's own are left alone."""
    root, taken = unwrapped(model), []
    counts = dict.fromkeys((sort for sort, *_ in SERVED), 0)
    try:
        for path, module in root.named_modules():
            if "graft" in path.split(".") or "forward" in module.__dict__:
                continue
            for sort, serve, mixin, key in SERVED:
                if serve(module, kernels):
                    taken.append((path, module, mixin, key))
                    substitute(module, mixin)
                    counts[sort] += 1
        counts[SWIGLU] = serve_products(root, kernels)
        yield Served(kernels, counts)
    finally:
        release_products(root)
        for path, module, mixin, key in reversed(taken):
            others = tuple(each for each in getattr(type(module), "graft_mixins", ()) if each is not mixin)
            restore(module, path, keep=others)
            module.__dict__.pop(key)
