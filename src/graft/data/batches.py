"""Batches for the model, and the way in which a step is cut into micro-batches.

There are two layouts of the same samples: `flat` lays all tokens end to end in one row (packing without padding), `padded` gives each
sample a row that is padded on the right. In both, `target_index` lists the positions where the model's output predicts a target, so that
the head runs on these only. Padding is identified by its position; its token id means nothing.

The samples [5 6 7 8] and [9 8], with targets 7 8 and 8:

    flat     input_ids [[5 6 7 8 9 8]]               positions [[0 1 2 3 0 1]]              target_index [1 2 4]
    padded   input_ids [[5 6 7 8] [9 8 pad pad]]     positions [[0 1 2 3] [0 1 0 0]]        target_index [1 2 4]

A sample with a class or a value has one target: its row. An answer that a decoder writes is padded apart from the encoder's input.
Both of these come in the padded layout only.

Legend: B samples, L the longest of them, M the longest answer, T tokens in all, N targets.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graft.data.datasets import TokenDataset
from graft.data.samples import Example
from graft.errors import GraftError
from graft.utils.clock import timed

Layout = Literal["flat", "padded"]


@dataclass(frozen=True)
class Twins:
    """Which targets of a batch are the same target in a first and in a second pass of a sample, by their numbers."""

    first: Tensor
    """[P]"""
    again: Tensor
    """[P]: in the same order."""
    others: Tensor
    """[N - 2P]: targets of samples with one pass."""
    smoothing: Tensor
    """[P]: the share of each target that is spread over the vocabulary, or over all classes."""

    def to(self, device: torch.device | str) -> Twins:
        """Return them on another device."""
        return Twins(*(getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)))

    def among(self, numbers: Tensor, targets: int) -> Twins | None:
        """Return those among some of the batch's targets, counted there; None if there are none. Both passes of a sample are among them."""
        place = torch.full((targets,), -1, device=numbers.device)
        place[numbers] = torch.arange(len(numbers), device=numbers.device)
        first, again, others = (place[each] for each in (self.first, self.again, self.others))
        chosen = first >= 0
        return (
            Twins(first[chosen], again[chosen], others[others >= 0], self.smoothing[chosen]) if chosen.any() else None
        )


@dataclass(frozen=True)
class Batch:
    """Samples as tensors."""

    layout: Layout
    input_ids: Tensor
    """[1, T] flat, [B, L] padded; long."""
    position_ids: Tensor
    """Shaped like input_ids: the position within each sample, 0 at padding."""
    attention_mask: Tensor | None
    """[B, L]: 1 at tokens and 0 at padding; None if flat."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    target_index: Tensor
    """[N] long: the positions at which the output predicts a target, on the row-major token axis (of the decoder if there is one); for
    classes and values, the rows."""
    target_ids: Tensor
    """[N]: the targets; long, or float64 for values."""
    samples: tuple[int, ...]
    """Index of each sample in its data set."""
    token_type_ids: Tensor | None = None
    """[B, L]: the text of a pair that each token belongs to (0 or 1), 0 at padding."""
    answer_ids: Tensor | None = None
    """[B, M]: the answers that the decoder learns to write."""
    answer_mask: Tensor | None = None
    """[B, M]: 1 at tokens of the answer, 0 at padding."""
    twins: Twins | None = None
    """The targets that two passes predict, if the batch has any."""

    @property
    def num_targets(self) -> int:
        """The number of targets."""
        return len(self.target_ids)

    @timed("batches")
    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved, twins=None if self.twins is None else self.twins.to(device))


def flat(examples: Sequence[Example], samples: Sequence[int]) -> Batch:
    """Lay all samples end to end in one row; positions start again at 0 in each sample."""
    if any(example.label is not None or example.answer is not None for example in examples):
        raise GraftError(
            "samples with labels or with answers for a decoder need the padded layout: use train.layout auto or padded, not flat"
        )
    lengths = tuple(len(example) for example in examples)
    starts = np.cumsum([0, *lengths[:-1]])
    input_ids = np.concatenate([example.input_ids for example in examples])[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    return _batch("flat", examples, samples, input_ids, positions, None, starts)


def padded(examples: Sequence[Example], samples: Sequence[int], pad_id: int) -> Batch:
    """Give each sample a row, padded on the right with `pad_id` (any token id will do)."""
    input_ids, mask = _rows([example.input_ids for example in examples], pad_id)
    longest = input_ids.shape[1]
    batch = _batch(
        "padded", examples, samples, input_ids, np.arange(longest) * mask, mask, np.arange(len(examples)) * longest
    )
    if any(example.token_types is not None for example in examples):
        batch = replace(
            batch, token_type_ids=_long(_rows([example.token_types_or_zeros for example in examples], 0)[0])
        )
    labels = [example.label for example in examples if example.label is not None]
    if labels:
        return replace(batch, target_index=torch.arange(len(labels)), target_ids=torch.from_numpy(np.array(labels)))
    answers = [example.answer for example in examples if example.answer is not None]
    return _with_answers(batch, answers, pad_id) if answers else batch


def _with_answers(batch: Batch, answers: Sequence[np.ndarray], pad_id: int) -> Batch:
    """Add the decoder's side. At each position of the answer, the target of the decoder's output is the token of that position.

    So targets are not shifted here, unlike those of a causal model: the decoder's inputs are the answers shifted to the right.
    """
    ids, mask = _rows(answers, pad_id)
    return replace(
        batch,
        target_index=_long(np.flatnonzero(mask)),
        target_ids=_long(np.concatenate(answers)),
        answer_ids=_long(ids),
        answer_mask=_long(mask),
    )


def _rows(arrays: Sequence[np.ndarray], fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack arrays as rows, filled up on the right, and return them with a mask that is 1 at the arrays' own entries."""
    rows = np.full((len(arrays), max(map(len, arrays))), fill)
    mask = np.zeros_like(rows)
    for row, array in enumerate(arrays):
        rows[row, : len(array)] = array
        mask[row, : len(array)] = 1
    return rows, mask


