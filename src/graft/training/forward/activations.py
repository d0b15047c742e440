"""What becomes of the activations that the backward pass needs (`train.activations`).

    keep         they stay on the device until backward has used them
    recompute    a block keeps its input alone, and runs again in backward (non-reentrant gradient checkpointing)
    offload      they move to the host's memory, pinned, and come back in backward (torch's `save_on_cpu`, block by block)

transformers lets a block (`GradientCheckpointingLayer`) in training mode run through a function of ours. Training mode would also turn on
dropout that the block itself applies, so that function runs the block in the mode that the base has.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from graft.architectures.blocks import Block, blocks_of, layers_in
from graft.architectures.transformers_internals import clear_checkpointing, is_checkpointed_layer, set_checkpointing
from graft.architectures.walk import base_modules
from graft.config.activations import Activations, Way
from graft.errors import GraftError
from graft.injection.state import unwrapped


@contextmanager
def holding(model: nn.Module, activations: Activations, base_dropout: bool = False) -> Iterator[None]:
    """Let blocks recompute or offload their activations for a block of code. `set_training` comes after it.

    Raises `GraftError` for a model without such blocks, and for layers that it has not or that are in two ranges.
    """
    ways = {"recompute": _recomputed, "offload": _offloaded}
    layers = [(layer, ways[way]) for layer, way in ways_of(unwrapped(model), activations) if way != "keep"]
    for layer, function in layers:
        set_checkpointing(layer, function(layer, base_dropout))
    try:
        yield
    finally:
        for layer, _ in layers:
            layer.training = False
            clear_checkpointing(layer)


def refuse_nothing_to_gain(activations: Activations, device: torch.device) -> None:
    """Raise `GraftError` where activations would be offloaded to the memory that they are in already."""
    ways = {activations} if isinstance(activations, str) else set(activations.values())
    if "offload" in ways and device.type != "cuda":
        raise GraftError(
            f"train.activations: offload moves activations from a GPU to the host's memory, but this base is on {device}, where there is "
            "nothing to gain: set keep or recompute"
        )


def ways_of(root: nn.Module, activations: Activations) -> list[tuple[nn.Module, Way]]:
    """Return the blocks that can recompute, each with what `train.activations` says of it. Raises `GraftError` as `holding` does."""
    if activations == "keep":
        return []
    layers = [(path, layer) for path, layer in base_modules(root) if is_checkpointed_layer(layer)]
    if not layers:
        raise GraftError(
            f"{type(root).__name__} has no blocks that can be recomputed or offloaded: set train.activations to keep"
        )
    if isinstance(activations, str):
        return [(layer, activations) for _, layer in layers]
    blocks = blocks_of(root)
    chosen = _by_block(blocks, activations)
    return [
        (layer, chosen[block.path])
        for path, layer in layers
        for block in blocks
        if block.path in chosen and f"{path}.".startswith(f"{block.path}.")
    ]


def _by_block(blocks: list[Block], spans: dict[str, Way]) -> dict[str, Way]:
    """The way of each block that a range names, by the block's path."""
    depths, chosen = Counter(block.stack for block in blocks), {}
    for span, way in spans.items():
        for block in blocks:
            name = f"train.activations: {span}"
            if block.number not in layers_in(span, depths[block.stack], max(depths.values()), name):
                continue
            if block.path in chosen:
                raise GraftError(f"train.activations: layer {block.number} is in more than one range: name it once")
            chosen[block.path] = way
    return chosen


def _in_own_mode(layer: nn.Module, base_dropout: bool, function: Callable[..., Any], *inputs: Any) -> Any:
    """Run a block's function with the block in the base's own mode."""
    before, layer.training = layer.training, base_dropout
    try:
        return function(*inputs)
    finally:
        layer.training = before


def _recomputed(layer: nn.Module, base_dropout: bool) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        own = functools.partial(_in_own_mode, layer, base_dropout, function)
        return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=base_dropout)

    return run


def _offloaded(layer: nn.Module, base_dropout: bool) -> Callable[..., Any]:
    # What backward needs of the weights stays where it is. An address that is out of date moves a tensor too many or too few, no more.
    weights = frozenset(each.untyped_storage().data_ptr() for each in (*layer.parameters(), *layer.buffers()))

    def run(function: Callable[..., Any], *args: Any) -> Any:
        with _Offload(weights):
            return _in_own_mode(layer, base_dropout, function, *args)

    return run


class _Offload(save_on_cpu):
    """torch's `save_on_cpu` for all tensors but those in these storages."""

    def __init__(self, stay: frozenset[int]) -> None:
        super().__init__(pin_memory=True)
        pack, unpack = self.pack_hook, self.unpack_hook
        self.pack_hook = lambda tensor: tensor if tensor.untyped_storage().data_ptr() in stay else pack(tensor)
        self.unpack_hook = lambda packed: packed if isinstance(packed, Tensor) else unpack(packed)
