"""The interface of what generates answers, and Graft's own implementation of it (`vllm` is the other one)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from graft.distributed.group import ALONE, Group
from graft.generation.causal import CacheKind
from graft.generation.generate import generate
from graft.generation.requests import Decoding, Generated, Request
from graft.generation.selfcheck import self_check


class Engine(Protocol):
    """Generates answers with a base and its adapters."""

    @property
    def name(self) -> str:
        """The name that results carry. Answers of different engines are never kept in one folder."""
        ...

    def check(self, requests: Sequence[Request], token_budget: int) -> int:
        """Check that batching does not change answers; return on how many requests (0: this engine cannot check it)."""
        ...

    def answers(
        self, requests: Sequence[Request], decoding: Decoding, token_budget: int
    ) -> Iterator[tuple[int, Generated]]:
        """Yield (number of the request, its answer) in any order."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Graft's own generation. The kind of cache changes the speed but not the answers; `check` covers it. Ranks share the batches."""

    model: nn.Module
    cache: CacheKind = "dynamic"
    name: str = "graft"
    group: Group = ALONE

    def check(self, requests: Sequence[Request], token_budget: int) -> int:
        return self_check(self.model, requests, token_budget=token_budget, cache=self.cache)

    def answers(
        self, requests: Sequence[Request], decoding: Decoding, token_budget: int
    ) -> Iterator[tuple[int, Generated]]:
        return generate(self.model, requests, decoding, token_budget=token_budget, cache=self.cache, group=self.group)
