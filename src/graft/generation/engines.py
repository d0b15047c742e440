"""What makes the answers of an evaluation: Graft's own generation, or another program with the same base and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from graft.generation.generate import generate
from graft.generation.requests import Decoding, Generated, Request
from graft.generation.rows import CacheKind
from graft.generation.selfcheck import self_check


class Engine(Protocol):
    """Answers requests for the base and the adapters of a bench."""

    @property
    def name(self) -> str:
        """As results say it. Answers of different engines do not share a folder."""
        ...

    def check(self, requests: Sequence[Request], token_budget: int) -> int:
        """On how many requests it was proved that batches change nothing; 0 where nothing is proved."""
        ...

    def answers(
        self, requests: Sequence[Request], decoding: Decoding, token_budget: int
    ) -> Iterator[tuple[int, Generated]]:
        """(number of the request, its answer), in any order."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Graft's own generation. The cache changes the speed and not the answers, which the check proves too."""

    model: nn.Module
    cache: CacheKind = "dynamic"
    name: str = "graft"

    def check(self, requests: Sequence[Request], token_budget: int) -> int:
        return self_check(self.model, requests, token_budget=token_budget, cache=self.cache)

    def answers(
        self, requests: Sequence[Request], decoding: Decoding, token_budget: int
    ) -> Iterator[tuple[int, Generated]]:
        return generate(self.model, requests, decoding, token_budget=token_budget, cache=self.cache)
