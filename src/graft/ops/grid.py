"""The numbers that a quantised layer of bitsandbytes can hold for a given weight, and the layer that holds chosen ones.

bitsandbytes rounds each number to the nearest; here the caller chooses (`rounding.py`), and the layer's files are bitsandbytes' own.

Legend: O output features, I input features, K levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.architectures.four_bit import PACKS
from graft.utils.bits import bitsandbytes

Kind = Literal["nf4", "fp4", "int8"]
BLOCK = 64
"""Neighbouring numbers of a 4-bit weight, row after row, that share a scale."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers levels[code] * scale that each entry of a weight may take."""

    levels: Tensor
    """[K], rising."""
    scales: Tensor
    """[O, I], or [O, 1] where a row has one scale."""
    kind: Kind
    state: Any = None
    """bitsandbytes' own state of a 4-bit weight: scales and table."""

    def dense(self, codes: Tensor) -> Tensor:
        """Return the weight that codes stand for. codes: [O, I] -> [O, I]."""
        return torch.take(self.levels, codes).mul_(self.scales)

    def layer(self, codes: Tensor, bias: Tensor | None, compute: torch.dtype) -> nn.Module:
        """Return the layer of bitsandbytes with exactly these codes [O, I]. compute: the dtype in which it computes."""
        layers: Any = bitsandbytes().nn
        made: Any
        outputs, inputs = codes.shape
        options = {"bias": bias is not None, "device": "meta"}
        if self.kind == "int8":
            from graft.ops.eight_bit import Int8Linear

            made = Int8Linear(inputs, outputs, has_fp16_weights=False, **options)
            made.computes_in = compute
            numbers = (codes - len(self.levels) // 2).to(torch.int8)
            made.weight = layers.Int8Params(numbers, requires_grad=False, has_fp16_weights=False)
            made.weight.SCB, made.weight.CB = (self.scales[:, 0] * 127).float(), None
        else:
            made = layers.Linear4bit(
                inputs,
                outputs,
                compute_dtype=compute,
                compress_statistics=self.state.nested,
                quant_type=self.kind,
                **options,
            )
            made.weight = layers.Params4bit(
                self._packed(codes), requires_grad=False, quant_state=self.state, blocksize=BLOCK,
                compress_statistics=self.state.nested, quant_type=self.kind, bnb_quantized=True, module=made,
            )  # fmt: skip
        made.__dict__[PACKS] = False  # see `architectures/four_bit.py`
        made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return made.requires_grad_(False).eval()

    def _packed(self, codes: Tensor) -> Tensor:
        """Return two codes per byte, the earlier one in the upper half: [(O I + 1) / 2, 1]."""
        own = self.state.code.argsort()[codes].flatten().to(torch.uint8)  # bitsandbytes' table of fp4 does not rise
        own = nn.functional.pad(own, (0, len(own) % 2))
        return (own[0::2] << 4 | own[1::2])[:, None].contiguous()


def grid_of(weight: Tensor, kind: Kind, double_quant: bool) -> Grid:
    """Return the grid that bitsandbytes makes for a weight [O, I] in float32."""
    if kind == "int8":
        scales = weight.abs().amax(1, keepdim=True).float() / 127
        return Grid(torch.arange(-127, 128, dtype=torch.float32, device=weight.device), scales, kind)
    functions: Any = bitsandbytes().functional
    _, state = functions.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type=kind
    )
    return _of_state(state, kind, weight.shape)


def _of_state(state: Any, kind: Kind, shape: torch.Size) -> Grid:
    """Return the grid of a 4-bit state. Which scale an entry has is asked of bitsandbytes, by dequantising a weight of largest numbers.

    On a CPU it is not that of the entry's own block where a row is no multiple of a block, so there bitsandbytes' own weights are off.
    """
    functions: Any = bitsandbytes().functional
    levels, top = state.code.float(), int(state.code.argmax())
    packed = torch.full(((shape.numel() + 1) // 2, 1), top << 4 | top, dtype=torch.uint8, device=levels.device)
    scales = functions.dequantize_4bit(packed, state).float() / levels[top]
    return Grid(levels.sort().values, scales, kind, state)
