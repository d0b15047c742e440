"""Tokenised data in memory: all tokens end to end in one array, with the start of each sample."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graft.data.samples import Example


@dataclass(eq=False)
class TokenDataset:
    """Examples by index.

    N samples, T tokens read in all, M tokens that a decoder writes, R tokens of sequences with rejected answers. An array that no
    sample needs has length 0.
    """

    input_ids: NDArray[np.int32]
    """[T]"""
    supervised: NDArray[np.bool_]
    """[T]"""
    starts: NDArray[np.int64]
    """[N + 1]: sample i is input_ids[starts[i]:starts[i + 1]]."""
    weights: NDArray[np.float64]
    """[N]: how often each sample is seen per epoch."""
    rows: NDArray[np.int64]
    """[N]: row in the source, counted from 1."""
    source: NDArray[np.int64]
    """[N]: index into `sources`."""
    cut: NDArray[np.int64]
    """[N]: tokens of the prompt that were removed to make the sample fit."""
    sources: tuple[str, ...]
    """Files and hub names."""
    labels: NDArray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N]: the class (int64) or value (float64) of each sample."""
    answers: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """[M]: the answers that a decoder learns to write."""
    answer_starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N + 1]: like `starts`, for `answers`."""
    token_types: NDArray[np.int8] = field(default_factory=lambda: np.zeros(0, np.int8))
    """[T]: the text of a pair that each token belongs to (0 or 1)."""
    rejected_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """[R]: the sequences with the rejected answers."""
    rejected_supervised: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[R]"""
    rejected_starts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[N + 1]: like `starts`, for `rejected_ids`."""
    desirable: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[N]: whether each answer is marked as good; the rejected sequences are then the mismatched ones."""
    logprobs: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """[S]: of answers that a model drew, the log-probabilities of their supervised tokens when they were drawn."""
    advantages: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """[S]"""

    @classmethod
    def of(cls, examples: Sequence[Example], weights: Sequence[float] | None = None) -> TokenDataset:
        """Lay examples end to end. `weights` has one entry per example (default: 1 each)."""
        sources = tuple(dict.fromkeys(example.source for example in examples))
        at = {name: index for index, name in enumerate(sources)}
        none: list[NDArray] = [np.zeros(0)]  # np.concatenate refuses an empty list
        answers = [e.answer for e in examples if e.answer is not None]
        typed = any(e.token_types is not None for e in examples)
        rejected = [e.rejected for e in examples if e.rejected is not None]
        return cls(
            input_ids=np.concatenate([e.input_ids for e in examples] or none).astype(np.int32),
            supervised=np.concatenate([e.supervised for e in examples] or none).astype(np.bool_),
            starts=np.cumsum([0, *(len(e.input_ids) for e in examples)], dtype=np.int64),
            weights=np.ones(len(examples)) if weights is None else np.array(weights, dtype=np.float64),
            rows=np.array([e.row for e in examples], dtype=np.int64),
            source=np.array([at[e.source] for e in examples], dtype=np.int64),
            cut=np.array([e.cut for e in examples], dtype=np.int64),
            sources=sources,
            labels=np.array([e.label for e in examples if e.label is not None] or np.zeros(0, np.int64)),
            answers=np.concatenate(answers or none).astype(np.int32),
            answer_starts=np.cumsum([0, *map(len, answers)] if answers else [], dtype=np.int64),
            token_types=np.concatenate([e.token_types_or_zeros for e in examples] if typed else none).astype(np.int8),
            rejected_ids=np.concatenate([e.input_ids for e in rejected] or none).astype(np.int32),
            rejected_supervised=np.concatenate([e.supervised for e in rejected] or none).astype(np.bool_),
            rejected_starts=np.cumsum([0, *map(len, rejected)] if rejected else [], dtype=np.int64),
            desirable=np.array([e.desirable for e in examples if e.desirable is not None], dtype=np.bool_),
            logprobs=np.concatenate([e.logprobs for e in examples if e.logprobs is not None] or none).astype(
                np.float32
            ),
            advantages=np.concatenate([e.advantages for e in examples if e.advantages is not None] or none).astype(
                np.float32
            ),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        start, stop = self.starts[index], self.starts[index + 1]
        name = self.sources[self.source[index]]
        cut = int(self.cut[index])
        example = Example(self.input_ids[start:stop], self.supervised[start:stop], name, int(self.rows[index]), cut)
        if len(self.labels):
            example.label = self.labels[index].item()
        if len(self.answer_starts):
            example.answer = self.answers[self.answer_starts[index] : self.answer_starts[index + 1]]
        if len(self.token_types):
            example.token_types = self.token_types[start:stop]
        if self.has_pairs:
            side = slice(self.rejected_starts[index], self.rejected_starts[index + 1])
            ids, supervised = self.rejected_ids[side], self.rejected_supervised[side]
            example.rejected = Example(ids, supervised, name, example.row, cut)
        if self.has_marks:
            example.desirable = bool(self.desirable[index])
        if self.has_rollouts:
            own = slice(self._target_starts[index], self._target_starts[index + 1])
            example.logprobs, example.advantages = self.logprobs[own], self.advantages[own]
        return example

    @property
    def largest_id(self) -> int:
        """The largest token id that the model reads or learns to write; -1 if there is none."""
        return int(max(part.max(initial=-1) for part in (self.input_ids, self.answers, self.rejected_ids)))

    @property
    def ids_written(self) -> set[int]:
        """The token ids that are targets on a preferred side."""
        return set(np.unique(self.input_ids[self.supervised]).tolist()) | set(np.unique(self.answers).tolist())

    @property
    def has_pairs(self) -> bool:
        """Whether each sample has two sequences: a preferred and a rejected answer, or an answer that is marked and a mismatched one."""
        return len(self.rejected_starts) > 0

    @property
    def has_marks(self) -> bool:
        """Whether the samples are answers that are marked good or bad one by one."""
        return len(self.desirable) > 0

    @property
    def has_rollouts(self) -> bool:
        """Whether the samples are answers that a model drew."""
        return len(self.logprobs) > 0

    @cached_property
    def _target_starts(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(_sums(self.supervised, self.starts))])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[N]: tokens of each sample, including its decoder's answer or its rejected sequence."""
        return self.widths.sum(1)

    @cached_property
    def widths(self) -> NDArray[np.int64]:
        """[N, 2]: tokens read and tokens that a decoder writes; for a pair, the tokens of its two sequences."""
        second = next((starts for starts in (self.answer_starts, self.rejected_starts) if len(starts)), None)
        return np.stack([np.diff(self.starts), np.zeros(len(self), np.int64) if second is None else np.diff(second)], 1)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """[N]: the number of targets of each sample."""
        if len(self.labels):
            return np.ones(len(self), np.int64)
        if len(self.answer_starts):
            return np.diff(self.answer_starts)
        own = _sums(self.supervised, self.starts)
        pairs = self.has_pairs and not self.has_marks
        return own + _sums(self.rejected_supervised, self.rejected_starts) if pairs else own

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that is trained on: tokens, masks, sample borders, weights, labels and answers."""
        always = (self.input_ids, self.supervised, self.starts, self.weights)
        if_used = (
            *(self.labels, self.answers, self.answer_starts, self.token_types),
            *(self.rejected_ids, self.rejected_supervised, self.rejected_starts, self.desirable),
            *(self.logprobs, self.advantages),
        )
        digest = hashlib.sha256()
        for array in (*always, *(array for array in if_used if len(array))):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def epoch_order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the shuffled sample indices of one epoch; equal for equal seed and epoch.

        A sample of weight 1 appears once and a sample of weight 2 twice. Of the samples of weight 0.5, each epoch takes another half,
        so that two epochs see each of them once. All epochs have the same length.
        """
        chosen: list[NDArray[np.int64]] = []
        for weight in np.unique(self.weights):
            members = np.flatnonzero(self.weights == weight)
            chosen.append(np.tile(members, int(weight)))
            # The fraction: a window over one fixed permutation of the members, which each epoch moves on by its own length.
            # With 4 members of weight 0.5 it covers positions 0 1, then 2 3, then 0 1 again.
            width = round(len(members) * (float(weight) - int(weight)))
            window = np.arange(epoch * width, (epoch + 1) * width) % len(members)
            chosen.append(np.random.default_rng(seed).permutation(members)[window])
        return (
            np.random.default_rng((seed, epoch)).permutation(np.concatenate(chosen))
            if chosen
            else np.zeros(0, np.int64)
        )


def _sums(marks: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count the marks that are set between each start and the next."""
    return np.diff(np.concatenate([[0], np.cumsum(marks)])[starts]).astype(np.int64)
