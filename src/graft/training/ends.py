"""Whether answers end, by letting the model write a few: `graft check` does so before training, at a bounded cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graft.bases import Base
from graft.data.samples import Example
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Request
from graft.training.job import Job

ASKED = 8
"""Most prompts that are answered."""
LEAST, MOST = 8, 64
"""New tokens of each answer, at least and at most; an answer of the data that is longer is left out."""
SECONDS = 20.0
"""About how long it may take."""


def written_ends(base: Base, job: Job, samples: Sequence[Example], pass_seconds: float) -> dict[str, int] | None:
    """Answer a few prompts greedily, and count the answers that end by themselves. Plain text, and `train_on: all`, have no prompts.

    pass_seconds: of a forward pass that is no shorter than that of one new token. Returns the numbers "ended" and "asked", and
    "max_new_tokens", the limit of each; None where it would take too long, or no answer of the data is short enough.
    """
    most = min(MOST, int(SECONDS / max(pass_seconds, 1e-6)))
    if most < LEAST:
        return None
    short = [each for each in samples if len(prompt_of(each)) > 1 and 2 * _written(each) <= most][:ASKED]
    if not short:
        return None
    adapter = job.name if job.trainable.adapter is not None else None
    requests = [Request(prompt_of(example), adapter, job.stop_ids) for example in short]
    found = [answer.reason for _, answer in generate(base.model, requests, Decoding(most))]
    return {"ended": found.count("stopped"), "asked": len(found), "max_new_tokens": most}


def _written(example: Example) -> int:
    """The tokens of the last answer, its end mark included."""
    return len(example.input_ids) - len(prompt_of(example)) if example.answer is None else len(example.answer)


def prompt_of(example: Example) -> tuple[int, ...]:
    """Return the tokens before the last answer; none for a plain text."""
    if example.answer is not None:  # the decoder writes it
        return tuple(example.input_ids.tolist())
    read = np.flatnonzero(~example.supervised)
    return tuple(example.input_ids[: int(read[-1]) + 1].tolist()) if len(read) else ()
