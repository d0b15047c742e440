"""Class substitution: a module becomes an instance of a generated subclass of its own class, and later of its own class again.

The model stays itself: `isinstance`, the class's name and module, and every key of the state dict are unchanged. Generated classes are
cached per (class, mixins) and are made again when a model is unpickled or deep-copied.

Why: adapters run around a module's own forward. A wrapper module would change the names in the state dict and the class, and a forward on
the instance would not survive a copy or a pickle. So `__class__` is assigned.
Breaks: if a class of modules forbids that (one with `__slots__`), Python raises a TypeError in attach. A library that puts a forward on
the instance (accelerate) is wrapped at the call instead.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from graft.errors import GraftError


class Substituted:
    """The base of all generated classes. It knows the class that a generated one stands for."""

    graft_base: type[nn.Module]
    graft_mixins: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self.graft_base, self.graft_mixins), self.__getstate__()  # pyright: ignore


class GraftedForward:
    """Mixin that runs the module's adapters around its forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["graft"].run(super().forward, args, kwargs)  # pyright: ignore


class GraftedCall:
    """Mixin that runs the module's adapters around its call, for a module with a forward on the instance (accelerate's hooks)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["graft"].run(super().__call__, args, kwargs)  # pyright: ignore


class KeepsContext:
    """Mixin for a block: under gradient checkpointing it is recomputed under the context that it first ran with.

    `graft.use` may have ended before backward. So the context goes through transformers' checkpointing function as an argument.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self.gradient_checkpointing and self.training:  # pyright: ignore
            context = self.__dict__["graft_state"].current
            if any(each is not None for each in (context.cached_kv, context.cache_to_fill, context.parts)):
                _refuse_reentrant(self)
            kwargs["graft_context"] = context
        return super().__call__(*args, **kwargs)  # pyright: ignore

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        context = kwargs.pop("graft_context", None)
        if context is None or context is self.__dict__["graft_state"].current:
            return super().forward(*args, **kwargs)  # pyright: ignore
        with self.__dict__["graft_state"].entered(context):
            return super().forward(*args, **kwargs)  # pyright: ignore


def _refuse_reentrant(layer: Any) -> None:
    """Raise `GraftError` for reentrant checkpointing, which runs a block without gradients first, so cached keys would get none."""
    if torch.is_grad_enabled() and getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
        raise GraftError(
            "virtual tokens in the embedding (prompt, p-tuning) do not train under reentrant checkpointing: "
            "model.gradient_checkpointing_enable({'use_reentrant': False})"
        )


ORDER: list[type] = [KeepsContext, GraftedCall, GraftedForward]
"""The mixins, outermost first. Higher rooms add their own with `register_mixin`."""


def register_mixin(mixin: type) -> type:
    """Class decorator: add a mixin to the order, inside those that were registered before."""
    ORDER.append(mixin)
    return mixin


def register_outermost(mixin: type) -> type:
    """Class decorator: add a mixin to the order, around all others."""
    ORDER.insert(0, mixin)
    return mixin


@functools.cache
def _generated(base: type[nn.Module], mixins: tuple[type, ...]) -> type[nn.Module]:
    namespace: dict[str, Any] = {
        "graft_base": base, "graft_mixins": mixins,
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
    }  # fmt: skip
    if any("forward" in mixin.__dict__ for mixin in mixins):
        # Callers inspect the signature: a Trainer drops the columns of a data set that it does not find there.
        @functools.wraps(base.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return super(cls, self).forward(*args, **kwargs)  # pyright: ignore

        # It has to be in the namespace: transformers wraps the forward of each new subclass of a layer when the class is made.
        namespace["forward"] = forward
    metaclass: Any = type(base)
    cls = metaclass(base.__name__, (*mixins, Substituted, base), namespace)
    return cls


def _rebuild(base: type[nn.Module], mixins: tuple[type, ...]) -> nn.Module:
    cls = _generated(base, mixins)
    return cls.__new__(cls)


def substitute(module: nn.Module, mixin: type) -> None:
    """Give a module one more mixin. A module that has it stays as it is."""
    cls = type(module)
    base, mixins = (cls.graft_base, cls.graft_mixins) if issubclass(cls, Substituted) else (cls, ())
    if mixin not in mixins:
        module.__class__ = _generated(base, tuple(sorted((*mixins, mixin), key=ORDER.index)))


def rebase(module: nn.Module, base: type[nn.Module]) -> None:
    """Give a module another class of its own, under the mixins that it has."""
    cls = type(module)
    module.__class__ = _generated(base, cls.graft_mixins) if issubclass(cls, Substituted) else base


def hooked(module: nn.Module) -> bool:
    """Whether a forward on the instance hides the one that Graft gave its class."""
    own = module.__dict__.get("forward")
    ours = any("forward" in mixin.__dict__ for mixin in getattr(type(module), "graft_mixins", ()))
    return ours and own is not None and getattr(own, "__func__", None) is not type(module).forward


def restore(module: nn.Module, path: str, *, keep: tuple[type, ...] = ()) -> None:
    """Give a module its own class back, or one with only the mixins in `keep`. Raises `GraftError` if other code has wrapped it since."""
    cls = type(module)
    if not issubclass(cls, Substituted):
        return
    if "graft_base" not in cls.__dict__:
        raise GraftError(
            f"module '{path}' was wrapped by other code after attach (its class is now {cls.__mro__[0]}): undo that before detach"
        )
    if hooked(module):
        raise GraftError(
            f"module '{path}' was hooked after attach (its instance has a forward of its own): remove that hook before detach"
        )
    if getattr(module.__dict__.get("forward"), "__func__", None) is cls.forward:
        del module.__dict__["forward"]  # what accelerate leaves when it removes a hook: the class's forward, bound
    mixins = tuple(mixin for mixin in cls.graft_mixins if mixin in keep)
    module.__class__ = _generated(cls.graft_base, mixins) if mixins else cls.graft_base
