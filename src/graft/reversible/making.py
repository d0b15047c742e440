"""Make a loaded base reversible, in place: its blocks get two streams, its weights and their names stay.

Legend: [B, L, D] batch, length, hidden features.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graft.architectures.blocks import Block, blocks_of, text_config_of
from graft.architectures.torch_internals import has_hooks
from graft.architectures.two_streams import STREAM, Place, TwoStreams, Variant, put_in_place, two_streams_of
from graft.errors import GraftError, did_you_mean
from graft.injection.arguments import given_to
from graft.injection.call import Call
from graft.injection.state import unwrapped
from graft.injection.substitution import substitute
from graft.reversible.couplings import COUPLINGS
from graft.reversible.halves import HALVES, Halves
from graft.reversible.passes import CoupledBlock, StreamPartner

Model = TypeVar("Model", bound=nn.Module)
EXACT = (torch.float32, torch.float64)


def make_reversible(model: Model, variant: Variant, *, anchor_every: int | None = 3) -> Model:
    """Couple the blocks of a base into a reversible stack (MEFT), in place. Adapters are attached afterwards.

    variant: meft1, meft2 or meft3. anchor_every: both streams are kept before every so many blocks; None keeps those after the last block
    alone, which needs float32 or wider.
    Raises `GraftError` for a family that is not known, a model with adapters, hooks on its blocks or cross-attention, and for blocks that
    do not compute what their two halves compute.
    """
    root: Any = unwrapped(model)
    if not isinstance(variant, str) or variant not in COUPLINGS:
        raise GraftError(
            f"unknown reversible coupling '{variant}'.{did_you_mean(str(variant), COUPLINGS)} There are: {', '.join(COUPLINGS)}"
        )
    blocks = _blocks(root)
    if anchor_every is not None and (type(anchor_every) is not int or anchor_every < 1):
        raise GraftError(f"anchor_every is {anchor_every!r}: give a number of blocks, or null for no anchors")
    if anchor_every is None and root.dtype not in EXACT:
        raise GraftError(
            f"a reversible base in {str(root.dtype).removeprefix('torch.')} needs anchors, because rounding errors grow tenfold or more "
            "from block to block: set anchor_every to a number of blocks (base.anchor_every: 3)"
        )
    if COUPLINGS[variant].first == "attention":
        _prove_halves(root, blocks[0], HALVES[_model_type(root)])
    streams = TwoStreams(variant, len(blocks), anchor_every)
    for block in blocks:
        if "stream" in (COUPLINGS[variant].first, COUPLINGS[variant].second):
            block.module.add_module(STREAM, StreamPartner().train(block.module.training))
        block.module.__dict__["graft_model_type"] = _model_type(root)
        put_in_place(block.module, Place(streams, block.number))
        substitute(block.module, CoupledBlock)
    return model


def _model_type(root: nn.Module) -> str:
    return getattr(text_config_of(root), "model_type", None) or type(root).__name__


def _blocks(root: nn.Module) -> list[Block]:
    """Return the blocks of a base that can be made reversible. Raises `GraftError` for any other base."""
    kind = _model_type(root)
    if kind not in HALVES:
        raise GraftError(f"a base of type {kind} cannot be made reversible; these can: {', '.join(HALVES)}")
    if two_streams_of(root) is not None:
        raise GraftError("this base is reversible already: load it again to change its coupling")
    if "graft_state" in root.__dict__:
        raise GraftError("this model has adapters: make the base reversible first, then attach")
    blocks = blocks_of(root)
    if len({block.stack for block in blocks}) != 1 or any("cross" in block.family.sublayers for block in blocks):
        raise GraftError("a base with several stacks of blocks or with cross-attention cannot be made reversible")
    if any(has_hooks(block.module) for block in blocks):
        raise GraftError("a block of this model has hooks (accelerate's offloading, for one): load it without them")
    return blocks


class _Seen(Exception):
    """Ends a trial pass as soon as its first block has been called."""


@torch.no_grad()
def _prove_halves(root: Any, block: Block, halves: Halves) -> None:
    """Raise `GraftError` if a block does not compute one of its halves after the other, as in a release that changed it."""
    if root.device.type == "meta":
        return
    seen: list[Call] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(Call.of(args, kwargs))
        raise _Seen

    handle = block.module.register_forward_pre_hook(look, with_kwargs=True)
    modes = [(module, module.training) for module in root.modules()]
    try:
        root.eval()
        root(input_ids=torch.arange(6, device=root.device).view(2, 3), use_cache=False)
    except _Seen:
        pass
    finally:
        handle.remove()
    try:
        (call,) = seen
        own: Tensor = block.module(*call.args, **call.kwargs)
        given = {
            name: value for name, value in given_to(block.module, call.args, call.kwargs).items() if value is not call.x
        }
        found = halves.mlp(block.module, halves.attention(block.module, call.x, given))
    finally:
        for module, mode in modes:
            module.training = mode
    allowed = 1e-4 if own.dtype in EXACT else 3e-2
    if float((found - own).abs().max()) > allowed * (1.0 + float(own.abs().max())):
        raise GraftError(
            f"{type(block.module).__name__} of the installed transformers does not compute its attention and then its MLP as Graft knows "
            "it, so meft3 cannot split it: use meft1 or meft2"
        )
