"""How much a trial forgets: its loss on text that has nothing to do with what it learnt, beside the base's."""

from __future__ import annotations

from graft.config.data import SourceConfig
from graft.data.reading import read
from graft.data.samples import Example
from graft.data.tokenizing import tokenize
from graft.errors import GraftError
from graft.generation.loaded import LoadedModel
from graft.generation.loss import sample_losses

LONGEST = 256
"""Tokens of a text that are read."""


def losses_on(loaded: LoadedModel, file: str) -> dict[str, float]:
    """Return the mean loss per token of each candidate on the texts of a file, all tokens counted.

    Raises `GraftError` for a file without texts that are short enough.
    """
    samples = read(SourceConfig(path=file))
    found: dict[str, float] = {}
    for candidate in loaded.candidates:
        made = [
            tokenize(
                sample, loaded.base.tokenizer, candidate.template, max_length=LONGEST, overlong="drop", train_on="all"
            )
            for sample in samples
        ]
        examples = [one for one in made if isinstance(one, Example)]
        targets = sum(example.num_targets for example in examples)
        if not targets:
            raise GraftError(f"{file} holds no text of at most {LONGEST} tokens")
        found[candidate.name] = (
            sum(sample_losses(loaded.base.model, examples, [candidate.adapter] * len(examples))) / targets
        )
    return found
