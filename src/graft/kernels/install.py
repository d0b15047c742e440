"""Give modules of a model to the kernels for a block of code, and take them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from graft.kernels.liger import Kernels
from graft.kernels.norms import NormsByKernel, serve_norm
from graft.kernels.rotary import RotatesByKernel, serve_rotation
from graft.kernels.swiglu import release_products, serve_products
from graft.state import unwrapped
from graft.substitution import restore, substitute

SERVED: tuple[tuple[str, Callable[[nn.Module, Kernels], bool], type, str], ...] = (
    ("norms", serve_norm, NormsByKernel, "graft_norm"),
    ("rotary positions", serve_rotation, RotatesByKernel, "graft_rotary"),
)
"""What it is called, what finds it, the mixin, and what the mixin reads."""


@dataclass(frozen=True)
class Served:
    """How many modules of each sort the kernels compute."""

    version: str
    counts: dict[str, int]

    def __str__(self) -> str:
        found = [f"{count} {name}" for name, count in self.counts.items() if count]
        return f"Liger {self.version} ({', '.join(found)})"

    def __bool__(self) -> bool:
        return any(self.counts.values())


@contextmanager
def serving(model: nn.Module, kernels: Kernels) -> Iterator[Served]:
    """Let the kernels compute what they can of a model in a block of code. Modules whose forward is their instance's own are left alone."""
    root, taken = unwrapped(model), []
    counts = dict.fromkeys((name for name, *_ in SERVED), 0)
    try:
        for path, module in root.named_modules():
            if "graft" in path.split(".") or "forward" in module.__dict__:
                continue
            for name, serve, mixin, key in SERVED:
                if serve(module, kernels):
                    taken.append((path, module, mixin, key))
                    substitute(module, mixin)
                    counts[name] += 1
        counts["SwiGLU"] = serve_products(root, kernels)
        yield Served(kernels.version, counts)
    finally:
        release_products(root)
        for path, module, mixin, key in reversed(taken):
            restore(
                module,
                path,
                keep=tuple(each for each in getattr(type(module), "graft_mixins", ()) if each is not mixin),
            )
            module.__dict__.pop(key)
