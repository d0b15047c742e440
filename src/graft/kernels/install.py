"""Let kernels compute modules of a model while a block of code runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from graft.architectures.walk import base_modules
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
"""For each operation: its name, the function that recognises its modules, the mixin, and the attribute that the mixin reads."""


@dataclass(frozen=True)
class Served:
    """The modules that the kernels serve."""

    kernels: Kernels
    counts: dict[str, int]
    """The number of modules, by operation."""

    @property
    def used(self) -> dict[str, int]:
        """The counts of those operations that have run on a kernel at least once. Tensors that no kernel accepts stay with torch."""
        return {name: count for name, count in self.counts.items() if count and self.kernels.uses[name]}

    def __str__(self) -> str:
        return f"Liger {self.kernels.version} ({', '.join(f'{count} {name}' for name, count in self.used.items())})"


@contextmanager
def serving(model: nn.Module, kernels: Kernels) -> Iterator[Served]:
    """Let the kernels compute what they can in a model while a block of code runs.

    A module with a forward of its own, on the instance, is left alone: something else has patched it.
    """
    root, taken = unwrapped(model), []
    counts = dict.fromkeys((name for name, *_ in SERVED), 0)
    try:
        for path, module in base_modules(root):
            if "forward" in module.__dict__:
                continue
            for name, serve, mixin, key in SERVED:
                if serve(module, kernels):
                    taken.append((path, module, mixin, key))
                    substitute(module, mixin)
                    counts[name] += 1
        counts[SWIGLU] = serve_products(root, kernels)
        yield Served(kernels, counts)
    finally:
        release_products(root)
        for path, module, mixin, key in reversed(taken):
            # Other mixins (of adapters that the module hosts) stay.
            others = tuple(each for each in getattr(type(module), "graft_mixins", ()) if each is not mixin)
            restore(module, path, keep=others)
            module.__dict__.pop(key)
