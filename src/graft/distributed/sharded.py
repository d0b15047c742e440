"""A frozen base whose blocks come together only while they run (FSDP2): `shard` cuts it into parts that the ranks share, `stream` keeps its
blocks in the memory of the host.

    shard     each rank holds a part of every weight of blocks, embedding, head and the rest
    stream    each rank holds all of them, those of blocks in host memory; torch copies the next block while one computes

Adapters are attached afterwards, so they stay outside: whole, on every rank, on the device. A weight that embedding and head share stays
whole too.

    weights in full     in a pass, from a block's call to its end, and again in its backward
    `whole(head)`       around code that reads the head's weight without calling it
    `full(weight)`      for code that reads a frozen weight between passes: all ranks have to read it

Weights that are held in a narrower number format (bfloat16) than the computation's are widened block by block, which gives the same values.
Every rank has to make the same calls of blocks in the same order, forward and backward: see `Passes`.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from graft.architectures.blocks import blocks_of
from graft.architectures.eight_bit import is_eight_bit, keep_scales
from graft.architectures.four_bit import is_four_bit
from graft.architectures.layers import COMPUTES
from graft.errors import counted
from graft.utils.allocator import always_give_back

AT_ONCE = 2
"""Blocks that are on the device at once where they stream: the one that runs, and the next one."""


def shard(
    model: nn.Module, size: int, device: torch.device, dtype: torch.dtype, blocks: Iterable[nn.Module] | None = None
) -> None:
    """Cut a frozen model into parts for so many ranks, in place. They go to a device one after the other; adapters are attached afterwards.

    dtype: of the computation, which blocks may be narrower than. blocks: those of the model, each once it is ready to be cut; all are by
    default.
    """
    root: Any = model
    mesh, own = init_device_mesh(device.type, (size,)), [block.module for block in blocks_of(model)]
    for block in own if blocks is None else blocks:
        _bring_scales(block, device)
        _unit(block, mesh, device, dtype)
    _widen(_outside(root, own), dtype)
    table, head, body = root.get_input_embeddings(), root.get_output_embeddings(), root.base_model
    assert head is not None
    shared = {table.weight} & {head.weight}
    if not shared:
        for module in (table, head):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(body, mesh=mesh, reshard_after_forward=True, ignored_params=shared)
    root.to(device)  # what is in no unit: a shared table, buffers
    # Jobs of unlike depth would gather lower blocks in backward on some ranks only: with this, backward always reaches the first block.
    table.register_forward_hook(_reach_the_table)


def stream(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Keep the blocks of a frozen model in host memory, in place; they come to the device one after the other, and everything else stays
    there. dtype: of the computation. Adapters are attached afterwards."""
    root: Any = model
    mesh, blocks = _mesh_of_one(device), [block.module for block in blocks_of(model)]
    outside = _outside(root, blocks)
    _widen(outside, dtype)
    if device.type == "cpu":
        always_give_back()  # else the allocator keeps what a block leaves
    for block in blocks:
        _bring_scales(block, device)
        _unit(block, mesh, device, dtype, CPUOffloadPolicy() if device.type != "cpu" else OffloadPolicy())
    # The root of the units has no weights of its own: it only lets them share streams.
    fully_shard(root.base_model, mesh=mesh, reshard_after_forward=True, ignored_params=set(outside))
    for each in (*outside, *root.buffers()):
        each.data = each.data.to(device)
    size = [sum(each.numel() * each.element_size() for each in map(own_part, block.parameters())) for block in blocks]
    wide = [sum(each.numel() * getattr(each, COMPUTES)[1].itemsize for each in block.parameters()) for block in blocks]
    model.__dict__[STREAMED] = Streamed(len(blocks), sum(size), AT_ONCE * max(wide))


def _bring_scales(block: nn.Module, device: torch.device) -> None:
    """Bring what layers in few bits hold beside their weights to a device: torch moves weights alone."""
    layer: Any
    for layer in block.modules():
        if is_four_bit(layer):
            layer.weight.quant_state.to(device)
        elif is_eight_bit(layer):
            keep_scales(layer)
            layer.state.SCB = layer.state.SCB.to(device)


STREAMED = "graft_streamed"
"""Attribute of a model whose blocks stream."""


@dataclass(frozen=True)
class Streamed:
    """The memory of a base whose blocks stream."""

    blocks: int
    held: int
    """Bytes of the blocks in host memory."""
    at_once: int
    """Bytes of the blocks that are on the device at once, at most."""

    def __str__(self) -> str:
        held, at_once = f"{self.held / 1e6:,.1f} MB", f"{self.at_once / 1e6:,.1f} MB"
        return f"{counted(self.blocks, 'block')} ({held}) in host memory; {at_once} of them at once where they compute"


def streamed(model: nn.Module) -> Streamed | None:
    """What a base holds whose blocks stream; None for one whose blocks stay where they are."""
    return model.__dict__.get(STREAMED)


def _unit(
    block: nn.Module, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, offload: OffloadPolicy | None = None
) -> None:
    casts = MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    fully_shard(
        block, mesh=mesh, reshard_after_forward=True, mp_policy=casts, offload_policy=offload or OffloadPolicy()
    )
    for weight in block.parameters():
        setattr(weight, COMPUTES, (device, dtype if weight.is_floating_point() else weight.dtype))


def _outside(root: nn.Module, blocks: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters that lie in no block."""
    inside = {id(each) for block in blocks for each in block.parameters()}
    return [each for each in root.parameters() if id(each) not in inside]


def _widen(parameters: list[nn.Parameter], dtype: torch.dtype) -> None:
    for each in parameters:
        if each.is_floating_point():
            each.data = each.data.to(torch.promote_types(each.dtype, dtype))


def _mesh_of_one(device: torch.device) -> DeviceMesh:
    """A mesh of this process alone, for what torch offers to meshes only."""
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return init_device_mesh(device.type, (dist.get_world_size(), 1), mesh_dim_names=("ranks", "own"))["own"]


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
    """A weight in full, as the computation has it: gathered from all ranks where it is in parts."""
    if not isinstance(weight, DTensor):
        return weight
    device, dtype = getattr(weight, COMPUTES, (weight.device, weight.dtype))
    return (weight.to_local() if weight.device_mesh.size() == 1 else weight.full_tensor()).to(device, dtype)


def own_part(weight: Tensor) -> Tensor:
    """What this rank holds of a weight."""
    return weight.to_local() if isinstance(weight, DTensor) else weight
