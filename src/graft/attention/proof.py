"""Prove that the attention forwards of ours compute what the installed transformers computes, before an adapter relies on one.

They read the insides of a module, which a release may change: where ours fails or differs, attaching (or a token-flat run) ends with an
error that names the release, and nothing is wrong in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.walk import base_modules
from graft.attention.own_forward import OwnForward
from graft.errors import GraftError
from graft.injection.arguments import CACHE_NAMES, cache_name, cache_of, given_to
from graft.injection.modes import evaluation_mode
from graft.injection.state import State
from graft.injection.substitution import own_class
from graft.routing.context import ForwardContext

ONLY_ADDED = ("residual",)
"""Arguments that a forward adds to its output: they would hide a difference."""


def prove_forwards(root: Any, state: State) -> None:
    """Run a few tokens through the bare base, then one more behind its cache, and compare ours with the module's own: once per class.

    Raises `GraftError` for one that differs. Nothing is proved of a model on the meta device, or of one without text to try it on.
    """
    ours: list[Any] = [module for _, module in base_modules(root) if isinstance(module, OwnForward)]
    modules = {own_class(module): module for module in reversed(ours) if own_class(module) not in state.proved_forwards}
    if not modules or (ids := _text(root)) is None:
        return
    with (
        evaluation_mode(root, state),
        torch.no_grad(),
        state.carrying(ForwardContext()),
        _compared(list(modules.values())),
    ):
        _run(root, ids)
    state.proved_forwards.update(modules)


def _text(root: Any) -> Tensor | None:
    """transformers' own few tokens [B, L] for this model."""
    dummy = getattr(root, "dummy_inputs", None)
    ids = dummy.get("input_ids") if isinstance(dummy, Mapping) else None
    if ids is None:
        return None
    device = root.get_input_embeddings().weight.device
    if device.type != "meta":
        return ids.to(device)
    hooked = any(hasattr(module, "_hf_hook") for _, module in base_modules(root))
    return ids if hooked else None  # accelerate's hooks bring weights and ids together


def _run(root: Any, ids: Tensor) -> None:
    mask, name = torch.ones_like(ids), cache_name(root.forward)
    mask[0, ..., -1] = 0
    output = root(input_ids=ids, attention_mask=mask, **({} if name is None else {"use_cache": True}))
    cache = None if name is None else cache_of(output)
    if cache is not None:
        mask = torch.cat([mask, torch.ones_like(mask[..., :1])], -1)
        root(input_ids=ids[..., :1], attention_mask=mask, use_cache=True, **{str(name): cache})


@contextmanager
def _compared(modules: list[nn.Module]) -> Iterator[None]:
    """Compare at every call of these modules."""
    handles = [module.register_forward_pre_hook(_compare, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compare(module: Any, args: Any, kwargs: Any) -> None:
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
        except Exception as error:  # whatever comes of reading what is no longer there
            raise _refusal(module, f"Graft's forward for it fails ({type(error).__name__}: {error})") from error
        if not difference <= allowed:
            raise _refusal(module, f"Graft's forward for it is {difference:.2g} off (allowed {allowed:.2g})")


def _with_own_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a copy of the cache, which a call fills."""
    return {name: copy.deepcopy(value) if name in CACHE_NAMES else value for name, value in given.items()}


def _refusal(module: nn.Module, said: str) -> GraftError:
    from transformers import __version__ as release

    return GraftError(
        f"{type(module).__name__} of transformers {release} is not what this release of Graft knows: {said}. "
        "Prefix, prompt, p-tuning, llama-adapter and token-flat batches do not run in it. Adapters at its linear layers and sublayers "
        "(lora, ia3, bottlenecks and the like) and padded batches still do. docs/versions.md names the releases that Graft was tested with"
    )
