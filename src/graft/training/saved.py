"""What a forward pass keeps for its backward pass, counted tensor by tensor, block by block, on any device.

Counted are the storages that autograd saves, each once, without the weights. A pass over one sample tells the bytes per token, from which
those of any batch follow: with torch's own attention, as good as everything that is kept grows with the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from graft.architectures.blocks import blocks_of
from graft.config.activations import Way
from graft.distributed.sharded import own_part
from graft.training.batching import Batcher, num_tokens
from graft.training.forward.causal import Forward
from graft.training.rows import Row

OUTSIDE = -1
"""The number that stands for what is in no block: embedding, last norm, head and loss."""


@dataclass(frozen=True)
class Saved:
    """Bytes per token that a pass keeps."""

    blocks: tuple[float, ...]
    """Of each block that could recompute."""
    inputs: tuple[float, ...]
    """The input of each of these blocks."""
    outside: float

    def under(self, way: Way) -> float:
        """The bytes per token at the fullest moment of a step, if all blocks did this with them: a block that runs again, or whose
        activations come back, has them whole."""
        if way == "keep" or not self.blocks:
            return self.outside + sum(self.blocks)
        held = sum(self.inputs) if way == "recompute" else 0.0
        return self.outside + held + max(self.blocks)


def saved(forward: Forward, rows: Sequence[Row], batcher: Batcher) -> Saved:
    """Run these rows forward, with gradients, and count what is kept; nothing is left of the pass."""
    found: Counter[int] = Counter()
    inputs: Counter[int] = Counter()
    with counting(forward.root, found, inputs), torch.enable_grad():
        forward.losses(*batcher.inputs(rows, forward.device))
    tokens = num_tokens(rows)
    blocks = sorted(inputs)
    return Saved(
        tuple(found[number] / tokens for number in blocks),
        tuple(inputs[number] / tokens for number in blocks),
        found[OUTSIDE] / tokens,
    )


@contextmanager
def counting(root: nn.Module, found: Counter[int], inputs: Counter[int]) -> Iterator[None]:
    """Count the bytes that autograd saves in a block of code, and those of the blocks' inputs, by number of the block in the model."""
    known = {own_part(each).untyped_storage().data_ptr() for each in (*root.parameters(), *root.buffers())}
    inside = [OUTSIDE]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())  # it lives as long as the graph, so no other tensor comes to lie there
            found[inside[-1]] += storage.nbytes()
        return tensor

    def enter(number: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inside.append(number)
            hidden = next((each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)), None)
            inputs[number] = 0 if hidden is None else hidden.nbytes

        return hook

    def leave(*given: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for number, block in enumerate(blocks_of(root)):
            for handle in (
                block.module.register_forward_pre_hook(enter(number), with_kwargs=True),
                block.module.register_forward_hook(leave),
            ):
                stack.callback(handle.remove)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
