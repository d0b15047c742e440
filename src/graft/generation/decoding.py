"""The decoding settings, in a file without torch, because evaluation protocols use them without a model."""

from __future__ import annotations

from dataclasses import dataclass

from graft.errors import GraftError


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: greedily by default, by beam search with several beams, by sampling with a temperature."""

    max_new_tokens: int = 256
    beams: int = 1
    """1 is greedy decoding or sampling; more is deterministic beam search."""
    temperature: float = 0.0
    """0 is greedy; above 0 tokens are sampled."""
    top_p: float = 1.0
    """Sampling keeps only the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling. Each request has its own generator, so other requests in the batch do not change its answer."""

    def __post_init__(self) -> None:
        problems = {
            "max_new_tokens must be at least 1": self.max_new_tokens < 1,
            "beams must be at least 1": self.beams < 1,
            "temperature must not be negative": self.temperature < 0,
            "top_p must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "beam search does not sample: set temperature to 0, or beams to 1": self.beams > 1 and self.temperature > 0,
        }
        for problem, found in problems.items():
            if found:
                raise GraftError(f"{problem} (given: {self})")
