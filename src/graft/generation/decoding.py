"""How tokens are chosen. A file of its own, since protocols say it and need no model."""

from __future__ import annotations

from dataclasses import dataclass

from graft.errors import GraftError


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. The default is greedy; several beams are deterministic beam search; a temperature samples."""

    max_new_tokens: int = 256
    beams: int = 1
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Sampling keeps the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of sampling; each request draws from its own generator, so its company changes nothing."""

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
