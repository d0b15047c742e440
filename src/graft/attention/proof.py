"""Prove that Graft's attention forwards compute what the installed transformers computes, before an adapter relies on one.

They read the insides of a module, which a release may change. If one fails or differs, attaching (or a padding-free run) ends with an error
that names the release, so nothing goes wrong in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.transformers_internals import has_device_hook
from graft.architectures.walk import base_modules, own_class
from graft.attention.own_forward import OwnForward
from graft.errors import GraftError
from graft.injection.arguments import CACHE_NAMES, cache_name, cache_of, given_to
from graft.injection.modes import evaluation_mode
from graft.injection.state import State
from graft.routing.context import ForwardContext

ONLY_ADDED = ("residual",)
"""Arguments that a forward only adds to its output. They are set to zero, because large ones would hide a difference."""


def prove_forwards(root: Any, state: State) -> None:
    """Run a few tokens through the bare base, then one more with the cache, and compare both forwards, once per class.

    Raises `GraftError` if they differ. A model on the meta device, or one without tokens to try, is not checked.
    """
    ours: list[Any] = [module for _, module in base_modules(root) if isinstance(module, OwnForward)]
    modules = {own_class(module): module for module in reversed(ours) if own_class(module) not in state.proved_forwards}
    if not modules or (ids := _text(root)) is None:
        return
    with (
        evaluation_mode(root),
        torch.no_grad(),
        state.carrying(ForwardContext()),
        _compared(list(modules.values())),
    ):
        _run(root, ids)
    state.proved_forwards.update(modules)


def _text(root: Any) -> Tensor | None:
    """Return the few token ids [B, L] that transformers has for trying this model, None if it has none."""
    dummy = getattr(root, "dummy_inputs", None)
    ids = dummy.get("input_ids") if isinstance(dummy, Mapping) else None
    if ids is None:
        return None
    device = root.get_input_embeddings().weight.device
    if device.type != "meta":
        return ids.to(device)
    # Offloaded weights are on the meta device too, and accelerate's hooks load them when they are needed.
    hooked = any(has_device_hook(module) for _, module in base_modules(root))
    return ids if hooked else None


def _run(root: Any, ids: Tensor) -> None:
    """Run tokens of which the first row's last is masked, and then one more token with the cache."""
    mask, name = torch.ones_like(ids), cache_name(root.forward)
    mask[0, ..., -1] = 0
    output = root(input_ids=ids, attention_mask=mask, **({} if name is None else {"use_cache": True}))
    cache = None if name is None else cache_of(output)
    if cache is not None:
        mask = torch.cat([mask, torch.ones_like(mask[..., :1])], -1)
        root(input_ids=ids[..., :1], attention_mask=mask, use_cache=True, **{str(name): cache})


@contextmanager
def _compared(modules: list[nn.Module]) -> Iterator[None]:
    """Compare both forwards at every call of these modules."""
    handles = [module.register_forward_pre_hook(_compare, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(module: Any, args: Any, kwargs: Any) -> None:
    """Compare the module's own forward with Graft's on these arguments. Raises `GraftError` if Graft's fails or differs."""
    given = given_to(module, args, kwargs)
    given |= {name: torch.zeros_like(given[name]) for name in ONLY_ADDED if name in given}
    theirs = own_class(module).forward(module, **_with_own_cache(given))[0]
    exact = theirs.dtype in (torch.float32, torch.float64)
    allowed = (1e-5 if exact else 5e-2) * float(theirs.abs().max())
    for way in (True, False):
        try:
            ours = module.through_function(_with_own_cache(given), exact=way)[0]
            difference = float((ours - theirs).abs().max())
        except (GraftError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # reading what a release has removed may raise anything
            raise _refusal(module, f"Graft's forward for it fails ({type(error).__name__}: {error})") from error
        if not difference <= allowed:
            raise _refusal(module, f"Graft's forward for it is {difference:.2g} off (allowed {allowed:.2g})")


def _with_own_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the cache among the arguments, because a call adds to it."""
    return {name: copy.deepcopy(value) if name in CACHE_NAMES else value for name, value in given.items()}


def _refusal(module: nn.Module, finding: str) -> GraftError:
    from transformers import __version__ as release

    return GraftError(
        f"{type(module).__name__} of transformers {release} is not what this release of Graft knows: {finding}. "
        "Prefix, prompt, p-tuning, llama-adapter and padding-free batches do not run in it. Adapters at its linear layers and sublayers "
        "(lora, ia3, bottlenecks and the like) and padded batches still do. docs/versions.md names the releases that Graft was tested with"
    )
