"""The memory of a base: its parameters, its bytes by number format, and what is free on its device."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from graft.architectures.eight_bit import is_eight_bit
from graft.architectures.four_bit import is_four_bit, parameters_in
from graft.architectures.walk import base_modules
from graft.bases.quantised import tensors_of
from graft.distributed.sharded import own_part
from graft.injection.state import unwrapped


@dataclass(frozen=True)
class MemoryReport:
    """The parameters and bytes of a base, without its adapters. A tied weight counts once."""

    parameters: int
    num_bytes: int
    by_dtype: dict[str, int]
    """Bytes by number format."""
    tied: tuple[tuple[str, ...], ...]
    """The names that share a weight, for each such weight."""
    device: str
    device_free: int | None
    """Bytes free on the base's GPU, None on other devices."""


def memory_report(model: nn.Module) -> MemoryReport:
    """Count a model's parameters and bytes. The bytes include buffers, and the scales and tables of quantised weights."""
    root = unwrapped(model)
    names: dict[int, list[str]] = defaultdict(list)
    held: dict[int, torch.Tensor] = {}
    named = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if "graft" not in name.split("."):
            names[id(tensor)].append(name)
            held[id(tensor)] = own_part(tensor)
    by_dtype: dict[str, int] = defaultdict(int)
    beside = {
        tensor.untyped_storage().data_ptr(): tensor
        for _, module in base_modules(root)
        if is_four_bit(module) or is_eight_bit(module)
        for tensor in map(own_part, tensors_of(module))
    }
    own = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
    for tensor in (*held.values(), *(each for key, each in beside.items() if key not in own)):
        by_dtype[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    device = next((tensor.device for tensor in held.values()), torch.device("cpu"))
    return MemoryReport(
        parameters=sum(parameters_in(tensor) for tensor in held.values() if isinstance(tensor, nn.Parameter)),
        num_bytes=sum(by_dtype.values()),
        by_dtype=dict(by_dtype),
        tied=tuple(tuple(each) for each in names.values() if len(each) > 1),
        device=str(device),
        device_free=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
    )
