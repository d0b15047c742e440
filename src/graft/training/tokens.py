"""Samples that never were files: tokens with a target of their own at each of them, and numbers for the loss.

A target need not be the next token of the input, and a token may have several of them (K, for distillation). The output at a token
predicts its targets:

    ids              [5 6 7]
    target_tokens    [6 7 9]    or, with K = 2,    [[6 8] [7 3] [9 1]]
    weights          [0 1 1]    shaped like target_tokens, as every other field

Legend: T tokens of a sample, K targets of a token, C cells: the targets of some samples one behind the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from graft.data.batches import Batch
from graft.data.samples import Example
from graft.errors import GraftError
from graft.training.objectives.token_losses import token_loss


@dataclass(frozen=True, eq=False)
class TokenSample:
    """One sequence with its targets."""

    ids: Sequence[int]
    """[T]"""
    fields: Mapping[str, Tensor]
    """`target_tokens`, integers [T] or [T, K], and what the loss reads, floats of the same shape."""

    @property
    def targets(self) -> Tensor:
        """The targets, [T] or [T, K]."""
        return self.fields["target_tokens"]

    @property
    def cells(self) -> int:
        """The number of targets."""
        return self.targets.numel()


@dataclass(frozen=True, eq=False)
class Ask:
    """What one tenant wants from a pass: the loss of some samples."""

    tenant: str
    samples: Sequence[TokenSample]
    loss: str = "cross_entropy"
    settings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Given:
    """What a pass gave."""

    logprobs: list[Tensor]
    """The log-probability of each target, shaped like the targets of each sample, in float32 or wider, on the CPU."""
    loss: float
    """The sum over all targets."""


def check_ask(ask: Ask, vocabulary: int, longest: int | None) -> None:
    """Raise `GraftError`, which names the sample, for what no pass could compute.

    vocabulary: number of tokens that the head knows. longest: tokens that a sequence may have; None is no limit.
    """
    loss = token_loss(ask.loss)
    loss.settled(ask.loss, ask.settings)
    if not ask.samples:
        raise GraftError("there are no samples")
    for number, sample in enumerate(ask.samples):
        try:
            loss.check(ask.loss, sample.fields)
            _check(sample, vocabulary, longest)
        except GraftError as error:
            raise GraftError(f"sample {number}: {error}") from error


def _check(sample: TokenSample, vocabulary: int, longest: int | None) -> None:
    length, targets = len(sample.ids), sample.targets
    if not length:
        raise GraftError("it has no tokens")
    if longest is not None and length > longest:
        raise GraftError(f"it has {length} tokens, and the model takes at most {longest}")
    if targets.dim() not in (1, 2) or len(targets) != length or not targets.numel():
        raise GraftError(
            f"target_tokens is {list(targets.shape)}, and has to be [{length}] or [{length}, K] as there are tokens"
        )
    for name, values in (("ids", torch.as_tensor(sample.ids)), ("target_tokens", targets)):
        if values.is_floating_point() or int(values.min()) < 0 or int(values.max()) >= vocabulary:
            raise GraftError(f"{name} has to hold token ids from 0 to {vocabulary - 1}")
    for name, values in sample.fields.items():
        if values.shape != targets.shape:
            raise GraftError(f"{name} is {list(values.shape)}, and has to be {list(targets.shape)} like target_tokens")
        if not bool(torch.isfinite(values).all()):
            raise GraftError(f"{name} holds a number that is not finite")


def example_of(sample: TokenSample, tenant: str, number: int) -> Example:
    """Return a sample as the batches of training take it. Its targets come with `with_targets`."""
    ids = np.asarray(sample.ids, np.int32)
    return Example(ids, np.zeros(len(ids), np.bool_), tenant, number)


def with_targets(batch: Batch, samples: Sequence[TokenSample]) -> Batch:
    """Return a batch of these samples with their targets."""
    flat, width = batch.layout == "flat", batch.input_ids.shape[1]
    index: list[Tensor] = []
    start = 0
    for sample in samples:
        places = torch.arange(start, start + len(sample.ids))
        index.append(places.repeat_interleave(sample.cells // len(sample.ids)))
        start += len(sample.ids) if flat else width
    targets = torch.cat([sample.targets.flatten() for sample in samples]).long()
    return replace(batch, target_index=torch.cat(index), target_ids=targets)


def loss_of(ask: Ask, samples: Sequence[TokenSample], logprob_C: Tensor) -> Tensor:
    """Return what some samples of an ask add to its loss."""
    loss, like = token_loss(ask.loss), logprob_C
    fields = {name: [sample.fields[name].flatten() for sample in samples] for name in loss.fields}
    for name, missing in loss.optional.items():
        given = [sample.fields.get(name, torch.full((sample.cells,), missing)) for sample in samples]
        fields[name] = [each.flatten() for each in given]
    number_C = torch.arange(len(samples)).repeat_interleave(torch.tensor([sample.cells for sample in samples]))
    cells = {name: torch.cat(values).to(like) for name, values in fields.items()}
    return loss.sum(logprob_C, cells, loss.settled(ask.loss, ask.settings), number_C.to(like.device))