def _batch(
    layout: Layout,
    examples: Sequence[Example],
    samples: Sequence[int],
    input_ids: np.ndarray,
    positions: np.ndarray,
    mask: np.ndarray | None,
    starts: np.ndarray,
) -> Batch:
    """Build a batch from its input tensors. `starts` says where each sample begins on the row-major token axis.

    The output at a token predicts the next token, so a target at position p of a sample belongs to the output at p - 1.
    """
    targets = [np.flatnonzero(example.supervised) for example in examples]
    index = np.concatenate([start + at - 1 for start, at in zip(starts, targets, strict=True)])
    ids = np.concatenate([example.input_ids[at] for example, at in zip(examples, targets, strict=True)])
    return Batch(
        layout=layout,
        input_ids=_long(input_ids),
        position_ids=_long(positions),
        attention_mask=None if mask is None else _long(mask),
        lengths=tuple(len(example.input_ids) for example in examples),
        target_index=_long(index),
        target_ids=_long(ids),
        samples=tuple(int(sample) for sample in samples),
    )


def _long(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))


def samples_of_step(dataset: TokenDataset, order: np.ndarray, batch_size: int, step: int) -> list[int]:
    """Return the samples of one step, longest first, from the order of the epoch.

    They depend only on the arguments, so a position (epoch, step) is all that a resumed run needs.
    """
    chosen = order[step * batch_size : (step + 1) * batch_size]
    return chosen[np.lexsort((chosen, -dataset.lengths[chosen]))].tolist()


def steps_per_epoch(dataset: TokenDataset, batch_size: int) -> int:
    """Return the number of optimiser steps per epoch, which is the same for all epochs."""
    return math.ceil(len(dataset.epoch_order(0, 0)) / batch_size)


def micro_batches(
    lengths: np.ndarray,
    indices: np.ndarray | Sequence[int],
    token_budget: int,
    layout: Layout = "flat",
    classes: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Cut samples into groups of at most `token_budget` tokens, longest first, so that too large a batch fails at once.

    The flat layout counts tokens, the padded one counts padding too. A sample longer than the budget gets a group of its own.

    lengths: [N]; or [N, 2] if each sample has two parts that are padded apart (encoder input and decoder answer); or [N, S, 2] if a
    sample consists of up to S sequences that stay together (zeros if it has fewer), like the two sides of a pair.
    classes: of each sample; a group holds samples of one class. None: they are all of one.

    Example: lengths 9 5 4 2 with a budget of 9 give [9] [5 4] [2] flat, and [9] [5] [4 2] padded, since 5 and 4 would cost 2 x 5.
    """
    if classes is not None and len({classes[index] for index in indices}) > 1:
        by_class: dict[Hashable, list[int]] = {}
        for index in indices:
            by_class.setdefault(classes[index], []).append(int(index))
        return [group for own in by_class.values() for group in micro_batches(lengths, own, token_budget, layout)]
    parts = lengths[:, None, None] if lengths.ndim == 1 else lengths[:, None] if lengths.ndim == 2 else lengths
    # [N] tokens; [N, 2] the longest sequence of a sample, part by part; [N] the rows that it takes in the padded layout.
    totals, widths, rows = parts.sum((1, 2)), parts.max(1), (parts.sum(2) > 0).sum(1).clip(min=1)
    groups: list[list[int]] = []
    # Of the group that is being filled: its longest parts, its number of rows, its cost so far.
    longest, count, used = np.zeros(widths.shape[1], np.int64), 0, 0
    for index in sorted(map(int, indices), key=lambda index: (-int(totals[index]), index)):
        wider, more = np.maximum(longest, widths[index]), count + int(rows[index])
        cost = used + int(totals[index]) if layout == "flat" else more * int(wider.sum())
        if groups and cost <= token_budget:
            groups[-1].append(index)
            longest, count, used = wider, more, cost
        else:
            groups.append([index])
            longest, count, used = widths[index], int(rows[index]), int(totals[index])
    return groups
