"""The prompts that were read last, so that the same prompt of the same adapter is not read again.

A prompt is found by its adapter and all of its tokens. A part of a prompt is not reused: what some kinds do to a token depends on the
tokens after it (ReFT's suffix, gates that read whole sequences).

Legend: V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from graft.generation.causal import CausalBatch
from graft.generation.sampling import PromptScores


@dataclass(frozen=True)
class Prefix:
    """A prompt that was read."""

    batch: CausalBatch
    """One row, with its keys and values. Rows are taken with `part`, which leaves it as it is."""
    logits_1V: Tensor
    """Of the first new token."""
    scores: PromptScores | None


class PrefixCache:
    """Keeps prompts up to a number of tokens; those that were not used for the longest time go first.

    An adapter is known by the digest of what it is (`AdapterDigests`): under another name it finds its prompts, and one whose weights
    changed finds none.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.held, self.hits = tokens, 0, 0
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], Prefix] = OrderedDict()

    def find(self, digest: str, ids: tuple[int, ...]) -> Prefix | None:
        """Return a prompt of an adapter that is kept, None if it is not."""
        found = self._kept.get((digest, ids))
        if found is not None:
            self._kept.move_to_end((digest, ids))
            self.hits += 1
        return found

    def keep(self, digest: str, ids: tuple[int, ...], prefix: Prefix) -> None:
        """Keep a prompt, if it is not longer than all that may be kept."""
        if len(ids) > self.tokens:
            return
        if self._kept.pop((digest, ids), None) is None:
            self.held += len(ids)
        self._kept[digest, ids] = prefix
        while self.held > self.tokens:
            (_, oldest), _ = self._kept.popitem(last=False)
            self.held -= len(oldest)
