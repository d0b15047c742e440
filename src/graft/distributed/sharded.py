"""A frozen base cut into parts that the ranks share (FSDP2): each rank holds a part of every weight, and the whole of one block at a time.

Blocks, embedding, head and the rest of the body are units of their own. Adapters are attached afterwards, so they stay outside: whole,
on every rank. A weight that embedding and head share stays whole too.

    weights in full     in a pass, from a block's call to its end, and again in its backward
    `whole(head)`       around code that reads the head's weight without calling it
    `full(weight)`      for code that reads a frozen weight between passes: all ranks have to read it

Every rank has to make the same calls of blocks in the same order, forward and backward: see `Passes`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from graft.architectures.blocks import blocks_of


def shard(model: nn.Module, size: int, device: torch.device) -> None:
    """Cut a frozen model into parts for so many ranks, in place, which go to a device one after the other. Adapters are attached
    afterwards."""
    root: Any = model
    mesh = init_device_mesh(device.type, (size,))
    table, head, body = root.get_input_embeddings(), root.get_output_embeddings(), root.base_model
    assert head is not None
    shared = {table.weight} & {head.weight}
    for block in blocks_of(model):
        fully_shard(block.module, mesh=mesh, reshard_after_forward=True)
    if not shared:
        for module in (table, head):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(body, mesh=mesh, reshard_after_forward=True, ignored_params=shared)
    root.to(device)  # what is in no unit: a shared table, buffers
    # Jobs of unlike depth would gather lower blocks in backward on some ranks only: with this, backward always reaches the first block.
    table.register_forward_hook(_reach_the_table)


def _reach_the_table(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Have the weights of a module in full for a block of code, where it is cut into parts."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def full(weight: Tensor) -> Tensor:
    """A weight in full: gathered from all ranks where it is in parts."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def own_part(weight: Tensor) -> Tensor:
    """What this rank holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def class_without_parts(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was cut into parts, under Graft's own."""
    cls: type[nn.Module] = getattr(type(module), "graft_base", type(module))
    return (
        next(each for each in cls.__mro__ if not issubclass(each, FSDPModule)) if issubclass(cls, FSDPModule) else cls
    )
