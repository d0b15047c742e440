"""What of a base is quantised: how, in how many bits per parameter, and which weights are not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.architectures.eight_bit import is_eight_bit, scales_of
from graft.architectures.four_bit import is_four_bit, quant_state_of
from graft.architectures.layers import is_linear
from graft.architectures.torchao import is_torchao
from graft.architectures.walk import base_modules
from graft.distributed.sharded import own_part
from graft.errors import counted, listed
from graft.injection.state import unwrapped
from graft.ops.packed import packed_weight


@dataclass(frozen=True)
class Quantised:
    """How a base is quantised. `str()` is the line of `graft check`."""

    method: str
    """E.g. nf4 with double quantisation."""
    layers: int
    parameters: int
    """Parameters of the quantised layers' weights."""
    num_bytes: int
    """Bytes of these weights with their scales and tables."""
    compute: str
    """The dtype in which the layers compute."""
    kept: dict[str, int]
    """Matrices that are not quantised, with their parameters. Layers are counted together: model.layers.*.mlp.experts.down_proj."""
    reads: bool
    """Whether Graft can dequantise the weights, as kinds that read them need."""

    @property
    def bits(self) -> float:
        """Bits per parameter of the quantised weights."""
        return 8 * self.num_bytes / self.parameters

    def __str__(self) -> str:
        said = f"{counted(self.layers, 'linear layer')} in {self.method}, {self.bits:.3f} bits per parameter, computing in {self.compute}"
        if not self.reads:
            said += "; Graft cannot dequantise them, so kinds that read the weight do not work here"
        return said

    @property
    def kept_note(self) -> str | None:
        """A sentence that names the matrices that are not quantised, None if there are none."""
        if not self.kept:
            return None
        named = [f"{name} ({counted(count, 'parameter')})" for name, count in self.kept.items()]
        return f"not quantised: {listed(named)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the bits as JSON values."""
        return {**vars(self), "bits_per_parameter": self.bits}


def quantised(model: nn.Module) -> Quantised | None:
    """Return how a base is quantised, None if it is not. The bytes are those that the tensors take, with tables that layers share once."""
    methods: dict[str, int] = defaultdict(int)
    kept: dict[str, int] = defaultdict(int)
    held: dict[int, int] = {}
    parameters, reads, compute = 0, True, "its own dtype"
    seen: set[int] = set()
    for path, module in base_modules(unwrapped(model)):
        method = method_of_layer(module)
        if method is None:
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() > 1 and id(parameter) not in seen:
                    seen.add(id(parameter))
                    kept[re.sub(r"\.\d+(?=\.)", ".*", f"{path}.{name}").removesuffix(".weight")] += parameter.numel()
            continue
        methods[method] += 1
        parameters += size_of(module)
        for each in tensors_of(module):  # of a base in parts, the bytes of all parts
            storage = own_part(each).untyped_storage()
            held[storage.data_ptr()] = storage.nbytes() if own_part(each) is each else each.nbytes
        packed = packed_weight(module)
        reads &= packed is not None
        compute = compute if packed is None else str(packed.dtype).removeprefix("torch.")
    if not methods:
        return None
    return Quantised(
        " and ".join(methods), sum(methods.values()), parameters, sum(held.values()), compute, dict(kept), reads
    )


def method_of_layer(module: nn.Module) -> str | None:
    """Return how a linear layer is quantised, None if it is not."""
    weight: Any = module._parameters.get("weight")
    if is_four_bit(module) and (state := quant_state_of(module)) is not None:
        return f"{state.quant_type}{' with double quantisation' if state.nested else ''}"
    if is_eight_bit(module):
        return "int8"
    if not is_linear(module):
        return None
    if "qweight" in module._buffers:
        return type(module).__name__
    if weight is None:
        return None
    if is_torchao(weight):
        return f"torchao ({type(weight.data).__name__})"
    if weight.dtype.itemsize == 1:
        return str(weight.dtype).removeprefix("torch.")
    return None


def size_of(module: nn.Module) -> int:
    """Return the number of parameters that a quantised layer's weight stands for."""
    layer: Any = module
    return int(layer.in_features) * int(layer.out_features)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield the plain tensors that hold a quantised layer's weight, with scales and tables."""
    layer: Any = module
    if is_four_bit(module):
        state = quant_state_of(module)
        inner = state.state2
        yield from (layer.weight.data, state.absmax, state.code)
        if inner is not None:
            yield from (inner.absmax, inner.code, state.offset)
    elif is_eight_bit(module):
        scales = scales_of(module)
        yield from (layer.weight.data, *(() if scales is None else (scales,)))
    else:
        own = {**module._parameters, **module._buffers}
        for tensor in (each for name, each in own.items() if each is not None and name != "bias"):
            yield from _plain(tensor.data)


def _plain(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in a tensor of a class of its own."""
    if type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__"):
        yield torch.Tensor.as_subclass(tensor, Tensor)
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))
