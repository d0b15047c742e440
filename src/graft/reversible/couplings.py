"""The three couplings of MEFT: how a block turns two streams into two others, and which functions it does that with.

    y1 = lambda x1 + F(x2)          x2 = (y2 - G(y1)) / beta
    y2 = beta x2 + G(y1)            x1 = (y1 - F(x2)) / lambda

The first block gets x1 = x2 = the embedded tokens, and (x1 + x2) / 2 after the last one goes on to the model's last norm or head. Where the
coupling swaps, the next block gets (x1, x2) = (y2, y1).

    meft1    F is the block, G the adapter at `stream`
    meft2    F is the adapter at `stream`, G the block
    meft3    F is the block's attention with its residual, G its MLP with its residual

With adapters near zero and a small factor before the main stream, that stream is nearly the base's own.

Liao, Tan and Monz 2023, "Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning" (arXiv 2306.00477).

Legend: [..., D] hidden features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from graft.architectures.two_streams import Variant

Part = Literal["block", "stream", "attention", "mlp"]
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Coupling:
    """One coupling: its factors, its two functions, and whether it swaps the streams."""

    lam: float
    beta: float
    first: Part
    """What F is."""
    second: Part
    """What G is."""
    swaps: bool

    def out(self, y1: Tensor, y2: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next block's (x1, x2), or for these its (y1, y2): a swap is its own inverse."""
        return (y2, y1) if self.swaps else (y1, y2)


COUPLINGS: Mapping[Variant, Coupling] = {
    "meft1": Coupling(0.1, 1.0, "block", "stream", swaps=True),
    "meft2": Coupling(1.0, 0.1, "stream", "block", swaps=True),
    "meft3": Coupling(0.1, 0.1, "attention", "mlp", swaps=False),
}


def add(x: Tensor, factor: float, output: Tensor | None) -> Tensor:
    """Return factor x + output, without the output if it is None."""
    scaled = x if factor == 1.0 else factor * x
    return scaled if output is None else scaled + output


def take(y: Tensor, factor: float, output: Tensor | None) -> Tensor:
    """Return (y - output) / factor: the inverse of `add`."""
    rest = y if output is None else y - output
    return rest if factor == 1.0 else rest / factor
