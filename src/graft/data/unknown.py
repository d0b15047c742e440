"""Answers that the tokenizer cannot write: training on them would teach the model its token for unknown text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graft.data.datasets import TokenDataset
from graft.data.samples import Sample
from graft.errors import GraftError, listed


def refuse_unknown_targets(data: TokenDataset, samples: Sequence[Sample], tokenizer: Any) -> None:
    """Raise `GraftError`, with the share and the first row, if targets are the tokenizer's token for unknown text."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return
    targets = [data.input_ids[data.supervised], data.answers, data.rejected_ids[data.rejected_supervised]]
    count, total = sum(int((part == unknown).sum()) for part in targets), sum(map(len, targets))
    if not count:
        return
    example = next(example for example in data if any(map(_holds(unknown), example.sequences)))
    texts = [m["content"] for sample in samples for m in sample.messages if m["role"] == "assistant"]
    characters = sorted({character for text in texts for character in text if not character.isspace()})
    lost = [c for c in characters if unknown in tokenizer(c, add_special_tokens=False)["input_ids"]]
    raise GraftError(
        f"{count:,} of {total:,} targets ({count / total:.1%}) are {tokenizer.unk_token}: the tokenizer cannot write "
        f"{listed([repr(c) for c in lost]) or 'a part of the answers'}, and the model would learn to write {tokenizer.unk_token} "
        f"(first in {example.source}, row {example.row}). Take such text out of the answers, or use a base whose tokenizer can write it"
    )


def _holds(unknown: int) -> Any:
    return lambda side: (
        bool(np.any(side.input_ids[side.supervised] == unknown))
        or (side.answer is not None and bool(np.any(side.answer == unknown)))
    )
